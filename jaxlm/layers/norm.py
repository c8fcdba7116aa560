"""Normalisation, computed in float32: of each row, or of a batch."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.param import ONES, ZEROS, Param
from jaxlm.layers.rounding import integers

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
    y = _standardise(x.astype(jnp.float32), self.eps, True)
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
    y = _standardise(x.astype(jnp.float32), self.eps, False)
    if self.offset:
      p = {"scale": p["scale"] + self.offset}
    return _affine(p, y).astype(x.dtype)


@dataclass(frozen=True)
class BatchNorm:
  """y = (x - mean) / sqrt(var + eps) * scale + bias, over all but features.

  Ioffe and Szegedy, arXiv:1502.03167, algorithms 1 and 2. Training normalises
  by the batch and moves the running mean and variance a `momentum` of the way
  towards it; evaluation normalises by what is running. It is here to compare
  with: no decoder uses it, since it mixes rows and positions of a batch.
  """

  dim: int
  eps: float = 1e-5
  momentum: float = 0.1
  axis: str = "embed"

  def params(self) -> dict[str, Param]:
    """`scale` and `bias` [dim]."""
    return LayerNorm(self.dim, axis=self.axis).params()

  def state(self) -> dict[str, Param]:
    """The running `mean` and `var` [dim]; no gradient reaches them."""
    axes = (self.axis,)
    return {
      "mean": Param((self.dim,), axes, 0, ZEROS, jnp.float32),
      "var": Param((self.dim,), axes, 0, ONES, jnp.float32),
    }

  def __call__(
    self, p: dict[str, Any], x: Array, state: dict[str, Array], train: bool
  ) -> tuple[Array, dict[str, Array]]:
    """Normalises `x` [..., dim]; returns the new state as well.

    The batch is normalised by its own (biased) variance, the running one is
    unbiased, as in torch.
    """
    y = x.astype(jnp.float32)
    mean, var = state["mean"], state["var"]
    if train:
      axes = tuple(range(x.ndim - 1))
      mean, var = jnp.mean(y, axis=axes), jnp.var(y, axis=axes)
      rows = x.size // self.dim
      seen = {"mean": mean, "var": var * rows / max(rows - 1, 1)}
      seen = jax.lax.stop_gradient(seen)
      state = jax.tree.map(
        lambda old, new: old + self.momentum * (new - old), state, seen
      )
    lead = (1,) * (x.ndim - 1)
    y = y - mean.reshape(*lead, -1)
    y = y * jax.lax.rsqrt(var + self.eps).reshape(*lead, -1)
    return _affine(p, y).astype(x.dtype), state


@dataclass(frozen=True)
class Rounded:
  """A norm whose result is rounded to integers times a scale for each token.

  Every projection of BitNet (arXiv:2402.17764) reads the result of a norm, so
  this is where its activations become 8-bit.
  """

  norm: RMSNorm
  bits: int = 8

  def params(self) -> dict[str, Param]:
    """Those of the norm."""
    return self.norm.params()

  def __call__(self, p: dict[str, Any], x: Array) -> Array:
    """Normalises and rounds `x` [..., dim]; dtype and shape as of `x`."""
    return integers(self.norm(p, x), self.bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _standardise(x: Array, eps: float, center: bool) -> Array:
  """(x - mean) / sqrt(mean of squares + eps) over the last axis, float32.

  The gradient is written out because it needs only the input and two numbers a
  row; automatic differentiation would keep every intermediate array.
  """
  return _standardise_forward(x, eps, center)[0]


def _standardise_forward(x: Array, eps: float, center: bool):
  mean = jnp.mean(x, axis=-1, keepdims=True) if center else None
  y = x - mean if center else x
  rate = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return y * rate, (x, mean, rate)


def _standardise_backward(eps: float, center: bool, saved, dy: Array):
  """The gradient rate (dy - mean(dy) - y mean(dy y)); mean(dy) if centered."""
  del eps
  x, mean, rate = saved
  y = (x - mean if center else x) * rate
  dx = dy - y * jnp.mean(dy * y, axis=-1, keepdims=True)
  if center:
    dx = dx - jnp.mean(dy, axis=-1, keepdims=True)
  return (dx * rate,)


_standardise.defvjp(_standardise_forward, _standardise_backward)


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


Norm = LayerNorm | RMSNorm | Rounded
