"""Vocabularies of pieces in a tokenizer.json: those that came of SentencePiece.

Llama 2, Mistral, Gemma and T5 are published with such a file, BPE or unigram,
in which "▁" stands for a space and <0x0A> for a byte of what has no piece.
"""

import json
import re
from typing import Any

import numpy as np

from jaxlm.data.tokenizer import Tokenizer, utf8
from jaxlm.errors import UserError

MARK = "▁"


def read_json(content: str) -> tuple[Any, dict[str, Any]]:
  """A tokenizer.json as the library has it, and as JSON.

  Special tokens are matched by `Tokenizer.encode` and never by the library,
  which would recognise them in any text.

  Raises:
    UserError: if the library cannot use it.
  """
  import tokenizers

  try:
    made = tokenizers.Tokenizer.from_str(content)
    form = json.loads(content)
  except Exception as error:  # the library raises bare Exception
    raise UserError(f"not a usable tokenizer.json: {error}") from error
  made.no_padding()
  made.no_truncation()
  made.encode_special_tokens = True
  return made, form


def start_of(made: Any) -> tuple[int, ...]:
  """The special tokens that a tokenizer.json puts before every text."""
  plain = made.encode("a", add_special_tokens=False).ids
  ids = made.encode("a").ids
  return tuple(ids[: ids.index(plain[0])]) if plain else ()


class Pieces(Tokenizer):
  """BPE or unigram pieces, in the `tokenizer.json` format of Hugging Face.

  As lossless as the vocabulary: with byte pieces any text comes back, but for
  a "▁" of its own, and what the file's normaliser changes.
  """

  def __init__(self, content: str):
    """`content` is the text of a tokenizer.json; see `load`."""
    self._hf, form = read_json(content)
    kind = form["model"].get("type")
    vocab = self._hf.get_vocab(with_added_tokens=True)
    marked = any(MARK in piece for piece in vocab)
    if kind not in ("BPE", "Unigram") or not marked:
      raise UserError(
        f"this tokenizer.json is of a kind that is not read here ({kind}); "
        "known are byte-level BPE, and BPE or unigram pieces with '▁' for the "
        "space"
      )
    added = form.get("added_tokens") or []
    self.specials = {a["content"]: a["id"] for a in added if a["special"]}
    self.vocab_size = max(vocab.values()) + 1
    self._content = content
    self.start = start_of(self._hf)
    names = {a["content"] for a in added}
    self._table = [b""] * self.vocab_size
    for piece, i in vocab.items():
      self._table[i] = utf8(piece) if piece in names else _bytes_of(piece)
    # Most put a space before the text.
    self._adds_space = (
      self._hf.encode("a", add_special_tokens=False).tokens[0].startswith(MARK)
    )
    if self.decode(self.encode("a b")) != "a b":
      raise UserError(
        "this tokenizer.json changes plain text (perhaps by a lowercasing "
        "normalizer), so it cannot be read back; turn that off"
      )

  def _encode(self, texts: list[str]) -> list[np.ndarray]:
    for text in texts:
      utf8(text)
    found = self._hf.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in found]

  def _decode(self, ids: np.ndarray, start: bool) -> bytes:
    out = b"".join([self._table[i] for i in ids])
    return out[1:] if start and self._adds_space and out[:1] == b" " else out

  def _files(self) -> dict[str, bytes]:
    return {"tokenizer.json": self._content.encode("utf-8")}


def _bytes_of(piece: str) -> bytes:
  """What a piece stands for."""
  if re.fullmatch("<0x[0-9A-F]{2}>", piece):
    return bytes([int(piece[3:5], 16)])
  return utf8(piece.replace(MARK, " "))
