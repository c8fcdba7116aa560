"""Attention as one writes it the first time, with room for one mistake.

Without a mistake it computes what `Attention` does, for rotary positions and
full rows. Each mistake is a line that somebody has written.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.at import At
from jaxlm.layers.attention import Attention
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.linear import dot

Array = jax.Array


@dataclass(frozen=True)
class Plain(Attention):
  """Attention in plain JAX.

  Attributes:
    mistake: which line is wrong; an empty text for none.
  """

  mistake: str = ""

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    at: At | None = None,
    cache: Any = None,
    compute: Compute = DEFAULT,
  ) -> tuple[Array, dict]:
    """Maps `x` [batch, seq, dim] to the same shape; there is no cache."""
    del cache, compute
    t = jnp.arange(x.shape[1])
    if at is not None and at.positions is not None:
      t = at.positions
    q, k, v = (y.astype(x.dtype) for y in self._three(p, x, t))
    share = self.heads // self.groups
    if self.mistake == "key heads tiled":
      k, v = (jnp.tile(y, (1, 1, share, 1)) for y in (k, v))
    else:
      k, v = (jnp.repeat(y, share, axis=2) for y in (k, v))
    probs = self._probabilities(q, k, x.dtype)
    y = jnp.einsum(
      "bnts,bsnh->btnh", probs, v, preferred_element_type=jnp.float32
    ).astype(x.dtype)
    if self.mistake == "heads transposed":
      y = jnp.swapaxes(y, 2, 3).reshape(y.shape)
    return dot(y, p["o"], "btnh,nhd->btd", dtype=jnp.float32), {}

  def _three(self, p: dict, x: Array, t: Array) -> tuple[Array, Array, Array]:
    """Queries, keys, values; the first two are turned."""
    q, k, v = (dot(x, p[n], "btd,dnh->btnh", dtype=jnp.float32) for n in "qkv")
    if self.mistake == "rope on values":
      return q, self.position(k, t), self.position(v, t)
    if self.mistake == "rope only on queries":
      return self.position(q, t), k, v
    if self.mistake == "rope twice":
      return self.position(q, 2 * t), self.position(k, 2 * t), v
    if self.mistake == "no positions":
      return q, k, v
    return self.position(q, t), self.position(k, t), v

  def _probabilities(self, q: Array, k: Array, dtype: Any) -> Array:
    """Softmax of masked scores, [batch, heads, seq, keys]."""
    mistake, t = self.mistake, q.shape[1]
    scores = jnp.einsum(
      "btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32
    )
    if mistake == "softmax in 16 bits":
      scores = scores.astype(dtype)
    if mistake != "scale missing":
      scores = scores * jnp.asarray(self.width**-0.5, scores.dtype)
    edge = {"mask off by one": 1, "mask too strict": -1}.get(mistake, 0)
    mask = jnp.tril(jnp.ones((t, t), bool), edge)
    if mistake == "mask too strict":
      mask = mask.at[0, 0].set(True)
    if mistake == "mask missing":
      mask = jnp.ones((t, t), bool)
    axis = {"softmax over queries": -2, "softmax over heads": 1}.get(
      mistake, -1
    )
    low = -2.0 if mistake == "mask too weak" else -jnp.inf
    if mistake == "mask after softmax":
      probs = jax.nn.softmax(scores, axis=axis)
      return (probs * mask[None, None].astype(probs.dtype)).astype(dtype)
    low = jnp.asarray(low, scores.dtype)
    scores = jnp.where(mask[None, None], scores, low)
    return jax.nn.softmax(scores, axis=axis).astype(dtype)
