"""Safetensors: a file of named arrays, read where it lies, written as it comes.

    length of the head | head in JSON | the bytes of all tensors

(https://github.com/huggingface/safetensors, "Format"). The format is so small
that reading it here costs less than a dependency, and gives what loading
wants: a tensor is a mapping of its own, which is let go when nobody holds it
any more, and a file is written one tensor at a time.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "F8_E8M0": "float8_e8m0fnu",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U64": "uint64",
  "U32": "uint32",
  "U16": "uint16",
  "U8": "uint8",
  "BOOL": "bool",
}
_NAMES = {name: code for code, name in _DTYPES.items()}


@dataclass(frozen=True)
class Head:
  """What a file says of a tensor before its bytes.

  Attributes:
    path: the file.
    dtype: of the values.
    shape: of the array.
    start: where in the file it begins.
  """

  path: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  def map(self) -> np.ndarray:
    """The array, mapped from the file: its pages are read when touched."""
    n = math.prod(self.shape) * self.dtype.itemsize
    if n == 0:
      return np.empty(self.shape, self.dtype)
    raw = np.memmap(self.path, np.uint8, "r", offset=self.start, shape=(n,))
    return raw.view(self.dtype).reshape(self.shape)


class Tensors(Mapping[str, np.ndarray]):
  """The tensors of some safetensors files; each is mapped when asked for.

  Attributes:
    heads: name, shape, dtype and place of each.
  """

  def __init__(self, heads: Mapping[str, Head]):
    self.heads = dict(heads)

  def __getitem__(self, name: str) -> np.ndarray:
    return self.heads[name].map()

  def __iter__(self) -> Iterator[str]:
    return iter(self.heads)

  def __len__(self) -> int:
    return len(self.heads)

  def __contains__(self, name: object) -> bool:
    return name in self.heads


def open_folder(folder: Path) -> Tensors:
  """The tensors of `model.safetensors`, or of the shards its index names.

  Raises:
    UserError: if a file is missing, cut short or damaged.
  """
  if not (folder / INDEX).exists():
    return Tensors(heads(folder / SINGLE))
  where = _index(folder / INDEX)
  shards = {}
  for file in sorted(set(where.values())):
    if not (folder / file).is_file():
      raise UserError(
        f"{folder} lacks the shard {file}, which {INDEX} names; download it "
        "again"
      )
    shards[file] = heads(folder / file)
  found = {}
  for name, file in where.items():
    if name not in shards[file]:
      raise UserError(
        f"{INDEX} in {folder} says that {name!r} is in {file}, and it is not; "
        "take index and shards from the same place"
      )
    found[name] = shards[file][name]
  return Tensors(found)


def _index(path: Path) -> dict[str, str]:
  """The file of each tensor, by an index."""
  try:
    where = json.loads(path.read_bytes())["weight_map"]
    plain = all(Path(file).name == file for file in where.values())
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} is no index of safetensors files ({error}); download it again"
    ) from error
  if not plain:
    raise UserError(f"{path} names files outside its folder; do not trust it")
  return where


def heads(path: Path) -> dict[str, Head]:
  """What a safetensors file says of its tensors.

  Raises:
    UserError: if it is no such file, or cut short.
  """
  size = path.stat().st_size
  with open(path, "rb") as file:
    first = file.read(8)
    n = int.from_bytes(first, "little")
    if first == b"version ":
      raise UserError(
        f"{path} is a git-lfs pointer, not the file it points to; run git lfs "
        "pull"
      )
    if len(first) < 8 or n > size - 8:
      raise UserError(
        f"{path} is cut short or no safetensors file: it has {size:,} bytes; "
        "download it again"
      )
    text = file.read(n)
  try:
    said = json.loads(text)
    said.pop("__metadata__", None)
    found = {name: _head(path, 8 + n, x) for name, x in said.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} is damaged or no safetensors file ({type(error).__name__}: "
      f"{error}); download it again"
    ) from error
  for name, head in found.items():
    end = head.start + math.prod(head.shape) * head.dtype.itemsize
    if end > size:
      raise UserError(
        f"{path} is cut short: it has {size:,} bytes, and tensor {name!r} ends "
        f"at byte {end:,}; download it again"
      )
  return found


def _head(path: Path, offset: int, said: Mapping[str, Any]) -> Head:
  """One entry of the head; ValueError if it contradicts itself."""
  if said["dtype"] not in _DTYPES:
    raise ValueError(f"dtype {said['dtype']} is unknown")
  dtype = jnp.dtype(_DTYPES[said["dtype"]])
  shape = tuple(int(n) for n in said["shape"])
  begin, end = said["data_offsets"]
  if begin < 0 or min(shape, default=0) < 0:
    raise ValueError("a negative size")
  if end - begin != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"{end - begin} bytes for shape {shape}")
  return Head(path, dtype, shape, offset + begin)


Shape = tuple[tuple[int, ...], Any]  # (shape, dtype)


def n_bytes(shape: Shape) -> int:
  """How many bytes a tensor of this shape and dtype takes."""
  return math.prod(shape[0]) * jnp.dtype(shape[1]).itemsize


def write(
  path: Path, shapes: Mapping[str, Shape], make: Callable[[str], np.ndarray]
) -> None:
  """Writes a file, one tensor after another, through to the disk.

  Args:
    path: the file.
    shapes: of every tensor, known before.
    make: the array of a name; asked for in the order of `shapes`.

  Raises:
    OSError: it could not be written.
  """
  head, at = {"__metadata__": {"format": "pt"}}, 0
  for name, (shape, dtype) in shapes.items():
    end = at + n_bytes((shape, dtype))
    head[name] = {
      "dtype": _NAMES[jnp.dtype(dtype).name],
      "shape": list(shape),
      "data_offsets": [at, end],
    }
    at = end
  text = json.dumps(head, separators=(",", ":")).encode()
  text += b" " * (-(8 + len(text)) % 64)  # data begins on a cache line
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, (shape, dtype) in shapes.items():
      x = np.asarray(make(name), order="C")
      assert (x.shape, x.dtype) == (tuple(shape), jnp.dtype(dtype)), name
      file.write(x.reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
