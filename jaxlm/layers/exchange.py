"""Rows travel to the devices that want them, and back.

Each device has rows sorted by where they go, and how many go where is known
only at run time. Room is made for the worst case, that all rows of all devices
go to one, so nothing is ever lost. Accelerators send the rows alone, by
`jax.lax.ragged_all_to_all`; XLA has none for CPUs, which send the room with
them. Both leave the same rows in the same places.
"""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Plan:
  """Who sends how much to whom, as one device sees it; all int32 `[ways]`.

  Attributes:
    sizes: how many rows go to each device.
    starts: where in this device's rows those for each device start.
    arriving: how many come from each device.
    landing: where those lie among the sender's own rows.
    axis: the mesh axis of these devices.
  """

  sizes: Array
  starts: Array
  arriving: Array
  landing: Array
  axis: str = struct.field(pytree_node=False)

  @property
  def ways(self) -> int:
    """How many devices there are."""
    return self.sizes.shape[0]


def plan(sizes: Array, axis: str) -> Plan:
  """What `sizes` rows to each device mean for all of them; one small exchange.

  Args:
    sizes: int32 `[ways]`.
    axis: the mesh axis; the caller is inside `shard_map`.
  """
  starts = jnp.cumsum(sizes) - sizes
  both = jax.lax.all_to_all(jnp.stack([sizes, starts], 1), axis, 0, 0)
  return Plan(sizes, starts, both[:, 0], both[:, 1], axis)


@jax.custom_vjp
def there(x: Array, plan: Plan) -> Array:
  """Sends rows to where they go.

  Args:
    x: `[rows, dim]`, as many rows on each device, sorted by receiver.
    plan: of these rows.

  Returns:
    `[ways * rows, dim]`: a part of `rows` for each sender, whose first
    `plan.arriving` rows have arrived; the others are zero.
  """
  return jax.lax.platform_dependent(
    x, plan, cpu=_there_padded, default=_there_ragged
  )


@jax.custom_vjp
def back(y: Array, plan: Plan) -> Array:
  """Sends what became of the rows back: the inverse, and transpose, of `there`.

  Args:
    y: `[ways * rows, dim]`; rows that have not arrived are not read.
    plan: as it was on the way there.

  Returns:
    `[rows, dim]`, in the order of the senders' rows.
  """
  return jax.lax.platform_dependent(
    y, plan, cpu=_back_padded, default=_back_ragged
  )


there.defvjp(
  lambda x, plan: (there(x, plan), plan),
  lambda plan, dy: (back(dy, plan), None),
)
back.defvjp(
  lambda y, plan: (back(y, plan), plan),
  lambda plan, dx: (there(dx, plan), None),
)


# --- By the primitive -------------------------------------------------------


def _there_ragged(x: Array, plan: Plan) -> Array:
  rows = x.shape[0]
  mine = jax.lax.axis_index(plan.axis).astype(jnp.int32) * rows
  return jax.lax.ragged_all_to_all(
    x,
    jnp.zeros((plan.ways * rows, *x.shape[1:]), x.dtype),
    plan.starts,
    plan.sizes,
    jnp.broadcast_to(mine, plan.sizes.shape),
    plan.arriving,
    axis_name=plan.axis,
  )


def _back_ragged(y: Array, plan: Plan) -> Array:
  rows = y.shape[0] // plan.ways
  return jax.lax.ragged_all_to_all(
    y,
    jnp.zeros((rows, *y.shape[1:]), y.dtype),
    jnp.arange(plan.ways, dtype=jnp.int32) * rows,
    plan.arriving,
    plan.landing,
    plan.sizes,
    axis_name=plan.axis,
  )


# --- With the room ----------------------------------------------------------


def _slots(rows: int, plan: Plan) -> Array:
  """Where each row is in a table of `rows` for each receiver."""
  i = jnp.arange(rows, dtype=jnp.int32)
  ends = plan.starts + plan.sizes
  to = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
  return to * rows + i - plan.starts[to]


def _there_padded(x: Array, plan: Plan) -> Array:
  rows = x.shape[0]
  table = jnp.zeros((plan.ways * rows, *x.shape[1:]), x.dtype)
  table = table.at[_slots(rows, plan)].set(x)
  return jax.lax.all_to_all(table, plan.axis, 0, 0, tiled=True)


def _back_padded(y: Array, plan: Plan) -> Array:
  rows = y.shape[0] // plan.ways
  table = jax.lax.all_to_all(y, plan.axis, 0, 0, tiled=True)
  return table[_slots(rows, plan)]
