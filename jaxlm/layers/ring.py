"""Attention of rows that are split over devices. Twin: the reference.

Each device has a part of the queries and of the keys. In the ring (Ring
Attention, arXiv:2310.01889) keys, values and where they stand travel from
device to device, and each meets its queries while a running maximum, sum and
output are kept (arXiv:1805.02867); no device ever holds more than its own part
and a guest. In the gathered form all keys come at once. Both are one walk over
pairs of pieces, queries by keys, and both read from the mask's value which
pairs there are: a step that no device needs is not taken.

The gradient is a walk of the same steps, from the saved log-sum-exp; sums for
keys and values travel with them and end at home. So nothing of the size of
queries times keys outlives a pair of pieces, in either direction.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.at import At
from jaxlm.layers.kernels.flash import flash_part, flash_part_gradient
from jaxlm.layers.norm import soft_cap
from jaxlm.layers.ring_plan import Setting, plan
from jaxlm.layers.scores import distances, products, visible

Array = jax.Array
Tree = Any


def attend_ring(
  q: Array,
  k: Array,
  v: Array,
  at: At,
  keys: At,
  setting: Setting,
  sinks: Array | None = None,
  slopes: Array | None = None,
) -> Array:
  """Attention of a device's queries to the whole row, inside `shard_map`.

  Args:
    q: this device's queries `[batch, queries, heads, head_dim]`.
    k: its keys `[batch, keys, kv_heads, head_dim]`.
    v: its values `[batch, keys, kv_heads, value_dim]`.
    at: where the queries stand; positions are given.
    keys: where the keys stand, likewise.
    setting: the rest.
    sinks: learned logits `[heads]` in the denominator, or None.
    slopes: of ALiBi, float32 `[heads]`, or None; they get no gradient.

  Returns:
    `[batch, queries, heads, value_dim]` in the dtype of `v`.
  """
  return _attend(setting, q, k, v, at, keys, sinks, slopes)


# --- The walk ---------------------------------------------------------------


def _shift(setting: Setting, tree: Tree, steps: int) -> Tree:
  """Hands everything on to the device `steps` places further."""
  n = setting.ways
  if steps % n == 0:
    return tree
  to = [(i, (i + steps) % n) for i in range(n)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, setting.axis, to), tree)


def _walk(
  setting: Setting, meet: Callable, stay: Tree, guests: Tree, sums: Tree
) -> tuple[Tree, Tree]:
  """Takes all steps.

  Args:
    setting: says which there are.
    meet: `(stay, sums, guests, pair) -> (stay, sums)`.
    stay: sums that stay where they are.
    guests: keys and values; what is only read may travel while it is read.
    sums: sums that travel with the guests.

  Returns:
    The sums of both kinds, at home.
  """
  device = jax.lax.axis_index(setting.axis)

  def visit(stay: Tree, sums: Tree, guests: Tree, pairs: Array) -> tuple:
    def one(carry: tuple, pair: Array) -> tuple[tuple, None]:
      return meet(*carry, guests, pair), None

    return jax.lax.scan(one, (stay, sums), pairs)[0]

  def step(carry: tuple, pairs: Array) -> tuple[tuple, None]:
    stay, sums, guests = carry
    onward = _shift(setting, guests, 1)
    stay, sums = visit(stay, sums, guests, pairs)
    return (stay, _shift(setting, sums, 1), onward), None

  place = 0
  for run in plan(setting):
    guests, sums = _shift(setting, (guests, sums), run.first - place)
    place, pairs = run.first, jnp.asarray(run.pairs)[:, device]
    if len(pairs) == 1:
      stay, sums = visit(stay, sums, guests, pairs[0])
    else:
      carry, _ = jax.lax.scan(step, (stay, sums, guests), pairs)
      (stay, sums, guests), place = carry, run.first + len(pairs)
  return stay, _shift(setting, sums, -place)


# --- A pair of pieces -------------------------------------------------------


def _pieces(x: Array, n: int) -> Array:
  """`[batch, seq, ...]` as `[n, batch, seq / n, ...]`."""
  x = x.reshape(x.shape[0], n, -1, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _whole(x: Array) -> Array:
  """The inverse of `_pieces`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _pick(tree: Tree, i: Array) -> Tree:
  """Piece `i` of every array."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree
  )


def _put(tree: Tree, i: Array, piece: Tree) -> Tree:
  """The same arrays with piece `i` replaced."""
  return jax.tree.map(
    lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, piece
  )


def _scores(
  setting: Setting, q: Array, k: Array, at: At, keys: At, slopes: Array | None
) -> tuple[Array, Array | float]:
  """Scores [batch, kv_heads, group, q, k], and their slope by the products."""
  scores = products(q, k, None) * setting.scale
  slope = setting.scale
  if setting.softcap is not None:
    scores = soft_cap(scores, setting.softcap)
    slope = slope * (1.0 - jnp.square(scores / setting.softcap))
  if slopes is not None:
    away = distances(at, keys, q.shape[1], k.shape[1], None)[:, None, None]
    scores = scores + slopes.reshape(1, k.shape[2], -1, 1, 1) * away
  return scores, slope


def _sight(setting: Setting, at: At, keys: At, pair: Array) -> Array:
  """Which keys of a pair are seen: bool [batch or 1, 1, 1, q, k]."""
  t, s = at.positions.shape[1], keys.positions.shape[1]
  return visible(setting.mask, at, keys, t, s)[:, None, None] & (pair[2] > 0)


def _grouped(x: Array, groups: int) -> Array:
  """`[..., seq, heads, dim]` as `[..., groups, heads / groups, seq, dim]`."""
  *lead, t, n, h = x.shape
  x = x.reshape(*lead, t, groups, n // groups, h)
  return jnp.moveaxis(x, -4, -2)


def _ungrouped(x: Array) -> Array:
  """The inverse of `_grouped`."""
  x = jnp.moveaxis(x, -2, -4)
  return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _sum(spec: str, a: Array, b: Array) -> Array:
  """A product in the dtype of `b`, with float32 sums and result."""
  a = a.astype(b.dtype)
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _options(setting: Setting, keys: At, pair: Array, slopes) -> dict:
  """What a kernel takes besides arrays; where the keys of a pair stand."""
  there = jnp.where(pair[2] > 0, keys.positions, -1)
  return {
    "mask": setting.mask,
    "keys": keys.replace(positions=there),
    "scale": setting.scale,
    "softcap": setting.softcap,
    "slopes": slopes,
    "chip": setting.chip,
  }


def _part(setting: Setting, q, k, v, at: At, keys: At, pair: Array, slopes):
  """Output, maximum and sum of a pair: [b, kv_heads, group, q, dim], [.., q].

  The output is a sum of values times exp(score - maximum).
  """
  groups = k.shape[2]
  if setting.chip is not None:
    options = _options(setting, keys, pair, slopes)
    out, lse = flash_part(q, k, v, at=at, **options)
    lse = _grouped(lse[..., None], groups)[..., 0]
    return _grouped(out, groups).astype(jnp.float32), lse, jnp.ones_like(lse)
  see = _sight(setting, at, keys, pair)
  scores, _ = _scores(setting, q, k, at, keys, slopes)
  scores = jnp.where(see, scores, jnp.finfo(jnp.float32).min)
  top = jnp.max(scores, axis=-1)
  weights = jnp.where(see, jnp.exp(scores - top[..., None]), 0.0)
  return _sum("bkgts,bskh->bkgth", weights, v), top, jnp.sum(weights, axis=-1)


def _part_gradient(
  setting: Setting, q, k, v, at: At, keys: At, pair, slopes, do, drop, lse
):
  """Gradients of a pair: dq [b, kv_heads, group, q, dim], dk and dv as k, v.

  Args besides those of `_part`: `do` like the output, `drop` the sums of do
  times the whole output, `lse` the log-sum-exp over the whole row.
  """
  if setting.chip is not None:
    options = _options(setting, keys, pair, slopes)
    rows = (_ungrouped(x[..., None])[..., 0] for x in (lse, drop))
    do = _ungrouped(do)
    dq, dk, dv = flash_part_gradient(q, k, v, *rows, do, at=at, **options)
    return _grouped(dq, k.shape[2]), dk, dv
  see = _sight(setting, at, keys, pair)
  scores, slope = _scores(setting, q, k, at, keys, slopes)
  p = jnp.where(see, jnp.exp(scores - lse[..., None]), 0.0)
  dp = _sum("bkgth,bskh->bkgts", do, v)
  ds = (p * (dp - drop[..., None]) * slope).astype(q.dtype)
  dq = _sum("bkgts,bskh->bkgth", ds, k)
  dk = _sum("bkgts,bkgth->bskh", ds, _grouped(q, k.shape[2]))
  return dq, dk, _sum("bkgts,bkgth->bskh", p, do)


def _where_seen(setting: Setting, at, keys, pair, work: Callable, x: Tree):
  """`work(x)`, or `x` itself where nothing is seen, if that is worth asking."""
  if not setting.checks or setting.chip is not None:  # a kernel asks itself
    return work(x)
  see = _sight(setting, at, keys, pair)
  return jax.lax.cond(jnp.any(see), work, lambda x: x, x)


# --- The function and its gradient ------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting: Setting, q, k, v, at, keys, sinks, slopes) -> Array:
  return _forward(setting, q, k, v, at, keys, sinks, slopes)[0]


def _guests(setting: Setting, k: Array, v: Array, keys: At) -> Tree:
  """Keys, values and where they stand, in pieces, as the walk starts."""
  n = setting.cut(setting.keys)
  tree = jax.tree.map(lambda x: _pieces(x, n), (k, v, keys))
  if not setting.gather:
    return tree
  return jax.tree.map(
    lambda x: jax.lax.all_gather(x, setting.axis, tiled=True), tree
  )


def _forward(setting: Setting, q, k, v, at, keys, sinks, slopes):
  n, groups = setting.cut(setting.queries), k.shape[2]
  queries, place = jax.tree.map(lambda x: _pieces(x, n), (q, at))
  like = _grouped(queries, groups).shape[:-1]
  low = jnp.finfo(jnp.float32).min
  out = jnp.zeros((*like, v.shape[-1]), jnp.float32)
  stay = out, jnp.full(like, low), jnp.zeros(like, jnp.float32)

  def meet(stay: Tree, sums: Tree, guests: Tree, pair: Array) -> tuple:
    (q, at), (k, v, keys) = (
      _pick((queries, place), pair[0]),
      _pick(guests, pair[1]),
    )

    def work(stay: Tree) -> Tree:
      mine = _pick(stay, pair[0])
      more = _part(setting, q, k, v, at, keys, pair, slopes)
      return _put(stay, pair[0], _merged(mine, more))

    return _where_seen(setting, at, keys, pair, work, stay), sums

  stay, _ = _walk(setting, meet, stay, _guests(setting, k, v, keys), ())
  out, lse = _finish(*stay, sinks)
  out = _whole(_ungrouped(out))
  out = out.astype(v.dtype)
  return out, (q, k, v, at, keys, sinks, slopes, out, lse)


def _merged(a: Tree, b: Tree) -> Tree:
  """Two outputs, each with its maximum and its sum, as one of both."""
  top = jnp.maximum(a[1], b[1])
  out, total = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
  for part, its_top, its_total in (a, b):
    shrink = jnp.exp(its_top - top)
    out, total = out + part * shrink[..., None], total + its_total * shrink
  return out, top, total


def _finish(out: Array, top: Array, total: Array, sinks: Array | None):
  """Divides by the sums; a row that sees nothing is all zeros."""
  if sinks is not None:
    sinks = sinks.reshape(1, 1, *top.shape[2:4], 1)
    new = jnp.maximum(top, sinks)
    shrink = jnp.exp(top - new)
    out, top = out * shrink[..., None], new
    total = total * shrink + jnp.exp(sinks - new)
  total = jnp.where(total == 0.0, 1.0, total)
  return out / total[..., None], top + jnp.log(total)


def _backward(setting: Setting, saved: tuple, do: Array):
  """From dout: dv = P' dout, ds = P (dout v' - sum(dout out)), dq, dk.

  As in flash attention (arXiv:2205.14135, appendix B.2), with P made again
  from the scores and the log-sum-exp of the whole row.
  """
  q, k, v, at, keys, sinks, slopes, out, lse = saved
  n, groups = setting.cut(setting.queries), k.shape[2]
  queries, place, grads, outs = jax.tree.map(
    lambda x: _pieces(x, n), (q, at, do, out)
  )
  grads = _grouped(grads, groups)
  drop = grads.astype(jnp.float32) * _grouped(outs, groups).astype(jnp.float32)
  drop = jnp.sum(drop, axis=-1)
  mine = queries, place, grads, drop, lse

  def meet(dq: Array, sums: Tree, guests: Tree, pair: Array) -> tuple:
    (q, at, do, drop, lse), (k, v, keys) = (
      _pick(mine, pair[0]),
      _pick(guests, pair[1]),
    )

    def work(x: Tree) -> Tree:
      dq, sums = x
      more, *guest = _part_gradient(
        setting, q, k, v, at, keys, pair, slopes, do, drop, lse
      )
      dq = _put(dq, pair[0], _pick(dq, pair[0]) + more.astype(jnp.float32))
      new = jax.tree.map(
        lambda a, b: a + b.astype(jnp.float32),
        _pick(sums, pair[1]),
        tuple(guest),
      )
      return dq, _put(sums, pair[1], new)

    return _where_seen(setting, at, keys, pair, work, (dq, sums))

  guests = _guests(setting, k, v, keys)
  sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), guests[:2])
  dq = jnp.zeros(_grouped(queries, groups).shape, jnp.float32)
  dq, sums = _walk(setting, meet, dq, guests, sums)
  if setting.gather:
    sums = jax.tree.map(
      lambda x: jax.lax.psum_scatter(x, setting.axis, tiled=True), sums
    )
  dq = _whole(_ungrouped(dq)).astype(q.dtype)
  dk, dv = (_whole(x).astype(k.dtype) for x in sums)
  dsinks = None
  if sinks is not None:  # a key without a value: dP = 0, so dS = -P drop
    p = jnp.exp(sinks.reshape(1, 1, *lse.shape[2:4], 1) - lse)
    dsinks = -jnp.sum(p * drop, (0, 1, 4)).reshape(sinks.shape)
  none = None if slopes is None else jnp.zeros_like(slopes)
  return dq, dk, dv, None, None, dsinks, none


_attend.defvjp(_forward, _backward)
