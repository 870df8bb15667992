"""The fused kernels, compiled ahead of time for TPUs at the shape of MUDDFormer-2.8B: they fit VMEM, and no source is
copied, stacked or padded."""

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import shapes
from maxtext_mudd import kernels

SHAPE, WAYS = shapes.PAPER["2p8b"], 4


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p:2x2x1", "v6e:2x2x1"])
@pytest.mark.parametrize("form", ["mlp", "array", "channels"])
@pytest.mark.parametrize("is_buffer", [False, True], ids=["list", "buffer"])
def test_compiles_for(is_buffer, form, chip):
  topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

  number, hidden = SHAPE.sources, shapes.hidden_width(WAYS, SHAPE.sources)
  tokens = (8, 2048)
  row = array(*tokens, SHAPE.width)
  weights = array(*tokens, WAYS, number, dtype=jnp.float32)
  if form == "mlp":
    weights = kernels.WeightMLP(array(SHAPE.width, hidden), array(hidden, WAYS, number), array(WAYS, number))
  elif form == "channels":
    of_tokens = array(*tokens, WAYS, 1, number, dtype=jnp.float32)
    weights = kernels.ChannelWeights(of_tokens, array(WAYS, SHAPE.width, number))
  sources, count = [row] * number, None
  if is_buffer:
    sources, count = array(number, *row.shape), array(dtype=jnp.int32)

  def step(sources, weights, count, cotangents):
    def call(sources, weights):
      return kernels.mix(sources, weights, count=count, implementation="pallas")

    streams, vjp = jax.vjp(call, sources, weights)
    return streams, vjp(cotangents)

  compiled = jax.jit(step).lower(sources, weights, count, [row] * WAYS).compile()
  assert compiled.as_text().count("tpu_custom_call") >= 2
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * np.prod(row.shape)  # bytes of one source
