"""Runs a model over sequences of a text, and adds up what a figure measures, so that memory does not grow with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any, Protocol

from flax import nnx
import jax
from jaxtyping import Array, Float, Int
import numpy as np
import tqdm

from maxtext_mudd.config import devices
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import forward, inspection

Batch = tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]  # tokens, positions, segments


@dataclasses.dataclass(frozen=True)
class Named:
  """An array with a name for each of its axes.

  Attributes:
    dims: names of the axes.
    values: the array; NaN where there is nothing.
    labels: by axis, what its entries stand for, where that is not 0, 1, 2, ...
  """

  dims: tuple[str, ...]
  values: Float[np.ndarray, "..."]
  labels: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)


class Figure(Protocol):
  """What is measured for one figure. It is built from (request, model, tokenizer), for each model.

  Attributes:
    definition: a sentence on what the arrays are.
    functions: by kind, what is kept of an array in the forward pass.
  """

  definition: str
  functions: Mapping[str, Callable[[Array], Any]]

  def sums(self, model: nnx.Module, logits: Float[Array, "B T V"], arrays: dict[str, Any], batch: Batch) -> Any:
    """What one batch adds: a pytree of arrays whose shapes do not depend on the batch. Compiled."""

  def added(self, found: Any) -> Any:
    """What is added over batches, from `sums` of one batch in float64. Optional; by default the sums themselves."""

  def arrays(self, sums: Any) -> dict[str, Named]:
    """The figure's arrays, from the sums over all batches, in float64."""


def batches(text: str, tokenizer, config, length: int, sequences: int, batch_size: int) -> Iterator[Batch]:
  """Cuts a text into sequences of BOS and the next tokens. The last one, and the last batch, are padded by segment 0.

  Raises:
    ConfigError: the sequences are longer than the context of the model, or the text has no tokens.
  """
  if length > config.max_target_length:
    raise ConfigError(f"--length={length} is more than the context, max_target_length={config.max_target_length}.")
  parts = devices.batch_parts(config)
  batch_size = -(-batch_size // parts) * parts
  tokens = tokenizer.encode(text, bos=False)
  if not tokens:
    raise ConfigError("--text has no tokens, or white space alone; name another text.")
  rows = [tokens[start : start + length - 1] for start in range(0, len(tokens), length - 1)][:sequences]
  for start in range(0, len(rows), batch_size):
    of_batch = np.zeros((batch_size, length), np.int32)
    segments = np.zeros_like(of_batch)
    for k, row in enumerate(rows[start : start + batch_size]):
      of_batch[k, : len(row) + 1] = [tokenizer.prefix_id, *row]
      segments[k, : len(row) + 1] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), of_batch.shape)
    yield of_batch, positions, segments


def totals(
  figure: Figure, model: nnx.Module, data: Sequence[Batch], before_batch: Callable[[], None], name: str
) -> Any:
  """The sums of a figure over all batches, in float64.

  Args:
    before_batch: called before each batch; what it raises ends the measurement.
    name: of the progress bar.
  """

  @forward.pure
  def sums(model, *batch):
    logits, arrays = inspection.observe(model, batch, figure.functions)
    return figure.sums(model, logits, arrays, batch)

  total = None
  for batch in tqdm.tqdm(data, desc=name):
    before_batch()
    of_batch = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums(model, *batch)))
    of_batch = getattr(figure, "added", lambda x: x)(of_batch)
    total = of_batch if total is None else jax.tree.map(np.add, total, of_batch)
  check_finite(total)
  return total


def check_finite(values: Any) -> None:
  """Raises ConfigError for NaN and infinity among the arrays of a pytree."""
  if not all(np.isfinite(x).all() for x in jax.tree.leaves(values)):
    raise ConfigError("the model computes values that are not finite; use a checkpoint from before its run diverged.")
