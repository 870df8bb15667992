"""Parameters of stacked layers, which are scanned or in the stages of a pipeline, from those of single ones, and back.

Functions take and return arrays by path, as in "decoder/layers_0/mlp/wo/kernel". A path may have more in front of it,
as the moments of an optimizer have. What is not a part of the decoder's layers is passed on. Shapes:
`connections.layout`.
"""

from collections.abc import Iterator, Mapping
import math
import re

from maxtext.configs.pyconfig import HyperParameters
import numpy as np

from maxtext_mudd import connections
from maxtext_mudd.blocks import ffn_widths, stacks
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.config.changed import changed
from maxtext_mudd.connections import layout
from maxtext_mudd.connections.base import Plan

_CONNECTION = "connection/"
_OTHER_STATE = "nnx_aux/"  # what the paths of state begin with that is not of parameters, in a train state


def with_stages(config: HyperParameters, stages: int, *, scans: bool) -> HyperParameters:
  """The configuration with its layers in so many stages of a pipeline, whatever the devices of this host; 1: without a
  pipeline.

  Args:
    scans: whether the layers of a stage are scanned.
  """
  length = config.num_decoder_layers // stages
  return changed(
    config,
    ici_pipeline_parallelism=stages,
    dcn_pipeline_parallelism=1,
    using_pipeline_parallelism=stages > 1,
    num_layers_per_pipeline_stage=length,
    num_pipeline_repeats=1,
    pipeline_parallel_layers=config.num_decoder_layers,
    num_pipeline_microbatches=stages,
    scan_layers_per_stage=scans,
  )


def of_shapes(config: HyperParameters, shapes: Mapping[str, tuple[int, ...]]) -> HyperParameters:
  """The configuration in the layout in which parameters, or a train state, of its model were saved.

  Args:
    shapes: by path.
  """
  paths = {name: name.split("/") for name in shapes}
  of_stages = [name for name, path in paths.items() if stacks.is_of_stages(path) and shapes[name]]
  if of_stages:
    scans = any("/scanned_layers/" in name for name in of_stages)
    return with_stages(config, shapes[of_stages[0]][0], scans=scans)
  config = with_stages(config, 1, scans=False)
  return changed(config, scan_layers=any(map(stacks.is_stacked, paths.values())))


def convert(values: Mapping[str, np.ndarray], config: HyperParameters) -> dict[str, np.ndarray]:
  """Values in the layout of a configuration, from values in the layout in which they were saved.

  Raises:
    KeyError, ValueError: as `stack` and `unstack` do.
  """
  saved = of_shapes(config, {path: x.shape for path, x in values.items()})
  if stacks.are_stacked(saved):
    values = unstack(values, saved)
  return stack(values, config) if stacks.are_stacked(config) else dict(values)


