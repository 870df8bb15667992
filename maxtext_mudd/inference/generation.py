"""Generates tokens with MaxText's engine: it prefills each prompt, then adds one token at a time to all prompts.

A step reads the KV cache and the L+1 hidden states X_0..X_L of its token. Depth connections store nothing of earlier
tokens. `generate` is the public function. The commands call `decode`, which takes MaxText's sampling keys.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple
import weakref

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from maxtext.configs import pyconfig
from maxtext.inference.maxengine import maxengine
import numpy as np

from maxtext_mudd import blocks
from maxtext_mudd.config import devices
from maxtext_mudd.config.changed import changed
from maxtext_mudd.config.errors import ConfigError

MIN_TEMPERATURE = 1e-6  # below it, sampling differs from greedy decoding by rounding only
_MIN_PADDED_LENGTH = 16


class Sampling(NamedTuple):
  """How the next token is chosen. The names are those of the arguments of MaxText's engine.

  Attributes:
    algorithm: a value of decode_sampling_strategy: greedy, weighted, nucleus, topk or composite.
    topk: the number of most probable tokens to draw from, for topk and composite.
    nucleus_topp: the probability of the tokens to draw from, for nucleus and composite.
    temperature: the logits are divided by it, except for greedy.
  """

  algorithm: str = "greedy"
  topk: int = 0
  nucleus_topp: float = -1.0
  temperature: float = 1.0

  @classmethod
  def from_config(cls, config) -> "Sampling":
    """Reads MaxText's keys `decode_sampling_*`. Raises ConfigError if their values cannot be used."""
    sampling = cls(
      config.decode_sampling_strategy.value,
      config.decode_sampling_top_k,
      config.decode_sampling_nucleus_p,
      config.decode_sampling_temperature,
    )
    names = ("decode_sampling_top_k", "decode_sampling_nucleus_p", "decode_sampling_temperature")
    sampling.check(config.vocab_size, *names)
    return sampling

  def check(self, vocab_size: int, top_k: str = "top_k", top_p: str = "top_p", temperature: str = "temperature"):
    """Raises ConfigError for values with which MaxText would draw wrong tokens, or fail late.

    Args:
      top_k, top_p, temperature: the names of the values in the error.
    """
    if self.algorithm in ("topk", "composite") and not 0 < self.topk <= vocab_size:
      raise ConfigError(f"{top_k}={self.topk} is not from 1 to vocab_size={vocab_size}.")
    if self.algorithm in ("nucleus", "composite") and not 0 < self.nucleus_topp <= 1:
      raise ConfigError(f"{top_p}={self.nucleus_topp} is not above 0, and 1 at most.")
    if self.algorithm != "greedy" and not MIN_TEMPERATURE <= self.temperature < np.inf:
      greedy = "decode_sampling_strategy=greedy" if temperature == "decode_sampling_temperature" else f"{temperature}=0"
      raise ConfigError(
        f"{temperature}={self.temperature} is not a finite number of {MIN_TEMPERATURE} or more; {greedy} takes the "
        "most probable token each time."
      )


def generate(
  model: nnx.Module,
  config: pyconfig.HyperParameters,
  prompt_tokens: Sequence[Sequence[int]],
  max_new_tokens: int,
  temperature: float = 0.0,
  top_k: int = 0,
  seed: int = 0,
) -> Int[np.ndarray, "B P+max_new_tokens"]:
  """Continues each prompt by `max_new_tokens` tokens.

  Args:
    model, config: what `from_pretrained` or `from_run` returns.
    prompt_tokens: one or more prompts. Their lengths may differ; P is the length of the longest.
    max_new_tokens: the number of tokens to generate for each prompt.
    temperature: the logits are divided by it before a token is drawn. 0 takes the most probable token each time, for
      every value of `top_k`.
    top_k: the number of most probable tokens to draw from; 0 draws from all.
    seed: seed of the random numbers, from 0 to 2**32 - 1.

  Returns:
    int32: each prompt followed by its new tokens. Rows of shorter prompts end in zeros.

  Raises:
    ConfigError: a prompt is empty, has a token that is not in the vocabulary, or is too long for the context; or an
      argument is not a number in its range.
  """
  _check_numbers(max_new_tokens, temperature, top_k, seed, config)
  sampling = Sampling()
  if temperature:
    sampling = Sampling("topk" if top_k else "weighted", int(top_k), temperature=float(temperature))
  sampling.check(config.vocab_size)
  max_new_tokens = int(max_new_tokens)
  check(prompt_tokens, max_new_tokens, config)
  return decode(model, config, prompt_tokens, max_new_tokens, sampling, seed)


