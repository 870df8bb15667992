"""A table of placements in which each DA differs from the others, and what it says, written out by hand."""

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
