"""Decoding with MaxText's own engine: each prompt is prefilled, then all go on together, a token at a time.

A step reads the KV cache and the L+1 hidden states of its own token; depth connections keep nothing of past tokens.
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

from maxtext_mudd.config import devices
from maxtext_mudd.config.changed import changed
from maxtext_mudd.config.errors import ConfigError

COLDEST = 1e-6  # of temperatures: less is greedy, but for rounding
_SHORTEST = 16  # of padded lengths


class Sampling(NamedTuple):
  """How the next token is chosen, in the words of MaxText's `decode_sampling_*`."""

  algorithm: str = "greedy"
  topk: int = 0
  nucleus_topp: float = -1.0
  temperature: float = 1.0

  @classmethod
  def from_config(cls, config) -> "Sampling":
    """Raises ConfigError."""
    made = cls(
      config.decode_sampling_strategy.value,
      config.decode_sampling_top_k,
      config.decode_sampling_nucleus_p,
      config.decode_sampling_temperature,
    )
    made.check(config.vocab_size, "decode_sampling_top_k", "decode_sampling_nucleus_p", "decode_sampling_temperature")
    return made

  def check(self, vocab_size: int, top_k: str = "top_k", top_p: str = "top_p", temperature: str = "temperature"):
    """Raises ConfigError for what cannot be drawn with, by these names; MaxText draws nonsense then, or fails late."""
    if self.algorithm in ("topk", "composite") and not 0 < self.topk <= vocab_size:
      raise ConfigError(f"{top_k}={self.topk} is not from 1 to vocab_size={vocab_size}.")
    if self.algorithm in ("nucleus", "composite") and not 0 < self.nucleus_topp <= 1:
      raise ConfigError(f"{top_p}={self.nucleus_topp} is not above 0, and 1 at most.")
    if self.algorithm != "greedy" and not COLDEST <= self.temperature < np.inf:
      greedy = "greedy decoding" if temperature == "decode_sampling_temperature" else "0"
      raise ConfigError(
        f"{temperature}={self.temperature} is not from {COLDEST} on; {greedy} takes the most probable token each time."
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
  """Goes on with each prompt by `max_new_tokens` tokens.

  Args:
    model, config: as of `from_pretrained`.
    prompt_tokens: one or more prompts, of any lengths; P is that of the longest.
    temperature: 0 takes the most probable token each time, whatever `top_k`.
    top_k: draws from that many; 0: from all.

  Returns:
    int32: each prompt with what follows it; rows of shorter prompts end in zeros.

  Raises:
    ConfigError: a prompt is empty, has a token that is not in the vocabulary, or is too long for the context.
  """
  whole = {"max_new_tokens": max_new_tokens, "top_k": top_k, "seed": seed}
  for name, value in whole.items():
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
      raise ConfigError(f"{name}={value!r} is not a whole number.")
  if not 0 <= seed < 2**32:
    raise ConfigError(f"seed={seed} is not from 0 to 2**32 - 1.")
  if temperature is None or np.ndim(temperature) or not np.isrealobj(temperature) or isinstance(temperature, str):
    raise ConfigError(f"temperature={temperature!r} is not a number.")
  temperature = float(temperature)
  if not 0 <= top_k <= config.vocab_size:
    raise ConfigError(f"top_k={top_k} is not from 0 to vocab_size={config.vocab_size}; 0 draws from all.")
  sampling = Sampling()
  if temperature:
    sampling = Sampling("topk" if top_k else "weighted", int(top_k), temperature=temperature)
  sampling.check(config.vocab_size)
  max_new_tokens = int(max_new_tokens)
  check(prompt_tokens, max_new_tokens, config)
  return decode(model, config, prompt_tokens, max_new_tokens, sampling, seed)


def decode(
  model: nnx.Module,
  config: pyconfig.HyperParameters,
  prompt_tokens: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling,
  seed: int,
) -> Int[np.ndarray, "B P+max_new_tokens"]:
  """`generate` of prompts that `check` has passed."""
  prompts = [np.asarray(prompt, np.int32) for prompt in prompt_tokens]
  longest = max(map(len, prompts))
  engine = engine_for(model, config, len(prompts), longest, max_new_tokens)
  params = nnx.state(model, nnx.Param)
  keys = jax.random.split(jax.random.PRNGKey(seed), len(prompts) + max_new_tokens + 1)[1:]
  state = engine.init_decode_state()
  for slot, prompt in enumerate(prompts):
    state = engine.insert(prefilled(engine, params, prompt, slot, keys[slot], sampling), state, slot=slot)
  made, _ = go_on(engine, params, state, keys[len(prompts) : -1], sampling)
  made = np.asarray(made)
  found = np.zeros((len(prompts), longest + max_new_tokens), np.int32)
  for row, prompt in enumerate(prompts):
    found[row, : len(prompt) + max_new_tokens] = [*prompt, *made[row]]
  return found


def prefilled(engine: maxengine.MaxEngine, params: nnx.State, prompt, slot: int, key, sampling: Sampling) -> Any:
  """What `engine.insert` takes: the KV cache of a prompt, and its first token.

  Chunks of a prompt attend to those before them through the cache, and need nothing else of them.
  """
  config = engine.config
  size = config.prefill_chunk_size if config.use_chunked_prefill else config.max_prefill_predict_length
  chosen = {"rng": key, "slot": slot, **sampling._asdict()}
  prefix, done = None, None
  for start in range(0, len(prompt), size):
    chunk = prompt[start : start + size]
    if start:
      done = maxengine.ExistingPrefix(cache=prefix["cache"], common_prefix_tokens=jnp.asarray(prompt[:start]))
    padded = jnp.asarray(np.pad(chunk, (0, size - len(chunk))))
    prefix, _ = engine.prefill(
      params=params, padded_tokens=padded, true_length=len(chunk), existing_prefix=done, **chosen
    )
  return prefix


def go_on(
  engine: maxengine.MaxEngine, params: nnx.State, state: Any, keys, sampling: Sampling
) -> tuple[Int[Array, "B keys+1"], Any]:
  """The tokens of a state and those of the steps after it, one for each key; and the state behind them.

  The steps are one program: called one by one, handing over hundreds of arrays each time takes longer than a step of a
  fast device, and the more so the more parameters there are.
  """
  steps = len(keys)
  room = padded_length(steps + 1)
  keys = jnp.pad(keys, [(0, room - steps), *[(0, 0)] * (keys.ndim - 1)])
  static = sampling._replace(temperature=None)
  made, state = _go_on(engine, static, params, state, keys, steps, sampling.temperature)
  return made[:, : steps + 1], state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _go_on(engine, sampling: Sampling, params, state, keys, steps, temperature):
  """The same for any number of steps that there is room for, so that few programs are compiled."""
  chosen = sampling._replace(temperature=temperature)._asdict()

  def step(i, carry):
    made, state = carry
    state, _ = engine.generate(params, state, rng=keys[i], **chosen)
    return made.at[:, i + 1].set(state["tokens"][:, 0]), state

  made = jnp.zeros((len(state["tokens"]), len(keys)), jnp.int32).at[:, 0].set(state["tokens"][:, 0])
  made, state = jax.lax.fori_loop(0, steps, step, (made, state))
  return jax.lax.with_sharding_constraint(made, engine.replicated_sharding), state


def padded_length(length: int) -> int:
  """The power of two that a length is padded to, so that few programs are compiled."""
  return max(_SHORTEST, 1 << (length - 1).bit_length())


def check_config(config) -> None:
  """Raises ConfigError for models that MaxText does not decode as it trains them."""
  if config.moba:
    raise ConfigError("moba=True: MaxText decodes with all keys, where training chooses blocks of them; use logits.")


def check(prompt_tokens: Sequence[Sequence[int]], max_new_tokens: int, config) -> None:
  """Raises ConfigError for prompts that cannot be gone on with."""
  check_config(config)
  if not hasattr(prompt_tokens, "__len__"):
    raise ConfigError(f"prompts are {type(prompt_tokens).__name__}; they have to be a list of lists of tokens.")
  if not len(prompt_tokens):
    raise ConfigError("there is no prompt; give one at least.")
  if max_new_tokens < 1:
    raise ConfigError(f"max_new_tokens={max_new_tokens} is not a number of tokens; set it to 1 or more.")
  for number, prompt in enumerate(prompt_tokens):
    try:
      prompt = np.asarray(prompt)
      found = f"{prompt.dtype}{list(prompt.shape)}"
    except ValueError:
      prompt, found = np.zeros(0), "made of rows of different lengths"
    if prompt.ndim != 1 or not len(prompt) or not np.issubdtype(prompt.dtype, np.integer):
      raise ConfigError(f"prompt {number} is {found}; it has to be a list of tokens, which are whole numbers.")
    if len(prompt) + max_new_tokens > config.max_target_length:
      raise ConfigError(
        f"prompt {number} has {len(prompt)} tokens, and {max_new_tokens} more are longer than the context, "
        f"max_target_length={config.max_target_length}; shorten it, or ask for fewer."
      )
    wrong = [int(token) for token in prompt if not 0 <= token < config.vocab_size]
    if wrong:
      raise ConfigError(f"prompt {number} has the token {wrong[0]}, and the model has vocab_size={config.vocab_size}.")


def engine_for(model: nnx.Module, config, batch: int, prompt: int, new: int) -> maxengine.MaxEngine:
  """The engine of a model for so many prompts, tokens of the longest and new tokens. A model's engines are kept: JAX
  keeps them anyway, with the programs that it compiled for them."""
  rows = devices.batch_parts(config)
  batch = -(-batch // rows) * rows
  size = config.prefill_chunk_size
  prefill = -(-prompt // size) * size if config.use_chunked_prefill else padded_length(prompt)
  sizes = (batch, prefill, prefill + padded_length(new))
  engines = _engines.setdefault(model, {})
  if (sizes, config) not in engines:
    engines[sizes, config] = _engine(model, config, *sizes)
  return engines[sizes, config]


def _engine(model: nnx.Module, config, batch: int, prefill: int, length: int) -> maxengine.MaxEngine:
  update = {
    "per_device_batch_size": math.nextafter(batch / model.mesh.size, math.inf),  # MaxText rounds down
    "micro_batch_size_to_train_on": batch,
    "max_prefill_predict_length": prefill,
    "max_target_length": length,
  }
  engine = maxengine.MaxEngine(changed(config, **update))
  engine.load_params(params=nnx.state(model, nnx.Param))
  return engine


_engines = weakref.WeakKeyDictionary()


def _register(results: type) -> None:
  """MaxText's stand-in for a class of JetStream's leaves its programs through `jit`, and JAX does not know it."""
  arrays, static = ("data", "log_prob"), ("tokens_idx", "valid_idx", "length_idx", "samples_per_slot")

  def flatten(result):
    return [getattr(result, name) for name in arrays], tuple(getattr(result, name) for name in static)

  def unflatten(kept, children):
    return results(**dict(zip(arrays, children)), **dict(zip(static, kept)))

  jax.tree_util.register_pytree_node(results, flatten, unflatten)


if getattr(maxengine.engine_api, "_IS_STUB", False):
  _register(maxengine.engine_api.ResultTokens)
