"""Goes on with a prompt: `python3 -m maxtext_mudd.decode FILE.yml load_parameters_path=M prompt="..."`.

What MaxText's own decode does, without JetStream, which it needs and which is on no package index.
"""

from collections.abc import Sequence
import os
import pathlib

from maxtext_mudd.config.errors import ConfigError, reachable
from maxtext_mudd.runs import console
from maxtext_mudd.runs.launch import launch

_PROMPT = "prompt="


def run() -> None:
  """Decodes; what is read is checked before anything is compiled."""
  with console.Console(writes_log=False):
    launch("maxtext_mudd.decode", check=check_decoding)


@reachable()
def check_decoding(config) -> None:
  """Raises ConfigError for keys and folders that give no text."""
  if config.load_full_state_path:
    raise ConfigError(
      f"load_full_state_path={config.load_full_state_path}: decoding reads parameters alone; name the checkpoint by "
      "load_parameters_path, which takes one of a run, too."
    )
  if not config.load_parameters_path:
    raise ConfigError("load_parameters_path='' names no checkpoint; name one, as OUTPUT/RUN/checkpoints/STEP.")
  if "://" not in config.load_parameters_path and not pathlib.Path(config.load_parameters_path).is_dir():
    raise ConfigError(f"load_parameters_path={config.load_parameters_path}: there is no such folder.")
  if config.max_prefill_predict_length >= config.max_target_length:
    raise ConfigError(
      f"max_prefill_predict_length={config.max_prefill_predict_length} leaves no room for new tokens in "
      f"max_target_length={config.max_target_length}; lower it, or raise that."
    )
  from maxtext_mudd import generation  # once MaxText is known to be the right one

  generation.check_config(config)
  generation.Sampling.from_config(config)


@reachable()
def main(argv: Sequence[str]) -> None:
  import jax
  from maxtext.configs import pyconfig

  from maxtext_mudd.checkpoints import parameters
  from maxtext_mudd.inference import generation, tokens

  jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as MaxText's decode does
  # A text, where MaxText would read YAML.
  texts = [argument.removeprefix(_PROMPT) for argument in argv if argument.startswith(_PROMPT)]
  config = pyconfig.initialize([argument for argument in argv if not argument.startswith(_PROMPT)])
  text = texts[-1] if texts else config.prompt
  if not text:
    raise ConfigError("prompt='' says nothing; write something.")
  words = tokens.Tokenizer(config, _moved_tokenizer(config))
  prompt = words.encode(text, words.add_bos)
  if len(prompt) > config.max_prefill_predict_length:
    raise ConfigError(
      f"the prompt has {len(prompt)} tokens, more than max_prefill_predict_length={config.max_prefill_predict_length}; "
      f"raise that, and what is left to max_target_length={config.max_target_length} is made, or shorten it."
    )
  number = config.max_target_length - config.max_prefill_predict_length
  generation.check([prompt], number, config)
  if "://" not in config.load_parameters_path:
    path = str(parameters.items_folder(config.load_parameters_path))
    update = {"load_parameters_path": os.path.abspath(path)}
    config = pyconfig.HyperParameters(config._pydantic_config.model_copy(update=update))
  if console.stderr().isatty():
    print("reading the checkpoint and compiling ...", file=console.stderr())
  model = parameters.load(config)
  sampling = generation.Sampling.from_config(config)
  found = generation.decode(model, config, [prompt], number, sampling, seed=config.init_weights_seed)
  made = [int(token) for token in found[0, len(prompt) :]]
  if words.eos_id in made:
    made = made[: made.index(words.eos_id)]
  output = words.decode(made)
  console.show(f"Input `{text}` -> `{output}`")
  if not output.startswith(config.autoregressive_decode_assert):
    raise ConfigError(
      f"autoregressive_decode_assert={config.autoregressive_decode_assert}: the text does not begin so: {output!r}."
    )


def _moved_tokenizer(config) -> str:
  """That of a converted folder which has been moved since its YAML was written; else nothing."""
  from maxtext_mudd.checkpoints import model_folder, tokenizers

  if not pathlib.Path(config.tokenizer_path or "").is_absolute() or pathlib.Path(config.tokenizer_path).exists():
    return ""
  own = {"tokenizer_path": config.tokenizer_path, "tokenizer_type": config.tokenizer_type.value}
  return tokenizers.moved_keys(own, pathlib.Path(config.load_parameters_path) / model_folder.TOKENIZER).get(
    "tokenizer_path", ""
  )


if __name__ == "__main__":
  run()
