"""Lets EleutherAI's lm-evaluation-harness evaluate a model of MaxText (`MaxTextLM`), also on a text (`TextTask`)."""

from collections.abc import Callable, Sequence
import dataclasses
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
# The keys of `generation_kwargs` in task files, with the harness's names, and the types of those that are numbers.
_GENERATION_KEYS = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}
_NUMBER_TYPES = {"temperature": float, "top_p": float} | dict.fromkeys(
  ("top_k", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"), int
)


class MaxTextLM(TemplateLM):
  """A model that the harness can evaluate.

  It computes log-likelihoods of targets after contexts and of whole texts, and continues texts by greedy decoding or
  sampling. The harness splits texts into contexts and targets. This class splits long texts into windows, and cuts off
  the beginning of a context that is too long.

  Attributes:
    model, config: the model and its configuration.
    text_tokenizer: encodes and decodes texts.
    tokenizer: the Hugging Face tokenizer behind it, if any. The harness records its special tokens.
    batch_size: the number of rows of a batch.
    max_length: the context of the model, in tokens.
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
      model, config: what `from_pretrained` or `from_run` returns.
      batch_size: the number of rows of a batch. It is rounded up to a multiple of the parts that the mesh divides a
        batch into.
      before_batch: called before each batch; what it raises ends the evaluation.
    """
    super().__init__()
    self.model, self.config, self.text_tokenizer = model, config, tokenizer
    self.tokenizer = tokenizer.hugging_face
    parts = devices.batch_parts(config)
    self.batch_size = -(-batch_size // parts) * parts
    self.max_length, self._before_batch = config.max_target_length, before_batch
    self._last_seed = 0
    self._has_warned_of_spanning = False

  @property
  def eot_token_id(self) -> int:
    """The token that ends a generated text: EOS or, if there is none, BOS."""
    return self.text_tokenizer.prefix_id if self.text_tokenizer.eos_id is None else self.text_tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """The token that stands for an empty context."""
    return self.text_tokenizer.prefix_id

  def get_model_info(self) -> dict:
    """What the harness records about the model."""
    sizes = [x.size for x in jax.tree.leaves(nnx.state(self.model, nnx.Param))]
    return {"model_num_parameters": sum(sizes), "model_dtype": str(self.config.dtype)}

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    add_bos = self.text_tokenizer.add_bos if add_special_tokens is None else add_special_tokens
    return self.text_tokenizer.encode(string, add_bos)

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encodes a context and the target after it.

    The harness encodes both texts together. If the context alone has n tokens, the target has the tokens after the
    first n. If one token spans context and target, the target may have no tokens. Then the harness's model for PyTorch
    fails (its issue 1297). In this case this method encodes the target alone, as the harness's pull request 4055 does.
    """
    context_tokens, target = super()._encode_pair(context, continuation)
    if target:
      return context_tokens, target
    spaces = context[len(context.rstrip()) :]  # the harness moves these spaces to the target
    target = self.tok_encode(spaces + continuation, add_special_tokens=False)
    if target and not self._has_warned_of_spanning:
      self._has_warned_of_spanning = True
      _logger.warning(
        "the target %r after %r: one token spans both, so the target is encoded alone, here and in all similar cases.",
        continuation[:40],
        context[-40:],
      )
    return context_tokens, target

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_
  ) -> list[tuple[float, bool]]:
    """Scores each target after its context.

    Args:
      requests: for each, the two texts, which are used in errors only, the tokens of the context and those of the
        target. A context without tokens, such as white space that the harness moves to the target, is replaced by the
        prefix token.

    Returns:
      For each request the log-probability of the target, and whether each of its tokens is the most probable one.

    Raises:
      ConfigError: a target has no tokens, or more than the model's context.
    """
    rows, target_lengths = [], []
    for texts, context, target in requests:
      if not 0 < len(target) <= self.max_length:
        raise ConfigError(
          f"the target {texts[1][:40]!r} has {len(target)} tokens; it can have from 1 to max_target_length="
          f"{self.max_length}."
        )
      context = context or [self.prefix_token_id]
      rows.append(np.asarray([*context, *target][-(self.max_length + 1) :], np.int32))
      target_lengths.append(len(target))
    results = [(0.0, False)] * len(rows)
    # The longest rows come first, so that memory runs out at the start or never.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    for start in tqdm.trange(0, len(order), self.batch_size, desc="log-likelihoods", disable=disable_tqdm):
      self._before_batch()
      batch = order[start : start + self.batch_size]
      scores, is_most_probable = self._score([rows[row] for row in batch])
      for number, row in enumerate(batch):
        end = len(rows[row]) - 1
        target = slice(end - target_lengths[row], end)
        score = scores[number, target].sum(dtype=np.float64)
        results[row] = (float(score), bool(is_most_probable[number, target].all()))
    return results

  def _score(self, rows: Sequence[np.ndarray]) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """The log-probability of each token after the first of each row, and whether it is the most probable one.

    Args:
      rows: the tokens of each row, the longest row first.
    """
    length = min(generation.padded_length(len(rows[0]) - 1), self.max_length)
    tokens = np.zeros((self.batch_size, length + 1), np.int32)
    lengths = np.zeros((self.batch_size, 1), np.int32)
    for number, row in enumerate(rows):
      tokens[number, : len(row)], lengths[number] = row, len(row) - 1
    segment_ids = (np.arange(length) < lengths).astype(np.int32)
    return jax.device_get(log_likelihoods(self.model, tokens[:, :-1], tokens[:, 1:], segment_ids))

  def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
    """The log-probabilities of whole texts. Each token is predicted once, from the tokens before it in its window."""
    windows, text_numbers = [], []
    for number, (text,) in enumerate(request.args for request in requests):
      # The prefix token takes the place of a BOS.
      tokens = self.tok_encode(text, add_special_tokens=False)
      for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
        windows.append((("", text), *utils.make_disjoint_window(window)))
        text_numbers.append(number)
    scores = [0.0] * len(requests)
    for number, (score, _) in zip(text_numbers, self._loglikelihood_tokens(windows, disable_tqdm)):
      scores[number] += score
    return scores

  def check_generation(self, generation_kwargs: dict) -> None:
    """Raises ConfigError if a task's `generation_kwargs` has an unknown key, or a value that the model cannot take."""
    _GenerationOptions.read(generation_kwargs, self.config)

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    """Continues each context up to the first stop sequence or EOS.

    Raises:
      ConfigError: as for `check_generation`.
    """
    options = [_GenerationOptions.read(request.args[1], self.config) for request in requests]
    prompts = [self._prompt(request.args[0], each.max_new_tokens) for request, each in zip(requests, options)]
    order = sorted(range(len(requests)), key=lambda row: (options[row].batch_key, -len(prompts[row])))
    batches = []
    for row in order:  # the rows of a batch have the same `batch_key`
      if (
        not batches
        or len(batches[-1]) == self.batch_size
        or options[batches[-1][0]].batch_key != options[row].batch_key
      ):
        batches.append([])
      batches[-1].append(row)
    texts = [""] * len(requests)
    for batch in tqdm.tqdm(batches, desc="generations", disable=disable_tqdm):
      self._before_batch()
      for row, text in zip(batch, self._generate([prompts[row] for row in batch], options[batch[0]])):
        texts[row] = postprocess_generated_text(text, options[row].stop_texts, None)
    return texts

  def _prompt(self, context: str, max_new_tokens: int) -> list[int]:
    """The last tokens of a context, as many as fit the model's context together with the new tokens."""
    tokens = self.tok_encode(context)[-(self.max_length - max_new_tokens) :]
    return tokens or [self.prefix_token_id]

  def _generate(self, prompts: list[list[int]], options: "_GenerationOptions") -> list[str]:
    """The text that continues each prompt, up to EOS."""
    padded = prompts + prompts[-1:] * (self.batch_size - len(prompts))  # so that one program serves all batches
    seed = self._last_seed = self._last_seed + 1
    rows = generation.decode(self.model, self.config, padded, options.max_new_tokens, options.sampling, seed)
    texts = []
    for row, prompt in zip(rows.tolist(), prompts):
      new_tokens = row[len(prompt) : len(prompt) + options.max_new_tokens]
      if self.eot_token_id in new_tokens:
        new_tokens = new_tokens[: new_tokens.index(self.eot_token_id)]
      texts.append(self.text_tokenizer.decode(new_tokens))
    return texts


@dataclasses.dataclass(frozen=True)
class _GenerationOptions:
  """The `generation_kwargs` of a task.

  Attributes:
    sampling: how the next token is chosen.
    max_new_tokens: the largest number of new tokens.
    stop_texts: the texts that end the generation.
  """

  sampling: generation.Sampling
  max_new_tokens: int
  stop_texts: list[str]

  @property
  def batch_key(self) -> tuple:
    """Requests whose keys are equal can be in the same batch."""
    return self.sampling, self.max_new_tokens

  @classmethod
  def read(cls, generation_kwargs: dict, config) -> "_GenerationOptions":
    """Raises ConfigError if a key is not known, or a value cannot be used."""
    try:
      return cls._read(_with_numbers(generation_kwargs), config)
    except ConfigError as error:
      raise ConfigError(f"generation_kwargs: {error}") from None

  @classmethod
  def _read(cls, kwargs: dict, config) -> "_GenerationOptions":
    temperature = kwargs.get("temperature", 1.0)
    if not 0 <= temperature < np.inf:
      raise ConfigError(
        f"temperature={temperature} is not a finite number of 0 or more; 0 takes the most probable token each time."
      )
    keys = normalize_gen_kwargs(kwargs)
    unknown = sorted(keys.keys() - _GENERATION_KEYS)
    if unknown:
      raise ConfigError(
        f"{unknown[0]}={keys[unknown[0]]} is not known; the known keys are {', '.join(sorted(_GENERATION_KEYS))}."
      )
    max_new_tokens, stop_texts = keys["max_gen_toks"], keys["until"]
    if not 0 < max_new_tokens < config.max_target_length:
      raise ConfigError(
        f"max_gen_toks={max_new_tokens} leaves no room for a prompt, or asks for no tokens; set it from 1 to "
        f"{config.max_target_length - 1}, for max_target_length={config.max_target_length}."
      )
    generation.check_config(config)
    generation.check_window(config.max_target_length - max_new_tokens, max_new_tokens, config)
    if not all(isinstance(text, str) for text in stop_texts):
      raise ConfigError(f"until={stop_texts} is not a text, nor a list of texts.")
    if not isinstance(keys["do_sample"], bool):
      raise ConfigError(f"do_sample={keys['do_sample']!r} is neither true nor false.")
    sampling = generation.Sampling()
    if keys["do_sample"] and temperature:
      sampling = _sampling(temperature, kwargs.get("top_k", 0), kwargs.get("top_p", 1.0), config.vocab_size)
    return cls(sampling, max_new_tokens, stop_texts)


def _sampling(temperature: float, top_k: int, top_p: float, vocab_size: int) -> generation.Sampling:
  """MaxText's sampling for the numbers of a task file. There `top_k` is off if it is 0, and `top_p` if it is 1.

  Raises:
    ConfigError: MaxText cannot sample in this way.
  """
  algorithms = {(False, False): "weighted", (True, False): "topk", (False, True): "nucleus", (True, True): "composite"}
  sampling = generation.Sampling(algorithms[top_k != 0, top_p != 1], top_k, top_p, temperature)
  sampling.check(vocab_size)
  if top_p < 1 and temperature != 1:
    raise ConfigError(
      f"top_p={top_p} with temperature={temperature}: MaxText applies top_p before the temperature, and task files "
      "mean after it; set temperature=1, or leave top_p out."
    )
  return sampling


def _with_numbers(kwargs: dict) -> dict:
  """The arguments that are not None, with numbers instead of texts: YAML reads 1e-6 as a text. Raises ConfigError."""
  result = {key: value for key, value in kwargs.items() if value is not None}
  for key in result.keys() & _NUMBER_TYPES.keys():
    number_type, value = _NUMBER_TYPES[key], result[key]
    try:
      result[key] = number_type(value)
      is_equal = result[key] == float(value)  # False for a fraction that `int` cuts off, and for NaN
    except (TypeError, ValueError, OverflowError):
      is_equal = False
    if not is_equal:
      raise ConfigError(f"{key}={value!r} is not a {'whole ' if number_type is int else ''}number.")
  return result


def log_likelihoods(
  model: nnx.Module,
  tokens: Int[np.ndarray, "B T"],
  targets: Int[np.ndarray, "B T"],
  segment_ids: Int[np.ndarray, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
  """Computes the log-probability of each target after the tokens up to its position.

  Args:
    tokens: the input tokens.
    targets: the token to score at each position.
    segment_ids: the segment of each token. Tokens attend to their own segment only, and 0 is padding.

  Returns:
    The log-probabilities in float32, and whether each target is the most probable token.
  """
  return _log_likelihoods(model, *(jnp.asarray(x, jnp.int32) for x in (tokens, targets, segment_ids)))


@forward.pure
def _log_likelihoods(model, tokens, targets, segment_ids):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  logits = model(tokens, positions, segment_ids, enable_dropout=False).astype(jnp.float32)
  target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return target_logits - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets


class TextTask(ConfigurableTask):
  """A task of the harness that gives the perplexity per token and the bits per byte of a text."""

  def __init__(self, text: str, lm: MaxTextLM):
    """
    Args:
      text: the text, which is not empty.
      lm: the model whose tokens are counted.
    """
    self._text = text
    tokens, size = len(lm.tok_encode(text, add_special_tokens=False)), len(text.encode())

    def process_results(_, log_likelihoods_of_document):
      score = log_likelihoods_of_document[0]
      return {"perplexity": (score, tokens), "bits_per_byte": (score, size)}

    aggregations = {"perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
    super().__init__(
      config={
        "task": "text",
        "num_fewshot": 0,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "process_results": process_results,
        "metric_list": [
          {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
          for metric, aggregation in aggregations.items()
        ],
        "metadata": {"version": 1.0, "tokens": tokens, "bytes": size},
      }
    )

  def download(self, *_, **__) -> None:
    self.dataset = {"test": datasets.Dataset.from_list([{"text": self._text}])}