def _check_numbers(max_new_tokens: int, temperature: float, top_k: int, seed: int, config) -> None:
  """Raises ConfigError for arguments of `generate` that are not numbers, or not in their range."""
  for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k), ("seed", seed)):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
      raise ConfigError(f"{name}={value!r} is not a whole number.")
  if not 0 <= seed < 2**32:
    raise ConfigError(f"seed={seed} is not from 0 to 2**32 - 1.")
  if temperature is None or np.ndim(temperature) or not np.isrealobj(temperature) or isinstance(temperature, str):
    raise ConfigError(f"temperature={temperature!r} is not a number.")
  if not 0 <= top_k <= config.vocab_size:
    raise ConfigError(f"top_k={top_k} is not from 0 to vocab_size={config.vocab_size}; 0 draws from all.")


def decode(
  model: nnx.Module,
  config: pyconfig.HyperParameters,
  prompt_tokens: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling,
  seed: int,
) -> Int[np.ndarray, "B P+max_new_tokens"]:
  """Continues prompts as `generate` does. `check` must have accepted the prompts."""
  prompts = [np.asarray(prompt, np.int32) for prompt in prompt_tokens]
  longest = max(map(len, prompts))
  engine = engine_for(model, config, len(prompts), longest, max_new_tokens)
  params = nnx.state(model, nnx.Param)
  keys = jax.random.split(jax.random.PRNGKey(seed), len(prompts) + max_new_tokens + 1)[1:]
  state = engine.init_decode_state()
  for slot, prompt in enumerate(prompts):
    state = engine.insert(prefill(engine, params, prompt, slot, keys[slot], sampling), state, slot=slot)
  new_tokens, _ = generate_steps(engine, params, state, keys[len(prompts) : -1], sampling)
  new_tokens = np.asarray(new_tokens)
  rows = np.zeros((len(prompts), longest + max_new_tokens), np.int32)
  for row, prompt, continuation in zip(rows, prompts, new_tokens):
    row[: len(prompt) + max_new_tokens] = [*prompt, *continuation]
  return rows


def prefill(
  engine: maxengine.MaxEngine, params: nnx.State, prompt: Int[np.ndarray, " P"], slot: int, key, sampling: Sampling
) -> Any:
  """Computes the KV cache of a prompt and draws its first new token. `engine.insert` takes the result.

  A long prompt can be prefilled in chunks. A chunk attends to earlier chunks through the KV cache, and reads nothing
  else of them.

  Args:
    slot: the row of the prompt in the engine's decode state.
    key: JAX's random key for the token.
  """
  config = engine.config
  size = config.prefill_chunk_size if config.use_chunked_prefill else config.max_prefill_predict_length
  options = {"rng": key, "slot": slot, **sampling._asdict()}
  prefix, existing_prefix = None, None
  for start in range(0, len(prompt), size):
    chunk = prompt[start : start + size]
    if start:
      common_tokens = jnp.asarray(prompt[:start])
      existing_prefix = maxengine.ExistingPrefix(cache=prefix["cache"], common_prefix_tokens=common_tokens)
    padded_chunk = jnp.asarray(np.pad(chunk, (0, size - len(chunk))))
    prefix, _ = engine.prefill(
      params=params,
      padded_tokens=padded_chunk,
      true_length=len(chunk),
      existing_prefix=existing_prefix,
      **options,
    )
  return prefix


