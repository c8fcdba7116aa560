"""Weights in float8 blocks, as DeepSeek-V3 is published.

A matrix `X.weight` of float8_e4m3fn is stored with `X.weight_scale_inv`: one
float32 for each block of 128 x 128 of it. A weight is its number times the
scale of its block (arXiv:2412.19437, section 3.3).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm.errors import UserError

_SCALE = "_scale_inv"


class Blocks(Mapping[str, np.ndarray]):
  """Tensors with those in blocks as float32; each is made when asked for."""

  def __init__(
    self, tensors: Mapping[str, np.ndarray], block: tuple[int, int] = (128, 128)
  ):
    self._tensors, self._block = tensors, block
    self._names = [n for n in tensors if not n.endswith(_SCALE)]
    self._scaled = {n for n in self._names if n + _SCALE in tensors}

  def __getitem__(self, name: str) -> np.ndarray:
    x = self._tensors[name]
    if name not in self._scaled:
      return x
    scales = np.asarray(self._tensors[name + _SCALE], np.float32)
    blocks = tuple(
      -(-n // b) for n, b in zip(x.shape, self._block, strict=True)
    )
    if scales.shape != blocks:
      raise UserError(
        f"tensor {name + _SCALE!r} has shape {scales.shape}; for {x.shape} in "
        f"blocks of {self._block} it must be {blocks}"
      )
    out = x.astype(np.float32)
    for row, scale in enumerate(scales):  # a band of blocks at a time
      band = slice(row * self._block[0], (row + 1) * self._block[0])
      out[band] *= np.repeat(scale, self._block[1])[None, : x.shape[1]]
    return out

  def __contains__(self, name: object) -> bool:
    return name in self._tensors and not str(name).endswith(_SCALE)

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def view(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Blocks:
  """The tensors of a checkpoint whose `quantization_config` says fp8."""
  block = config["quantization_config"].get("weight_block_size") or (128, 128)
  return Blocks(tensors, tuple(block))
