"""Depth-wise aggregation of a buffer with a dynamic count, in all its forms, against float64 NumPy.

The oracle is written from Eqs. 5 and 6 and their derivatives. What is not valid, in the buffer and in the weights, is
NaN throughout. Budgets are of the largest error over the largest value, for each stream and each gradient.
"""

import functools

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # public only as a message that is printed
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from maxtext_mudd import kernels
from maxtext_mudd.kernels import tpu_buffer, tpu_buffer_common

# B, T, D, entries, count, C, K, dtype, has newest, dynamic, activation
CASES = {
  "one entry": (1, 16, 128, 2, 1, 4, 16, "float32", False, True, "gelu"),
  "two groups of three, the second partial; odd sizes": (2, 5, 24, 5, 3, 4, 16, "float32", False, True, "gelu"),
  "full; one way, tanh, pre-normed": (3, 7, 40, 3, 3, 1, 8, "float32", True, True, "gelu_tanh"),
  "bfloat16": (2, 12, 128, 4, 3, 4, 64, "bfloat16", False, True, "gelu"),
  "static": (2, 13, 40, 5, 4, 4, 0, "float32", False, False, "gelu"),
  "static with a newest": (2, 5, 24, 3, 2, 4, 0, "float32", True, False, "gelu"),
  "two groups, the second partial; odd sizes": (2, 5, 24, 19, 18, 4, 16, "float32", False, True, "gelu"),
  "three groups, one not needed": (1, 24, 128, 33, 20, 4, 32, "bfloat16", False, True, "gelu_tanh"),
  "one whole group of three": (1, 12, 40, 33, 16, 4, 32, "bfloat16", True, True, "gelu"),
  "full, three groups": (1, 24, 128, 33, 33, 1, 32, "float32", False, True, "gelu"),
  "two row blocks, the last partial": (2, 75, 24, 3, 2, 4, 16, "float32", False, True, "gelu"),
  "three row blocks": (3, 128, 24, 3, 2, 4, 16, "bfloat16", True, True, "gelu"),
}
FAST = list(CASES)[:4]
SMALL_GROUPS = FAST[1]  # of two entries, for interpreting a slot takes long
BUDGETS = {"float64": (1e-12, 1e-12), "float32": (2e-6, 5e-6), "bfloat16": (2**-8, 2**-6)}  # of values, of gradients


def operands(case):
  batch, length, width, entries, count, ways, hidden, dtype, has_newest, dynamic, _ = CASES[case]
  rng = np.random.default_rng(0)

  def normal(*shape, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape), dtype)

  buffer = normal(entries, batch, length, width).at[count:].set(jnp.nan)
  newest = normal(batch, length, width) if has_newest else None
  w1 = normal(width, hidden, scale=width**-0.5) if dynamic else None
  w2 = normal(hidden, ways, entries, scale=hidden**-0.5).at[..., count:].set(jnp.nan) if dynamic else None
  a = normal(ways, entries).at[:, count:].set(jnp.nan)
  return (buffer, newest, w1, w2, a), [normal(batch, length, width) for _ in range(ways)]


def oracle(case, args, cotangents, epsilon=1e-6):
  """(streams, gradients of the arguments that there are), by hand."""
  count, activation = CASES[case][4], CASES[case][10]
  buffer, newest, w1, w2, a = (None if x is None else np.asarray(x, np.float64) for x in args)
  g = np.stack([np.asarray(x, np.float64) for x in cotangents])
  x = buffer[:count]
  weights = np.broadcast_to(a[:, :count], (*x.shape[1:3], *a[:, :count].shape))
  if w1 is not None:
    source = x[-1] if newest is None else newest
    scale = 1 / np.sqrt(np.mean(source**2, -1, keepdims=True) + epsilon)
    y = source * scale
    z = y @ w1
    if activation == "gelu":
      cdf = scipy.special.ndtr(z)
      h, slope = z * cdf, cdf + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    else:
      t = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
      h = 0.5 * z * (1 + t)
      slope = 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
    weights = weights + np.einsum("btk,kcn->btcn", h, w2[..., :count])
  streams = np.einsum("btcn,nbtd->cbtd", weights, x)

  to_weights = np.einsum("cbtd,nbtd->btcn", g, x)
  to_x = np.einsum("btcn,cbtd->nbtd", weights, g)
  to_newest, to_w1, to_w2 = None if newest is None else np.zeros_like(newest), None, None
  if w1 is not None:
    to_w2 = np.einsum("btk,btcn->kcn", h, to_weights)
    to_z = np.einsum("btcn,kcn->btk", to_weights, w2[..., :count]) * slope
    to_w1 = np.einsum("btd,btk->dk", y, to_z)
    to_y = to_z @ w1.T
    to_source = scale * (to_y - y * np.mean(to_y * y, -1, keepdims=True))
    if newest is None:
      to_x[-1] += to_source
    else:
      to_newest = to_source

  def padded(gradient, like, axis):
    missing = [(0, 0)] * like.ndim
    missing[axis] = (0, like.shape[axis] - gradient.shape[axis])
    return np.pad(gradient, missing)

  if w1 is not None:
    to_w2 = padded(to_w2, w2, 2)
  gradients = [padded(to_x, buffer, 0), to_newest, to_w1, to_w2, padded(to_weights.sum((0, 1)), a, 1)]
  return list(streams), [x for x in gradients if x is not None]


