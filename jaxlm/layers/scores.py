"""Scores: who sees whom, and how well a query fits a key.

What every form of attention is made of, written once: the sight, the products,
the distances, and the softmax over what is seen.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.layers.at import At
from jaxlm.layers.mask import Mask, PrefixLM

Array = jax.Array


@struct.dataclass
class Moved:
  """The first keys, which queries meet as if these stood elsewhere.

  Attributes:
    q: the queries for them, `[batch, seq, heads, head_dim]`.
    positions: where the queries stand for them, `[batch, seq]`; the mask still
      goes by where they really stand.
    keys: how many keys are meant.
  """

  q: Array
  positions: Array
  keys: int = struct.field(pytree_node=False)


def visible(mask: Mask, at: At, keys: At, t: int, s: int) -> Array:
  """Which key each query sees: bool [batch or 1, t, s]."""
  q = jnp.arange(t)[None] if at.positions is None else at.positions
  k = jnp.arange(s)[None] if keys.positions is None else keys.positions
  see = mask.allows(q[:, :, None], k[:, None, :])
  if isinstance(mask, PrefixLM) and at.blocks is not None:
    same = at.blocks[:, :, None] == keys.blocks[:, None, :]
    see = see | (same & (at.blocks >= 0)[:, :, None])
  if at.segments is not None and keys.segments is not None:
    see = see & (at.segments[:, :, None] == keys.segments[:, None, :])
  if keys.positions is not None:
    see = see & (k >= 0)[:, None, :]
  return see


def products(q: Array, k: Array, moved: Moved | None) -> Array:
  """Queries times keys, float32 [batch, kv_heads, group, seq, keys]."""
  if moved is not None:
    n = moved.keys
    parts = products(moved.q, k[:, :n], None), products(q, k[:, n:], None)
    return jnp.concatenate(parts, axis=-1)
  b, t, n, h = q.shape
  q = jnp.moveaxis(q.reshape(b, t, k.shape[2], n // k.shape[2], h), 1, 3)
  if t == 1 and k.shape[2] == 1:  # keys in front lie as a CPU reads them
    y = jax.lax.dot_general(
      k,
      q,
      (((3,), (4,)), ((0, 2), (0, 1))),
      preferred_element_type=jnp.float32,
    )
    return jnp.moveaxis(y, 2, 4)
  # Not by einsum: it puts the keys in front, and a CPU turns what comes of it.
  return jax.lax.dot_general(
    q,
    k,
    (((4,), (3,)), ((0, 1), (0, 2))),
    preferred_element_type=jnp.float32,
  )


def distances(at: At, keys: At, t: int, s: int, moved: Moved | None) -> Array:
  """From each query on to each key, float32 [batch or 1, seq, keys]."""
  i = jnp.arange(t)[None] if at.positions is None else at.positions
  j = jnp.arange(s)[None] if keys.positions is None else keys.positions
  away = j[:, None, :] - i[:, :, None]
  if moved is not None:
    first = j[:, None, : moved.keys] - moved.positions[:, :, None]
    away = jnp.concatenate([first, away[:, :, moved.keys :]], axis=-1)
  return away.astype(jnp.float32)


def masked_softmax(scores: Array, see: Array, sinks: Array | None) -> Array:
  """Softmax over the last axis of float32 scores where `see`; else zero.

  A row that sees nothing is all zeros, never NaN. `sinks` (learned, one per
  head) join the denominator without joining the sum of values (gpt-oss).
  """
  low = jnp.finfo(scores.dtype).min
  scores = jnp.where(see, scores, low)
  top = jnp.max(scores, axis=-1, keepdims=True)
  if sinks is not None:
    top = jnp.maximum(top, sinks)
  top = jax.lax.stop_gradient(top)
  weights = jnp.where(see, jnp.exp(scores - top), 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if sinks is not None:
    total = total + jnp.exp(sinks - top)
  return weights / jnp.where(total == 0.0, 1.0, total)
