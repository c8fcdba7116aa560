"""Flash attention on TPUs and GPUs. Twin: `attend_reference`.

Memory grows with the length and not with its square: scores live in blocks
that never leave the chip (arXiv:2205.14135, arXiv:2307.08691). One pair of
kernels reads the mask's value, whatever it is; `visits` reads from the same
value which pairs of blocks there are to compute. docs/kernels.md explains.

The heads of a group (GQA) and the queries of a block stand one above the
other, a row each, so that a block of keys is read once for all heads that
share it, and a single query of many heads still fills a matrix.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.kernels import flash_gpu, visits
from jaxlm.layers.kernels.flash_backward import backward
from jaxlm.layers.kernels.flash_forward import (
  Operands,
  Setting,
  Steps,
  forward,
)
from jaxlm.layers.kernels.tiles import Powers, Tiles
from jaxlm.layers.kernels.tpu import LOG2E, on_device, padded
from jaxlm.layers.mask import Mask, PrefixLM

Array = jax.Array


@dataclass(frozen=True)
class Chip:
  """Whose kernels run.

  Attributes:
    platform: JAX's name of it; a CPU interprets the kernels.
    tiles: sizes of blocks.
    words: steps that fit its memory for them, or None.
    plan: lists which blocks meet: (setting, data, queries) -> two walks.
    forward, backward: the kernels, see `flash_forward` and `flash_backward`.
  """

  platform: str
  tiles: Tiles
  words: int | None
  plan: Callable
  forward: Callable
  backward: Callable


def flash_attention(
  q: Array,
  k: Array,
  v: Array,
  mask: Mask,
  at: At,
  keys: At,
  *,
  scale: float,
  softcap: float | None = None,
  sinks: Array | None = None,
  slopes: Array | None = None,
  tiles: Tiles | None = None,
  chip: Chip | None = None,
) -> Array:
  """Attention in blocks that stay on the chip; see `attend`.

  Runs compiled on the chip and interpreted, slowly, on a CPU. `slopes` are
  numbers of the model and get no gradient.

  Args:
    q: `[batch, seq, heads, head_dim]`.
    k: `[batch, keys, kv_heads, head_dim]`.
    v: `[batch, keys, kv_heads, value_dim]`.
    mask: who sees whom.
    at: where the queries stand.
    keys: where the keys stand.
    scale: of the products.
    softcap: of the scores, or None.
    sinks: learned logits `[heads]` in the denominator, or None.
    slopes: of ALiBi, float32 `[heads]`, or None.
    tiles: sizes of the blocks; None means the chip's.
    chip: `TPU`, as None means, or `GPU`.

  Returns:
    `[batch, seq, heads, value_dim]` in the dtype of `v`.
  """
  chip, fixed, plan, data = _planned(
    q, k, v, mask, at, keys, scale, softcap, sinks, slopes, tiles, chip
  )
  return _attention(chip, fixed, plan, data, q, k, v, sinks, slopes)


def _planned(
  q, k, v, mask, at, keys, scale, softcap, sinks, slopes, tiles, chip
) -> tuple:
  """The chip, what is fixed, which blocks to visit, and what decides it."""
  (b, t, n, _), (s, groups) = q.shape, k.shape[1:3]
  if n % groups:
    raise UserError(
      f"{n} query heads do not share {groups} key heads evenly; give a multiple"
    )
  chip = chip or TPU
  tiles = tiles or chip.tiles.fit(_widest(q, v))
  data = _data(mask, at, keys, b, t, s)

  def setting(tiles: Tiles) -> Setting:
    queries = tiles.queries(t, n // groups)
    return Setting(
      mask=mask,
      queries=queries,
      rows=tiles.up(queries * (n // groups)),
      keys=min(tiles.keys, tiles.up(s)),
      length=s,
      scale=scale,
      softcap=softcap,
      fields=tuple(sorted(data)),
      sinks=sinks is not None,
      slopes=slopes is not None,
    )

  fixed = setting(tiles)
  if chip.words is not None and _words(fixed, data, b, t) > chip.words:
    fixed = setting(replace(tiles, rows=2 * tiles.rows, keys=2 * tiles.keys))
    if _words(fixed, data, b, t) > chip.words:
      raise UserError(
        f"{t} queries and {s} keys in {b} rows have too many blocks for flash "
        "attention; give it fewer rows, or attention='reference'"
      )
  return chip, fixed, chip.plan(fixed, data, t), data


def fits_gpu(q: Array, k: Array, v: Array) -> bool:
  """Whether a block of such heads has room on a GPU."""
  size, tiles = _widest(q, v), GPU.tiles
  group = q.shape[2] // k.shape[2]
  return size <= 2048 and group <= tiles.fit(size).rows


def _widest(q: Array, v: Array) -> int:
  """Bytes of the widest head."""
  return max(q.shape[3], v.shape[3]) * q.dtype.itemsize


def _words(setting: Setting, data: dict, b: int, t: int) -> int:
  """How long the lists of steps are; a core keeps them beside its registers."""
  return int(_possible(setting, data, t).sum()) * (b if data else 1)


# --- What comes with the data -----------------------------------------------


def _data(mask: Mask, at: At, keys: At, b: int, t: int, s: int) -> dict:
  """What of the sight comes with the data: name -> int32 ([b, t], [b, s])."""

  def full(x: Array | None, n: int) -> Array:
    x = jnp.arange(n, dtype=jnp.int32)[None] if x is None else x
    return jnp.broadcast_to(x.astype(jnp.int32), (b, n))

  data = {}
  if at.positions is not None or keys.positions is not None:
    data["positions"] = full(at.positions, t), full(keys.positions, s)
  if at.segments is not None and keys.segments is not None:
    data["segments"] = full(at.segments, t), full(keys.segments, s)
  if isinstance(mask, PrefixLM) and at.blocks is not None:
    data["blocks"] = full(at.blocks, t), full(keys.blocks, s)
  return data


def plan_steps(setting: Setting, data: dict, t: int) -> tuple[Steps, Steps]:
  """The walks by blocks of queries and by blocks of keys.

  Args:
    setting: says the mask and the blocks.
    data: as `_data` gives it; empty where the trace knows everything.
    t: how many queries.
  """
  q, k = (t, setting.queries), (setting.length, setting.keys)
  possible = _possible(setting, data, t)
  if not data:
    return Steps(visits.listed(possible)), Steps(visits.listed(possible.T))
  seen = _seen(setting, data, possible, q, k)
  turned = seen.swapaxes(1, 2)
  return (
    Steps(*visits.sorted_steps(seen, possible)),
    Steps(*visits.sorted_steps(turned, possible.T)),
  )


def plan_lists(setting: Setting, data: dict, t: int) -> tuple[Steps, Steps]:
  """The same walks as a list for each block."""
  q, k = (t, setting.queries), (setting.length, setting.keys)
  seen, form = _possible(setting, data, t)[None], np
  if data:
    seen, form = _seen(setting, data, seen[0], q, k), jnp
  turned = seen.swapaxes(1, 2)
  return Steps(*visits.lists(seen, form)), Steps(*visits.lists(turned, form))


def _possible(setting: Setting, data: dict, t: int) -> np.ndarray:
  """Which blocks may meet, as far as the trace knows."""
  q, k = (t, setting.queries), (setting.length, setting.keys)
  if "positions" in data or "blocks" in data:
    return np.ones([-(-n // size) for n, size in (q, k)], bool)
  return visits.meets(
    setting.mask, _each(visits.ranges(*q), 1), _each(visits.ranges(*k), 0)
  )


def _each(bounds: visits.Bounds, axis: int) -> visits.Bounds:
  """Bounds with a new last-but-`axis` axis, to meet others."""
  return visits.Bounds(
    *(x[..., None] if axis else x[..., None, :] for x in bounds)
  )


def _seen(setting: Setting, data, possible, q, k) -> Array:
  """Which blocks meet: bool [batch, blocks of queries, blocks of keys]."""

  def both(name: str, q_least: int | None, k_least: int | None):
    x, y = data[name]
    x, y = padded(x, q[1], 1, 0), padded(y, k[1], 1, 0)
    return (
      _each(visits.bounds(x, q[1], q[0], q_least), 1),
      _each(visits.bounds(y, k[1], k[0], k_least), 0),
    )

  seen = jnp.asarray(possible)[None]
  if "positions" in data:
    seen = visits.meets(setting.mask, *both("positions", None, 0), jnp)
  elif "blocks" in data:
    q_range, k_range = visits.ranges(*q), visits.ranges(*k)
    seen = jnp.asarray(
      visits.meets(setting.mask, _each(q_range, 1), _each(k_range, 0))
    )[None]
  if "blocks" in data:
    seen = seen | visits.overlap(*both("blocks", 0, 0))
  if "segments" in data:
    seen = seen & visits.overlap(*both("segments", None, None))
  b = next(iter(data.values()))[0].shape[0]
  return jnp.broadcast_to(seen, (b, *possible.shape))


# --- Layouts ----------------------------------------------------------------


def _rows(setting: Setting, x: Array, groups: int) -> Array:
  """[batch, seq, heads, dim] as [batch, groups, P, dim].

  P goes over blocks, heads of the group and queries of the block, and what
  rounds a block up.
  """
  b, _, n, h = x.shape
  x = padded(x, setting.queries, 1)
  x = x.reshape(b, -1, setting.queries, groups, n // groups, h)
  x = jnp.transpose(x, (0, 3, 1, 4, 2, 5))
  x = padded(x.reshape(*x.shape[:3], -1, h), setting.rows, 3)
  return x.reshape(b, groups, -1, h)


def _from_rows(setting: Setting, x: Array, t: int, group: int) -> Array:
  """The inverse of `_rows`."""
  b, groups, _, h = x.shape
  x = x.reshape(b, groups, -1, setting.rows, h)
  x = x[:, :, :, : group * setting.queries]
  x = x.reshape(b, groups, -1, group, setting.queries, h)
  x = jnp.transpose(x, (0, 2, 4, 1, 3, 5))
  return x.reshape(b, -1, groups * group, h)[:, :t]


def _per_head(setting: Setting, x: Array, groups: int) -> Array:
  """[heads] times log2(e), as float32 [groups, 1, rows]."""
  x = x.astype(jnp.float32).reshape(groups, 1, -1) * LOG2E
  return padded(jnp.repeat(x, setting.queries, 2), setting.rows, 2)


def _operands(setting: Setting, data, q, k, v, sinks, slopes) -> Operands:
  groups = k.shape[2]
  at = keys = None
  if data:  # every head of a group says the same
    fields = [data[name] for name in setting.fields]
    at = jnp.stack([x for x, _ in fields], axis=2)[:, :, None]
    heads = (*at.shape[:2], q.shape[2] // groups, at.shape[3])
    at = _rows(setting, jnp.broadcast_to(at, heads), 1)[:, 0]
    keys = jnp.stack([x for _, x in fields], axis=1)
    keys = padded(padded(keys, setting.keys, 2, -1), 8, 1)
    at = padded(jnp.swapaxes(at, 1, 2), 8, 1)

  def by_head(x: Array) -> Array:
    return padded(jnp.swapaxes(x, 1, 2), setting.keys, 2)

  return Operands(
    _rows(setting, q, groups),
    by_head(k),
    by_head(v),
    at,
    keys,
    None if sinks is None else _per_head(setting, sinks, groups),
    None if slopes is None else _per_head(setting, slopes, groups),
  )


# --- The function and its gradient ------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
  chip: Chip, setting: Setting, plan, data, q, k, v, sinks, slopes
) -> Array:
  return _forward(chip, setting, plan, data, q, k, v, sinks, slopes)[0]


def _forward(chip: Chip, setting: Setting, plan, data, q, k, v, sinks, slopes):
  x = _operands(setting, data, q, k, v, sinks, slopes)
  kernel = functools.partial(chip.forward, setting)
  out, lse = on_device(kernel, x, plan[0], chip=chip.platform)
  out = _from_rows(setting, out, q.shape[1], q.shape[2] // k.shape[2])
  return out, (plan, data, q, k, v, sinks, slopes, out, lse)


def _gradients(
  chip, setting, plan, data, q, k, v, slopes, lse, delta, do, sinks=None
) -> tuple[Array, Array, Array]:
  """Of queries, keys and values; `lse` and `delta` by row of the kernel."""
  groups, t, group = k.shape[2], q.shape[1], q.shape[2] // k.shape[2]
  x = _operands(setting, data, q, k, v, sinks, slopes)
  kernel = functools.partial(chip.backward, setting)
  do = _rows(setting, do, groups)
  dq, dk, dv = on_device(kernel, x, lse, delta, do, plan, chip=chip.platform)
  dk, dv = (jnp.swapaxes(y, 1, 2)[:, : k.shape[1]] for y in (dk, dv))
  return _from_rows(setting, dq, t, group), dk, dv


def _backward(chip: Chip, setting: Setting, saved, do: Array):
  plan, data, q, k, v, sinks, slopes, out, lse = saved
  groups, t, group = k.shape[2], q.shape[1], q.shape[2] // k.shape[2]
  delta = jnp.sum(
    do.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True
  )
  rows = jnp.swapaxes(_rows(setting, delta, groups), 2, 3)
  dq, dk, dv = _gradients(
    chip, setting, plan, data, q, k, v, slopes, lse, rows, do, sinks
  )
  dsinks = None
  if sinks is not None:  # a key without a value: dP = 0, so dS = -P delta
    sums = _from_rows(setting, jnp.swapaxes(lse, 2, 3), t, group)
    score = sinks.astype(jnp.float32)[None, None, :, None] * LOG2E
    p = jnp.exp2(score - sums)
    dsinks = -jnp.sum(p * delta, (0, 1, 3)).astype(sinks.dtype)
  none = None if slopes is None else jnp.zeros_like(slopes)
  return None, None, dq, dk, dv, dsinks, none


_attention.defvjp(_forward, _backward)


# --- Parts of a row ---------------------------------------------------------
#
# Where the keys of a row come in parts, what each part says is joined by the
# log-sum-exp, and its gradient needs that of the whole row.


def flash_part(
  q: Array,
  k: Array,
  v: Array,
  *,
  mask: Mask,
  at: At,
  keys: At,
  scale: float,
  softcap: float | None,
  slopes: Array | None,
  chip: Chip,
) -> tuple[Array, Array]:
  """As `flash_attention`, and the log of each query's sum.

  Returns:
    `[batch, seq, heads, value_dim]`, and float32 `[batch, seq, heads]`.
  """
  chip, fixed, plan, data = _planned(
    q, k, v, mask, at, keys, scale, softcap, None, slopes, None, chip
  )
  out, saved = _forward(chip, fixed, plan, data, q, k, v, None, slopes)
  group = q.shape[2] // k.shape[2]
  lse = _from_rows(fixed, jnp.swapaxes(saved[-1], 2, 3), q.shape[1], group)
  return out, lse[..., 0] / LOG2E


def flash_part_gradient(
  q: Array,
  k: Array,
  v: Array,
  lse: Array,
  delta: Array,
  do: Array,
  *,
  mask: Mask,
  at: At,
  keys: At,
  scale: float,
  softcap: float | None,
  slopes: Array | None,
  chip: Chip,
) -> tuple[Array, Array, Array]:
  """What a part adds to the gradients of queries, keys and values.

  With `lse`, the log of each query's sum over the whole row, and `delta`, the
  sums of `do` times the output of the whole row, both `[batch, seq, heads]`;
  `do` is the gradient of that output, and all else as in `flash_part`.
  """
  chip, fixed, plan, data = _planned(
    q, k, v, mask, at, keys, scale, softcap, None, slopes, None, chip
  )
  lse, delta = (
    jnp.swapaxes(_rows(fixed, x[..., None], k.shape[2]), 2, 3)
    for x in (lse * LOG2E, delta)
  )
  return _gradients(chip, fixed, plan, data, q, k, v, slopes, lse, delta, do)


# A core of a TPU keeps the steps in its scalar memory, of 1 MiB.
TPU = Chip("tpu", Tiles(), 200_000, plan_steps, forward, backward)
GPU = Chip(
  "cuda", Powers(), None, plan_lists, flash_gpu.forward, flash_gpu.backward
)