def stack(values: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
  """For the layout of a configuration whose layers are stacked, from values for single layers.

  Raises:
    KeyError: a layer lacks a parameter that others have.
    ValueError: the configuration has fewer layers, or stacks parameters that differ in shape.
  """
  return dict(stacking(values, config))


def stacking(values: Mapping[str, np.ndarray], config) -> Iterator[tuple[str, np.ndarray]]:
  """`stack`, one parameter at a time: looks each value up once, when it is needed."""
  plan, singles = connections.plan(config), stacks.single_layers(config)
  family = connections.family(config)  # the decoder has what starts and finishes, where layers are scanned
  layers = {}
  for path in values:
    match = re.fullmatch(rf"(|.*/)decoder/({stacks.SINGLE_LAYER})/(.+)", path)
    if not match:
      yield path, values[path]
      continue
    root, block, name = match[1] + "decoder/", singles.get(match[2]), match[3]
    if block is None:
      raise ValueError(f"it has {path}, of more layers than {plan.num_blocks}")
    if _module(name) in {*family.start_modules, *family.finish_modules}:
      yield root + name, values[path]
    else:
      layers.setdefault((root, _scanned_name(name, config, plan, block)), {})[block] = path
  for (root, name), by_block in layers.items():
    for stack in stacks.of_config(config):
      if any(block in by_block for block in stack.blocks):
        yield root + "/".join((*stack.path, name)), _stacked(values, by_block, stack, root, name, config)


def _stacked(values, paths: Mapping[int, str], stack: stacks.Stack, root: str, name: str, config) -> np.ndarray:
  """One parameter of the blocks of a stack, zero where a block has none."""
  blocks = stack.blocks
  table = layout.table(connections.plan(config), blocks, padded=True)
  path = tuple(name.split("/"))
  exists = layout.existing_entries(config, table, path)
  by_block = None
  for k, block in enumerate(blocks):
    if block not in paths:
      if exists is None or exists[k].any():
        raise KeyError(f"{root}layers_{block - 1}/{name}")
      continue
    value = layout.pad(config, path, values[paths[block]], table.sites[k], table.padded)
    if by_block is None:
      by_block = np.zeros((len(blocks), *value.shape), value.dtype)
    if value.shape != by_block.shape[1:]:
      shapes = f"{list(by_block.shape[1:])} and {list(value.shape)}"
      raise ValueError(
        f"{name} is {shapes} in blocks that mudd_ffn_groups={len(ffn_widths.groups(config))} scans together"
      )
    by_block[k] = value
  is_parameter = not root.startswith(_OTHER_STATE)
  return np.ascontiguousarray(layout.of_stack(config, stack, by_block, is_parameter=is_parameter))


def unstack(values: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
  """For single layers, from values for the layout of a configuration whose layers are stacked; views where possible.

  Raises:
    ValueError: the configuration has another number of layers, or values would be lost that are not padding.
  """
  plan = connections.plan(config)
  names = {block: name for name, block in stacks.single_layers(config).items()}
  singles = {}
  for path, value in values.items():
    end = re.fullmatch(rf"(|.*/)decoder/({_CONNECTION}.+)", path)
    match = re.fullmatch(r"(|.*/)decoder/(.+)", path)
    if end:
      block = 1 if _module(end[2]) in connections.family(config).start_modules else plan.num_blocks
      singles[f"{end[1]}decoder/{names[block]}/{end[2]}"] = value
    elif not match or (stack := stacks.of_path(config, match[2].split("/"))) is None:
      if match and stacks.is_stacked(match[2].split("/")):
        raise ValueError(f"{path} is of layers that this model does not have")
      singles[path] = value
    else:
      is_parameter = not match[1].startswith(_OTHER_STATE)
      blocks, full_name = stack.blocks, match[2].removeprefix("/".join(stack.path) + "/")
      sizes = layout.stacked_sizes(config, stack, value.shape, is_parameter=is_parameter)
      if sizes != stack.sizes:
        raise ValueError(f"{path} is of {math.prod(sizes)} layers, not {len(blocks)}")
      by_block = layout.by_block(config, stack, value, is_parameter=is_parameter)
      table = layout.table(plan, blocks, padded=True)
      name = tuple(full_name.split("/"))
      exists = layout.existing_entries(config, table, name)
      for k, block in enumerate(blocks):
        if exists is not None and np.any(np.where(_like(exists[k], by_block[k]), 0, by_block[k])):
          raise ValueError(f"{path} has values for block {block} that this model does not have")
        if exists is None or exists[k].any():
          single_name = _single_name(full_name, config, plan, block)
          single = layout.trim(config, name, by_block[k], table.sites[k], table.padded)
          singles[f"{match[1]}decoder/{names[block]}/{single_name}"] = single
  return singles


def _module(name: str) -> str | None:
  """The attribute of the connection that a parameter of a layer belongs to; None: it belongs to the stock layer."""
  return name.split("/")[1] if name.startswith(_CONNECTION) else None


def _like(mask: np.ndarray, value: np.ndarray) -> np.ndarray:
  """A mask of the first axes as one that broadcasts with `value`."""
  return mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))


def _scanned_name(name: str, config, plan: Plan, block: int) -> str:
  """In a stack where some blocks have LN_q, LN_k and LN_v, LN_q stands for the one norm of a block that has not."""
  norm = f"{block_spec(config).attention_norm}/"
  group = next(stack.blocks for stack in stacks.of_config(config) if block in stack.blocks)
  if name.startswith(norm) and any(map(plan.has_separate_norms, group)) and not plan.has_separate_norms(block):
    return f"{norm}q/{name.removeprefix(norm)}"
  return name


def _single_name(name: str, config, plan: Plan, block: int) -> str:
  norm = f"{block_spec(config).attention_norm}/q/"
  if name.startswith(norm) and not plan.has_separate_norms(block):
    return name.replace("/q/", "/", 1)
  return name
