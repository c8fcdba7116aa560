"""Rows travel to the devices that want them, are worked on, and come back.

Each device has rows sorted by where they go, and how many go where is known
only at run time. A receiver has room for so many; more of them arrive in
rounds, one after the other, of which there are as many as the fullest device
needs. So nothing is ever lost, and memory does not depend on where rows go:
the worst case, all rows of all devices on one, takes time instead.

What is done with rows is done again for their gradients. Nothing of a round
outlives it.

Accelerators send the rows alone, by `jax.lax.ragged_all_to_all`; XLA has none
for CPUs, which send room for all rows of a pair with them. Both leave the same
rows in the same places.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Tree = Any
Work = Callable[[Tree, Tree, Array], Array]

LEAST = 1024  # rows there is room for in any case


def room(rows: int, ways: int, factor: float | None) -> int:
  """Rows that a device has room for, where each has `rows` to send.

  Args:
    rows: as many arrive where all receive alike.
    ways: how many devices there are.
    factor: room by that fair share; None: for the worst case.
  """
  if factor is None:
    return ways * rows
  return min(ways * rows, max(LEAST, math.ceil(factor * rows)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def visit(
  work: Work, axis: str, most: int, p: Tree, rows: Tree, sizes: Array
) -> Array:
  """What `work` makes of rows on the devices they go to, where they came from.

  Args:
    work: `(p, rows, sizes) -> rows`: maps rows sorted by group, `sizes`
      [groups] of them, those of no group last. It may see each row at any
      time, beside any others.
    axis: the mesh axis of these devices; the caller is inside `shard_map`.
    most: rows that a device has room for.
    p: what the work takes besides.
    rows: arrays `[rows, ...]`, sorted by receiver, and then by group there.
    sizes: how many go to each group of each device, int32 `[ways, groups]`.

  Returns:
    `[rows, ...]`, in the order of `rows`.
  """
  route, n = plan(sizes, axis), len(jax.tree.leaves(rows)[0])
  like = jax.eval_shape(work, p, _roomy(rows, most), sizes[0])

  def one(state: tuple[Array, Array]) -> tuple[Array, Array]:
    i, y = state
    part = route.round(i, most)
    made = work(p, arrived(rows, part, most), part.groups)
    return i + 1, returned(made, part, y)

  y = jnp.zeros((n, *like.shape[1:]), like.dtype)
  return _rounds(route, most, one, y)


def _forward(work, axis, most, p, rows, sizes) -> tuple[Array, tuple]:
  return visit(work, axis, most, p, rows, sizes), (p, rows, sizes)


def _backward(work, axis, most, saved: tuple, dy: Array) -> tuple:
  p, rows, sizes = saved
  route = plan(sizes, axis)

  def one(state: tuple) -> tuple:
    i, (dp, drows) = state
    part = route.round(i, most)
    here, dhere = arrived((rows, dy), part, most)
    _, pull = jax.vjp(lambda p, rows: work(p, rows, part.groups), p, here)
    more, back = pull(dhere)
    dp = jax.tree.map(jnp.add, dp, more)
    keep = functools.partial(returned, part=part)
    return i + 1, (dp, jax.tree.map(lambda d, x: keep(d, onto=x), back, drows))

  zeros = jax.tree.map(jnp.zeros_like, (p, rows))
  return *_rounds(route, most, one, zeros), None


visit.defvjp(_forward, _backward)


def _rounds(route: "Plan", most: int, one: Callable, start: Tree) -> Tree:
  """Goes on until all rows have been everywhere."""
  fullest = jax.lax.pmax(jnp.sum(route.arriving), route.axis)
  rounds = -(-fullest // most)
  zero = jnp.int32(0)
  return jax.lax.while_loop(lambda s: s[0] < rounds, one, (zero, start))[1]


def _roomy(rows: Tree, most: int) -> Tree:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((most, *x.shape[1:]), x.dtype), rows
  )


# --- Who sends what ---------------------------------------------------------


@struct.dataclass
class Plan:
  """Who sends how much to whom, as one device sees it; int32 `[ways]`.

  Attributes:
    sizes: how many rows go to each device.
    starts: where those start among the rows here.
    places: where they land in the room of each.
    arriving: how many rows come from each device.
    origins: where those start among its rows.
    landing: where they land in the room here, one after the other.
    theirs: how many of them are for each group here, `[ways, groups]`.
    axis: the mesh axis of these devices.
  """

  sizes: Array
  starts: Array
  places: Array
  arriving: Array
  origins: Array
  landing: Array
  theirs: Array
  axis: str = struct.field(pytree_node=False)

  @property
  def groups(self) -> Array:
    """How many rows each group here gets."""
    return jnp.sum(self.theirs, axis=0)

  @property
  def back(self) -> "Plan":
    """The same rows, sent home."""
    return self.replace(
      sizes=self.arriving,
      starts=self.landing,
      places=self.origins,
      arriving=self.sizes,
      origins=self.places,
      landing=self.starts,
    )

  def round(self, i: Array, most: int) -> "Plan":
    """Of the i-th `most` rows that arrive on each device."""
    first = i * most

    def cut(places: Array, sizes: Array) -> tuple[Array, Array]:
      begin = jnp.clip(first - places, 0, sizes)
      return begin, jnp.clip(first + most - places, 0, sizes) - begin

    skipped, sizes = cut(self.places, self.sizes)
    missed, arriving = cut(self.landing, self.arriving)
    before = jnp.cumsum(self.theirs, axis=1) - self.theirs
    _, theirs = cut(self.landing[:, None] + before, self.theirs)
    return self.replace(
      sizes=sizes,
      starts=self.starts + skipped,
      places=jnp.clip(self.places - first, 0, most),
      arriving=arriving,
      origins=self.origins + missed,
      landing=jnp.clip(self.landing - first, 0, most),
      theirs=theirs,
    )


def plan(sizes: Array, axis: str) -> Plan:
  """What `sizes` rows to each group of each device mean for all of them.

  Three exchanges of a few numbers.

  Args:
    sizes: int32 `[ways, groups]`.
    axis: the mesh axis; the caller is inside `shard_map`.
  """
  exchange = functools.partial(
    jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True
  )
  out = jnp.sum(sizes, axis=1)
  starts = jnp.cumsum(out) - out
  theirs, origins = exchange(sizes), exchange(starts)
  arriving = jnp.sum(theirs, axis=1)
  landing = jnp.cumsum(arriving) - arriving
  places = exchange(landing)
  return Plan(out, starts, places, arriving, origins, landing, theirs, axis)


# --- There and back ---------------------------------------------------------


def arrived(rows: Tree, part: Plan, most: int) -> Tree:
  """The rows of a round where they go, `[most, ...]`, sorted by group.

  Rows that are empty come last; they are zero.
  """
  order = _by_group(part, most)
  send = functools.partial(_sent, part=part, most=most)
  return jax.tree.map(lambda x: send(x)[order], rows)


def returned(y: Array, part: Plan, onto: Array) -> Array:
  """Rows `[most, ...]` of a round back home, written `onto` `[rows, ...]`."""
  return _moved(y[jnp.argsort(_by_group(part, len(y)))], onto, part.back)


def _sent(x: Array, part: Plan, most: int) -> Array:
  return _moved(x, jnp.zeros((most, *x.shape[1:]), x.dtype), part)


def _moved(x: Array, onto: Array, part: Plan) -> Array:
  return jax.lax.platform_dependent(x, onto, part, cpu=_padded, default=_ragged)


def _by_group(part: Plan, most: int) -> Array:
  """Sorts by group what came sorted by sender and then by group, `[most]`."""
  ends = jnp.cumsum(part.theirs.reshape(-1))
  place = jnp.arange(most, dtype=ends.dtype)
  found = jnp.searchsorted(ends, place, side="right")
  n = part.theirs.shape[1]
  return jnp.argsort(jnp.where(place < ends[-1], found % n, n), stable=True)


def _ragged(x: Array, onto: Array, part: Plan) -> Array:
  return jax.lax.ragged_all_to_all(
    x,
    onto,
    part.starts,
    part.sizes,
    part.places,
    part.arriving,
    axis_name=part.axis,
  )


def _padded(x: Array, onto: Array, part: Plan) -> Array:
  """The same by a table of as many rows for each pair as one can have."""
  i = jnp.arange(min(len(x), len(onto)), dtype=jnp.int32)[None]
  table = x.at[part.starts[:, None] + i].get(mode="clip")
  table = jax.lax.all_to_all(table, part.axis, 0, 0)
  here = i < part.arriving[:, None]
  to = jnp.where(here, part.landing[:, None] + i, len(onto))
  return onto.at[to].set(table, mode="drop")
