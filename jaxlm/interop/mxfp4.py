"""Weights in MXFP4, as gpt-oss is published: four bits a number, in blocks.

The experts' matrices `X` [experts, in, out] are stored as `X_blocks`, uint8
[experts, out, in / 32, 16], and `X_scales`, uint8 [experts, out, in / 32]. A
byte holds two numbers, the first in its low half: a sign and one of 0, 0.5, 1,
1.5, 2, 3, 4, 6 (E2M1). A scale is a power of two, 2^(byte - 127) (E8M0). See
OCP Microscaling Formats 1.0, sections 5.3 and 6.3. Both are exact in bfloat16.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError

_BLOCKS, _SCALES = "_blocks", "_scales"

_HALF = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E2M1 = np.concatenate([_HALF, -_HALF])
# Both numbers of every byte, the low half first: [256, 2].
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], -1)
# The scale of every byte; the last one stands for NaN.
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.nan)


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """Matrices from their blocks, exactly.

  Args:
    blocks: uint8 `[..., out, in / 32, 16]`.
    scales: uint8 `[..., out, in / 32]`.

  Returns:
    bfloat16 `[..., in, out]`.

  Raises:
    UserError: if the shapes do not belong together.
  """
  if blocks.shape != (*scales.shape, 16) or scales.ndim < 2:
    raise UserError(
      f"MXFP4 blocks of shape {blocks.shape} and scales of shape "
      f"{scales.shape}: blocks must be (..., out, in / 32, 16) and scales the "
      "same without the 16"
    )
  *lead, rows, n = scales.shape
  out = np.empty((*lead, 32 * n, rows), jnp.bfloat16)
  for i in np.ndindex(*lead):  # float32 of one matrix at a time
    values = _PAIRS[blocks[i]].reshape(rows, n, 32)
    with np.errstate(over="ignore"):  # what is beyond bfloat16 is infinite
      values *= _E8M0[scales[i].view(np.uint8)].astype(np.float32)[..., None]
    out[i] = values.reshape(rows, -1).T
  return out


class Blocks(Mapping[str, np.ndarray]):
  """Tensors with those in blocks as bfloat16; each is made when asked for."""

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    self._tensors = tensors
    packed = [n for n in tensors if n.endswith(_BLOCKS)]
    self._packed = {n.removesuffix(_BLOCKS) for n in packed}
    self._names = [
      n.removesuffix(_BLOCKS) for n in tensors if not n.endswith(_SCALES)
    ]

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._packed:
      return self._tensors[name]
    if name + _SCALES not in self._tensors:
      raise UserError(
        f"tensor {name + _BLOCKS!r} has no {name + _SCALES!r}; without scales "
        "nobody knows what it is"
      )
    try:
      return dequantise(
        self._tensors[name + _BLOCKS], self._tensors[name + _SCALES]
      )
    except UserError as error:
      raise UserError(f"tensor {name!r}: {error}") from error

  def __contains__(self, name: object) -> bool:
    return name in self._packed or (
      name in self._tensors and not str(name).endswith((_BLOCKS, _SCALES))
    )

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def view(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Blocks:
  """The tensors of a checkpoint whose `quantization_config` says mxfp4."""
  del config  # the format has no options
  return Blocks(tensors)
