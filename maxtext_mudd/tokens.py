"""Text to a model's tokens and back, by the tokenizers of MaxText."""

from collections.abc import Sequence
import pathlib

from maxtext.input_pipeline import tokenizer
from maxtext.utils import globals as maxtext_globals

from maxtext_mudd import assets
from maxtext_mudd.errors import ConfigError, brief


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
    if not path:
      raise ConfigError("tokenizer_path='' names no tokenizer; name one.")
    try:
      # BOS is put by `encode`, and not where a text goes on.
      self._words = tokenizer.build_tokenizer(path, kind, False, False, config.hf_access_token)
      around = self._words.encode("")
    except Exception as error:  # libraries raise all kinds
      raise ConfigError(
        f"tokenizer_path={path} cannot be read as a tokenizer of {kind}; name another ({brief(error)})."
      ) from error
    if around:
      raise ConfigError(f"tokenizer_path={path} puts tokens of its own around texts; name one that does not.")
    self.hugging_face = getattr(self._words, "tokenizer", None)
    size = _size(self._words)
    if size > config.vocab_size:
      raise ConfigError(
        f"tokenizer_path={path} has {size} tokens, and the model has vocab_size={config.vocab_size}; name the "
        "tokenizer that the model was trained with."
      )
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


def _kind(path: str) -> str:
  if not pathlib.Path(path).is_file():
    return "huggingface"
  return "tiktoken" if "tiktoken" in path else "sentencepiece"


def _size(words) -> int:
  """One more than the largest token."""
  if isinstance(words, tokenizer.HFTokenizer):
    return max(words.tokenizer.get_vocab().values()) + 1
  return words.n_words if isinstance(words, tokenizer.TikTokenTokenizer) else words._tokenizer_model.vocab_size()