def generate_steps(
  engine: maxengine.MaxEngine, params: nnx.State, state: Any, keys, sampling: Sampling
) -> tuple[Int[Array, "B keys+1"], Any]:
  """Does one decoding step for each key, as one program.

  If Python called the steps one by one, it would pass hundreds of arrays to each. This takes longer than a step on a
  fast device, and the time grows with the number of parameters.

  Returns:
    The current token of each row in `state`, the tokens of the following steps, and the state after the last step.
  """
  steps = len(keys)
  padding = padded_length(steps + 1) - steps
  keys = jnp.pad(keys, [(0, padding), *[(0, 0)] * (keys.ndim - 1)])
  static_sampling = sampling._replace(temperature=None)
  tokens, state = _generate_steps(engine, static_sampling, params, state, keys, steps, sampling.temperature)
  return tokens[:, : steps + 1], state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _generate_steps(engine, sampling: Sampling, params, state, keys, steps, temperature):
  """Does one step for each of the first `steps` keys. One program serves all values of `steps` with as many keys."""
  options = sampling._replace(temperature=temperature)._asdict()

  def step(i, carry):
    tokens, state = carry
    state, _ = engine.generate(params, state, rng=keys[i], **options)
    return tokens.at[:, i + 1].set(state["tokens"][:, 0]), state

  tokens = jnp.zeros((len(state["tokens"]), len(keys)), jnp.int32).at[:, 0].set(state["tokens"][:, 0])
  tokens, state = jax.lax.fori_loop(0, steps, step, (tokens, state))
  return jax.lax.with_sharding_constraint(tokens, engine.replicated_sharding), state


def padded_length(length: int) -> int:
  """The power of two that a length is padded to, so that few programs are compiled."""
  return max(_MIN_PADDED_LENGTH, 1 << (length - 1).bit_length())


def check_config(config) -> None:
  """Raises ConfigError for models that compute another function in MaxText's decoding than in training."""
  if config.moba:
    raise ConfigError(
      "moba=True: MaxText attends to all keys in decoding, and to chosen blocks of them in training; use logits."
    )
  if config.decoder_block.value == "deepseek4":
    raise ConfigError(
      "decoder_block='deepseek4': MaxText makes other compressed keys in decoding than in training; use logits."
    )
  widths = {config.head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim}
  if config.attention_type == "mla" and config.mla_naive_kvcache and len(widths) > 1:
    raise ConfigError(
      f"mla_naive_kvcache=True: MaxText caches keys and values only if head_dim={config.head_dim}, qk_nope_head_dim + "
      f"qk_rope_head_dim={config.qk_nope_head_dim + config.qk_rope_head_dim} and v_head_dim={config.v_head_dim} are "
      "equal; set mla_naive_kvcache=False."
    )
  if config.quantize_kvcache and jnp.dtype(config.dtype) != jnp.bfloat16:
    raise ConfigError(
      f"quantize_kvcache=True with dtype={config.dtype}: MaxText keeps the scales of the cache in bfloat16; set "
      "dtype=bfloat16."
    )


def check(prompt_tokens: Sequence[Sequence[int]], max_new_tokens: int, config) -> None:
  """Raises ConfigError for prompts that cannot be continued by `max_new_tokens` tokens."""
  check_config(config)
  if not hasattr(prompt_tokens, "__len__"):
    raise ConfigError(f"prompts are {type(prompt_tokens).__name__}; pass a list of lists of tokens.")
  if not len(prompt_tokens):
    raise ConfigError("there is no prompt; pass at least one.")
  if max_new_tokens < 1:
    raise ConfigError(f"max_new_tokens={max_new_tokens} is not a number of tokens; set it to 1 or more.")
  for number, prompt in enumerate(prompt_tokens):
    try:
      prompt = np.asarray(prompt)
      described_type = f"{prompt.dtype}{list(prompt.shape)}"
    except ValueError:
      prompt, described_type = np.zeros(0), "made of rows of different lengths"
    if prompt.ndim != 1 or not len(prompt) or not np.issubdtype(prompt.dtype, np.integer):
      raise ConfigError(f"prompt {number} is {described_type}; pass a list of tokens, which are whole numbers.")
    if len(prompt) + max_new_tokens > config.max_target_length:
      raise ConfigError(
        f"prompt {number} has {len(prompt)} tokens, and {max_new_tokens} more do not fit into the context, "
        f"max_target_length={config.max_target_length}; shorten the prompt, or lower max_new_tokens."
      )
    unknown = [int(token) for token in prompt if not 0 <= token < config.vocab_size]
    if unknown:
      raise ConfigError(
        f"prompt {number} has the token {unknown[0]}, and the model has vocab_size={config.vocab_size}."
      )
  check_window(max(map(len, prompt_tokens)), max_new_tokens, config)


