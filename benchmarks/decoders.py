"""Times a model with random weights that continues prompts as `maxtext_mudd.generate` does."""

import time
from typing import NamedTuple

from flax import nnx
import jax
from maxtext.utils import maxtext_utils, model_creation_utils
import numpy as np

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import generation


class Seconds(NamedTuple):
  """Seconds of the prefill of one prompt, and seconds of a step that adds one token to every prompt."""

  prefill: float
  step: float


class Decoder:
  """One model of a comparison.

  Attributes:
    name: name of the model.
    config: configuration of the model.
    parameter_bytes: bytes of the parameters on all devices.
    cache_bytes: bytes of the KV cache on all devices, after the last `prepare`.
    compile_seconds: seconds that the last `prepare` took to build the engine and to run once.
  """

  def __init__(self, name: str, config):
    """Creates the weights on the devices, with MaxText's initial values.

    Raises:
      ConfigError: they do not fit.
    """
    self.name, self.config = name, config
    create = model_creation_utils.from_pretrained  # it loads nothing if load_parameters_path is empty
    self._model = self._checked(lambda: create(config, maxtext_utils.get_mesh_from_config(config)))
    self._params = nnx.state(self._model, nnx.Param)
    self.parameter_bytes = _bytes(self._params)

  def prepare(self, batch: int, prompt: int, new: int, warmup: int, calls: bool) -> None:
    """Compiles for these sizes, and runs a few times.

    Args:
      batch: number of prompts.
      prompt: tokens of a prompt.
      new: new tokens for each prompt.
      warmup: number of runs.
      calls: whether the engine is called for each step; otherwise all steps are one program.

    Raises:
      ConfigError: the device runs out of memory.
    """
    tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, (batch, prompt), dtype=np.int32)
    self._prompts, self._calls = tokens, calls
    self._sampling = generation.Sampling()
    keys = jax.random.split(jax.random.PRNGKey(0), batch + new - 1)
    self._keys, self._step_keys = list(keys[:batch]), list(keys[batch:]) if calls else keys[batch:]
    start = time.monotonic()
    self._engine = self._checked(lambda: generation.engine_for(self._model, self.config, batch, prompt, new))
    self.run()
    self.compile_seconds = time.monotonic() - start
    for _ in range(warmup - 1):
      self.run()

  def run(self) -> Seconds:
    """Continues all prompts. The seconds of prefill are the mean over the prompts.

    Raises:
      ConfigError: the device runs out of memory.
    """
    return self._checked(self._run)

  def _run(self) -> Seconds:
    state = jax.block_until_ready(self._engine.init_decode_state())
    self.cache_bytes = _bytes(state["cache"])
    prefill = 0.0
    for slot, prompt in enumerate(self._prompts):
      start = time.monotonic()
      prefix = generation.prefill(self._engine, self._params, prompt, slot, self._keys[slot], self._sampling)
      jax.block_until_ready(prefix)
      prefill += time.monotonic() - start
      state = self._engine.insert(prefix, state, slot=slot)
    jax.block_until_ready(state)
    keys = self._step_keys
    start = time.monotonic()
    if self._calls:
      chosen = self._sampling._asdict()
      for key in keys:  # a list of arrays; see `prepare`
        state, _ = self._engine.generate(self._params, state, rng=key, **chosen)
    else:
      state = generation.generate_steps(self._engine, self._params, state, keys, self._sampling)
    jax.block_until_ready(state)
    return Seconds(prefill / len(self._prompts), (time.monotonic() - start) / len(keys))

  def free(self) -> None:
    """Frees the memory of the model. It cannot run after this call."""
    for array in jax.tree.leaves(self._params):
      array.delete()
    self._model = self._engine = None

  def _checked(self, function):
    """Calls a function; turns a device's lack of memory into a ConfigError."""
    try:
      return function()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise ConfigError(
        f"{self.name} does not fit the device beside the other model; use a smaller --batch, --prompt or --new."
      ) from None


def _bytes(tree) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))
