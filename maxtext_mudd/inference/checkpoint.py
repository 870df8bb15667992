"""Loads the model and the tokenizer of a command's --checkpoint, of whatever format."""

import os
from typing import Any

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.inference import pretrained, tokens


def load(checkpoint: str, config_file: str, overrides: dict[str, Any], tokenizer: str):
  """Loads a model and its tokenizer.

  Args:
    checkpoint: a folder that `from_pretrained` takes or, with a configuration file, one that `from_run` takes.
    config_file: the configuration that a run was started with; empty for other models.
    overrides: MaxText's keys.
    tokenizer: the path of a tokenizer that overrides the configuration's; empty for the configuration's.

  Returns:
    (model, config, tokenizer), the last a `tokens.Tokenizer`.

  Raises:
    ConfigError: the model or its tokenizer cannot be loaded.
  """
  if config_file:
    model, config = pretrained.from_run(checkpoint, config_file, **overrides)
  else:
    model, config = pretrained.from_pretrained(checkpoint, **overrides)
  if not (tokenizer or overrides.get("tokenizer_path") or tokens.is_named(config)):
    _check_default_tokenizer(checkpoint, config_file, config.tokenizer_path)
  return model, config, tokens.Tokenizer(config, tokenizer)


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
