"""A model of MaxText as EleutherAI's lm-evaluation-harness sees one."""

from collections.abc import Callable, Sequence
import logging

import datasets
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
import numpy as np
import tqdm

from maxtext_mudd.config import devices
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import forward, generation
from maxtext_mudd.inference.tokens import Tokenizer

_logger = logging.getLogger(__name__)
_GENERATION_KEYS = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}
_NUMBERS = {"temperature": float, "top_p": float} | dict.fromkeys(
  ("top_k", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"), int
)


class MaxTextLM(TemplateLM):
  """Log-likelihoods of targets after contexts, of whole texts, and what greedy decoding or sampling goes on with.

  The harness splits texts into contexts and targets, and long texts into windows. Contexts that are too long lose their
  beginning.
  """

  def __init__(
    self,
    model: nnx.Module,
    config,
    tokenizer: Tokenizer,
    batch_size: int = 8,
    before_batch: Callable[[], None] = lambda: None,
  ):
    """
    Args:
      model, config: as of `from_pretrained`.
      batch_size: rows of a batch; the next multiple of what the mesh divides them into is taken.
      before_batch: called before each batch; what it raises ends the evaluation.
    """
    super().__init__()
    self.model, self.config, self.words = model, config, tokenizer
    self.tokenizer = tokenizer.hugging_face  # the harness writes its special tokens down
    rows = devices.batch_parts(config)
    self.batch_size = -(-batch_size // rows) * rows
    self.max_length, self._before_batch = config.max_target_length, before_batch
    self._batches_drawn = 0
    self._warned_of_spanning = False

  @property
  def eot_token_id(self) -> int:
    return self.words.prefix_id if self.words.eos_id is None else self.words.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self.words.prefix_id

  def get_model_info(self) -> dict:
    """What the harness writes down of the model."""
    sizes = [x.size for x in jax.tree.leaves(nnx.state(self.model, nnx.Param))]
    return {"model_num_parameters": sum(sizes), "model_dtype": str(self.config.dtype)}

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    return self.words.encode(string, self.words.add_bos if add_special_tokens is None else add_special_tokens)

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of the target after it.

    The harness encodes both together and takes as target what is beyond the context's number of tokens. Where a token
    spans both, nothing may be left, which its model for PyTorch asserts against (its issue 1297). The target is encoded
    alone then, as its pull request 4055 does.
    """
    context_tokens, target = super()._encode_pair(context, continuation)
    if target:
      return context_tokens, target
    spaces = context[len(context.rstrip()) :]  # which the harness moves to the target
    target = self.tok_encode(spaces + continuation, add_special_tokens=False)
    if target and not self._warned_of_spanning:
      self._warned_of_spanning = True
      _logger.warning(
        "the target %r after %r: one token spans both, so the target is encoded alone, here and wherever this is so.",
        continuation[:40],
        context[-40:],
      )
    return context_tokens, target

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_
  ) -> list[tuple[float, bool]]:
    """Of each target after its context: the sum of log-probabilities, and whether each token is the most probable.

    Args:
      requests: texts, which are for messages; tokens of the context; tokens of the target. Where the context has none,
        as one of white space, which the harness moves to the target, the prefix stands for it.

    Raises:
      ConfigError: a target has no tokens, or more than the context.
    """
    rows, targets = [], []
    for texts, context, target in requests:
      if not 0 < len(target) <= self.max_length:
        raise ConfigError(
          f"the target {texts[1][:40]!r} has {len(target)} tokens; it can have 1 to {self.max_length}, the context "
          "(max_target_length)."
        )
      context = context or [self.prefix_token_id]
      rows.append(np.asarray([*context, *target][-(self.max_length + 1) :], np.int32))
      targets.append(len(target))
    found = [(0.0, False)] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # the longest first: memory runs out early
    for start in tqdm.trange(0, len(order), self.batch_size, desc="log-likelihoods", disable=disable_tqdm):
      self._before_batch()
      batch = order[start : start + self.batch_size]
      scores, greedy = self._score([rows[row] for row in batch])
      for number, row in enumerate(batch):
        end = len(rows[row]) - 1
        own = slice(end - targets[row], end)
        found[row] = (float(scores[number, own].sum(dtype=np.float64)), bool(greedy[number, own].all()))
    return found

  def _score(self, rows: Sequence[np.ndarray]) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Log-probability of each token but the first of each row, and whether it is the most probable one."""
    length = min(generation.padded_length(len(rows[0]) - 1), self.max_length)
    tokens = np.zeros((self.batch_size, length + 1), np.int32)
    lengths = np.zeros((self.batch_size, 1), np.int32)
    for number, row in enumerate(rows):
      tokens[number, : len(row)], lengths[number] = row, len(row) - 1
    segment_ids = (np.arange(length) < lengths).astype(np.int32)
    return jax.device_get(log_likelihoods(self.model, tokens[:, :-1], tokens[:, 1:], segment_ids))

  def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
    """Of whole texts: each token is predicted once, after as many tokens before it as a window has."""
    windows, owners = [], []
    for number, (text,) in enumerate(request.args for request in requests):
      # The prefix stands where a BOS would.
      tokens = self.tok_encode(text, add_special_tokens=False)
      for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
        windows.append((("", text), *utils.make_disjoint_window(window)))
        owners.append(number)
    found = [0.0] * len(requests)
    for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
      found[number] += score
    return found

  def check_generation(self, asked: dict) -> None:
    """Raises ConfigError where `generation_kwargs` has a key that is not known, or a value that cannot be had."""
    _Generation.of(asked, self.config)

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    """What follows each context, up to the first stop sequence or EOS.

    Raises:
      ConfigError: as `check_generation`.
    """
    chosen = [_Generation.of(request.args[1], self.config) for request in requests]
    prompts = [self._prompt(request.args[0], each) for request, each in zip(requests, chosen)]
    order = sorted(range(len(requests)), key=lambda row: (chosen[row].key, -len(prompts[row])))
    batches = []
    for row in order:  # of one kind each
      if not batches or len(batches[-1]) == self.batch_size or chosen[batches[-1][0]].key != chosen[row].key:
        batches.append([])
      batches[-1].append(row)
    found = [""] * len(requests)
    for batch in tqdm.tqdm(batches, desc="generations", disable=disable_tqdm):
      self._before_batch()
      for row, text in zip(batch, self._generate([prompts[row] for row in batch], chosen[batch[0]])):
        found[row] = postprocess_generated_text(text, chosen[row].until, None)
    return found

  def _prompt(self, context: str, chosen: "_Generation") -> list[int]:
    tokens = self.tok_encode(context)[-(self.max_length - chosen.number) :]
    return tokens or [self.prefix_token_id]

  def _generate(self, prompts: list[list[int]], chosen: "_Generation") -> list[str]:
    full = prompts + prompts[-1:] * (self.batch_size - len(prompts))  # one program for all batches
    seed = self._batches_drawn = self._batches_drawn + 1
    tokens = generation.decode(self.model, self.config, full, chosen.number, chosen.sampling, seed)
    texts = []
    for row, prompt in zip(tokens.tolist(), prompts):
      made = row[len(prompt) : len(prompt) + chosen.number]
      texts.append(self.words.decode(made[: made.index(self.eot_token_id)] if self.eot_token_id in made else made))
    return texts


class _Generation:
  """What a task's `generation_kwargs` ask for."""

  def __init__(self, sampling: generation.Sampling, number: int, until: list[str]):
    self.sampling, self.number, self.until = sampling, number, until
    self.key = (sampling, number)  # requests with the same go together

  @classmethod
  def of(cls, asked: dict, config) -> "_Generation":
    """Raises ConfigError."""
    try:
      return cls._of(_with_numbers(asked), config)
    except ConfigError as error:
      raise ConfigError(f"generation_kwargs: {error}") from None

  @classmethod
  def _of(cls, asked: dict, config) -> "_Generation":
    temperature, top_k, top_p = asked.get("temperature", 1.0), asked.get("top_k", 0), asked.get("top_p", 1.0)
    if not 0 <= temperature < np.inf:
      raise ConfigError(
        f"temperature={temperature} is not 0 or more, and finite; 0 takes the most probable token each time."
      )
    keys = normalize_gen_kwargs(asked)
    unknown = sorted(keys.keys() - _GENERATION_KEYS)
    if unknown:
      raise ConfigError(f"{unknown[0]}={keys[unknown[0]]} is not known; {', '.join(sorted(_GENERATION_KEYS))} are.")
    number, until = keys["max_gen_toks"], keys["until"]
    if not 0 < number < config.max_target_length:
      raise ConfigError(
        f"max_gen_toks={number} leaves no room for a prompt, or asks for nothing; set it from 1 to "
        f"{config.max_target_length - 1}, for max_target_length={config.max_target_length}."
      )
    if not all(isinstance(text, str) for text in until):
      raise ConfigError(f"until={until} is not a text, nor a list of texts.")
    if not isinstance(keys["do_sample"], bool):
      raise ConfigError(f"do_sample={keys['do_sample']!r} is neither true nor false.")
    if not keys["do_sample"] or not temperature:
      return cls(generation.Sampling(), number, until)
    algorithm = {(False, False): "weighted", (True, False): "topk", (False, True): "nucleus"}.get(
      (top_k != 0, top_p != 1), "composite"
    )
    sampling = generation.Sampling(algorithm, top_k, top_p, temperature)
    sampling.check(config.vocab_size)
    if top_p < 1 and temperature != 1:
      raise ConfigError(
        f"top_p={top_p} with temperature={temperature}: MaxText cuts before the temperature, and task files mean after "
        "it; set temperature=1, or leave top_p out."
      )
    return cls(sampling, number, until)


def _with_numbers(asked: dict) -> dict:
  """What is set, with numbers for texts: YAML's 1e-6 is one. Raises ConfigError."""
  found = {key: value for key, value in asked.items() if value is not None}
  for key in found.keys() & _NUMBERS.keys():
    kind, text = _NUMBERS[key], found[key]
    try:
      found[key] = kind(text)
      fits = found[key] == float(text)  # neither cut off, nor not a number
    except (TypeError, ValueError, OverflowError):
      fits = False
    if not fits:
      raise ConfigError(f"{key}={text!r} is not a {'whole ' if kind is int else ''}number.")
  return found


def log_likelihoods(
  model: nnx.Module,
  tokens: Int[np.ndarray, "B T"],
  targets: Int[np.ndarray, "B T"],
  segment_ids: Int[np.ndarray, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
  """Log-probability of each target after the tokens up to its place, in float32, and whether it is the most probable.

  Args:
    segment_ids: tokens attend to their own segment only. 0 is padding.
  """
  return _log_likelihoods(model, *(jnp.asarray(x, jnp.int32) for x in (tokens, targets, segment_ids)))


@forward.pure
def _log_likelihoods(model, tokens, targets, segment_ids):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  logits = model(tokens, positions, segment_ids, enable_dropout=False).astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets


class TextTask(ConfigurableTask):
  """A whole text as a task of the harness: its perplexity per token, and bits per byte."""

  def __init__(self, text: str, lm: MaxTextLM):
    """
    Args:
      text: not empty.
    """
    self._text = text
    tokens, size = len(lm.tok_encode(text, add_special_tokens=False)), len(text.encode())

    def results(_, found):
      return {"perplexity": (found[0], tokens), "bits_per_byte": (found[0], size)}

    aggregations = {"perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
    super().__init__(
      config={
        "task": "text",
        "num_fewshot": 0,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "process_results": results,
        "metric_list": [
          {"metric": metric, "aggregation": x, "higher_is_better": False} for metric, x in aggregations.items()
        ],
        "metadata": {"version": 1.0, "tokens": tokens, "bytes": size},
      }
    )

  def download(self, *_, **__) -> None:
    self.dataset = {"test": datasets.Dataset.from_list([{"text": self._text}])}
