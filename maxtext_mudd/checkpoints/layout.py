"""Parameters of scanned layers from those of single ones, and back.

Both take and return arrays by path, as in "decoder/layers_0/mlp/wo/kernel". A path may have more in front of it, as the
moments of an optimizer have. What is not a part of the decoder's layers is passed on. Shapes: `connections.layout`.
"""

from collections.abc import Iterator, Mapping
import re

import numpy as np

from maxtext_mudd import connections
from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.connections import layout
from maxtext_mudd.connections.base import Plan

_CONNECTION = "connection/"


def stack(values: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
  """For `scan_layers: true`, from values for `scan_layers: false`.

  Raises:
    KeyError: a layer lacks a parameter that others have.
    ValueError: the configuration has fewer layers, or stacks parameters that differ in shape.
  """
  return dict(stacking(values, config))


def stacking(values: Mapping[str, np.ndarray], config) -> Iterator[tuple[str, np.ndarray]]:
  """`stack`, one parameter at a time: looks each value up once, when it is needed."""
  plan, groups = connections.plan(config), ffn_widths.groups(config)
  family = connections.family(config)  # the decoder has what starts and finishes, where layers are scanned
  layers = {}
  for path in values:
    match = re.fullmatch(r"(|.*/)decoder/layers_(\d+)/(.+)", path)
    if not match:
      yield path, values[path]
      continue
    root, block, name = match[1] + "decoder/", int(match[2]) + 1, match[3]
    if block > plan.num_blocks:
      raise ValueError(f"it has {path}, of more layers than {plan.num_blocks}")
    if _module(name) in {*family.start_modules, *family.finish_modules}:
      yield root + name, values[path]
    else:
      layers.setdefault((root, _scanned_name(name, config, plan, block)), {})[block] = path
  for (root, name), by_block in layers.items():
    for number, blocks in enumerate(groups):
      if any(block in by_block for block in blocks):
        folder = "layers/" if len(groups) == 1 else f"layers/group_{number}/"
        yield root + folder + name, _stacked(values, by_block, blocks, root, name, config)


def _stacked(values, paths: Mapping[int, str], blocks: range, root: str, name: str, config) -> np.ndarray:
  """One parameter of a group of blocks, zero where a block has none."""
  table = layout.table(connections.plan(config), blocks, padded=True)
  path = tuple(name.split("/"))
  exists = layout.existing_entries(config, table, path)
  stacked = by_block = None
  for k, block in enumerate(blocks):
    if block not in paths:
      if exists is None or exists[k].any():
        raise KeyError(f"{root}layers_{block - 1}/{name}")
      continue
    value = layout.pad(config, path, values[paths[block]], table.sites[k], table.padded)
    if stacked is None:
      axis = min(config.param_scan_axis, value.ndim)
      stacked = np.zeros((*value.shape[:axis], len(blocks), *value.shape[axis:]), value.dtype)
      by_block = np.moveaxis(stacked, axis, 0)
    if value.shape != by_block.shape[1:]:
      shapes = f"{list(by_block.shape[1:])} and {list(value.shape)}"
      raise ValueError(
        f"{name} is {shapes} in blocks that mudd_ffn_groups={len(ffn_widths.groups(config))} scans together"
      )
    by_block[k] = value
  return stacked


def unstack(values: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
  """For `scan_layers: false`, from values for `scan_layers: true`; views where possible.

  Raises:
    ValueError: the configuration has another number of layers, or values would be lost that are not padding.
  """
  plan = connections.plan(config)
  singles = {}
  for path, value in values.items():
    end = re.fullmatch(rf"(|.*/)decoder/({_CONNECTION}.+)", path)
    match = re.fullmatch(r"(|.*/)decoder/layers/(?:group_(\d+)/)?(.+)", path)
    if end:
      layer = 0 if _module(end[2]) in connections.family(config).start_modules else plan.num_blocks - 1
      singles[f"{end[1]}decoder/layers_{layer}/{end[2]}"] = value
    elif not match:
      singles[path] = value
    else:
      blocks = ffn_widths.groups(config)[int(match[2] or 0)]
      by_block = np.moveaxis(value, min(config.param_scan_axis, value.ndim - 1), 0)
      if len(by_block) != len(blocks):
        raise ValueError(f"{path} is of {len(by_block)} layers, not {len(blocks)}")
      table = layout.table(plan, blocks, padded=True)
      name = tuple(match[3].split("/"))
      exists = layout.existing_entries(config, table, name)
      for k, block in enumerate(blocks):
        if exists is not None and np.any(np.where(_like(exists[k], by_block[k]), 0, by_block[k])):
          raise ValueError(f"{path} has values for block {block} that this model does not have")
        if exists is None or exists[k].any():
          single_name = _single_name(match[3], config, plan, block)
          single = layout.trim(config, name, by_block[k], table.sites[k], table.padded)
          singles[f"{match[1]}decoder/layers_{block - 1}/{single_name}"] = single
  return singles


def _module(name: str) -> str | None:
  """The attribute of the connection that a parameter of a layer belongs to; None: it belongs to the stock layer."""
  return name.split("/")[1] if name.startswith(_CONNECTION) else None


def _like(mask: np.ndarray, value: np.ndarray) -> np.ndarray:
  """A mask of the first axes as one that broadcasts with `value`."""
  return mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))


def _scanned_name(name: str, config, plan: Plan, block: int) -> str:
  """In a stack where some blocks have LN_q, LN_k and LN_v, LN_q stands for the one norm of a block that has not."""
  norm = block_spec(config).attention_norm + "/"
  group = next(blocks for blocks in ffn_widths.groups(config) if block in blocks)
  if name.startswith(norm) and any(map(plan.has_separate_norms, group)) and not plan.has_separate_norms(block):
    return f"{norm}q/{name.removeprefix(norm)}"
  return name


def _single_name(name: str, config, plan: Plan, block: int) -> str:
  norm = block_spec(config).attention_norm + "/q/"
  if name.startswith(norm) and not plan.has_separate_norms(block):
    return name.replace("/q/", "/", 1)
  return name
