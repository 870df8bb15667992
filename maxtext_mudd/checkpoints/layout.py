"""Parameters of scanned layers from those of single ones, and back.

Both take and return arrays by path, as in "decoder/layers_0/mlp/wo/kernel". A path may have more in front of it, as the
moments of an optimizer have; what is not a part of the decoder's layers is passed on. Shapes: `connections.scanned`.
"""

from collections.abc import Iterator, Mapping
import re

import numpy as np

from maxtext_mudd.blocks import spec as block_spec
from maxtext_mudd.connections import scan as scanned
from maxtext_mudd.connections.mudd import topology
from maxtext_mudd.connections.mudd.topology import Aggregate, Topology

_EMBEDDING_NORM = "connection/embedding_norm/"
_FINAL = "connection/final_depth_aggregate/"
_OWN = "connection/depth_aggregate/"


def stack(values: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
  """For `scan_layers: true`, from values for `scan_layers: false`.

  Raises:
    KeyError: a layer lacks a parameter that others have.
    ValueError: the configuration has fewer layers, or stacks parameters that differ in shape.
  """
  return dict(stacking(values, config))


def stacking(values: Mapping[str, np.ndarray], config) -> Iterator[tuple[str, np.ndarray]]:
  """`stack`, one parameter at a time: looks each value up once, when it is wanted."""
  own = topology.from_config(config)
  layers = {}
  for path in values:
    found = re.fullmatch(r"(|.*/)decoder/layers_(\d+)/(.+)", path)
    if not found:
      yield path, values[path]
      continue
    root, block, name = found[1] + "decoder/", int(found[2]) + 1, found[3]
    if block > own.num_blocks:
      raise ValueError(f"it has {path}, of more layers than {own.num_blocks}")
    if name.startswith((_EMBEDDING_NORM, _FINAL)):
      yield root + name, values[path]
    else:
      layers.setdefault((root, _scanned_name(name, config, own, block)), {})[block] = path
  for (root, name), by_block in layers.items():
    for number, blocks in enumerate(own.groups):
      if any(block in by_block for block in blocks):
        made = _stacked(values, by_block, blocks, root, name, config)
        yield _stack_path(root, name, own, number), made


def _stacked(values, paths: Mapping[int, str], blocks: range, root: str, name: str, config) -> np.ndarray:
  """One parameter of a group of blocks, zero where a block has none."""
  own = topology.from_config(config)
  table = scanned.table(config, own, blocks)
  exists = scanned.existing(config, table, tuple(name.split("/")))
  made = by_block = None
  for k, block in enumerate(blocks):
    if block not in paths:
      if exists is None or exists[k].any():
        raise KeyError(f"{root}layers_{block - 1}/{name}")
      continue
    value = _padded(name, values[paths[block]], own.before(block), table.padded)
    if made is None:
      axis = min(config.param_scan_axis, value.ndim)
      made = np.zeros((*value.shape[:axis], len(blocks), *value.shape[axis:]), value.dtype)
      by_block = np.moveaxis(made, axis, 0)
    if value.shape != by_block.shape[1:]:
      shapes = f"{list(by_block.shape[1:])} and {list(value.shape)}"
      raise ValueError(f"{name} is {shapes} in blocks that mudd_ffn_groups={len(own.groups)} scans together")
    by_block[k] = value
  return made


def unstack(values: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
  """For `scan_layers: false`, from values for `scan_layers: true`; views where that can be.

  Raises:
    ValueError: the configuration has another number of layers.
  """
  own = topology.from_config(config)
  made = {}
  for path, value in values.items():
    ends = re.fullmatch(r"(|.*/)decoder/(connection/.+)", path)
    found = re.fullmatch(r"(|.*/)decoder/layers/(?:group_(\d+)/)?(.+)", path)
    if ends:
      layer = 0 if ends[2].startswith(_EMBEDDING_NORM) else own.num_blocks - 1
      made[f"{ends[1]}decoder/layers_{layer}/{ends[2]}"] = value
    elif not found:
      made[path] = value
    else:
      root, name = found[1] + "decoder/", found[3]
      blocks = own.groups[int(found[2] or 0)]
      by_block = np.moveaxis(value, min(config.param_scan_axis, value.ndim - 1), 0)
      if len(by_block) != len(blocks):
        raise ValueError(f"{path} is of {len(by_block)} layers, not {len(blocks)}")
      table = scanned.table(config, own, blocks)
      exists = scanned.existing(config, table, tuple(name.split("/")))
      for k, block in enumerate(blocks):
        if exists is None or exists[k].any():
          single_name = _single_name(name, config, own, block)
          made[f"{root}layers_{block - 1}/{single_name}"] = _trimmed(name, by_block[k], own.before(block))
  return made


def _stack_path(root: str, name: str, own: Topology, number: int) -> str:
  return f"{root}layers/{name}" if len(own.groups) == 1 else f"{root}layers/group_{number}/{name}"


def _scanned_name(name: str, config, own: Topology, block: int) -> str:
  """LN_q stands for the one norm of a block that has no norms of its own."""
  norm = block_spec(config).attention_norm + "/"
  decoupled = any(scanned.has_own_norms(config, own, other) for other in _group_of(own, block))
  if name.startswith(norm) and decoupled and not scanned.has_own_norms(config, own, block):
    return f"{norm}q/{name.removeprefix(norm)}"
  return name


def _single_name(name: str, config, own: Topology, block: int) -> str:
  norm = block_spec(config).attention_norm + "/q/"
  if name.startswith(norm) and not scanned.has_own_norms(config, own, block):
    return name.replace("/q/", "/", 1)
  return name


def _group_of(own: Topology, block: int) -> range:
  return next(blocks for blocks in own.groups if block in blocks)


def _padded(name: str, value, aggregate: Aggregate | None, padded: Aggregate | None):
  name = name.removeprefix(_OWN) if name.startswith(_OWN) else ""
  if name not in ("w1", "w2", "a"):
    return value
  if name == "w1":
    return np.pad(value, ((0, 0), (0, padded.hidden - value.shape[1])))
  made = np.zeros((*value.shape[:-1], len(padded.sources)), value.dtype)
  made[..., list(aggregate.sources)] = value
  return made if name == "a" else np.pad(made, ((0, padded.hidden - len(made)), (0, 0), (0, 0)))


def _trimmed(name: str, value, aggregate: Aggregate | None):
  name = name.removeprefix(_OWN) if name.startswith(_OWN) else ""
  if name == "w1":
    return value[:, : aggregate.hidden]
  if name == "w2":
    return value[: aggregate.hidden][..., list(aggregate.sources)]
  return value[:, list(aggregate.sources)] if name == "a" else value
