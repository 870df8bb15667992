"""Goes on with a prompt: `python3 -m maxtext_mudd.decode FILE.yml load_parameters_path=M prompt="..."`.

What MaxText's own decode does, without JetStream, which it needs and which is on no package index.
"""

from collections.abc import Sequence
import math
import pathlib

from maxtext_mudd.errors import ConfigError
from maxtext_mudd.launch import launch

_PROMPT = "prompt="


def run() -> None:
  """Decodes; what is read is checked before anything is compiled."""
  launch("maxtext_mudd.decode", check=check_decoding)


def check_decoding(config) -> None:
  """Raises ConfigError for keys and folders that give no text."""
  if config.load_full_state_path:
    raise ConfigError(
      f"load_full_state_path={config.load_full_state_path}: decoding reads parameters alone; name the checkpoint by "
      "load_parameters_path, which takes one of a run, too."
    )
  if not config.load_parameters_path:
    raise ConfigError("load_parameters_path='' names no checkpoint; name one, as OUTPUT/RUN/checkpoints/STEP.")
  if "://" not in config.load_parameters_path and not items(config.load_parameters_path).is_dir():
    raise ConfigError(f"load_parameters_path={config.load_parameters_path}: there is no such folder.")
  if config.max_prefill_predict_length >= config.max_target_length:
    raise ConfigError(
      f"max_prefill_predict_length={config.max_prefill_predict_length} leaves no room for new tokens in "
      f"max_target_length={config.max_target_length}; lower it, or raise that."
    )
  _check_sampling(config)


def _check_sampling(config) -> None:
  strategy, size = config.decode_sampling_strategy.value, config.vocab_size
  needs = []
  if strategy in ("topk", "composite"):
    needs.append(("decode_sampling_top_k", lambda k: 0 < k <= size, f"from 1 to vocab_size={size}"))
  if strategy in ("nucleus", "composite"):
    needs.append(("decode_sampling_nucleus_p", lambda p: 0 < p <= 1, "above 0, and 1 at most"))
  if strategy != "greedy":
    needs.append(("decode_sampling_temperature", lambda x: 0 < x < math.inf, "above 0, and finite"))
  for key, fits, kind in needs:
    if not fits(value := getattr(config, key)):
      raise ConfigError(f"{key}={value}: decode_sampling_strategy={strategy} needs it {kind}.")


def items(path: str) -> pathlib.Path:
  """The tree in a checkpoint, which MaxText's loaders want named."""
  inner = pathlib.Path(path) / "items"
  return inner if inner.is_dir() else pathlib.Path(path)


def main(argv: Sequence[str]) -> None:
  import jax
  from maxtext.configs import pyconfig

  from maxtext_mudd import generation, tokens
  from maxtext_mudd.checkpoints import parameters

  jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as MaxText's decode does
  # A text, where MaxText would read YAML.
  texts = [argument.removeprefix(_PROMPT) for argument in argv if argument.startswith(_PROMPT)]
  config = pyconfig.initialize([argument for argument in argv if not argument.startswith(_PROMPT)])
  text = texts[-1] if texts else config.prompt
  if not text:
    raise ConfigError("prompt='' says nothing; write something.")
  words = tokens.Tokenizer(config)
  prompt = words.encode(text, words.add_bos)
  number = config.max_target_length - config.max_prefill_predict_length
  generation.check([prompt], number, config)
  if "://" not in config.load_parameters_path:
    update = {"load_parameters_path": str(items(config.load_parameters_path).absolute())}
    config = pyconfig.HyperParameters(config._pydantic_config.model_copy(update=update))
  model = parameters.load(config)
  sampling = generation.Sampling.from_config(config)
  found = generation.decode(model, config, [prompt], number, sampling, seed=config.init_weights_seed)
  made = [int(token) for token in found[0, len(prompt) :]]
  if words.eos_id in made:
    made = made[: made.index(words.eos_id)]
  print(f"Input `{text}` -> `{words.decode(made)}`")


if __name__ == "__main__":
  run()