def streams_and_gradients(case, args, cotangents, implementation):
  ways, activation = CASES[case][5], CASES[case][10]

  @jax.jit
  def both(count, args, cotangents):
    def call(buffer, newest, w1, w2, a):
      settings = {"activation": activation, "implementation": implementation}
      return kernels.depth_aggregate(buffer, w1, w2, a, ways=ways, newest=newest, count=count, **settings)

    streams, vjp = jax.vjp(call, *args)
    return streams, jax.tree.leaves(vjp(cotangents))

  return both(jnp.int32(CASES[case][4]), args, cotangents)


def check(case, found, expected, budgets):
  for mine, theirs, budget in zip(found, expected, budgets):
    assert len(mine) == len(theirs)
    for x, y in zip(mine, theirs):
      assert x.shape == y.shape
      assert np.abs(np.asarray(x, np.float64) - y).max() <= budget * np.abs(y).max()
  count, gradients = CASES[case][4], found[1]
  assert not np.asarray(gradients[0][count:]).any()
  assert not np.asarray(gradients[-1][:, count:]).any()
  if CASES[case][9]:
    assert not np.asarray(gradients[-2][..., count:]).any()


@pytest.mark.parametrize("case", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_float64_is_the_truth(case):
  with jax.enable_x64(True):
    args, cotangents = jax.tree.map(lambda x: x.astype(jnp.float64), operands(case))
    found = streams_and_gradients(case, args, cotangents, "xla")
    assert found[0][0].dtype == jnp.float64
    check(case, found, oracle(case, args, cotangents), BUDGETS["float64"])


@pytest.mark.parametrize("case", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_kernel(case, monkeypatch):
  if case == SMALL_GROUPS:
    monkeypatch.setattr(tpu_buffer, "SLOTS", 2)
  args, cotangents = operands(case)
  found = streams_and_gradients(case, args, cotangents, "pallas_interpret")
  jax.block_until_ready(found)
  assert not interpret_pallas_call.races.races_found
  check(case, found, oracle(case, args, cotangents), BUDGETS[CASES[case][7]])


def test_each_valid_entry_is_read_once():
  """A slot copies when its block differs from the one before: together they copy the valid entries, once each; a slot
  without any copies one block at the very start."""
  shape = tpu_buffer_common.BufferShape(
    rows=16, width=8, block=8, dtype=jnp.dtype("float32"), activation="gelu", epsilon=0.0, entries=7, slots=3
  )
  index = jax.jit(
    jax.vmap(functools.partial(tpu_buffer_common.slot_index, shape), (None, 0, 0, None)), static_argnums=0
  )
  rows, groups = (x.ravel() for x in np.meshgrid(range(shape.blocks), range(shape.groups), indexing="ij"))
  for count in range(1, 8):
    copied = []
    for slot in range(3):
      steps = [tuple(map(int, step)) for step in zip(*index(slot, rows, groups, count)[:2])]
      own = [step for k, step in enumerate(steps) if k == 0 or step != steps[k - 1]]
      assert own == [(0, 0)] or slot < count
      copied += own if slot < count else []
    assert sorted(copied) == [(j, i) for j in range(count) for i in range(2)]


@pytest.mark.slow
def test_what_is_not_finite_stays_among_eight_tokens():
  """Slots without an entry hold rows of other tokens."""
  buffer = jnp.ones((2, 1, 256, 24)).at[0, 0, 3].set(jnp.nan)
  call = functools.partial(kernels.depth_aggregate, ways=1, count=1, implementation="pallas_interpret")
  found, vjp = jax.vjp(lambda x: call(x, None, None, jnp.ones((1, 2))), buffer)
  (gradient,) = vjp(found)
  assert np.isnan(found[0][0, 3]).all()
  assert np.isfinite(found[0][0, 8:]).all()
  assert np.isfinite(gradient[:, 0, 8:]).all()
  assert np.isnan(gradient[0, 0, 3]).all()
  assert not gradient[1].any()


def scanned(implementation, start, w1, w2, a):
  """Each block is the tanh of the mean of its streams; the loop index counts the entries."""
  layers = a.shape[0]

  def block(buffer, layer):
    i, *weights = layer
    streams = kernels.depth_aggregate(buffer, *weights, ways=4, count=i + 1, implementation=implementation)
    return buffer.at[i + 1].set(jnp.tanh(sum(streams) / 4)), None

  buffer = jnp.full((layers + 1, *start.shape), jnp.nan).at[0].set(start)
  return jax.lax.scan(block, buffer, (jnp.arange(layers), w1, w2, a))[0]


def unrolled(start, w1, w2, a):
  sources = [start]
  for i in range(a.shape[0]):
    streams = kernels.depth_aggregate(sources, w1[i], w2[i, ..., : i + 1], a[i, :, : i + 1], ways=4)
    sources.append(jnp.tanh(sum(streams) / 4))
  return jnp.stack(sources)


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_scan_is_the_unrolled_loop(implementation):
  rng = np.random.default_rng(0)
  layers, width, hidden = 3, 24, 8
  shapes = [(1, 8, width), (layers, width, hidden), (layers, hidden, 4, layers + 1), (layers, 4, layers + 1)]
  args = [jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for shape in shapes]
  cotangent = jnp.asarray(rng.standard_normal((layers + 1, *shapes[0])), jnp.float32)

  def both(function):
    made, vjp = jax.vjp(function, *args)
    return [made, *vjp(cotangent)]

  found = jax.jit(functools.partial(both, functools.partial(scanned, implementation)))()
  for x, y in zip(found, jax.jit(functools.partial(both, unrolled))()):
    np.testing.assert_allclose(x, y, atol=5e-6 * np.abs(y).max(), rtol=0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"sources": [jnp.zeros((2, 5, 8))] * 3},
      "count goes with one buffer [N,B,T,D]; leave it out where sources are a list.",
    ),
    (
      {"count": None},
      "sources is one buffer; give count, the number of its valid entries, or a list of sources.",
    ),
    ({"sources": jnp.zeros((2, 5, 8))}, "sources has shape [2, 5, 8]; a buffer of sources is [N,B,T,D]."),
    ({"count": 0}, "count=0 is not in 1..3, the number of entries in the buffer."),
    ({"count": np.int64(4)}, "count=4 is not in 1..3, the number of entries in the buffer."),
    ({"count": jnp.ones((1,), jnp.int32)}, "count is int32[1]; give one int."),
    ({"count": 1.0}, "count is float32[]; give one int."),
    ({"a": jnp.zeros((4, 2))}, "a has shape [4, 2]; 4 ways and 3 sources need [4, 3]."),
    ({"w2": jnp.zeros((16, 4, 2))}, "w2 has shape [16, 4, 2]; the other arguments need [16, 4, 3]."),
    (
      {"newest": jnp.zeros((5, 8))},
      "newest is float32[5, 8], sources[-1] is float32[2, 5, 8]; make them equal.",
    ),
  ],
)
def test_arguments_that_do_not_fit(change, message):
  shapes = {"sources": (3, 2, 5, 8), "w1": (8, 16), "w2": (16, 4, 3), "a": (4, 3)}
  given = {name: jnp.zeros(shape) for name, shape in shapes.items()} | {"ways": 4, "count": 2} | change
  with pytest.raises(ValueError) as error:
    kernels.depth_aggregate(**given)
  assert str(error.value) == message


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p:2x2x1", "v6e:2x2x1"])
def test_compiles_for(chip):
  """Ahead of time, at the shape of the buffer of MUDDFormer-2.8B: it fits VMEM, forward and backward."""
  topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  batch, length, width, entries, ways, hidden = 8, 2048, 2560, 33, 4, 192

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

  row = (batch, length, width)
  weights = (array(width, hidden), array(hidden, ways, entries), array(ways, entries))

  def step(count, buffer, w1, w2, a, cotangents):
    call = functools.partial(kernels.depth_aggregate, ways=ways, count=count, implementation="pallas")
    streams, vjp = jax.vjp(call, buffer, w1, w2, a)
    return streams, vjp(cotangents)

  lowered = jax.jit(step).lower(array(dtype=jnp.int32), array(entries, *row), *weights, [array(*row)] * ways)
  compiled = lowered.compile()
  assert compiled.as_text().count("tpu_custom_call") >= 2
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * np.prod(row)  # no entry is copied
