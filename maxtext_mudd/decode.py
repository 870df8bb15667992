"""Continues a prompt with a trained model, and prints prompt and continuation.

    python3 -m maxtext_mudd.decode FILE.yml load_parameters_path=M prompt="..."

It replaces `maxtext.inference.decode`, which needs JetStream, and JetStream is on no package index.
"""

from collections.abc import Sequence
import os
import pathlib

from maxtext_mudd.config.errors import ConfigError, reachable
from maxtext_mudd.runs import console
from maxtext_mudd.runs.launch import launch

_PROMPT = "prompt="


def run() -> None:
  """Runs the command. The configuration and the folders that it names are checked before anything is compiled."""
  with console.Console(writes_log=False):
    launch("maxtext_mudd.decode", check=check_decoding)


@reachable()
def check_decoding(config) -> None:
  """Raises ConfigError for keys and folders with which decoding cannot work."""
  if config.load_full_state_path:
    raise ConfigError(
      f"load_full_state_path={config.load_full_state_path}: decoding reads parameters only; name the checkpoint by "
      "load_parameters_path, which also accepts a checkpoint of a run."
    )
  if not config.load_parameters_path:
    raise ConfigError("load_parameters_path='' names no checkpoint; name one, such as OUTPUT/RUN/checkpoints/STEP.")
  if "://" not in config.load_parameters_path and not pathlib.Path(config.load_parameters_path).is_dir():
    raise ConfigError(f"load_parameters_path={config.load_parameters_path}: there is no such folder.")
  for key in ("image_path", "video_path", "audio_path"):
    if path := getattr(config, key):
      raise ConfigError(f"{key}={path}: decoding reads a prompt of text alone; leave it empty.")
  if config.max_prefill_predict_length >= config.max_target_length:
    raise ConfigError(
      f"max_prefill_predict_length={config.max_prefill_predict_length} leaves no room for new tokens in "
      f"max_target_length={config.max_target_length}; lower the first key, or raise the second."
    )
  # Imported here because it imports MaxText, whose version `launch` has checked by now.
  from maxtext_mudd.inference import generation

  generation.check_config(config)
  generation.Sampling.from_config(config)


@reachable()
def main(argv: Sequence[str]) -> None:
  """Decodes. `launch` calls it with the arguments of the command line, the name of the program first.

  Raises:
    ConfigError: the prompt is empty or too long, the tokenizer cannot be read, or the new text does not begin with
      autoregressive_decode_assert.
  """
  import jax
  from maxtext.configs import pyconfig

  from maxtext_mudd.checkpoints import parameters
  from maxtext_mudd.config.changed import changed
  from maxtext_mudd.inference import generation, tokens

  jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as MaxText's decode does
  # MaxText would read the prompt as YAML, so the last prompt argument is kept from it.
  prompts = [argument.removeprefix(_PROMPT) for argument in argv if argument.startswith(_PROMPT)]
  config = pyconfig.initialize([argument for argument in argv if not argument.startswith(_PROMPT)])
  prompt = prompts[-1] if prompts else config.prompt
  if not prompt:
    raise ConfigError('prompt is empty; pass prompt="...".')
  tokenizer = tokens.Tokenizer(config, _moved_tokenizer(config))
  prompt_tokens = _encode(prompt, tokenizer, config)
  max_new_tokens = config.max_target_length - config.max_prefill_predict_length
  generation.check([prompt_tokens], max_new_tokens, config)
  if "://" not in config.load_parameters_path:
    path = str(parameters.items_folder(config.load_parameters_path))
    config = changed(config, load_parameters_path=os.path.abspath(path))
  if console.stderr().isatty():
    print("reading the checkpoint and compiling ...", file=console.stderr())
  model = parameters.load(config)
  sampling = generation.Sampling.from_config(config)
  (row,) = generation.decode(
    model, config, [prompt_tokens], max_new_tokens, sampling, seed=config.init_weights_seed
  ).tolist()
  new_tokens = row[len(prompt_tokens) :]
  if tokenizer.eos_id in new_tokens:
    new_tokens = new_tokens[: new_tokens.index(tokenizer.eos_id)]
  output = tokenizer.decode(new_tokens)
  console.show(f"Input `{prompt}` -> `{output}`")
  if not output.startswith(config.autoregressive_decode_assert):
    raise ConfigError(
      f"autoregressive_decode_assert={config.autoregressive_decode_assert}: the new text does not begin with it: "
      f"{output!r}."
    )


def _encode(prompt: str, tokenizer, config) -> list[int]:
  """The tokens of a prompt. Raises ConfigError if there are more than max_prefill_predict_length."""
  prompt_tokens = tokenizer.encode(prompt, tokenizer.add_bos)
  if len(prompt_tokens) > config.max_prefill_predict_length:
    raise ConfigError(
      f"the prompt has {len(prompt_tokens)} tokens, more than "
      f"max_prefill_predict_length={config.max_prefill_predict_length}; shorten it, or raise that key, which leaves "
      f"fewer new tokens up to max_target_length={config.max_target_length}."
    )
  return prompt_tokens


def _moved_tokenizer(config) -> str:
  """The path of the tokenizer in a converted folder that was moved after its YAML was written; otherwise empty."""
  from maxtext_mudd.checkpoints import model_folder, tokenizers

  if not pathlib.Path(config.tokenizer_path or "").is_absolute() or pathlib.Path(config.tokenizer_path).exists():
    return ""
  keys = {"tokenizer_path": config.tokenizer_path, "tokenizer_type": config.tokenizer_type.value}
  folder = pathlib.Path(config.load_parameters_path) / model_folder.TOKENIZER
  return tokenizers.moved_keys(keys, folder).get("tokenizer_path", "")


if __name__ == "__main__":
  run()
