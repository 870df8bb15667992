"""Tables of placements, and what they say, written out by hand: in most of them each DA differs from the others, and
in one DAs share weight MLPs."""

BLOCKS = 6
IRREGULAR = [
  {"block": 1, "sources": "all", "streams": "x"},
  {"block": 2, "sources": [0, "last:1"], "streams": "k"},
  {"block": 4, "sources": ["every:2", 1], "streams": "rv", "hidden": 5},
  {"block": "L-1", "sources": "last:3", "streams": "qkvr"},
  {"block": "L", "sources": [0, "L-3", "last:1"], "streams": "r"},
]
# Sources and streams by DA.
IRREGULAR_DAS = {
  1: ((0, 1), "x"),
  2: ((0, 2), "k"),
  4: ((0, 1, 2, 4), "vr"),
  5: ((3, 4, 5), "qkvr"),
  6: ((0, 3, 6), "r"),
}

# Two weight MLPs that DAs share, one of them before and after the last block.
SHARED = [
  {"block": 1, "sources": "all", "streams": "qkvr"},
  {"block": [2, "L-2"], "sources": [0, "last:2"], "streams": "vr", "mlp": "middle"},
  {"block": "L-1", "sources": [1, "last:1"], "streams": "r", "hidden": 5, "mlp": "end"},
  {"block": "L", "sources": [0, "last:1"], "streams": "r", "hidden": 5, "mlp": "end"},
]
SHARED_DAS = {
  1: ((0, 1), "qkvr"),
  2: ((0, 1, 2), "vr"),
  4: ((0, 3, 4), "vr"),
  5: ((1, 5), "r"),
  6: ((0, 6), "r"),
}
SHARING = ((2, 4), (5, 6))
OF_EXTRA = [  # for four blocks and three extra embeddings
  {"block": 1, "sources": "all", "streams": "x"},
  {"block": 2, "sources": [-2, "last:2"], "streams": "vr"},
  {"block": "L", "sources": ["-3..-1 step 2", "every:1"], "streams": "r"},
]
OF_EXTRA_DAS = {1: ((-3, -2, -1, 0, 1), "x"), 2: ((-2, 1, 2), "vr"), 4: ((-3, -1, 0, 1, 2, 3, 4), "r")}
