"""Text to a model's tokens and back, by the tokenizers of MaxText."""

from collections.abc import Sequence
import os
import pathlib

from maxtext.input_pipeline import tokenizer
from maxtext.utils import globals as maxtext_globals

from maxtext_mudd import assets
from maxtext_mudd.config.errors import ConfigError, brief


def is_named(config) -> bool:
  """Whether something named `config.tokenizer_path`, which is MaxText's own where nothing did."""
  return config.tokenizer_path != maxtext_globals.HF_IDS["default"]


class Tokenizer:
  """The tokenizer of a configuration.

  Attributes:
    path: where it is.
    add_bos: whether texts begin with BOS, as those of the configuration's training do.
    bos_id, eos_id: None where it has none.
    hugging_face: the one of `transformers`, where it is of that type.
  """

  def __init__(self, config, path: str = ""):
    """Reads it.

    Args:
      path: instead of `config.tokenizer_path`: a Hugging Face folder, or a file of SentencePiece or tiktoken.

    Raises:
      ConfigError: there is none, it cannot be read, or the model has fewer tokens.
    """
    kind = _kind(path) if path else config.tokenizer_type.value
    self.path = path = str(assets.BYTE_TOKENIZER_FOLDER) if path == assets.BYTE_TOKENIZER else path
    self.path = path = path or config.tokenizer_path
    # BOS is put by `encode`, and not where a text goes on.
    self._words = read(path, kind, config.hf_access_token)
    if self._words.encode(""):
      raise ConfigError(f"tokenizer_path={path} puts tokens of its own around texts; name one that does not.")
    self.hugging_face = getattr(self._words, "tokenizer", None)
    size = check_size(self._words, path, config, "name the tokenizer that the model was trained with")
    self.bos_id, self.eos_id = (
      x if x is not None and 0 <= x < size else None for x in (self._words.bos_id, self._words.eos_id)
    )
    if self.bos_id is None and self.eos_id is None:
      raise ConfigError(f"tokenizer_path={path} has neither BOS nor EOS, which texts are to begin with.")
    self.add_bos = config.add_bos and self.bos_id is not None

  @property
  def prefix_id(self) -> int:
    """What the first token of a text is predicted from."""
    return self.eos_id if self.bos_id is None else self.bos_id

  def encode(self, text: str, bos: bool) -> list[int]:
    ids = list(self._words.encode(text))
    return [self.bos_id, *ids] if bos and ids[:1] != [self.bos_id] else ids

  def decode(self, ids: Sequence[int]) -> str:
    return self._words.decode(list(ids))


def check_training(config) -> None:
  """Raises ConfigError where the tokenizer of a training run cannot be read, or has tokens that the model has not.

  MaxText would train: targets beyond `vocab_size` count as a loss of 0.
  """
  dataset_type = config.dataset_type.value
  is_map = dataset_type == "grain" and config.grain_file_type.startswith("mmap")
  if is_map or dataset_type in ("synthetic", "olmo_grain"):
    return  # these hold tokens; MaxText reads no tokenizer
  # MaxText's pipeline of dataset_type=hf reads tokenizers of Hugging Face, whatever tokenizer_type says.
  kind = "huggingface" if dataset_type == "hf" else config.tokenizer_type.value
  words = read(config.tokenizer_path, kind, config.hf_access_token)
  if config.tokenize_train_data or (config.eval_interval > 0 and config.tokenize_eval_data):
    check_size(words, config.tokenizer_path, config, "set vocab_size={size} or more, or name another tokenizer")


def read(path: str | None, kind: str, access_token: str | None):
  """MaxText's tokenizer of a path, which adds neither BOS nor EOS.

  Args:
    kind: a value of `tokenizer_type`.

  Raises:
    ConfigError: there is none, or it cannot be read.
  """
  if not path:
    raise ConfigError("tokenizer_path='' names no tokenizer; name one.")
  if kind != "huggingface" and pathlib.Path(path).is_dir():
    raise ConfigError(
      f"{_name(path)} is a folder, and tokenizer_type={kind} reads a file; name its file, or set "
      "tokenizer_type=huggingface."
    )
  if kind == "tiktoken" and kind not in path:
    raise ConfigError(
      f"{_name(path)} has no 'tiktoken' in it, by which MaxText knows files of tokenizer_type=tiktoken; rename "
      "the file, or set another tokenizer_type."
    )
  try:
    words = tokenizer.build_tokenizer(path, kind, False, False, access_token)
    words.encode("")
  except Exception as error:  # libraries raise all kinds
    if kind == "huggingface" and not os.path.exists(path):
      offline = "with HF_HUB_OFFLINE set, " if os.environ.get("HF_HUB_OFFLINE") else ""
      gated = ", with HF_TOKEN set, as it is gated" if "gated" in str(error) else ""
      raise ConfigError(
        f"{_name(path)} cannot be read as a tokenizer of {kind}: it is no local folder and, {offline}"
        f"cannot be loaded from Hugging Face; name a folder with a tokenizer.json, or a model of the hub{gated}."
      ) from error
    raise ConfigError(
      f"{_name(path)} cannot be read as a tokenizer of {kind}; name another ({brief(error)})."
    ) from error
  return words


def check_size(words, path: str, config, advice: str) -> int:
  """The number of tokens: one more than the largest id.

  Args:
    words: as of `read`.
    advice: what would work; {size} in it stands for the number.

  Raises:
    ConfigError: the model has fewer.
  """
  size = _size(words)
  if size > config.vocab_size:
    raise ConfigError(
      f"{_name(path)} has {size} tokens, and the model has vocab_size={config.vocab_size}; {advice.format(size=size)}."
    )
  return size


def _name(path: str) -> str:
  return f"tokenizer_path={assets.BYTE_TOKENIZER if path == str(assets.BYTE_TOKENIZER_FOLDER) else path}"


def _kind(path: str) -> str:
  if not pathlib.Path(path).is_file():
    return "huggingface"
  return "tiktoken" if "tiktoken" in path else "sentencepiece"


def _size(words) -> int:
  """One more than the largest token."""
  if isinstance(words, tokenizer.HFTokenizer):
    return max(words.tokenizer.get_vocab().values()) + 1
  return words.n_words if isinstance(words, tokenizer.TikTokenTokenizer) else words._tokenizer_model.vocab_size()
