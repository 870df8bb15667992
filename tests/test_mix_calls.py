"""Calls of `mix` and `depth_aggregate`: arguments that do not fit, which implementation runs, and what it reads."""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_mudd import kernels
from maxtext_mudd.kernels import tpu
from maxtext_mudd.kernels.tpu import common
from maxtext_mudd.kernels.weights import product
from tests import mixing
from tests.mixing import FORMS, Case

B, T, D, N, C, K = 2, 5, 8, 3, 4, 16


# ---------------------------------------------------------------- arguments that do not fit


def fitting() -> dict[str, dict]:
  """Arguments that fit: of `depth_aggregate` on a list and on a buffer, and of `mix`."""
  parameters = {"w1": jnp.zeros((D, K)), "w2": jnp.zeros((K, C, N)), "a": jnp.zeros((C, N)), "ways": C}
  sources, buffer = [jnp.zeros((B, T, D))] * N, jnp.zeros((N, B, T, D))
  return {
    "list": {"sources": sources, **parameters},
    "buffer": {"sources": buffer, "count": 2, **parameters},
    "mix": {"sources": sources, "weights": jnp.zeros((B, T, C, N))},
    "mix of a buffer": {"sources": buffer, "count": 2, "weights": jnp.zeros((B, T, C, N))},
  }


def call(given: dict):
  return (kernels.mix if "weights" in given else kernels.depth_aggregate)(**given)


@pytest.mark.parametrize("arguments", fitting())
def test_arguments_that_fit(arguments):
  assert [x.shape for x in call(fitting()[arguments])] == [(B, T, D)] * C


