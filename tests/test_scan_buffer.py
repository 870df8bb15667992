"""Arrays that scanned blocks write: each operation of the backward pass must get the array that it read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd import kernels
from maxtext_mudd.connections.scan_buffer import Entries, ScanBuffer

ENTRIES, BLOCKS, SHAPE, ROWS = 6, 5, (2, 8, 128), (4, 3)
SAVE_NOTHING = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
SAVE_PRODUCTS = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)


class PlainEntries:
  """The same operations for JAX to differentiate."""

  def __init__(self, array):
    self.array = array

  def put(self, index, entry):
    return PlainEntries(self.array.at[index].set(entry))

  append = put

  def take(self, index, number, axis=0):
    return jax.lax.dynamic_slice_in_dim(self.array, index, number, axis), self

  def mix(self, passes, count, weights):
    return kernels.mix(self.array, weights, count=count, implementation="xla"), self


def block(parts, number, x, weights):
  """Of one array: writes two entries, of which the second replaces the first in odd blocks, and reads all of them three
  times. Of another: appends an entry, and reads two rows of all."""
  passes = kernels.Passes("xla")
  sources, rows = parts
  rows = rows.append(number, jnp.sin(x[0, :4, :3]))
  taken_rows, rows = rows.take(number % 3, 2, axis=1)
  sources = sources.put(number, jnp.sin(x))
  (first,), sources = sources.mix(passes, number + 1, weights["first"])
  second_index = number + 1 - number % 2
  sources = sources.put(second_index, jnp.cos(first + x))
  streams, sources = sources.mix(passes, second_index + 1, weights["second"])
  taken, sources = sources.take(number, 1)
  return [sources, rows], x + jnp.tanh(streams[0] * streams[1]) + taken[0] ** 2 + jnp.sum(jnp.cos(taken_rows) ** 3)


def run(arguments, make, through, close):
  """A number that depends on all blocks, on what is written after them, and on two readings of that."""
  x, weights = arguments
  buffer = make()

  def body(carry, of_block):
    buffer, x = carry
    number, w = of_block
    return through(buffer, number, x, w), jnp.sum(x)

  (buffer, x), sown = jax.lax.scan(body, (buffer, x), (jnp.arange(BLOCKS), weights))
  (sources, _), (x, sown) = close(buffer, (x, sown))
  passes = kernels.Passes("xla")
  (last,), sources = sources.mix(passes, jnp.asarray(ENTRIES), weights["first"][0])
  later, _ = sources.mix(passes, jnp.asarray(ENTRIES), weights["second"][0])
  return jnp.sum(jnp.sin(last) + x + jnp.cos(later[0]) * later[1]) + jnp.sum(jnp.sin(sown))


def kept_once(rematerialise, arguments):
  def through(buffer, number, x, weights):
    return buffer.through(block, number, x, weights)

  def close(buffer, others):
    sources, rows = buffer.parts
    buffer = ScanBuffer([sources.put(jnp.asarray(ENTRIES - 1), others[0]), rows], buffer.rematerialise)
    buffer, others = buffer.close(others)
    return buffer.parts, others

  def make():
    entry = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (SHAPE, ROWS)]
    return ScanBuffer.zeros(entry, ENTRIES, [None, None], rematerialise)

  return run(arguments, make, through, close)


def plain(arguments):
  def through(arrays, number, x, weights):
    parts, x = block([PlainEntries(array) for array in arrays], number, x, weights)
    return [part.array for part in parts], x

  def close(arrays, others):
    sources, rows = (PlainEntries(array) for array in arrays)
    return [sources.put(ENTRIES - 1, others[0]), rows], others

  return run(arguments, lambda: [jnp.zeros((ENTRIES, *shape)) for shape in (SHAPE, ROWS)], through, close)


@pytest.fixture(scope="module")
def arguments():
  rng = np.random.default_rng(0)
  weights = {
    "first": rng.standard_normal((BLOCKS, *SHAPE[:2], 1, ENTRIES)),
    "second": rng.standard_normal((BLOCKS, *SHAPE[:2], 2, ENTRIES)),
  }
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (rng.standard_normal(SHAPE), weights))


@pytest.fixture(scope="module")
def expected(arguments):
  return jax.jit(jax.value_and_grad(plain))(arguments)


@pytest.mark.parametrize("rematerialise", [None, SAVE_NOTHING, SAVE_PRODUCTS], ids=["full", "nothing", "products"])
def test_gradients_are_those_of_jax(arguments, expected, rematerialise):
  found = jax.jit(jax.value_and_grad(functools.partial(kept_once, rematerialise)))(arguments)
  for value, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(value, right, rtol=0, atol=1e-6 * np.abs(right).max())


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_readings_of_one_array_add_their_gradients(implementation):
  """The gradients of three readings, one after another, are those of three separate readings."""
  rng = np.random.default_rng(0)
  array = jnp.asarray(rng.standard_normal((5, 2, 8, 128)), jnp.float32)
  weights = [jnp.asarray(rng.standard_normal((2, 8, 1, 5)), jnp.float32) for _ in range(3)]
  passes, counts = kernels.Passes(implementation), [jnp.asarray(n) for n in (2, 4, 5)]

  def total(streams):
    return sum((factor + 1) * jnp.sum(jnp.sin(x)) for factor, x in enumerate(streams))

  def one_after_another(array, weights):
    def step(parts, weights):
      (sources,), streams = parts, []
      for count, w in zip(counts, weights):
        (stream,), sources = sources.mix(passes, count, w)
        streams.append(stream)
      return [sources], streams

    buffer = ScanBuffer([Entries(array, jnp.zeros_like(array))], None)
    buffer, streams = buffer.through(step, weights)
    return total(buffer.close(streams)[1])

  def separate(array, weights):
    return total(kernels.mix(array, w, count=count, implementation="xla")[0] for count, w in zip(counts, weights))

  found, right = (jax.jit(jax.grad(f, argnums=(0, 1)))(array, weights) for f in (one_after_another, separate))
  for value, expected in zip(jax.tree.leaves(found), jax.tree.leaves(right)):
    np.testing.assert_allclose(value, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
