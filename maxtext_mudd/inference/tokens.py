"""Encodes text to a model's tokens and decodes tokens, with MaxText's tokenizers.

`Tokenizer` is for inference and evaluation. `check_training` checks the tokenizer of a training run.
"""

from collections.abc import Sequence
import os
import pathlib

from maxtext.input_pipeline import tokenizer
from maxtext.utils import globals as maxtext_globals

from maxtext_mudd import assets
from maxtext_mudd.config.errors import ConfigError, brief


def is_named(config) -> bool:
  """Whether a file or an argument set `tokenizer_path`. Otherwise it is MaxText's default."""
  return config.tokenizer_path != maxtext_globals.HF_IDS["default"]


class Tokenizer:
  """The tokenizer of a configuration.

  Attributes:
    path: the file, folder or name of the tokenizer.
    add_bos: whether texts begin with BOS, as in the training that the configuration describes.
    bos_id, eos_id: the ids of BOS and EOS; None if the tokenizer has no such token.
    hugging_face: the tokenizer of the library `transformers` behind this one; None if it has another type.
  """

  def __init__(self, config, path: str = ""):
    """Reads the tokenizer.

    Args:
      path: overrides `config.tokenizer_path`: a Hugging Face folder, or a file of SentencePiece or tiktoken.

    Raises:
      ConfigError: no tokenizer is named, it cannot be read, or it has more tokens than the model.
    """
    tokenizer_type = _type_of(path) if path else config.tokenizer_type.value
    path = str(assets.BYTE_TOKENIZER_FOLDER) if path == assets.BYTE_TOKENIZER else path
    self.path = path = path or config.tokenizer_path
    # The tokenizer adds no BOS. `encode` adds it, but not to a text that continues another text.
    self._tokenizer = read(path, tokenizer_type, config.hf_access_token)
    if self._tokenizer.encode(""):
      raise ConfigError(f"tokenizer_path={path} adds tokens to every text; name a tokenizer that does not.")
    self.hugging_face = getattr(self._tokenizer, "tokenizer", None)
    size = check_size(self._tokenizer, path, config, "name the tokenizer that the model was trained with")
    self.bos_id, self.eos_id = (
      x if x is not None and 0 <= x < size else None for x in (self._tokenizer.bos_id, self._tokenizer.eos_id)
    )
    if self.bos_id is None and self.eos_id is None:
      raise ConfigError(
        f"tokenizer_path={path} has neither BOS nor EOS, and a text has to begin with one of them; name another."
      )
    self.add_bos = config.add_bos and self.bos_id is not None

  @property
  def prefix_id(self) -> int:
    """The token that the first token of a text is predicted from: BOS or, if there is none, EOS."""
    return self.eos_id if self.bos_id is None else self.bos_id

  def encode(self, text: str, bos: bool) -> list[int]:
    """The tokens of a text, after BOS if `bos` is true."""
    ids = list(self._tokenizer.encode(text))
    return [self.bos_id, *ids] if bos and ids[:1] != [self.bos_id] else ids

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(list(ids))


def check_training(config) -> None:
  """Raises ConfigError if the tokenizer of a training run cannot be read, or has more tokens than the model.

  MaxText would train a model with fewer tokens: it gives targets beyond `vocab_size` a loss of 0.
  """
  dataset_type = config.dataset_type.value
  is_megatron = dataset_type == "grain" and config.grain_file_type.startswith("mmap")
  if is_megatron or dataset_type in ("synthetic", "olmo_grain"):
    return  # the data are tokens, and MaxText reads no tokenizer
  # With dataset_type=hf MaxText reads a tokenizer of Hugging Face, whatever tokenizer_type says.
  tokenizer_type = "huggingface" if dataset_type == "hf" else config.tokenizer_type.value
  maxtext_tokenizer = read(config.tokenizer_path, tokenizer_type, config.hf_access_token)
  if config.tokenize_train_data or (config.eval_interval > 0 and config.tokenize_eval_data):
    advice = "set vocab_size={size} or more, or name another tokenizer"
    check_size(maxtext_tokenizer, config.tokenizer_path, config, advice)


def read(path: str | None, tokenizer_type: str, access_token: str | None):
  """Reads MaxText's tokenizer of a path, which adds neither BOS nor EOS.

  Args:
    tokenizer_type: a value of the key `tokenizer_type`.
    access_token: a token of the Hugging Face hub.

  Raises:
    ConfigError: `path` is empty, or the tokenizer cannot be read.
  """
  if not path:
    raise ConfigError("tokenizer_path='' names no tokenizer; name one.")
  if tokenizer_type != "huggingface" and pathlib.Path(path).is_dir():
    raise ConfigError(
      f"{_described(path)} is a folder, and tokenizer_type={tokenizer_type} reads a file; name its file, or set "
      "tokenizer_type=huggingface."
    )
  if tokenizer_type == "tiktoken" and tokenizer_type not in path:
    raise ConfigError(
      f"{_described(path)} has no 'tiktoken' in it, by which MaxText knows files of tokenizer_type=tiktoken; rename "
      "the file, or set another tokenizer_type."
    )
  try:
    maxtext_tokenizer = tokenizer.build_tokenizer(path, tokenizer_type, False, False, access_token)
    maxtext_tokenizer.encode("")
  except Exception as error:  # each tokenizer library raises its own
    if tokenizer_type == "huggingface" and not os.path.exists(path):
      offline = "with HF_HUB_OFFLINE set, " if os.environ.get("HF_HUB_OFFLINE") else ""
      gated = ", with HF_TOKEN set, as it is gated" if "gated" in str(error) else ""
      raise ConfigError(
        f"{_described(path)} cannot be read as a tokenizer of {tokenizer_type}: it is no local folder and, {offline}"
        f"cannot be loaded from Hugging Face; name a folder with a tokenizer.json, or a model of the hub{gated}."
      ) from error
    raise ConfigError(
      f"{_described(path)} cannot be read as a tokenizer of {tokenizer_type}; name another ({brief(error)})."
    ) from error
  return maxtext_tokenizer


def check_size(maxtext_tokenizer, path: str, config, advice: str) -> int:
  """Checks that the model has all tokens of a tokenizer.

  Args:
    maxtext_tokenizer: what `read` returns.
    path: the path of the tokenizer, for the error.
    advice: the end of the error, which says what would work. {size} in it stands for the number of tokens.

  Returns:
    The number of tokens: one more than the largest id.

  Raises:
    ConfigError: the model has fewer tokens.
  """
  size = _size(maxtext_tokenizer)
  if size > config.vocab_size:
    raise ConfigError(
      f"{_described(path)} has {size} tokens, and the model has vocab_size={config.vocab_size}; "
      f"{advice.format(size=size)}."
    )
  return size


def _described(path: str) -> str:
  """The key and value that name a tokenizer, for errors."""
  return f"tokenizer_path={assets.BYTE_TOKENIZER if path == str(assets.BYTE_TOKENIZER_FOLDER) else path}"


def _type_of(path: str) -> str:
  """The value of `tokenizer_type` for a path."""
  if not pathlib.Path(path).is_file():
    return "huggingface"
  return "tiktoken" if "tiktoken" in path else "sentencepiece"


def _size(maxtext_tokenizer) -> int:
  """One more than the largest id of a token."""
  if isinstance(maxtext_tokenizer, tokenizer.HFTokenizer):
    return max(maxtext_tokenizer.tokenizer.get_vocab().values()) + 1
  if isinstance(maxtext_tokenizer, tokenizer.TikTokenTokenizer):
    return maxtext_tokenizer.n_words
  return maxtext_tokenizer._tokenizer_model.vocab_size()
