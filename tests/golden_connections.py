"""Runs cases of other people's depth connections through this project's families, and compares all that they stored.

    JAX_ENABLE_X64=1 python -m tests.golden_connections FOLDER

prints {kind: {case: {array: error}}} in float64. The sublayers of the model cases are stand-ins, so that no family can
need a Transformer.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
import sys

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from safetensors.numpy import load_file

from maxtext_mudd import connections, plugin
from maxtext_mudd.config.changed import changed
from maxtext_mudd.connections.attnres import connection as attnres_connection
from maxtext_mudd.connections.base import Site
from maxtext_mudd.connections.dca.connection import StaticWeights
from maxtext_mudd.connections.mhc.connection import SINKHORN
from tests import models

EPSILON = 1e-6  # of the norms of the stand-ins
SINKHORN_OF = {**SINKHORN, "lucidrains": SINKHORN["lite"]}  # the same steps, without logarithms


def folders(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path.parent for path in root.glob("*/golden.json") if json.loads(path.read_text()).get("kind") in KINDS)


def cases(folder: pathlib.Path) -> dict[str, dict]:
  return json.loads((folder / "golden.json").read_text())["cases"]


def errors(folder: pathlib.Path, name: str, dtype) -> dict[str, float]:
  """Of each stored output the largest error; of each gradient, relative to its largest entry or 1."""
  kind, case = json.loads((folder / "golden.json").read_text())["kind"], cases(folder)[name]
  arrays = {key: value for key, value in load_file(folder / case["file"]).items() if not key.startswith("f32/")}

  def among(prefix):
    return {key.removeprefix(prefix): jnp.asarray(x, dtype) for key, x in arrays.items() if key.startswith(prefix)}

  forward, cotangents = KINDS[kind](case, dtype), among("cot/")

  @jax.jit
  def run(inputs, params):
    def loss(inputs, params):
      outputs = forward(inputs, params)
      return sum(jnp.sum(cotangents[key] * outputs[key]) for key in case["loss_outputs"]), outputs

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(inputs, params)

  (_, outputs), (to_inputs, to_params) = run(among("in/"), among("param/"))
  found = {f"out/{key}": outputs[key] for key in case["outputs"]}
  found |= {f"grad/in/{key}": x for key, x in to_inputs.items()}
  found |= {f"grad/param/{key}": x for key, x in to_params.items()}
  assert {key for key in arrays if key.startswith(("out/", "grad/"))} == set(found)
  result = {}
  for key, x in found.items():
    assert x.shape == arrays[key].shape, (key, x.shape, arrays[key].shape)
    scale = max(1, np.abs(arrays[key]).max()) if key.startswith("grad/") else 1
    result[key] = float(np.abs(np.asarray(x, np.float64) - arrays[key]).max() / scale)
  return result


def sublayer(params, s: int, x):
  """F_s, with its norm: of attention, for even s, the mean over all positions so far stands in."""
  u = _rms(x) * params[f"norm.{s}"]
  if s % 2 == 0:
    u = jnp.cumsum(u, axis=1) / jnp.arange(1, u.shape[1] + 1, dtype=u.dtype)[:, None]
  return jnp.tanh(u @ params[f"w.{s}"]) @ params[f"v.{s}"]


def _rms(x):
  return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)


def build(dtype, num_blocks: int, width: int, **keys):
  """(configuration, the connection of each block), for stand-ins of a width."""
  cfg = models.config(mudd=True, base_num_decoder_layers=max(num_blocks, 1), base_emb_dim=width, **keys)
  cfg = changed(cfg, dtype=np.dtype(dtype), weight_dtype=np.dtype(dtype))
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  family, blocks = connections.family(cfg), range(1, num_blocks + 1)
  ends = ({"starts": i == 1, "finishes": i == num_blocks} for i in blocks)
  return cfg, [family.build(cfg, (i,), mesh, nnx.Rngs(0), **end) for i, end in zip(blocks, ends)]


def set_parameters(module: nnx.Module, values: dict) -> None:
  found = {".".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.state(module, nnx.Param))}
  assert found.keys() == values.keys(), (found.keys(), values.keys())
  for path, x in found.items():
    *parents, last = path.split(".")
    owner = module
    for parent in parents:
      owner = getattr(owner, parent)
    assert x.get_value().shape == values[path].shape, (path, x.get_value().shape, values[path].shape)
    setattr(owner, last, nnx.Param(values[path]))


def streams_op(connection, inputs):
  """(M as a sublayer reads it, the streams after the sublayer)."""
  carry = dataclasses.replace(connection.start(inputs["f"]), streams=tuple(jnp.moveaxis(inputs["streams"], 2, 0)))
  m = connection.sublayer_input("attention", connection.attention, carry, after=lambda carry: carry.streams)
  return m, jnp.stack(m + inputs["f"], axis=2)


def run_sublayers(connection, number: int, carry, params, outputs: dict):
  """The carry after one block of stand-ins. Stores what they read and what they return."""

  def block(_, carry, __):
    x = connection.read(carry)
    for s in (2 * number, 2 * number + 1):
      outputs[f"read.{s}"], outputs[f"f.{s}"] = x.read, sublayer(params, s, x.read)
      x = x + outputs[f"f.{s}"]
    return connection.write(x), None, None

  return connection.through(block, None, carry, None)[0]


def streams_model(blocks: list, embedding, params) -> dict:
  """Outputs of a model of stand-in sublayers, with the connection of each block around them."""
  outputs, before = {}, []
  for connection in blocks:
    for name in ("attention", "feed_forward"):
      weights = getattr(connection, name)
      setattr(connection, name, _recording(weights, before))
  carry = blocks[0].start(embedding)
  for number, connection in enumerate(blocks):
    carry = run_sublayers(connection, number, carry, params, outputs)
  outputs["hidden"], *_ = blocks[-1].finish(carry)
  outputs["final"] = _rms(outputs["hidden"]) * params["final_norm"]
  after = [*before[1:], carry.streams]
  return outputs | {f"streams.{s}": jnp.stack(x, axis=2) for s, x in enumerate(after)}


def _recording(weights: Callable, before: list) -> Callable:
  def record(streams, s):
    before.append(streams)
    return weights(streams, s)

  return record


def hyper_connections(case: dict, dtype) -> Callable:
  def weights_of(params, end: str = "") -> dict:
    names = {"hc_norm": "norm.scale", "hc_norm_bias": "norm.bias"}
    values = {names.get(key, key): params[key + end] for key in HYPER if key + end in params}
    return values | ({"w_beta": values["w_beta"][:, None]} if "w_beta" in values else {})

  keys = {
    "depth_connection": "hyper_connections",
    "mudd_expansion_rate": case["n"],
    "mudd_hyper_end": "sum",
    "mudd_dynamic": case["variant"] != "static",
    # The other code has no epsilon in its RMSNorm.
    "normalization_layer_epsilon": 0.0,
  }
  if case["variant"] == "paper":
    keys["mudd_hyper_norm"] = "layer"

  def op(inputs, params):
    _, [connection] = build(dtype, 1, inputs["f"].shape[-1], **keys)
    set_parameters(connection.attention, weights_of(params))
    m, written = streams_op(connection, inputs)
    _, beta = connection.attention(jnp.moveaxis(inputs["streams"], 2, 0), 0)
    shape = (*written.shape[:2], 1)
    beta = jnp.concatenate([jnp.broadcast_to(b, shape) for b in beta], axis=-1)
    return {"read": m.read, "carried": jnp.stack(m.carried, axis=2), "beta": beta, "written": written}

  def model(inputs, params):
    _, blocks = build(dtype, case["sublayers"] // 2, inputs["embedding"].shape[-1], **keys)
    for i, connection in enumerate(blocks):
      set_parameters(connection.attention, weights_of(params, f".{2 * i}"))
      set_parameters(connection.feed_forward, weights_of(params, f".{2 * i + 1}"))
    return streams_model(blocks, inputs["embedding"], params)

  return op if "op" in case else model


HYPER = ("static_alpha", "static_beta", "w_alpha", "w_beta", "alpha_scale", "beta_scale", "hc_norm", "hc_norm_bias")
MANIFOLD = ("phi_pre", "phi_post", "phi_res", "alpha", "b_pre", "b_post", "b_res", "mhc_norm")


def mhc(case: dict, dtype) -> Callable:
  if case.get("op") == "sinkhorn":
    steps_of = SINKHORN_OF[case["variant"]]
    return lambda inputs, _: {f"m.{steps}": steps_of(inputs["logits"], steps, EPSILON) for steps in case["iters"]}
  n = case["n"]

  def weights_of(params, end: str = "") -> dict:
    values = {key: params[key + end] for key in MANIFOLD if key + end in params}
    for key in ("phi_pre", "phi_post", "phi_res"):
      values[key] = values[key].reshape(n, -1, values[key].shape[-1])
    values["b_res"] = values["b_res"].reshape(-1)
    if "mhc_norm" in values:
      values["norm_scale"] = values.pop("mhc_norm").reshape(n, -1)
    return values

  keys = {
    "depth_connection": "mhc",
    "mudd_expansion_rate": n,
    "mudd_mhc_mixing": case["variant"],
    "mudd_mhc_steps": case["iters"],
    "mudd_mhc_end": "weighted" if case["variant"] == "deepseek" else "mean",
    "normalization_layer_epsilon": EPSILON,
  }

  def op(inputs, params):
    _, [connection] = build(dtype, 1, inputs["f"].shape[-1], **keys)
    set_parameters(connection.attention, weights_of(params))
    m, written = streams_op(connection, inputs)
    w, beta = connection.attention(jnp.moveaxis(inputs["streams"], 2, 0), 0)
    mixing = w[..., 1:, :]  # [target, source]
    if case["h_res_index"] == "[source, target]":
      mixing = mixing.swapaxes(-1, -2)
    outputs = {"h_post": jnp.concatenate(beta, axis=-1), "h_res": mixing}
    return outputs | {"read": m.read, "written": written}

  def model(inputs, params):
    _, blocks = build(dtype, case["sublayers"] // 2, inputs["embedding"].shape[-1], **keys)
    for i, connection in enumerate(blocks):
      set_parameters(connection.attention, weights_of(params, f".{2 * i}"))
      set_parameters(connection.feed_forward, weights_of(params, f".{2 * i + 1}"))
    if "head_phi" in params:
      head = {"phi": params["head_phi"].reshape(n, -1, n), "alpha": params["head_alpha"], "b": params["head_b"]}
      set_parameters(blocks[-1].head, head)
    return streams_model(blocks, inputs["embedding"], params)

  return op if "op" in case else model


def denseformer(case: dict, dtype) -> Callable:
  keys = {
    "mudd_ways": 1,
    "mudd_dynamic": False,
    "mudd_source_dilation": case["dilation"],
    "mudd_block_period": case["period"],
  }

  def model(inputs, params):
    _, blocks = build(dtype, case["blocks"], inputs["embedding"].shape[-1], **keys)
    for i, connection in enumerate(blocks):
      if connection.depth_aggregate is not None:
        set_parameters(connection.depth_aggregate, {"a": params[f"dwa.{i - 1}"][None]})
    if blocks[-1].final_depth_aggregate is not None:
      set_parameters(blocks[-1].final_depth_aggregate, {"a": params[f"dwa.{len(blocks) - 1}"][None]})
    outputs, carry = {}, blocks[0].start(inputs["embedding"])
    for i, connection in enumerate(blocks):

      def block(params, number, sums, output, _, connection=connection, i=i):
        x = mixed = connection.read(number, sums, output)
        for s in (2 * i, 2 * i + 1):
          x = x + sublayer(params, s, x)
        return connection.write(x), x, (mixed, x)

      carry, (mixed, outputs[f"block.{i}"]) = connection.through(block, params, carry, None)
      if i:
        outputs[f"mixed.{i - 1}"] = mixed
    outputs[f"mixed.{len(blocks) - 1}"], *_ = blocks[-1].finish(carry)
    outputs["final"] = _rms(outputs[f"mixed.{len(blocks) - 1}"]) * params["final_norm"]
    return outputs

  return model


def attnres(case: dict, dtype) -> Callable:
  keys = {"depth_connection": "attnres", "normalization_layer_epsilon": EPSILON}

  def weights_of(carry, s: int, count: int):
    return jax.nn.softmax(carry.sources.take_logits(s, 1, count)[0][:, 0], axis=0)

  def op(inputs, params):
    sources = [inputs[f"source.{j}"] for j in range(len(inputs))]
    s = len(sources) - 1
    _, blocks = build(dtype, len(sources), sources[0].shape[-1], **keys)
    connection, rows = blocks[0], np.arange(2 * len(sources) + 1)[:, None] == s
    set_parameters(connection.depth_queries, {key: rows * params[key] for key in ("query", "key_norm")})
    carry = connection.start(sources[0])
    for number, source in enumerate(sources):
      carry = connection.put_newest(dataclasses.replace(carry, newest=source), number)
    (mixed,), carry = connection.mix(["x"], carry, s)
    if "output_norm" in params:
      mixed = _rms(mixed) * params["output_norm"]
    return {"mixed": mixed, "weights": weights_of(carry, s, len(sources))}

  def model(inputs, params):
    sublayers = case["sublayers"]
    # Blocks that are longer than the model are one block, as those of its length are.
    size = min(case["block_sublayers"], sublayers)
    _, blocks = build(dtype, sublayers // 2, inputs["embedding"].shape[-1], **keys, mudd_attnres_block=size)
    set_parameters(blocks[0].depth_queries, {key: params[key] for key in ("query", "key_norm")})
    outputs, mix = {}, attnres_connection.AttnResConnection.mix

    def recorded(self, readers, carry, s):
      streams, carry = mix(self, readers, carry, s)
      (outputs[f"mixed.{s}"],) = streams
      outputs[f"weights.{s}"] = weights_of(carry, s, len(carry.sources.sources))
      return streams, carry

    carry = blocks[0].start(inputs["embedding"])
    for number, connection in enumerate(blocks):
      connection.mix = functools.partial(recorded, connection)
      carry = run_sublayers(connection, number, carry, params, outputs)
    hidden, *_ = blocks[-1].finish(carry)
    return outputs | {"final": _rms(hidden) * params["final_norm"]}

  return op if "op" in case else model


def dca(case: dict, dtype) -> Callable:
  epsilon = float(np.finfo(np.dtype(dtype)).eps)  # PyTorch's default
  keys = {"depth_connection": "dca", "normalization_layer_epsilon": epsilon}

  def norm(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)

  def op(inputs, params):
    number, ways = case["sources"], case["outputs_o"]
    cfg, blocks = build(dtype, number, inputs["source.0"].shape[-1], **keys)
    connection, site = blocks[0], Site(number - 1, tuple(range(number)), "qkv"[:ways])
    at = jnp.arange(3 * number + 1)[:, None] - 3 * site.block
    w = sum(jnp.where(at == o, params["grn_w"][o], 0) for o in range(ways))
    scale = jnp.broadcast_to(params["grn_norm"], (number + 1, len(params["grn_norm"])))
    set_parameters(connection.depth_queries, {"w": w, "key_norm": scale})
    module = StaticWeights(cfg, site)
    set_parameters(module, {"b": jnp.swapaxes(params["grn_b"], 1, 2)})
    carry = connection.start(inputs["source.0"])
    for j in range(number):
      carry = connection.put_newest(dataclasses.replace(carry, newest=inputs[f"source.{j}"]), j)
    return {
      "mixed": jnp.stack(connection.mix(site.streams, carry, site.block, module, connection.reading(site.block))[0])
    }

  def model(inputs, params):
    number, k = case["blocks"], case["past_layers_k"]
    chosen = {"mudd_dca_sources": "first_and_last", "mudd_dca_k": k} if 2 * k <= number else {}
    _, blocks = build(dtype, number, inputs["embedding"].shape[-1], **keys, **chosen)
    ends = [*range(number), "final"]
    w, scale = (
      jnp.concatenate([jnp.atleast_2d(params[f"{key}.{end}"]) for end in ends]) for key in ("grn_w", "grn_norm")
    )
    set_parameters(blocks[0].depth_queries, {"w": w, "key_norm": scale})
    for end, connection in zip(ends, blocks):
      set_parameters(connection.depth_aggregate, {"b": jnp.swapaxes(params[f"grn_b.{end}"], 1, 2)})
    set_parameters(blocks[-1].final_depth_aggregate, {"b": jnp.swapaxes(params["grn_b.final"], 1, 2)})
    outputs, carry = {}, blocks[0].start(inputs["embedding"])
    for i, connection in enumerate(blocks):

      def block(_, carry, __, connection=connection, i=i):
        x = connection.read(carry)
        streams = {"q": x.q, "k": x.k, "v": x.v}
        outputs.update({f"{name}.{i}": stream for name, stream in streams.items()})
        read = sum(_rms(x) * params[f"norm_{name}.{i}"] @ params[f"w_{name}.{i}"] for name, x in streams.items())
        length = jnp.arange(1, read.shape[1] + 1, dtype=read.dtype)[:, None]
        x = x + jnp.tanh(jnp.cumsum(read, axis=1) / length) @ params[f"w_o.{i}"]
        hidden = jnp.tanh(norm(x.read) * params[f"ff_norm.{i}"] @ params[f"w_1.{i}"])
        x = x + hidden @ params[f"w_2.{i}"]
        outputs[f"block.{i}"] = x.arrays
        return connection.write(x), None, None

      carry, _ = connection.through(block, None, carry, None)
    outputs["hidden"], *_ = blocks[-1].finish(carry)
    return outputs | {"final": norm(outputs["hidden"]) * params["final_norm"]}

  return op if "op" in case else model


KINDS = {
  "attnres_block": attnres,
  "attnres_full": attnres,
  "dca": dca,
  "denseformer": denseformer,
  "hyper_connections": hyper_connections,
  "mhc": mhc,
}


def main(root: pathlib.Path, names: list[str]) -> None:
  """Prints the errors in float64 of cases FOLDER/NAME, as JSON."""
  print(json.dumps({name: errors(root / name.split("/")[0], name.split("/")[1], "float64") for name in names}))


if __name__ == "__main__":
  plugin.install()
  main(pathlib.Path(sys.argv[1]), sys.argv[2:])
