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


def view(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Ternary:
  """The tensors of a checkpoint whose `quantization_config` says bitnet."""
  said = config["quantization_config"]
  kept = None
  if said.get("quantization_mode") == "online":
    kept = (*_KEPT, *(said.get("modules_to_not_convert") or ()))
  divide = said.get("linear_class", "bitlinear") == "bitlinear"
  return Ternary(tensors, divide, kept)
