"""Which blocks of keys a block of queries visits, read from the mask's value.

A kernel walks over a list of steps, one per pair of blocks that can see each
other; a pair that the mask excludes is on no list. A step is one 32-bit word:
the outer block (whose sums the kernel keeps), the inner one, and flags. Where
positions or segments come with the data, each row has a list of its own, made
on the device, and the longest row says how many steps are taken.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.layers.mask import Mask

Array = jax.Array

FIRST, LAST, LIVE = 1, 2, 4
OUTER, INNER = 1 << 15, 1 << 12  # how many blocks a word can name


class Bounds(NamedTuple):
  """The smallest and largest number of each block; `low > high` if empty."""

  low: Any
  high: Any


def outer(word: Array) -> Array:
  """The block whose sums are kept over steps."""
  return word >> 16


def inner(word: Array) -> Array:
  """The block that is met in this step."""
  return (word >> 4) & (INNER - 1)


def meets(mask: Mask, q: Bounds, k: Bounds, np: Any = np) -> Any:
  """True where some query of a block sees some key of another.

  Two pairs decide: the nearest, and the last query with the first key. That is
  exact for every mask in which a query that sees a key sees all keys between,
  but for the first ones of all (sinks).

  Args:
    mask: who sees whom.
    q: positions of the queries, in a shape that broadcasts with `k`.
    k: positions of the keys.
    np: `numpy`, or `jax.numpy` for what is known only on the device.
  """
  near = np.clip(k.low, q.low, q.high)
  seen = mask.allows(near, np.clip(near, k.low, k.high))
  seen = seen | mask.allows(q.high, k.low)
  return seen & (q.low <= q.high) & (k.low <= k.high)


def overlap(a: Bounds, b: Bounds) -> Any:
  """True where two ranges have a number in common."""
  return (a.low <= b.high) & (b.low <= a.high)


def ranges(length: int, block: int) -> Bounds:
  """Bounds of 0, 1, ..., length - 1 in blocks."""
  low = np.arange(0, length, block, dtype=np.int32)
  return Bounds(low, np.minimum(low + block, length) - 1)


def bounds(x: Array, block: int, length: int, least: int | None) -> Bounds:
  """Bounds of data `[batch, padded]`: what is padding or below `least` is not.

  Returns:
    Two arrays `[batch, blocks]`.
  """
  big = np.iinfo(np.int32).max
  real = jnp.arange(x.shape[1])[None] < length
  real = real if least is None else real & (x >= least)
  low, high = jnp.where(real, x, big), jnp.where(real, x, -big)
  shape = (x.shape[0], -1, block)
  return Bounds(low.reshape(shape).min(-1), high.reshape(shape).max(-1))


def listed(seen: np.ndarray) -> np.ndarray:
  """The steps of a table that is known when the program is traced.

  Args:
    seen: bool `[outer blocks, inner blocks]`.

  Returns:
    int32 `[1, steps]`; an outer block that meets none has one step, so that
    its result is written.
  """
  seen = _at_least_one(seen)
  i, j = np.nonzero(seen)
  first = np.diff(i, prepend=-1) != 0
  last = np.diff(i, append=-1) != 0
  words = (i << 16) | (j << 4) | (first * FIRST) | (last * LAST) | LIVE
  return words.astype(np.int32)[None]


def sorted_steps(seen: Array, possible: np.ndarray) -> tuple[Array, Array]:
  """The same of a table that comes with the data.

  Args:
    seen: bool `[batch, outer blocks, inner blocks]`.
    possible: bool `[outer blocks, inner blocks]`, what may be in `seen`.

  Returns:
    Words `[batch, steps]`, where rows that have fewer repeat their last blocks
    without flags, and the largest number of steps of a row.
  """
  possible = _at_least_one(possible)
  i, j = np.nonzero(possible)
  starts = np.flatnonzero(np.diff(i, prepend=-1))
  ends = np.append(starts[1:], len(i)) - 1
  lone = ~jnp.any(seen & possible[None], axis=2)
  seen = seen[:, i, j].at[:, starts].max(lone)
  # Counted within its outer block, the first seen is number one, and the last
  # is as many as there are.
  count = jnp.cumsum(seen.astype(jnp.int32), axis=1)
  before = (count - seen.astype(jnp.int32))[:, starts]
  words = jnp.asarray((i << 16) | (j << 4) | LIVE, jnp.int32)[None]
  words = words | jnp.where(count == (before + 1)[:, i], FIRST, 0)
  words = words | jnp.where(count == count[:, ends][:, i], LAST, 0)
  order = jnp.argsort(~seen, axis=1, stable=True)
  words, total = jnp.take_along_axis(words, order, axis=1), count[:, -1:]
  final = jnp.take_along_axis(words, total - 1, axis=1) & ~15
  idle = jnp.arange(words.shape[1])[None] >= total
  return jnp.where(idle, final, words), jnp.max(total)


def lists(seen: Any, np: Any = np) -> tuple[Any, Any]:
  """Which inner blocks each outer one visits, for a loop that reads them.

  Args:
    seen: bool `[batch or 1, outer blocks, inner blocks]`.
    np: `numpy`, or `jax.numpy` for what is known only on the device.

  Returns:
    Inner blocks in order, int32 `[batch or 1, outer blocks, longest]`, of
    which the first `[batch or 1, outer blocks]` are visited.
  """
  count = np.sum(seen, axis=-1, dtype=np.int32)
  inner = np.argsort(~seen, axis=-1, stable=True).astype(np.int32)
  if isinstance(inner, Array):  # the longest is known only on the device
    return inner, count
  return inner[..., : max(1, int(count.max()))], count


def _at_least_one(seen: np.ndarray) -> np.ndarray:
  """The table with a block for those that have none."""
  if seen.shape[0] > OUTER or seen.shape[1] > INNER:
    raise UserError(
      f"{seen.shape[0]} x {seen.shape[1]} blocks are more than flash attention "
      f"counts ({OUTER} x {INNER}); give it larger blocks"
    )
  seen = seen.copy()
  seen[:, 0] |= ~seen.any(axis=1)
  return seen
