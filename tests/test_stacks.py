"""Which blocks the stacks of scanned layers hold, and layouts of what is stacked; nothing is compiled."""

import numpy as np

from maxtext_mudd.blocks import stacks
from maxtext_mudd.checkpoints import layout
from tests.blocks import config_of


def of_config(block, **keys):
  config = config_of(block, scan_layers=True, **keys)
  return {"/".join(stack.path): (stack.blocks, stack.sizes) for stack in stacks.of_config(config)}


def test_cycles_of_members_and_what_is_left():
  assert of_config("gpt_oss") == {"layers/layers_0": ((1, 3), (2,)), "layers/layers_1": ((2, 4), (2,))}
  found = of_config("gemma3")
  assert found["layers/layers_5"] == ((6,), (1,))
  assert found["layers_remainder/layers_0"] == ((7,), ())
  assert found["layers_remainder/layers_1"] == ((8,), ())
  assert len(found) == 8


def test_stacks_within_cycles():
  assert of_config("gemma4") == {
    "scanned_blocks/local_layers": ((1, 2, 3, 4, 5, 7, 8, 9, 10, 11), (2, 5)),
    "scanned_blocks/global_layer": ((6, 12), (2,)),
    "layers_remainder/local_layers": ((13, 14), (2,)),
  }
  assert of_config("gemma4", base_num_decoder_layers=3) == {"layers_remainder/local_layers": ((1, 2, 3), (3,))}


def test_dense_layers_then_experts():
  assert of_config("deepseek") == {"dense_layers": ((1, 2), (2,)), "moe_layers": ((3, 4), (2,))}
  assert of_config("deepseek", first_num_dense_layers=0) == {"moe_layers": ((1, 2, 3, 4), (4,))}


def test_layers_that_are_two_blocks():
  assert of_config("gemma2") == {"layers/half_0": ((1, 3), (2,)), "layers/half_1": ((2, 4), (2,))}
  config = config_of("gemma2")
  paths = ["layers_0/half_0", "layers_0/half_1", "layers_1/half_0", "layers_1/half_1"]
  assert stacks.single_layers(config) == {path: block for block, path in enumerate(paths, 1)}
  path = ("decoder", "layers_1", "half_0", "connection", "depth_aggregate", "a")
  assert stacks.block_of_single(config, path) == 3
  assert stacks.block_of_single(config, ("decoder", "layers_9")) is None


def test_single_layers_then_cycles():
  assert of_config("deepseek4") == {
    "layers_0": ((1,), ()),
    "layers_1": ((2,), ()),
    "scanned_blocks/layers_0": ((3,), (1,)),
    "scanned_blocks/layers_1": ((4,), (1,)),
  }
  config = config_of("deepseek4", scan_layers=True)
  assert stacks.of_path(config, ("decoder", "layers_1", "mlp")).blocks == (2,)
  assert stacks.of_path(config, ("decoder", "scanned_blocks", "layers_1", "mlp")).blocks == (4,)


def test_place_of_a_block_in_a_stack():
  blocks = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)
  assert [stacks.index(blocks, block) for block in blocks] == list(range(10))
  np.testing.assert_array_equal(stacks.index((2, 5, 8), np.array([2, 5, 8])), [0, 1, 2])


def test_state_that_is_no_parameter():
  """The biases of routers are stacked along their first axis; four of them by four experts show a transposition."""
  config = config_of("deepseek", mudd=True, scan_layers=True, base_num_decoder_layers=6)
  name = "DeepSeekMoeBlock_0/MoeBlock_0/gate/bias"
  singles = {f"nnx_aux/model/decoder/moe_layers_{k}/{name}": np.arange(4) + 10 * k for k in range(4)}
  stacked = layout.stack(singles, config)
  assert list(stacked) == [f"nnx_aux/model/decoder/moe_layers/{name}"]
  np.testing.assert_array_equal(*stacked.values(), np.arange(4) + 10 * np.arange(4)[:, None])
  back = layout.unstack(stacked, config)
  assert back.keys() == singles.keys()
  for path, bias in singles.items():
    np.testing.assert_array_equal(back[path], bias)
