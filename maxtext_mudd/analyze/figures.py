"""The figures that one pass over a text measures."""

import functools
import itertools
import types
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from maxtext.common.common_types import MODEL_MODE_TRAIN
import numpy as np

from maxtext_mudd import blocks, connections
from maxtext_mudd.analyze.measurement import Figure, Named
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.connections.base import STREAMS

BINS = 4001  # of cosines from -1 to 1, for percentiles
BAND = (0.05, 0.95)
FIRST_POSITIONS = 2
SINKS = (".", "\n")
ORDER = ("x", *STREAMS, "m", "attention", "value", "ffn")


def _whole(x):
  return x


def by_stream(arrays: dict[str, Array], kind: str) -> dict[str, dict[int, Array]]:
  """Arrays of a kind: by stream or sublayer, and by the number of blocks before."""
  streams = {}
  for name, x in arrays.items():
    if name.startswith(f"{kind}/"):
      _, stream, after = name.split("/")
      streams.setdefault(stream, {})[int(after.removeprefix("da_"))] = x
  return streams


def block_inputs(arrays: dict[str, Array], number: int) -> dict[str, list[Array]]:
  """What each block reads, by stream. A block that reads one array as all its streams has it under each of them; a
  stream that a block does not read is zero."""
  streams = by_stream(arrays, "streams")
  one = streams.pop("x", {})
  nothing = jnp.zeros_like(next(x for name, x in arrays.items() if name.startswith("streams/")))
  of_blocks = {
    name: [by_block.get(k, one.get(k, nothing)) for k in range(number)]
    for name, by_block in streams.items()
    if any(k < number for k in by_block)  # not of what follows the last block alone
  }
  return in_order(of_blocks) or {"x": [one[k] for k in range(number)]}


def is_read(config, stream: str, number: int) -> bool:
  """Whether a block reads a stream."""
  return stream not in STREAMS or stream in blocks.streams_read(config, number)


def in_order(by_stream: dict[str, Any]) -> dict[str, Any]:
  """Sorted by stream or sublayer as in the paper; JAX returns dictionaries sorted by letter."""
  return {name: by_stream[name] for name in ORDER if name in by_stream}


class Similarity(Figure):
  """Fig. 6 of the paper."""

  definition = (
    "cosine of what block i and block i + 1 read, by stream, over all tokens, with BOS before each sequence: its mean, "
    "and its 5th and 95th percentile"
  )
  functions: ClassVar = {"streams": _whole}

  def __init__(self, request, config, tokenizer):
    self.config, self.number = config, blocks.num_blocks(config)
    if self.number < 2:
      raise ConfigError("similarity compares adjacent blocks, and the model has one block; use another figure.")

  def sums(self, model, logits, arrays, batch):
    is_token, statistics = batch[2] > 0, {}
    for stream, inputs in block_inputs(arrays, self.number).items():
      cosines = jnp.stack([cosine(x, y) for x, y in itertools.pairwise(inputs)])
      histogram = jax.vmap(functools.partial(_histogram, is_token=is_token))(cosines)
      statistics[stream] = {"sum": (cosines * is_token).sum((1, 2)), "histogram": histogram}
    return statistics

  def arrays(self, sums):
    sums = in_order(sums)
    counts = [of_stream["histogram"].sum(-1) for of_stream in sums.values()]
    means = [of_stream["sum"] / count for of_stream, count in zip(sums.values(), counts)]
    labels = {"stream": [*sums], "block": [*range(1, self.number)]}
    pairs = np.array(
      [[all(is_read(self.config, name, k) for k in (i, i + 1)) for i in labels["block"]] for name in sums]
    )
    ends = {f"percentile_{round(100 * q)}": [_quantile(x["histogram"], q) for x in sums.values()] for q in BAND}
    found = {name: np.where(pairs, np.stack(x), np.nan) for name, x in {"mean": means, **ends}.items()}
    return {name: Named(("stream", "block"), x, labels) for name, x in found.items()}

  @staticmethod
  def summary(arrays) -> str:
    mean = arrays["mean"]
    of_streams = (f"{name} {np.nanmean(x):.3f}" for name, x in zip(mean.labels["stream"], mean.values))
    return f"mean cosine of adjacent blocks' inputs: {', '.join(of_streams)}"


