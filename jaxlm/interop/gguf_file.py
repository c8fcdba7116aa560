"""The container of a GGUF file: metadata and tensors, nothing interpreted.

    "GGUF", version, counts | key, type, value ... | name, shape, type, offset
    ... | padding | the bytes of the tensors

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The file is
mapped, not read: a tensor's bytes are touched when it is asked for. The
package `gguf` knows the block formats; its own reader takes seconds for a
vocabulary, so the few lines of the container are read here.
"""

import importlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.errors import UserError

_SCALARS = dict(
  zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)
_STRING, _ARRAY = 8, 9
_PLAIN = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F64": np.dtype(np.float64),
}


def library() -> ModuleType:
  """The package `gguf`.

  Raises:
    UserError: if it is not installed.
  """
  try:
    return importlib.import_module("gguf")
  except ImportError as error:
    raise UserError(
      "GGUF files need the package gguf; pip install 'jaxlm[gguf]'"
    ) from error


@dataclass(frozen=True)
class Tensor:
  """A tensor as it lies in the file.

  Attributes:
    name: its name there.
    type: 'F32', 'Q4_1', 'Q6_K', ...; see `array`.
    shape: of its values, outermost axis first (the file has it the other way
      round).
    raw: its bytes, uint8 [..., bytes of a row].
  """

  name: str
  type: str
  shape: tuple[int, ...]
  raw: np.ndarray

  def array(self, index: int | None = None) -> np.ndarray:
    """Its values: floats as they are stored, float32 for blocks.

    Args:
      index: one entry of the first axis (an expert); None means all.

    Raises:
      UserError: for a type whose blocks the package cannot read.
    """
    raw = self.raw if index is None else self.raw[index]
    shape = self.shape if index is None else self.shape[1:]
    if self.type in _PLAIN:
      return raw.view(_PLAIN[self.type]).reshape(shape)
    gguf = library()
    try:
      kind = gguf.GGMLQuantizationType[self.type]
      return gguf.quants.dequantize(raw, kind).reshape(shape)
    except NotImplementedError as error:
      raise UserError(
        f"tensor {self.name!r} is stored as {self.type}, which the package "
        "gguf cannot decode; take a file of type F16, Q8_0, Q4_K or Q6_K"
      ) from error


@dataclass(frozen=True)
class Container:
  """What a GGUF file holds: `metadata` by key, `tensors` by name."""

  metadata: dict[str, Any]
  tensors: dict[str, Tensor]


def load(path: str | Path) -> Container:
  """Reads the head of a file and maps its tensors.

  Raises:
    UserError: if it is no GGUF file, cut short, of another byte order or
      version, or has a tensor of an unknown type.
  """
  library()
  try:
    data = np.memmap(path, np.uint8, mode="r")
  except (OSError, ValueError) as error:  # ValueError: an empty file
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"cannot read {path}: {reason}") from error
  if bytes(data[:4]) != b"GGUF":
    raise UserError(
      f"{path} is not a GGUF file (it does not begin with 'GGUF'); give a "
      ".gguf file, or the directory of a Hugging Face model"
    )
  try:
    return _parse(_Reader(data))
  except (struct.error, UnicodeDecodeError, MemoryError, OverflowError) as e:
    raise UserError(
      f"{path} is damaged or cut short: its head does not end ({e}); "
      "download it again"
    ) from e
  except UserError as e:
    raise UserError(f"{path}: {e}") from e


class _Reader:
  """Reads values from the front of a buffer."""

  def __init__(self, data: np.ndarray):
    self.data = data
    self.bytes = memoryview(data)
    self.at = 4

  def number(self, code: str) -> Any:
    """A number of a `struct` code, little-endian."""
    (value,) = struct.unpack_from(f"<{code}", self.bytes, self.at)
    self.at += struct.calcsize(code)
    return value

  def string(self) -> str:
    """A string: its length, its UTF-8."""
    n = self.number("Q")
    if n > len(self.bytes) - self.at:
      raise struct.error(f"a string of {n} bytes")
    self.at += n
    return str(self.bytes[self.at - n : self.at], "utf-8")

  def value(self, kind: int) -> Any:
    """A value of one of the format's types; arrays are lists."""
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      return self.array(self.number("I"), self.number("Q"))
    if kind not in _SCALARS:
      raise struct.error(f"a value of unknown type {kind}")
    return self.number(_SCALARS[kind])

  def array(self, kind: int, n: int) -> list:
    """`n` values of one type."""
    if kind not in _SCALARS:
      return [self.value(kind) for _ in range(n)]
    dtype = np.dtype(f"<{_SCALARS[kind]}" if kind != 7 else "?")
    values = np.frombuffer(self._take(n * dtype.itemsize), dtype)
    return values.tolist()

  def _take(self, n: int) -> memoryview:
    if n > len(self.bytes) - self.at:
      raise struct.error(f"an array of {n} bytes")
    self.at += n
    return self.bytes[self.at - n : self.at]


def _parse(reader: _Reader) -> Container:
  """Everything after the magic."""
  version = reader.number("I")
  if version not in (2, 3):
    raise UserError(
      f"GGUF version {version} is not known here, only 2 and 3 (little-endian)"
      "; convert the model again with a current llama.cpp"
    )
  n_tensors, n_values = reader.number("Q"), reader.number("Q")
  metadata = {}
  for _ in range(n_values):
    key = reader.string()
    metadata[key] = reader.value(reader.number("I"))
  heads = [_head(reader) for _ in range(n_tensors)]
  unit = metadata.get("general.alignment", 32)
  start = -(-reader.at // unit) * unit
  tensors = [_tensor(reader.data, start, *head) for head in heads]
  return Container(metadata, {t.name: t for t in tensors})


def _head(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
  """Name, shape, type and offset of a tensor."""
  name = reader.string()
  shape = reader.array(10, reader.number("I"))
  return name, tuple(shape[::-1]), reader.number("I"), reader.number("Q")


def _tensor(
  data: np.ndarray,
  start: int,
  name: str,
  shape: tuple[int, ...],
  kind: int,
  offset: int,
) -> Tensor:
  """A tensor's view of the file."""
  gguf = library()
  try:
    kind = gguf.GGMLQuantizationType(kind)
  except ValueError as error:
    raise UserError(
      f"tensor {name!r} is of type {kind}, which the package gguf does not "
      "know; upgrade it, or take a file of type F16, Q8_0, Q4_K or Q6_K"
    ) from error
  per_block, size = gguf.GGML_QUANT_SIZES[kind]
  row = shape[-1] if shape else 1
  if row % per_block:
    raise UserError(
      f"tensor {name!r} has rows of {row} values, no multiple of the "
      f"{per_block} in a block of {kind.name}; the file is damaged"
    )
  raw_shape = (*shape[:-1], row // per_block * size)
  begin, n = start + offset, math.prod(raw_shape)
  if begin + n > len(data):
    raise UserError(
      f"the file is cut short: it has {len(data):,} bytes, and tensor "
      f"{name!r} ends at byte {begin + n:,}; download it again"
    )
  return Tensor(
    name, kind.name, shape, data[begin : begin + n].reshape(raw_shape)
  )
