"""SentencePiece models from their pieces, and the pieces of a model.

A GGUF file keeps the pieces of a SentencePiece vocabulary with scores and
types; the library reads a protocol buffer of them (sentencepiece_model.proto
of https://github.com/google/sentencepiece). Its wire format takes a few lines:
each field is a key, number·8 + kind, and then a varint (kind 0), 4 bytes (5)
or a length and so many bytes (2).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # GGUF's, too
UNIGRAM, BPE = 1, 2


@dataclass(frozen=True)
class Pieces:
  """A SentencePiece vocabulary.

  Attributes:
    kind: UNIGRAM or BPE.
    names, scores, types: of every piece.
    adds_space: a space is put before a text.
    trims: runs of spaces become one.
    charsmap: how characters are normalised, compiled; b"" for not at all.
  """

  kind: int
  names: list[str]
  scores: list[float]
  types: list[int]
  adds_space: bool = True
  trims: bool = False
  charsmap: bytes = b""


def to_proto(pieces: Pieces) -> bytes:
  """The content of a SentencePiece `.model` file."""
  rows = zip(pieces.names, pieces.scores, pieces.types, strict=True)
  unknown = pieces.types.index(UNKNOWN)
  out = [
    _field(1, _field(1, name.encode()) + _field(2, score) + _field(3, kind))
    for name, score, kind in rows
  ]
  trainer = _field(3, pieces.kind) + _field(35, int(BYTE in pieces.types))
  trainer += _field(40, unknown)
  normalizer = _field(1, b"identity") + _field(2, pieces.charsmap)
  normalizer += _field(3, int(pieces.adds_space))
  normalizer += _field(4, int(pieces.trims)) + _field(5, 1)
  return b"".join(out) + _field(2, trainer) + _field(3, normalizer)


def from_proto(proto: bytes) -> Pieces:
  """The vocabulary in the content of a `.model` file."""
  rows, trainer, normalizer = [], {}, {}
  for number, value in _fields(proto):
    if number == 1:
      rows.append(dict(_fields(value)))
    elif number == 2:
      trainer = dict(_fields(value))
    elif number == 3:
      normalizer = dict(_fields(value))
  return Pieces(
    kind=trainer.get(3, UNIGRAM),
    names=[row[1].decode() for row in rows],
    scores=[struct.unpack("<f", row.get(2, bytes(4)))[0] for row in rows],
    types=[row.get(3, NORMAL) for row in rows],
    adds_space=bool(normalizer.get(3, 1)),
    trims=bool(normalizer.get(4, 1)),
    charsmap=normalizer.get(2, b""),
  )


def _field(number: int, value: int | float | bytes) -> bytes:
  """A field with its key."""
  if isinstance(value, bytes):
    return _varint(number * 8 + 2) + _varint(len(value)) + value
  if isinstance(value, float):
    return _varint(number * 8 + 5) + struct.pack("<f", value)
  return _varint(number * 8) + _varint(value)


def _varint(value: int) -> bytes:
  """Seven bits a byte, the lowest first; the top bit says there is more."""
  out = bytearray()
  while value > 127:
    out.append(value & 127 | 128)
    value >>= 7
  return bytes([*out, value])


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
  """Numbers and values of the fields of a message."""
  at = 0

  def varint() -> int:
    nonlocal at
    value = shift = 0
    while True:
      byte = data[at]
      at += 1
      value |= (byte & 127) << shift
      if byte < 128:
        return value
      shift += 7

  while at < len(data):
    key = varint()
    if key & 7 == 0:
      yield key >> 3, varint()
      continue
    size = {1: 8, 5: 4}.get(key & 7) or varint()
    yield key >> 3, data[at : at + size]
    at += size
