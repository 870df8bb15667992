"""What a model loses where parts of its dynamic depth weights are replaced."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import tqdm

from maxtext_mudd import connections
from maxtext_mudd.analyze import measurement
from maxtext_mudd.analyze.figures import by_stream, next_tokens, token_losses
from maxtext_mudd.analyze.measurement import Batch, Named
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.connections import kept
from maxtext_mudd.inference import forward, inspection


class Ablation:
  """Losses of a model with other depth weights, on the same tokens.

  Attributes:
    definition: as of `measurement.Figure`.
  """

  definition = (
    "increase of the mean cross-entropy of the next token, in nats, where some weights of an aggregate DA_i are the "
    "same for all tokens: their static part, with --to=mean their mean over these tokens, with --to=zero 0. Source 0 "
    "is the embedding, source j the output of block j, -1, -2, ... are extra embeddings. `source`: the weights of one "
    "source, in all streams; `stream`: those of one stream; `aggregate`: all of DA_i; `everything`: all of all. Where "
    "the loss is not finite there is no increase"
  )

  def __init__(self, request, config, tokenizer):
    self.plan = connections.plan(config)
    if not self.plan.sites or connections.family(config).reads != "block":
      is_plain = config.depth_connection == "residual"
      raise ConfigError(
        "ablate needs a model that mixes block outputs (depth_connection=dense); this one has "
        f"{'no depth weights' if is_plain else f'depth_connection={config.depth_connection}'}."
      )
    if request.to != "zero" and not config.mudd_dynamic:
      raise ConfigError(
        f"ablate: the weights of this model are the same for all tokens (mudd_dynamic=False), so --to={request.to} "
        "changes nothing; use --to=zero."
      )
    self.to = request.to
    self.sites = [self.plan.sites[i] for i in sorted(self.plan.sites) if i <= self.plan.num_blocks]
    last = max(self.plan.sites)
    self.shape = (last + 1, len(kept.STREAMS), last + 1 - self.plan.oldest)

  def measure(self, model, data: Sequence[Batch], before_batch: Callable[[], None], name: str) -> dict[str, Named]:
    """The arrays of the figure.

    Args:
      before_batch: called before each batch; what it raises ends the measurement.
      name: of the progress bar.
    """
    cases = [("baseline", None, np.zeros(self.shape, bool)), *self._cases()]
    with tqdm.tqdm(total=(len(cases) + (self.to == "mean")) * len(data), desc=name) as progress:

      def each():
        for batch in data:
          before_batch()
          yield batch
          progress.update()

      values = np.full(self.shape, np.nan if self.to == "static" else 0, np.float32)
      if self.to == "mean":
        values = self._means(model, each)
      losses = []
      for _, _, replaced in cases:
        total, count = 0.0, 0
        for batch in each():
          of_tokens = np.asarray(_losses(model, replaced, values, *batch), np.float64)
          counts = np.asarray(next_tokens(batch))
          total, count = total + of_tokens[counts].sum(), count + counts.sum()
        losses.append(total / count)
        measurement.check_finite(losses[:1])  # with other weights a model may overflow; the array has NaN there
    increases = self._empty()
    for (kind, at, _), loss in zip(cases[1:], losses[1:]):
      increases[kind].values[at] = loss - losses[0] if np.isfinite(loss) else np.nan
    return increases | {"baseline": Named((), np.array(losses[0]))}

  def _cases(self) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """(name of the array, index in it, which weights are replaced) of each loss."""
    streams = self._streams()
    for row, site in enumerate(self.sites):
      i, columns = site.block, np.array(site.sources) - self.plan.oldest
      of_all_streams = slice(None)
      for column in columns:
        yield "source", (row, column), self._replaced(i, of_all_streams, column)
      for stream in site.streams if site.ways > 1 else ():
        yield "stream", (row, streams.index(stream)), self._replaced(i, kept.STREAMS.index(stream))
      yield "aggregate", (row,), self._replaced(i)
    yield "everything", (), np.ones(self.shape, bool)

  def _replaced(self, *at) -> np.ndarray:
    replaced = np.zeros(self.shape, bool)
    replaced[at] = True
    return replaced

  def _streams(self) -> list[str]:
    return [x for x in kept.STREAMS if any(x in site.streams for site in self.sites)]

  def _empty(self) -> dict[str, Named]:
    """Arrays of NaN, since not every DA has each source and stream."""
    number, streams, rows = self.plan.num_blocks, self._streams(), [site.block for site in self.sites]
    sources = [*range(self.plan.oldest, number + 1)]
    labels = {"aggregate": rows, "source": sources, "stream": streams}
    sizes = {"aggregate": len(rows), "source": len(sources), "stream": len(streams)}
    dims = {"source": ("aggregate", "source"), "stream": ("aggregate", "stream"), "aggregate": ("aggregate",)}
    dims["everything"] = ()
    return {
      name: Named(axes, np.full([sizes[x] for x in axes], np.nan), {x: labels[x] for x in axes})
      for name, axes in dims.items()
    }

  def _means(self, model, each: Callable) -> np.ndarray:
    """The mean of each weight over all tokens."""
    total, count = np.zeros(self.shape), 0
    for batch in each():
      sums, tokens = jax.device_get(_weight_sums(model, *batch))
      count += int(tokens)
      for stream, by_site in sums.items():
        for after, x in by_site.items():
          columns = np.array(self.plan.sites[after].sources) - self.plan.oldest
          total[after, kept.STREAMS.index(stream), columns] += x
    return (total / count).astype(np.float32)

  @staticmethod
  def summary(arrays) -> str:
    source = arrays["source"]
    largest = np.argmax(np.nan_to_num(source.values, nan=-np.inf))
    row, column = np.unravel_index(largest, source.values.shape)
    return (
      f"loss {arrays['baseline'].values:.4f}; {arrays['everything'].values:+.4f} with all weights replaced; most for "
      f"one source: {source.values[row, column]:+.4f}, source {source.labels['source'][column]} of "
      f"DA_{source.labels['aggregate'][row]}"
    )


@forward.pure
def _losses(model, replaced, values, *batch):
  """The loss of each next token [B,T]. A sum of them in float32 has too few digits for small differences."""
  logits, _ = inspection.observe(model, batch, {}, kept.Edit(replaced, values))
  return token_losses(logits, batch)


@forward.pure
def _weight_sums(model, *batch):
  _, arrays = inspection.observe(model, batch, {"weights": lambda x: x})
  is_token = batch[2] > 0
  sums = {
    stream: {after: (x * is_token[..., None]).sum((0, 1)) for after, x in by_site.items()}
    for stream, by_site in by_stream(arrays, "weights").items()
  }
  return sums, is_token.sum()
