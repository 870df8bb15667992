"""Reads the model and the tokenizer of a command's --checkpoint, of whatever format."""

import os
from typing import Any

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import pretrained, tokens


def load(checkpoint: str, config_file: str, overrides: dict[str, Any], tokenizer: str):
  """(model, config, tokenizer) of the arguments of `read`. Raises what `read` raises."""
  config, tokenizer, load_model = read(checkpoint, config_file, overrides, tokenizer)
  return load_model(), config, tokenizer


def read(checkpoint: str, config_file: str, overrides: dict[str, Any], tokenizer: str):
  """Reads the configuration and the tokenizer of a model, and none of its parameters.

  Args:
    checkpoint: a folder that `from_pretrained` takes or, with a configuration file, one that `from_run` takes.
    config_file: the configuration that a run was started with; empty for other models.
    overrides: MaxText's keys.
    tokenizer: the path of a tokenizer that overrides the configuration's; empty for the configuration's.

  Returns:
    (config, a `tokens.Tokenizer`, a function without arguments that loads and returns the model).

  Raises:
    ConfigError: the model or its tokenizer cannot be read.
  """
  if config_file:
    config, load_model = pretrained.open_run(checkpoint, config_file, **overrides)
  else:
    config, load_model = pretrained.open_folder(checkpoint, **overrides)
  if not (tokenizer or overrides.get("tokenizer_path") or tokens.is_named(config)):
    _check_default_tokenizer(checkpoint, config_file, config.tokenizer_path)
  return config, tokens.Tokenizer(config, tokenizer), load_model


def _check_default_tokenizer(checkpoint: str, config_file: str, path: str) -> None:
  """Raises ConfigError if no tokenizer is named, and MaxText's default tokenizer cannot be the model's.

  A run may have been trained with the default tokenizer, if the tokenizer is on this machine. No other model was.
  """
  if not config_file:
    raise ConfigError(
      f"{checkpoint} has no tokenizer; name the one that the model was trained with by --tokenizer=PATH."
    )
  if not os.path.exists(path):
    raise ConfigError(
      f"{config_file} names no tokenizer_path; name the tokenizer that the model was trained with by --tokenizer=PATH."
    )
