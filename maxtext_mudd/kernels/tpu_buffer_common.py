"""What the two kernels on a buffer share: which entry lies in which slot of VMEM at which step.

The grid runs over row blocks and, inside, over groups of entries. The buffer is passed once for every slot, so that
each slot has a BlockSpec of its own, and nothing but valid entries is copied from HBM.
"""

import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from maxtext_mudd.kernels import tpu_common as common

SLOTS = 16  # with eight tokens 128 rows of a product, the depth of a v5p's MXU


@dataclasses.dataclass(frozen=True)
class BufferShape(common.Shape):
  """The static facts of one call on a buffer [S,rows,D]: `entries` is S, `slots` how many one grid step takes."""

  entries: int
  slots: int

  @property
  def groups(self) -> int:
    return pl.cdiv(self.entries, self.slots)


def slot_index(shape: BufferShape, slot: int, row_block, group, count):
  """The block of the buffer for one slot: that of entry group·slots + slot, while there is such a valid entry.

  Later the slot keeps the block it has, and a slot that never gets an entry the very first: Pallas copies a block only
  when it changes.
  """
  last_group = jax.lax.div(count - 1 - slot, shape.slots)
  entry = jnp.minimum(group, last_group) * shape.slots + slot
  used = slot < count
  return jnp.where(used, entry, 0), jnp.where(used, row_block, 0), 0


def slot_specs(shape: BufferShape, row_block):
  """One BlockSpec for each slot; `row_block` maps the grid indices, but for the last, the group, to a block of rows."""

  def spec(slot):
    def index(*at):
      *outer, group, count = at
      return slot_index(shape, slot, row_block(*outer), group, count[0])

    return pl.BlockSpec((None, shape.block, shape.width), index)

  return [spec(slot) for slot in range(shape.slots)]


def row_spec(shape: BufferShape, row_block, width: int | None = None):
  """Of an array [rows,n], D wide if not told, read or written once for each row block."""
  return pl.BlockSpec((shape.block, width or shape.width), lambda *at: (row_block(*at[:-2]), 0))


def row_specs(shape: BufferShape, row_block, tree):
  return jax.tree.map(lambda x: row_spec(shape, row_block, x.shape[1]), tree)


def newest_of(shape: BufferShape, row_block, buffer, origin: common.Origin, operands: common.Operands):
  """(array, its spec) of the newest entry where the weights are made from it: then it must be there before the first
  group, so it is read twice. Otherwise None, twice."""
  if operands.w2 is None or origin.newest is not None or origin.hidden is not None:
    return None, None
  spec = pl.BlockSpec((None, shape.block, shape.width), lambda *at: (at[-1][0] - 1, row_block(*at[:-2]), 0))
  return buffer, spec


def group_spec(shape: BufferShape, row_block):
  """Of all slots of a group at once; groups without a valid entry stand for the last that has one."""

  def index(*at):
    *outer, group, count = at
    last_group = jax.lax.div(count[0] - 1, shape.slots)
    return jnp.minimum(group, last_group), row_block(*outer), 0

  return pl.BlockSpec((shape.slots, shape.block, shape.width), index)


def stack_slots(shape: BufferShape, slots, rows, first_row, left, columns):
  """Eight rows of each slot, one slot above another; of some columns. Zero from slot `left` on, whose content belongs
  to other entries or tokens: nothing that is not finite there may reach these tokens."""
  found = [common.valid(shape, first_row, x[rows, columns]) for x in slots]
  found = [x if k == 0 else jnp.where(k < left, x, jnp.zeros_like(x)) for k, x in enumerate(found)]
  return jnp.concatenate(found, axis=0)


def fill_factors(factors, shape: BufferShape, h, operands: common.Operands, group):
  """L of one group of entries; `operands` are by group."""
  w2 = None if operands.w2 is None else operands.w2.at[group]
  of_group = common.Operands(a=operands.a.at[group], w2=w2)
  common.fill_factors(factors, shape, h, of_group, of_group.a.shape[0])
