"""Normalisation over the last axis, computed in float32."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.param import ONES, ZEROS, Param

Array = jax.Array


@dataclass(frozen=True)
class LayerNorm:
  """y = (x - mean) / sqrt(var + eps) * scale + bias (arXiv:1607.06450).

  `bias=False` leaves the shift out; `scale=False` leaves both out.
  """

  dim: int
  eps: float = 1e-5
  scale: bool = True
  bias: bool = True
  axis: str = "embed"

  def params(self) -> dict[str, Param]:
    """`scale` [dim] starts at one, `bias` [dim] at zero; both stay float32."""
    tree = {}
    if self.scale:
      tree["scale"] = Param((self.dim,), (self.axis,), 0, ONES, jnp.float32)
    if self.scale and self.bias:
      tree["bias"] = Param((self.dim,), (self.axis,), 0, ZEROS, jnp.float32)
    return tree

  def __call__(self, p: dict[str, Any], x: Array) -> Array:
    """Normalises `x` [..., dim]; the result has the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(var + self.eps)
    return _affine(p, y).astype(x.dtype)


@dataclass(frozen=True)
class RMSNorm:
  """y = x / sqrt(mean(x^2) + eps) * (offset + scale) (arXiv:1910.07467).

  `offset=1` stores the scale as a difference from one, as Gemma does.
  `scale=False` has no parameters at all.
  """

  dim: int
  eps: float = 1e-6
  scale: bool = True
  offset: float = 0.0
  axis: str = "embed"

  def params(self) -> dict[str, Param]:
    """`scale` [dim], so that the effective scale starts at one; float32."""
    if not self.scale:
      return {}
    start = ZEROS if self.offset == 1.0 else ONES
    return {"scale": Param((self.dim,), (self.axis,), 0, start, jnp.float32)}

  def __call__(self, p: dict[str, Any], x: Array) -> Array:
    """Normalises `x` [..., dim]; the result has the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(
      jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps
    )
    if self.offset:
      p = {"scale": p["scale"] + self.offset}
    return _affine(p, y).astype(x.dtype)


def _affine(p: dict[str, Any], y: Array) -> Array:
  """Scale and shift along the last axis, where the parameters exist."""
  lead = (1,) * (y.ndim - 1)
  for name, join in (("scale", jnp.multiply), ("bias", jnp.add)):
    if name in p:
      y = join(y, p[name].astype(y.dtype).reshape(*lead, -1))
  return y


def soft_cap(y: Array, cap: float) -> Array:
  """`cap * tanh(y / cap)`: the identity near zero, bounded by the cap.

  Gemma 2 (arXiv:2408.00118, section 2) bounds logits and scores with it.
  """
  return cap * jnp.tanh(y / cap)


Norm = LayerNorm | RMSNorm