def check_window(prompt_length: int, max_new_tokens: int, config) -> None:
  """Raises ConfigError where local attention would not reach all tokens. There MaxText's decoding takes others into the
  window than its training: it counts slots of two caches, one of the padded prompt and one of new tokens."""
  key = blocks.spec(config).window
  window = getattr(config, key) if key else 0
  new = padded_length(max_new_tokens)
  needed = max(prompt_length + max_new_tokens, _prefill_length(prompt_length, config), new)
  if 0 < window < needed:
    raise ConfigError(
      f"{key}={window}: MaxText decodes other functions than it trains where a window is shorter than prompt and new "
      f"tokens, which need {needed} here with padding; use a shorter prompt or fewer new tokens (in commands, a lower "
      "max_target_length), or logits."
    )


def _prefill_length(prompt_length: int, config) -> int:
  """The number of tokens that a prompt is padded to."""
  chunk = config.prefill_chunk_size
  return -(-prompt_length // chunk) * chunk if config.use_chunked_prefill else padded_length(prompt_length)


def engine_for(model: nnx.Module, config, batch: int, prompt_length: int, max_new_tokens: int) -> maxengine.MaxEngine:
  """The engine of a model for these sizes, which are rounded up so that few engines are created.

  Engines are kept for later calls. This costs no memory: JAX keeps them, too, with the programs that it compiled.

  Args:
    batch: the number of prompts.
    prompt_length: the number of tokens of the longest prompt.
  """
  parts = devices.batch_parts(config)
  batch = -(-batch // parts) * parts
  prefill_length = _prefill_length(prompt_length, config)
  sizes = (batch, prefill_length, prefill_length + padded_length(max_new_tokens))
  engines = _engines.setdefault(model, {})
  if (sizes, config) not in engines:
    engines[sizes, config] = _new_engine(model, config, *sizes)
  return engines[sizes, config]


def _new_engine(model: nnx.Module, config, batch: int, prefill_length: int, length: int) -> maxengine.MaxEngine:
  update = {
    "per_device_batch_size": math.nextafter(batch / model.mesh.size, math.inf),  # MaxText rounds down
    "micro_batch_size_to_train_on": batch,
    "max_prefill_predict_length": prefill_length,
    "max_target_length": length,
  }
  engine = maxengine.MaxEngine(changed(config, **update))
  engine.load_params(params=nnx.state(model, nnx.Param))
  return engine


_engines = weakref.WeakKeyDictionary()  # by model, then by (sizes, configuration)


def _register_as_pytree(result_class: type) -> None:
  """Registers MaxText's substitute for JetStream's `ResultTokens`, which MaxText's compiled functions return."""
  arrays, static = ("data", "log_prob"), ("tokens_idx", "valid_idx", "length_idx", "samples_per_slot")

  def flatten(result):
    return [getattr(result, name) for name in arrays], tuple(getattr(result, name) for name in static)

  def unflatten(static_values, children):
    return result_class(**dict(zip(arrays, children)), **dict(zip(static, static_values)))

  jax.tree_util.register_pytree_node(result_class, flatten, unflatten)


if getattr(maxengine.engine_api, "_IS_STUB", False):
  _register_as_pytree(maxengine.engine_api.ResultTokens)
