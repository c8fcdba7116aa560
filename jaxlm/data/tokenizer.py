"""What a tokenizer is, and what can be done with any of them.

`jaxlm.data.tokenizers` has the kinds. Special tokens such as
<|endoftext|> have ids of their own that text cannot reach: `encode` spells
them out like any other text unless the caller allows them by name, so a user
cannot end a document or a turn.
"""

import codecs
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from jaxlm.data.cache import digest, write_whole
from jaxlm.errors import UserError

EOT = "<|endoftext|>"
_ENDS = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")

# Files of a published model that belong to its tokenizer.
TEMPLATE = "chat_template.jinja"
BESIDE = (TEMPLATE, "tokenizer_config.json", "generation_config.json")
BESIDE += ("special_tokens_map.json", "added_tokens.json")


class Tokenizer:
  """What every tokenizer offers; the subclasses fill in four hooks.

  Attributes:
    vocab_size: ids are 0 .. vocab_size - 1.
    specials: id of every special token, by its name.
    start: ids that its file puts before every text; `encode` does not.
    beside: files that were published with it (a chat template, ...), by name;
      they travel with it and change no id.
  """

  vocab_size: int
  specials: dict[str, int]
  start: tuple[int, ...] = ()
  beside: Mapping[str, bytes] = MappingProxyType({})

  @property
  def eot(self) -> int | None:
    """Id of the token that ends a document, or None if there is none."""
    return next((self.specials[n] for n in _ENDS if n in self.specials), None)

  def encode(
    self, text: str, allow_special: bool | Collection[str] = False
  ) -> np.ndarray:
    """Token ids of a text, int32 [n].

    Args:
      text: any string without lone surrogates.
      allow_special: the names of special tokens to recognise in the text, or
        True for all of them. By default none: "<|endoftext|>" is 13 ordinary
        characters.

    Raises:
      UserError: if the text cannot be expressed in this vocabulary.
    """
    names = self.specials if allow_special is True else allow_special or ()
    names = [re.escape(name) for name in names if name in self.specials]
    if not names:
      return self._encode([text])[0]
    pieces = re.split(f"({'|'.join(names)})", text)
    ids = self._encode(pieces[::2])
    for i, name in enumerate(pieces[1::2]):
      ids.insert(2 * i + 1, np.array([self.specials[name]], np.int32))
    return np.concatenate(ids)

  def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` of each text, on all cores where the library can."""
    return self._encode(list(texts))

  def decode_bytes(self, ids: Iterable[int], start: bool = True) -> bytes:
    """The UTF-8 bytes that the ids stand for; may end within a character.

    `start=False` continues a text: no leading space is taken off by the
    SentencePiece models that add one.
    """
    array = ids if hasattr(ids, "__array__") else list(ids)
    ids = np.asarray(array, np.int64).reshape(-1)
    bad = ids[(ids < 0) | (ids >= self.vocab_size)]
    if bad.size:
      raise UserError(
        f"token id {bad[0]} is outside this tokenizer's vocabulary "
        f"(0..{self.vocab_size - 1}); was it made with another tokenizer?"
      )
    return self._decode(ids, start)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
    return self.decode_bytes(ids).decode("utf-8", errors="replace")

  def fingerprint(self) -> str:
    """A hash of all that decides its ids: equal tokenizers, equal ids."""
    return digest(*(x for pair in self._files().items() for x in pair))

  def save(self, folder: str | Path) -> None:
    """Writes the file that `load` reads back, whole or not at all.

    It is tokenizer.model for SentencePiece and tokenizer.json for the others;
    what is `beside` it comes along.

    Raises:
      UserError: if the folder cannot be written or the disk is full.
    """
    for name, content in (*self.beside.items(), *self._files().items()):
      try:
        write_whole(Path(folder) / name, content)
      except OSError as error:
        raise UserError(
          f"cannot write {Path(folder) / name}: {error.strerror or error}; "
          "free some space or choose another folder"
        ) from error

  def _encode(self, texts: list[str]) -> list[np.ndarray]:
    raise NotImplementedError

  def _decode(self, ids: np.ndarray, start: bool) -> bytes:
    raise NotImplementedError

  def _files(self) -> dict[str, bytes]:
    raise NotImplementedError


class TextStream:
  """Turns ids that arrive one by one into text, never half a character.

  >>> from jaxlm.data import Bytes
  >>> stream = TextStream(Bytes())
  >>> [stream.push([i]) for i in "é!".encode()]
  ['', 'é', '!']
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

  def push(self, ids: Iterable[int]) -> str:
    """The text that became complete with these ids; often empty or one word."""
    return self._decoder.decode(self._tokenizer.decode_bytes(ids, start=False))

  def flush(self) -> str:
    """What is left at the end: U+FFFD for a character that never came whole."""
    return self._decoder.decode(b"", final=True)


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
  """How many bytes of UTF-8 a token stands for: higher means fewer steps.

  Losses of different tokenizers compare as bits per byte:
  loss / (ln 2 * bytes_per_token).
  """
  tokens = sum(len(ids) for ids in tokenizer.encode_many(texts))
  if not tokens:
    raise UserError("bytes per token of an empty text is undefined")
  return sum(len(utf8(text)) for text in texts) / tokens


def utf8(text: str) -> bytes:
  """UTF-8 of a text; a lone surrogate in it is a UserError."""
  try:
    return text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise UserError(
      f"the text has a lone surrogate at position {error.start}, which is no "
      "character; decode its file as UTF-8 or use tokenizer='bytes' on it"
    ) from error
