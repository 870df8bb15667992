"""Where the decoder has its layers: the attribute of each single layer, and the stacks of scanned ones. Pure Python."""

from collections.abc import Sequence
import dataclasses
import itertools
import re

from maxtext_mudd import blocks as decoder_blocks
from maxtext_mudd.blocks import Cycle, ffn_widths

_INNER = "local_layers"  # a stack within each cycle
_REMAINDER = "layers_remainder"
_STAGES = ("pipeline_module", "layers")
SINGLE_LAYER = r"[a-z_]*layers_\d+(?:/half_\d+)?"  # the path from the decoder to a single layer, of whatever model
_ATTRIBUTES = {_REMAINDER, _STAGES[0]}.union(  # of decoders with stacked layers
  *({*spec.layers, *([spec.cycle.name] if spec.cycle else [])} for spec in decoder_blocks.BLOCKS.values())
)


@dataclasses.dataclass(frozen=True)
class Stack:
  """Scanned layers whose parameters are stacked, each in one array.

  Attributes:
    path: attributes that lead from the decoder to the stack.
    blocks: numbers of the blocks, rising, in the order of the arrays.
    sizes: of the axes along which parameters are stacked: one axis or, where a stack lies within each scanned cycle or
      each stage of a pipeline, two, that of cycles or stages first. No axis for a layer that is not stacked, before the
      first cycle or after the last.
    of_stages: whether the first of these axes is that of the stages of a pipeline. It is axis 0 of every array.
  """

  path: tuple[str, ...]
  blocks: tuple[int, ...]
  sizes: tuple[int, ...]
  of_stages: bool = False

  @property
  def inner_length(self) -> int | None:
    """The length of the scan within each cycle; None: there is none."""
    return self.sizes[-1] if self.path[-1] == _INNER else None


def num_stages(config) -> int:
  """S, the number of stages of a pipeline; 1 without one."""
  return config.ici_pipeline_parallelism * config.dcn_pipeline_parallelism


def are_stacked(config) -> bool:
  """Whether parameters of several layers are one array: of scanned layers, or of the stages of a pipeline."""
  return config.scan_layers or num_stages(config) > 1


def arrays_per_stage(config) -> int:
  """How many arrays the parameters of one name are in, in the stages of a pipeline."""
  return 1 if config.scan_layers_per_stage else config.num_layers_per_pipeline_stage


def describe(config) -> str:
  """How a model has its layers, in words."""
  stages = num_stages(config)
  if stages > 1:
    inner = "scanned" if config.scan_layers_per_stage and config.num_decoder_layers > stages else "single"
    return f"{inner} layers in {stages} stages of a pipeline"
  return f"{'scanned' if config.scan_layers else 'single'} layers"


def of_config(config) -> tuple[Stack, ...]:
  """The stacks of a model whose layers are stacked, in the order in which MaxText first runs them.

  MaxText scans single layers or, where layers differ, cycles of them. Then the first layers of all cycles are one
  stack, the second ones another, and so on; or those before the last are a stack in each cycle. Layers that differ in
  their FFN widths are scanned in groups. Of a pipeline, the first layers of all stages are one stack, the second ones
  another, unless the layers of a stage are scanned.
  """
  if num_stages(config) > 1:
    return _of_stages(config)
  cycle = decoder_blocks.spec(config).cycle
  groups = ffn_widths.groups(config)
  if cycle is None and len(groups) > 1:
    return tuple(_stack(("layers", f"group_{k}"), blocks) for k, blocks in enumerate(groups))
  if cycle is None:
    return tuple(_stack((name,), blocks) for name, blocks in _sections(config) if blocks)
  length = cycle.length or config.inhomogeneous_layer_cycle_interval
  first = getattr(config, cycle.singles_first) if cycle.singles_first else 0
  singles = [Stack((f"layers_{k}",), (k + 1,), ()) for k in range(first)]
  number, rest = divmod(decoder_blocks.num_blocks(config) - first, length)
  end = first + number * length
  whole = _cycles(cycle, cycle.name, range(first + 1, end + 1, length), length, (number,)) if number else []
  remainder = _cycles(cycle, _REMAINDER, range(end + 1, end + 2), rest, ()) if rest else []
  return (*singles, *whole, *remainder)