def cosine(x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T"]:
  """Of zero vectors it is zero."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return (x * y).sum(-1) / jnp.maximum(norms, 1e-30)


def _histogram(cosines: Float[Array, "B T"], is_token: Bool[Array, "B T"]) -> Float[Array, " bins"]:
  at = jnp.round((jnp.clip(cosines, -1, 1) + 1) / 2 * (BINS - 1)).astype(jnp.int32)
  return jnp.zeros(BINS).at[at].add(is_token.astype(jnp.float32))


def _quantile(histograms: Float[np.ndarray, "I bins"], q: float) -> Float[np.ndarray, " I"]:
  """The cosine below which a share q of the tokens lies, to 1/2000."""
  shares = np.cumsum(histograms, -1) / histograms.sum(-1, keepdims=True)
  return np.linspace(-1, 1, BINS)[(shares < q).sum(-1)]


class Heads(Figure):
  """Fig. 8 of the paper."""

  definition = (
    "share of (head, position) whose largest attention weight is on a token that is no sink: not at one of the first "
    "two positions, nor one of `sinks`; positions after the first two of each sequence"
  )

  def __init__(self, request, config, tokenizer):
    ids = {tokenizer.bos_id} - {None}
    for text in SINKS if request.sinks is None else request.sinks:
      token_ids = tokens_of(tokenizer, text)
      if not token_ids and request.sinks is not None:
        raise ConfigError(f"--sink={text!r} is no single token of the tokenizer; name texts that are.")
      ids |= token_ids
    self.ids = np.array(sorted(ids), np.int32)
    self.number = blocks.num_blocks(config)
    self.functions = {"attention": largest_key}

  def sums(self, model, logits, arrays, batch):
    tokens, positions, segments = batch
    is_sink = jnp.isin(tokens, self.ids) | (positions < FIRST_POSITIONS)
    counts = (segments > 0) & (positions >= FIRST_POSITIONS)
    by_block = {}
    for name, largest in arrays.items():
      block = int(name.removeprefix("attention/block_"))
      if block > self.number:  # of multi-token prediction
        continue
      on_sink = (largest < 0) | jnp.take_along_axis(is_sink[:, None], largest, axis=-1)
      active = (~on_sink * counts[:, None]).sum()
      by_block[block] = jnp.stack([active, counts.sum() * largest.shape[1]])
    if not by_block:
      raise ConfigError("heads: the model keeps no attention weights; its blocks have no softmax attention.")
    return by_block

  def arrays(self, sums):
    if not all(count for _, count in sums.values()):
      raise ConfigError(f"heads needs sequences of more than {FIRST_POSITIONS} tokens; name a longer text or --length.")
    shares = np.array([active / count for active, count in sums.values()])
    return {"active": Named(("block",), shares, {"block": [*sums]}), "sinks": Named(("token",), self.ids)}

  @staticmethod
  def summary(arrays) -> str:
    return f"share of active heads: {arrays['active'].values.mean():.4f}, mean over blocks"


def largest_key(weights: Float[Array, "B H T T"]) -> Int[Array, "B H T"]:
  """The position of the largest weight; -1 where a learned sink, which is no token, has more (gpt_oss)."""
  of_learned_sink = 1 - weights.sum(-1)
  return jnp.where(of_learned_sink > weights.max(-1), -1, jnp.argmax(weights, axis=-1))


def tokens_of(tokenizer, text: str) -> set[int]:
  """The tokens that stand for a text: at the start, and after a letter, where a tokenizer may have another one."""
  before = tokenizer.encode("a", bos=False)
  after_a = tokenizer.encode(f"a{text}", bos=False)
  encodings = [tokenizer.encode(text, bos=False)]
  if after_a[: len(before)] == before:
    encodings.append(after_a[len(before) :])
  return {tokens[0] for tokens in encodings if len(tokens) == 1}


class Attention(Figure):
  """Figs. 10 and 11 of the paper."""

  definition = "attention weights of all heads of one block, for the first sequence of the text"
  functions: ClassVar = {"attention": _whole}

  def __init__(self, request, config, tokenizer):
    number = blocks.num_blocks(config)
    self.block = request.block or (number + 1) // 2
    if self.block > number:
      raise ConfigError(f"--block={self.block}: the model has {number} blocks; name one of 1 to {number}.")
    self.tokenizer = tokenizer

  def sums(self, model, logits, arrays, batch):
    name = f"attention/block_{self.block:03d}"
    if name not in arrays:
      raise ConfigError(f"--block={self.block} has no softmax attention; name another block.")
    return {"weights": arrays[name][0], "tokens": batch[0][0], "length": (batch[2][0] > 0).sum()}

  def arrays(self, sums):
    length, tokens = int(sums["length"]), sums["tokens"].astype(int)
    texts = [self.tokenizer.decode([x]) for x in tokens[:length]]
    maps = sums["weights"][:, :length, :length]
    labels = {"head": [*range(1, len(maps) + 1)], "query": texts, "key": texts}
    return {f"block_{self.block:03d}": Named(("head", "query", "key"), maps, labels)}

  @staticmethod
  def summary(arrays) -> str:
    ((name, maps),) = arrays.items()
    on_first = maps.values[:, 1:, 0].mean()
    return f"{name}: {len(maps.values)} heads; mean weight on the first token {on_first:.3f}"


def depth_weights(arrays: dict[str, Array], number: int) -> tuple[dict[str, Array], dict[str, Array]]:
  """The weights [B,T,N] of all aggregates of blocks 1 to `number`, and the norms [B,T,N] of their sources, both by
  "STREAM/i"; without those of multi-token prediction."""
  names = [x.removeprefix("weights/") for x in arrays if x.startswith("weights/")]
  names = {x: x.replace("da_", "") for x in names if int(x.split("/da_")[1]) <= number}
  if any(x.startswith("written/") for x in arrays):
    return _unfolded(arrays, number)
  weights = {short: arrays[f"weights/{x}"] for x, short in names.items()}
  weights = {name: x if x.ndim == 3 else x.mean(2) for name, x in weights.items()}  # over the heads of AttnRes
  return weights, {short: arrays[f"norms/{x}"] for x, short in names.items()}


def _unfolded(arrays: dict[str, Array], number: int) -> tuple[dict[str, Array], dict[str, Array]]:
  """`depth_weights` of n residual streams. A sublayer reads the embedding and the outputs of all sublayers before it,
  each with a weight that is the sum over all paths of products of W and β."""
  embedding = arrays["history/000"][:, :, 0]
  paths = jnp.ones((*arrays["history/000"].shape[:3], 1))  # [B,T,n,N]: weight of each source in each residual stream
  of_sources = [jnp.linalg.norm(embedding.astype(jnp.float32), axis=-1)[..., None]]
  weights, norms = {}, {}
  for after in range(number):
    for sublayer in ("attention", "ffn"):
      name = f"{sublayer}/da_{after:03d}"
      w, beta = arrays[f"weights/{name}"], arrays[f"written/{name}"]
      mixed = jnp.einsum("btij,btjs->btis", w, paths, precision=jax.lax.Precision.HIGHEST)
      short = name.replace("da_", "")
      weights[short], norms[short] = mixed[:, :, 0], jnp.concatenate(of_sources, -1)
      paths = jnp.concatenate([mixed[:, :, 1:], beta[..., None]], -1)
      of_sources.append(arrays[f"norms/{name}"])
  of_streams = arrays[f"weights/x/da_{number:03d}"]
  weights[f"x/{number:03d}"] = jnp.einsum("btj,btjs->bts", of_streams, paths, precision=jax.lax.Precision.HIGHEST)
  norms[f"x/{number:03d}"] = jnp.concatenate(of_sources, -1)
  return weights, norms


class DepthWeights(Figure):
  """Figs. 12 and 13 of the paper."""

  definition = (
    "mean and standard deviation over tokens, with BOS before each sequence, of the weight of each source in each "
    "aggregate DA_i, times the mean norm of the source as it is mixed. Source 0 is the embedding, and -1, -2, ... are "
    "extra embeddings. Source j is the output of block j; of DeepCrossAttention what block j adds, or the sum of "
    "middle sources up to it, and weights are means over channels; of attnres, mhc and hyper_connections the output of "
    "sublayer j, or with mudd_attnres_block the j-th sum of outputs. Weights of several heads are their mean. Weights "
    "of several residual streams are products of W and of the entries of beta, summed over all paths from the source"
  )
  functions: ClassVar = dict.fromkeys(("weights", "written", "norms", "history"), _whole)

  def __init__(self, request, config, tokenizer):
    if config.depth_connection == "residual":
      raise ConfigError("weights: the model has no depth weights; name one with depth connections.")
    self.plan = connections.plan(config)

  def sums(self, model, logits, arrays, batch):
    is_token = batch[2] > 0
    count = is_token.sum()
    share = (is_token / jnp.maximum(count, 1))[..., None]
    weights, norms = depth_weights(arrays, self.plan.num_blocks)
    statistics = {"count": count, "weights": {}}
    for name, x in weights.items():
      mean = (x * share).sum((0, 1))
      variance = (jnp.square(x - mean) * share).sum((0, 1))
      statistics["weights"][name] = {"mean": mean, "variance": variance, "norm": (norms[name] * share).sum((0, 1))}
    return statistics

  @staticmethod
  def added(statistics):
    """Sums that can be added over batches. In float32, squares of weights would leave no digits of a small variance."""
    count = statistics["count"]
    weights = {
      name: {
        "sum": count * x["mean"],
        "squares": count * (x["variance"] + np.square(x["mean"])),
        "norm": count * x["norm"],
      }
      for name, x in statistics["weights"].items()
    }
    return statistics | {"weights": weights}

  def arrays(self, sums):
    places = {name: self._place(name, len(x["sum"])) for name, x in sums["weights"].items()}
    streams = sorted({stream for stream, _, _ in places.values()}, key=ORDER.index)
    rows = sorted({after for _, after, _ in places.values()})
    sources = sorted({number for _, _, numbers in places.values() for number in numbers})
    names = ("mean", "deviation", "source_norm")
    values = {name: np.full((len(streams), len(rows), len(sources)), np.nan) for name in names}
    for name, (stream, after, numbers) in places.items():
      at = streams.index(stream), rows.index(after), np.searchsorted(sources, numbers)
      of_tokens = {key: x / sums["count"] for key, x in sums["weights"][name].items()}
      deviation = np.sqrt(np.maximum(of_tokens["squares"] - of_tokens["sum"] ** 2, 0))
      values["mean"][at] = of_tokens["sum"] * of_tokens["norm"]
      values["deviation"][at] = deviation * of_tokens["norm"]
      values["source_norm"][at] = of_tokens["norm"]
    labels = {"stream": streams, "aggregate": rows, "source": sources}
    return {name: Named(("stream", "aggregate", "source"), x, labels) for name, x in values.items()}

  def _place(self, name: str, number: int) -> tuple[str, int, tuple[int, ...]]:
    """(stream, i, numbers of the sources) of the weights of one stream of DA_i."""
    stream, after = name.split("/")
    site = self.plan.sites.get(int(after))
    return stream, int(after), site.sources if site else tuple(range(number))

  @staticmethod
  def summary(arrays) -> str:
    mean, shares = arrays["mean"], []
    for stream, values in zip(mean.labels["stream"], np.abs(mean.values)):
      total = np.nansum(values, -1)
      newest = np.array([row[~np.isnan(row)][-1] if (~np.isnan(row)).any() else np.nan for row in values])
      shares.append(f"{stream} {np.nanmean(1 - newest / np.where(total > 0, total, np.nan)):.3f}")
    return f"share of the mean weight on older sources than the newest: {', '.join(shares)}"


class Lens(Figure):
  """The logit lens, for each stream."""

  definition = (
    "mean cross-entropy of the next token, in nats, where the final norm and the output head read the input of a block "
    "(or of its attention or FFN where these have inputs of their own) in place of the last hidden state; "
    "blocks_before is the number of blocks before it; after all of them it is the last hidden state"
  )
  functions: ClassVar = {"streams": _whole}

  def __init__(self, request, config, tokenizer):
    self.config, self.number = config, blocks.num_blocks(config)

  def sums(self, model, logits, arrays, batch):
    losses, last = {}, by_stream(arrays, "streams")
    for stream, inputs in block_inputs(arrays, self.number).items():
      # One after another, since logits [B,T,V] are large.
      losses[stream] = jax.lax.map(lambda x: self._loss(model, x, batch), jnp.stack(inputs))
    final = next(by_block[self.number] for name, by_block in last.items() if self.number in by_block and name != "m")
    return {"losses": losses, "final": self._loss(model, final, batch), "count": next_tokens(batch).sum()}

  def _loss(self, model, hidden, batch):
    logits = model.decoder.apply_output_head(model.token_embedder, hidden, True, MODEL_MODE_TRAIN)
    return (token_losses(logits.astype(jnp.float32), batch) * next_tokens(batch)).sum()

  def arrays(self, sums):
    losses = in_order(sums["losses"])
    values = np.stack([np.append(x, sums["final"]) for x in losses.values()]) / sums["count"]
    labels = {"stream": [*losses], "blocks_before": [*range(self.number + 1)]}
    for row, name in enumerate(losses):
      values[row, [not is_read(self.config, name, k + 1) for k in range(self.number)] + [False]] = np.nan
    return {"loss": Named(("stream", "blocks_before"), values, labels)}

  @staticmethod
  def summary(arrays) -> str:
    values = arrays["loss"].values
    return f"loss of the head: {values[0, 0]:.3f} on the embedding, {values[0, -1]:.3f} on the last hidden state"


def next_tokens(batch) -> Bool[Array, "B T"]:
  """Which tokens have a next one in their sequence."""
  segments = batch[2]
  return jnp.pad(segments[:, 1:] > 0, [(0, 0), (0, 1)])


def token_losses(logits: Float[Array, "B T V"], batch) -> Float[Array, "B T"]:
  """The cross-entropy of the next token in nats; where there is none, of some token."""
  targets = jnp.roll(batch[0], -1, axis=1)
  return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


FIGURES = types.MappingProxyType(
  {"similarity": Similarity, "heads": Heads, "attention": Attention, "weights": DepthWeights, "lens": Lens}
)
