"""Ternary weights, four to a byte, as BitNet b1.58 is published.

A matrix `X.weight` [out, in] of -1, 0 and 1 is stored as uint8 [out / 4, in]
beside its scale, `X.weight_scale`. Each number plus one takes two bits; the
lowest two of all bytes are the first quarter of the rows, the next two the
second, and so on. What a weight is depends on the layer that the config's
`quantization_config` names: with `autobitlinear` number times scale, with
`bitlinear` number over scale. Where its `quantization_mode` is 'online', files
hold float weights that their program rounds before every use; they are rounded
here once, on reading.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.layers.rounding import ternary

_SCALE = "_scale"
_KEPT = ("embed_tokens", "lm_head")  # never ternary


def pack(values: np.ndarray) -> np.ndarray:
  """Numbers -1, 0, 1 `[rows, ...]` as uint8 `[ceil(rows / 4), ...]`."""
  rows = -(-len(values) // 4)
  fill = np.zeros((4 * rows - len(values), *values.shape[1:]), np.uint8)
  codes = np.concatenate([(values + 1).astype(np.uint8), fill])
  quarters = codes.reshape(4, rows, *values.shape[1:])
  return np.bitwise_or.reduce([q << 2 * i for i, q in enumerate(quarters)])


def unpack(packed: np.ndarray, rows: int | None = None) -> np.ndarray:
  """What `pack` packed, int8 `[rows, ...]`; None means four times as many.

  Raises:
    UserError: for two bits that stand for no number.
  """
  quarters = [(packed >> 2 * i) & 3 for i in range(4)]
  values = np.concatenate(quarters).astype(np.int8) - np.int8(1)
  if values.max(initial=0) > 1:
    raise UserError("packed ternary weights hold a 2; the file is damaged")
  return values[:rows]


class Ternary(Mapping[str, np.ndarray]):
  """Tensors with packed ones as float32; each is made when asked for.

  Attributes:
    divide: by the scale, instead of multiplying.
    kept: parts of names of matrices that stay as they are where float ones
      are rounded; None rounds none.
  """

  def __init__(
    self,
    tensors: Mapping[str, np.ndarray],
    divide: bool = False,
    kept: tuple[str, ...] | None = None,
  ):
    self._tensors, self._divide, self._kept = tensors, divide, kept
    self._names = [n for n in tensors if not n.endswith(_SCALE)]

  def __getitem__(self, name: str) -> np.ndarray:
    x = self._tensors[name]
    if x.dtype == np.uint8:
      values = unpack(np.asarray(x)).astype(np.float32)
      scale = self._scale(name)
      return values / scale if self._divide else values * scale
    return np.asarray(ternary(jnp.asarray(x))) if self._rounds(name, x) else x

  def _rounds(self, name: str, x: np.ndarray) -> bool:
    """Whether a float tensor is rounded."""
    if self._kept is None or x.ndim != 2:
      return False
    return not any(part in name for part in self._kept)

  def _scale(self, name: str) -> np.float32:
    """Of a packed matrix."""
    if name + _SCALE not in self._tensors:
      raise UserError(
        f"tensor {name!r} is packed and has no {name + _SCALE!r}; without a "
        "scale nobody knows what it is"
      )
    return np.float32(np.asarray(self._tensors[name + _SCALE]).reshape(()))

  def __contains__(self, name: object) -> bool:
    return name in self._tensors and not str(name).endswith(_SCALE)

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


class Packed(Mapping[str, np.ndarray]):
  """`Ternary` the other way: plain tensors packed, each when asked for.

  Attributes:
    shapes: shape and dtype of each by name.
  """

  def __init__(
    self,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[tuple[int, ...], Any]],
  ):
    self._tensors, self.shapes = tensors, {}
    for name, (shape, dtype) in shapes.items():
      if len(shape) != 2 or any(part in name for part in _KEPT):
        self.shapes[name] = shape, dtype
        continue
      if shape[0] % 4:
        raise UserError(
          f"{name!r} has {shape[0]} rows; packed files have a multiple of 4"
        )
      self.shapes[name] = (shape[0] // 4, shape[1]), np.dtype(np.uint8)
      self.shapes[name + _SCALE] = (1,), np.dtype(np.float32)

  def __getitem__(self, name: str) -> np.ndarray:
    if name.endswith(_SCALE):
      return self._largest(name.removesuffix(_SCALE)).reshape(1)
    x = self._tensors[name]
    if self.shapes[name][1] != np.uint8:
      return x
    x = np.asarray(x, np.float32)
    scale = self._largest(name)
    values = np.sign(x)
    if not np.array_equal(values * scale, x):
      raise UserError(
        f"{name!r} has other values than -s, 0 and s, and packed files hold "
        "no others; round with jaxlm.layers.rounding.ternary_weights first"
      )
    return pack(values)

  def _largest(self, name: str) -> np.float32:
    """The scale of a ternary matrix; 1 if all of it is zero."""
    return np.float32(np.max(np.abs(self._tensors[name])) or 1.0)

  def __contains__(self, name: object) -> bool:
    return name in self.shapes

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


def view(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Ternary:
  """The tensors of a checkpoint whose `quantization_config` says bitnet."""
  said = config["quantization_config"]
  kept = None
  if said.get("quantization_mode") == "online":
    kept = (*_KEPT, *(said.get("modules_to_not_convert") or ()))
  divide = said.get("linear_class", "bitlinear") == "bitlinear"
  return Ternary(tensors, divide, kept)