NAMES = "auto, xla, pallas, pallas_interpret"
WANTED = "the sources need [2, 5, C, 3], or [C, 3] for all tokens."
HIDDEN = kernels.HiddenLayer(jnp.zeros((B, T, K)), jnp.zeros((K, C, N)), jnp.zeros((C, N)))
OF_THE_FIRST = kernels.WeightMLP(jnp.zeros((D, K)), jnp.zeros((K, C, N)), jnp.zeros((C, N)), source=0)
CHANNELS = kernels.ChannelWeights(jnp.zeros((B, T, C, 2, N)), jnp.zeros((C, D, N)))
BOUNDED = kernels.WeightMLP(
  jnp.zeros((D, K)), jnp.zeros((K, C, N)), jnp.zeros((C, N)), scale=jnp.zeros((C, N)), cap=1.0
)
REFUSED = [
  ("list", {"implementation": "cuda"}, f"implementation='cuda' does not exist; use one of {NAMES}."),
  ("list", {"activation": "relu"}, "activation='relu' does not exist; use one of gelu, gelu_tanh."),
  ("list", {"sources": []}, "sources is empty; give at least the newest block output."),
  (
    "list",
    {"sources": [jnp.zeros((B, T, D)), jnp.zeros((B, 4, D)), jnp.zeros((B, T, D))]},
    "sources[1] is float32[2, 4, 8], sources[-1] is float32[2, 5, 8]; make them equal.",
  ),
  ("list", {"sources": [jnp.zeros((T, D))] * N}, "a source is float32[5, 8]; give floating-point arrays [B,T,D]."),
  (
    "list",
    {"sources": [jnp.zeros((B, T, D), jnp.int32)] * N},
    "a source is int32[2, 5, 8]; give floating-point arrays [B,T,D].",
  ),
  ("list", {"ways": 1}, "a has shape [4, 3]; 1 ways and 3 sources need [1, 3]."),
  ("list", {"a": None}, "a is missing; give static weights [C,N], zeros if there are none."),
  ("list", {"w1": None}, "w1 and w2 go together; give both, or neither for static weights."),
  ("list", {"w1": jnp.zeros((9, K))}, "w1 has shape [9, 16]; the other arguments need [8, 16]."),
  ("list", {"w2": jnp.zeros((K, 1, N))}, "w2 has shape [16, 1, 3]; the other arguments need [16, 4, 3]."),
  (
    "list",
    {"newest": jnp.zeros((B, T, 9))},
    "newest is float32[2, 5, 9], sources[-1] is float32[2, 5, 8]; make them equal.",
  ),
  ("list", {"count": 2}, "count goes with one buffer [S,B,T,D]; leave it out where sources are a list."),
  (
    "buffer",
    {"count": None},
    "sources is one buffer; give count, the number of its valid entries, or a list of sources.",
  ),
  ("buffer", {"sources": jnp.zeros((B, T, D))}, "sources has shape [2, 5, 8]; a buffer of sources is [S,B,T,D]."),
  ("buffer", {"count": 0}, "count=0 is not in 1..3, the number of entries in the buffer."),
  ("buffer", {"count": np.int64(4)}, "count=4 is not in 1..3, the number of entries in the buffer."),
  ("buffer", {"count": jnp.ones((1,), jnp.int32)}, "count is int32[1]; give one int."),
  ("buffer", {"count": 1.0}, "count is float32[]; give one int."),
  ("buffer", {"a": jnp.zeros((C, 2))}, "a has shape [4, 2]; the other arguments need [4, 3]."),
  ("buffer", {"w2": jnp.zeros((K, C, 2))}, "w2 has shape [16, 4, 2]; the other arguments need [16, 4, 3]."),
  (
    "buffer",
    {"newest": jnp.zeros((T, D))},
    "newest is float32[5, 8], sources[-1] is float32[2, 5, 8]; make them equal.",
  ),
  ("mix", {"weights": jnp.ones((C, N), jnp.complex64)}, "weights is complex64; give a floating-point array."),
  ("mix", {"weights": None}, "weights is NoneType; give a floating-point array."),
  ("mix", {"weights": jnp.zeros((B, T, C, 2))}, f"weights has shape [2, 5, 4, 2]; {WANTED}"),
  ("mix", {"weights": jnp.zeros((B, 4, C, N))}, f"weights has shape [2, 4, 4, 3]; {WANTED}"),
  ("mix", {"weights": jnp.zeros((T, C, N))}, f"weights has shape [5, 4, 3]; {WANTED}"),
  ("mix", {"weights": jnp.zeros(N)}, f"weights has shape [3]; {WANTED}"),
  ("mix of a buffer", {"weights": jnp.zeros((C, 2))}, f"weights has shape [4, 2]; {WANTED}"),
  ("mix", {"weights": HIDDEN}, "weights is a HiddenLayer, which only `Passes` accepts; give an array or a WeightMLP."),
  (
    "mix",
    {"weights": OF_THE_FIRST},
    "weights has source=0, which only `Passes` accepts; give that source as newest.",
  ),
  (
    "mix",
    {"weights": dataclasses.replace(BOUNDED, cap=None)},
    "scale goes with cap; give cap=1.0 for scale · tanh(W).",
  ),
  (
    "mix",
    {"weights": dataclasses.replace(BOUNDED, cap=0.0)},
    "cap=0.0; give a positive number, or None for weights without a bound.",
  ),
  (
    "mix",
    {"weights": dataclasses.replace(BOUNDED, scale=jnp.zeros((C, 4)))},
    "scale has shape [4, 4]; the other arguments need [4, 3].",
  ),
  (
    "mix",
    {"weights": dataclasses.replace(CHANNELS, a=jnp.zeros((C, 9, N)))},
    "a has shape [4, 9, 3]; the other arguments need [4, 8, 3].",
  ),
  (
    "mix",
    {"weights": dataclasses.replace(CHANNELS, w=jnp.zeros((B, 4, C, 2, N)))},
    "w has shape [2, 4, 4, 2, 3]; the other arguments need [2, 5, 4, 2, 3].",
  ),
  (
    "mix",
    {"weights": dataclasses.replace(CHANNELS, w=jnp.zeros((B, T, C, 3, N)))},
    "w has shape [2, 5, 4, 3, 3]; give [B,T,C,H,N] with H that divides 8.",
  ),
  (
    "mix",
    {"weights": dataclasses.replace(CHANNELS, a=jnp.zeros((C, D, N), jnp.int32))},
    "a is int32; give a floating-point array.",
  ),
  (
    "mix",
    {"weights": CHANNELS, "implementation": "pallas"},
    "w has 2 heads, and implementation='pallas' mixes with one; use 'xla'.",
  ),
  (
    "mix",
    {"sources": [jnp.zeros((B, T, D), jnp.float16)] * N, "implementation": "pallas"},
    "the sources are float16; implementation='pallas' takes bfloat16 or float32.",
  ),
]


