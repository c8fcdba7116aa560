"""Causal self-attention in blocks of queries, for CPUs. Twin: the reference.

Three things make it quick, each measured (docs/performance.md). A block of
queries meets only the keys its mask lets it see, so half of a causal square is
never computed. Scores are kept transposed, [keys, queries], so that every
product contracts the last axis of its left operand, the one layout for which
XLA's CPU backend has a fast matmul. And the gradient is written out: it keeps
the probabilities and nothing else of their size.

For aligned rows only (positions 0, 1, 2, ...), where the first and last key of
a block are known when the program is traced.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.layers.mask import Mask

Array = jax.Array
Span = tuple[int, int, int]  # first query, end of queries, first key


def spans(t: int, mask: Mask) -> list[Span]:
  """Cuts `t` queries into blocks, each with the first key it can see."""
  size = max(min(64, t // 4), 32, t // 16)
  reach = mask.reach or t
  return [
    (lo, min(lo + size, t), max(0, lo - reach + 1)) for lo in range(0, t, size)
  ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend_causal(
  q: Array, k: Array, v: Array, mask: Mask, scale: float
) -> Array:
  """Softmax(scale q k') v under a causal mask, for aligned rows.

  Args:
    q: `[batch, seq, heads, head_dim]`.
    k: `[batch, seq, kv_heads, head_dim]`.
    v: `[batch, seq, kv_heads, value_dim]`.
    mask: a causal one.
    scale: of the products.

  Returns:
    `[batch, seq, heads, value_dim]` in the dtype of `v`.
  """
  return _forward(q, k, v, mask, scale)[0]


def _forward(q: Array, k: Array, v: Array, mask: Mask, scale: float):
  t, n = q.shape[1:3]
  keys, values = _by_head(k), _features_first(v)
  queries = _grouped(q * jnp.asarray(scale, q.dtype), k.shape[2])
  probs, outs = [], []
  for lo, hi, start in spans(t, mask):
    block = _flat(queries[..., lo:hi])
    scores = _product("bksh,bkhq->bksq", keys[:, :, start:hi], block)
    see = _visible(mask, lo, hi, start, n // k.shape[2])
    scores = jnp.where(see, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=2, keepdims=True))
    total = jnp.sum(weights, axis=2, keepdims=True)
    probs.append((weights * (1.0 / total)).astype(v.dtype))
    out = _product("bkhs,bksq->bkhq", values[..., start:hi], probs[-1])
    outs.append(_unflat(out.astype(v.dtype), hi - lo))
  out = _ungrouped(jnp.concatenate(outs, axis=-1), n)
  return out, (q, k, v, out, tuple(probs))


def _backward(mask: Mask, scale: float, saved, grad: Array):
  """From dout: dv = P dout', ds = P (v dout' - sum(dout out)), dq, dk.

  The products of flash attention's backward pass (arXiv:2205.14135, appendix
  B.2), with P read back instead of made again.
  """
  q, k, v, out, probs = saved
  groups, t = k.shape[2], q.shape[1]
  drop = jnp.sum(
    grad.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True
  )
  drop, grads = _grouped(drop, groups), _grouped(grad, groups)
  queries, keys = _grouped(q, groups), _features_first(k)
  values = _by_head(v)
  dq, dk, dv = [], [], []
  blocks = spans(t, mask)
  for (lo, hi, start), p in zip(blocks, probs, strict=True):
    do, block = _flat(grads[..., lo:hi]), _flat(queries[..., lo:hi])
    dp = _product("bksh,bkhq->bksq", values[:, :, start:hi], do)
    ds = (dp - _flat(drop[..., lo:hi])) * (p.astype(jnp.float32) * scale)
    ds = ds.astype(q.dtype)
    dv.append(_product("bksq,bkqh->bksh", p, jnp.swapaxes(do, 2, 3)))
    dk.append(_product("bksq,bkqh->bksh", ds, jnp.swapaxes(block, 2, 3)))
    dq_block = _product("bkhs,bksq->bkhq", keys[..., start:hi], ds)
    dq.append(_unflat(dq_block.astype(q.dtype), hi - lo))
  dq = _ungrouped(jnp.concatenate(dq, axis=-1), q.shape[2])
  dk, dv = (
    jnp.swapaxes(_sum_spans(parts, blocks), 1, 2).astype(k.dtype)
    for parts in (dk, dv)
  )
  return dq, dk, dv


attend_causal.defvjp(_forward, _backward)


# --- Layouts ----------------------------------------------------------------


def _product(spec: str, a: Array, b: Array) -> Array:
  """An einsum with float32 sums and result."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _by_head(x: Array) -> Array:
  """[batch, seq, heads, dim] as [batch, heads, seq, dim]."""
  return jnp.swapaxes(x, 1, 2)


def _features_first(x: Array) -> Array:
  """[batch, seq, heads, dim] as [batch, heads, dim, seq]."""
  return jnp.transpose(x, (0, 2, 3, 1))


def _grouped(x: Array, groups: int) -> Array:
  """[batch, seq, heads, dim] as [batch, groups, dim, heads / groups, seq]."""
  b, t, n, h = x.shape
  x = x.reshape(b, t, groups, n // groups, h)
  return jnp.transpose(x, (0, 2, 4, 3, 1))


def _ungrouped(x: Array, heads: int) -> Array:
  """The inverse of `_grouped`."""
  b, _, h, _, t = x.shape
  return jnp.transpose(x, (0, 4, 1, 3, 2)).reshape(b, t, heads, h)


def _flat(x: Array) -> Array:
  """Joins the last two axes: the queries of all heads of a group."""
  return x.reshape(*x.shape[:-2], -1)


def _unflat(x: Array, t: int) -> Array:
  """The inverse of `_flat`."""
  return x.reshape(*x.shape[:-1], -1, t)


def _visible(mask: Mask, lo: int, hi: int, start: int, group: int) -> Array:
  """Which keys [start, hi) queries [lo, hi) see: [keys, group x queries]."""
  keys, queries = jnp.arange(start, hi)[:, None], jnp.arange(lo, hi)[None]
  see = jnp.tile(mask.allows(queries, keys), (1, group))
  return see[None, None]


def _sum_spans(parts: Sequence[Array], blocks: Sequence[Span]) -> Array:
  """Adds what the blocks have to say about each key, along axis 2.

  Key ranges overlap; cut at the blocks' edges, each piece is one sum, and no
  array is written twice.
  """
  pieces = []
  for lo, hi, _ in blocks:
    found = []
    for part, (_, end, start) in zip(parts, blocks, strict=True):
      a, b = max(lo, start), min(hi, end)
      if a < b:
        piece = part[:, :, a - start : b - start]
        pad = ((0, 0), (0, 0), (a - lo, hi - b), (0, 0))
        found.append(jnp.pad(piece, pad) if b - a < hi - lo else piece)
    pieces.append(functools.reduce(jnp.add, found))
  return jnp.concatenate(pieces, axis=2)