def index(blocks: Sequence[int], number):
  """Where the block with a number, an integer or an array, stands among the blocks of a stack."""
  step = blocks[1] - blocks[0] if len(blocks) > 1 else 1
  if blocks[-1] - blocks[0] == step * (len(blocks) - 1):
    return (number - blocks[0]) // step
  return sum(number > block for block in blocks)


def of_path(config, path: Sequence[str]) -> Stack | None:
  """The stack that a parameter's path leads through; None for what is of no stack."""
  matches = [stack for stack in of_config(config) if _leads_through(path, stack.path)]
  # A layer of a cycle may have the name of a single one, whose path is shorter.
  return max(matches, key=lambda stack: len(stack.path), default=None)


def is_of_stages(path: Sequence[str]) -> bool:
  """Whether a parameter's path leads through the stages of a pipeline."""
  return _leads_through(path, _STAGES)


def _leads_through(path: Sequence[str], stack: tuple[str, ...]) -> bool:
  return stack[0] in path and tuple(path[path.index(stack[0]) :][: len(stack)]) == stack


def is_stacked(path: Sequence[str]) -> bool:
  """Whether a parameter's path leads through a stack of layers, of whatever model."""
  return not _ATTRIBUTES.isdisjoint(path)


def single_layers(config) -> dict[str, int]:
  """By the path from the decoder to a single layer, as "layers_0" or "layers_0/half_0", the number of its block."""
  layers = [f"{name}_{index}" for name, numbers in _sections(config) for index, _ in enumerate(numbers)]
  row = decoder_blocks.spec(config)
  if row.sides:
    layers = [f"{layer}/{row.cycle.member}_{k}" for layer in layers for k, _ in enumerate(row.sides)]
  return {path: block for block, path in enumerate(layers, 1)}


def block_of_single(config, path: Sequence[str]) -> int | None:
  """The number of the block of a single layer that a path leads through; None for what is of no single layer."""
  singles = single_layers(config)
  names = (*path, *map("/".join, itertools.pairwise(path)))
  return next((singles[name] for name in names if name in singles), None)


def path_from_plain(config, path: str) -> str:
  """The path in a model with connections of a parameter that has this path in MaxText's plain model."""
  row = decoder_blocks.spec(config)
  for k, side in enumerate(row.sides):
    path = re.sub(rf"(decoder/layers(?:_\d+)?)/(\w+)_{side}/", rf"\1/{row.cycle.member}_{k}/\2/", path)
  return path


def _of_stages(config) -> tuple[Stack, ...]:
  number, blocks = num_stages(config), tuple(range(1, config.num_decoder_layers + 1))
  length = len(blocks) // number
  if length == 1:
    return (Stack(_STAGES, blocks, (number,), of_stages=True),)
  if arrays_per_stage(config) == 1:
    return (Stack((*_STAGES, "scanned_layers"), blocks, (number, length), of_stages=True),)
  return tuple(Stack((*_STAGES, f"layers_{k}"), blocks[k::length], (number,), of_stages=True) for k in range(length))


def _sections(config) -> list[tuple[str, range]]:
  """What the attributes of MaxText's layers begin with, and the numbers of these layers, from 1."""
  names, end = decoder_blocks.spec(config).layers, config.num_decoder_layers + 1
  if len(names) == 1:
    return [(names[0], range(1, end))]
  first = config.first_num_dense_layers + 1
  return [(names[0], range(1, first)), (names[1], range(first, end))]


def _stack(path: tuple[str, ...], blocks: Sequence[int]) -> Stack:
  return Stack(path, tuple(blocks), (len(blocks),))


def _cycles(cycle: Cycle, name: str, firsts: Sequence[int], length: int, sizes: tuple[int, ...]) -> list[Stack]:
  """The stacks of cycles of so many layers.

  Args:
    firsts: the first block of each cycle.
    sizes: of the axes along which the cycles are stacked.
  """
  if cycle.member is not None:
    return [Stack((name, f"{cycle.member}_{k}"), tuple(first + k for first in firsts), sizes) for k in range(length)]
  has_last = bool(sizes)  # what follows the last whole cycle is the beginning of one
  inner, found = length - has_last, []
  if inner:
    blocks = tuple(first + k for first in firsts for k in range(inner))
    found.append(Stack((name, _INNER), blocks, (*sizes, inner)))
  if has_last:
    found.append(Stack((name, "global_layer"), tuple(first + inner for first in firsts), sizes))
  return found