@pytest.mark.parametrize(("arguments", "change", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_arguments_that_do_not_fit(arguments, change, message):
  with pytest.raises(ValueError) as error:
    call(fitting()[arguments] | change)
  assert str(error.value) == message


def test_a_traced_count_is_clipped():
  inputs = mixing.draw(Case(sources=3, invalid=0, is_buffer=True))
  for count, clipped in ((-1, 1), (9, 3)):
    found, expected = (mixing.mix(inputs._replace(count=jnp.int32(x)), "xla") for x in (count, clipped))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("form", ["static", "mlp", "newest"])
def test_depth_aggregate_is_mix(form):
  """Its weights by name, with settings that are not the defaults."""
  case = Case(form=form, activation="gelu_tanh", epsilon=0.5)
  sources, weights, *_ = mixing.draw(case)
  named = {"w1": None, "w2": None} | mixing.fields(weights)
  found = kernels.depth_aggregate(sources, **named, ways=4, activation="gelu_tanh", epsilon=0.5)
  jax.tree.map(np.testing.assert_array_equal, found, kernels.mix(sources, weights))


# ---------------------------------------------------------------- which implementation runs


def traced(case: Case, **settings) -> list:
  """All equations of streams and gradients."""
  inputs = mixing.draw(case)

  def both(sources, weights):
    mixed = functools.partial(kernels.mix, count=inputs.count, **settings)
    streams, vjp = jax.vjp(mixed, sources, weights)
    return streams, vjp(inputs.cotangents)

  return list(mixing.equations(jax.make_jaxpr(both)(inputs.sources, inputs.weights).jaxpr))


FUSED = ["depth_aggregate_forward", "depth_aggregate_backward"]


@pytest.mark.parametrize(
  ("implementation", "platform", "dtype", "names"),
  [
    ("auto", "tpu", "bfloat16", FUSED),
    ("auto", "tpu", "float32", FUSED),
    ("auto", "tpu", "float16", []),
    ("auto", "cpu", "bfloat16", []),
    ("auto", "gpu", "bfloat16", []),
    ("xla", "tpu", "bfloat16", []),
    ("pallas", "cpu", "bfloat16", FUSED),
    ("pallas_interpret", "cpu", "bfloat16", FUSED),
  ],
)
@pytest.mark.parametrize("is_buffer", [False, True], ids=["list", "buffer"])
def test_what_runs(implementation, platform, dtype, names, is_buffer, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  program = traced(Case(dtype=dtype, is_buffer=is_buffer), implementation=implementation)
  called = [x.params for x in program if x.primitive.name == "pallas_call"]
  assert [x["name"] for x in called] == names
  assert {bool(x["interpret"]) for x in called} <= {implementation == "pallas_interpret"}


def test_a_sharding_says_the_platform(monkeypatch):
  """Not the default backend: a program may be compiled for other devices."""
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("data",))
  program = traced(Case(), sharding=jax.NamedSharding(mesh, jax.P("data")))
  assert "pallas_call" not in {x.primitive.name for x in program}


def test_products_are_those_of_lax():
  """`product` binds the primitive, whose parameters are JAX's own affair."""
  x, y = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
  bound = jax.make_jaxpr(lambda x, y: product(x, y, 2, 0))(x, y)
  precision, axes = jax.lax.Precision.DEFAULT, (((2,), (0,)), ((), ()))
  called = jax.make_jaxpr(
    lambda x, y: jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
  )(x, y)
  assert str(bound) == str(called)


@pytest.mark.parametrize("has_newest", [False, True])
@pytest.mark.parametrize("is_buffer", [False, True])
def test_gradients_of_a_split_width_have_their_shapes(is_buffer, has_newest):
  """Traced for two devices, of which each has half of D; values on meshes are those of whole models."""
  mesh = jax.sharding.AbstractMesh((2,), ("width",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "width"))
  passes = kernels.Passes("pallas_interpret", sharding)

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  row = array(2, 8, 256)
  weights = kernels.WeightMLP(array(256, 16), array(16, 4, 3), array(4, 3), row if has_newest else None)
  entries = array(3, 2, 8, 256) if is_buffer else [row] * 3

  def loss(entries, weights):
    sources = kernels.Buffer(entries, jnp.int32(2)) if is_buffer else entries
    return sum(jnp.sum(x) for x in kernels.differentiable(passes, sources, weights))

  gradients = jax.eval_shape(jax.grad(loss, (0, 1)), entries, weights)
  assert jax.tree.map(lambda x: x.shape, gradients) == jax.tree.map(lambda x: x.shape, (entries, weights))


@pytest.mark.parametrize("precision", ["bfloat16", "tensorfloat32", "highest"])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_float32_is_multiplied_as_such(implementation, precision):
  """Whatever is set around. TPUs would round factors to bfloat16, and CPUs never do, so that errors do not show it."""
  with jax.default_matmul_precision(precision):
    program = [x for form in FORMS for x in traced(Case(form=form), implementation=implementation)]
  products = [x for x in program if x.primitive.name == "dot_general"]
  assert products
  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert {x.params["precision"] for x in products if x.invars[0].aval.dtype == jnp.float32} == {highest}


def test_each_valid_entry_is_read_once():
  """A slot copies when its block differs from the one before: together they copy the valid entries, once each; a slot
  without any copies one block at the very start."""
  shape = common.Shape(
    rows=16, width=8, ways=1, sources=7, slots=3, block=8, dtype=jnp.dtype("float32"), is_buffer=True
  )
  rows, groups = (x.ravel() for x in np.meshgrid(range(shape.blocks), range(shape.groups), indexing="ij"))
  specs = common.source_specs(shape, lambda i, *_: i)
  for count in range(1, 8):
    copied = []
    for slot, spec in enumerate(specs):
      entry, row, column = jax.vmap(spec.index_map, (0, 0, None))(rows, groups, jnp.array([count]))
      assert not np.any(column)
      steps = list(zip(map(int, entry), map(int, row)))
      own = [step for k, step in enumerate(steps) if k == 0 or step != steps[k - 1]]
      assert own == [(0, 0)] or slot < count
      copied += own if slot < count else []
    assert sorted(copied) == [(j, i) for j in range(count) for i in range(2)]


# ---------------------------------------------------------------- what the interpreter sees


def interpreted(body, x, **settings):
  """[8,128], written by `body` from `x`, as strictly as the tests interpret kernels."""
  out = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  return jax.block_until_ready(pl.pallas_call(body, out_shape=out, interpret=tpu.STRICTLY, **settings)(x))


def test_interpretation_is_strict():
  """What was not written or lies out of bounds is NaN, and a race is found, of any kernel of a program."""
  x = jnp.ones((8, 128))
  assert np.isnan(interpreted(lambda x, out: None, x)).all()

  def add_up(x, out):
    out[...] = jnp.broadcast_to(x[...].sum(), out.shape)

  beyond = pl.BlockSpec((16, 128), lambda i: (0, 0))
  assert np.isnan(interpreted(add_up, x, grid=(1,), in_specs=[beyond])).all()

  def read_too_early(x, out, buffer, semaphore):
    copy = pltpu.make_async_copy(x, buffer, semaphore)
    copy.start()
    out[...] = buffer[...]
    copy.wait()

  scratch = [pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA]
  with pytest.raises(AssertionError, match="RACE DETECTED"), mixing.no_races():
    interpreted(read_too_early, x, scratch_shapes=scratch)
    interpreted(add_up, x)
