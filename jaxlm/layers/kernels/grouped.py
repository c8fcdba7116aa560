"""Rows in groups, each group times a matrix of its own.

`grouped_dot` is what a mixture of experts spends its time in: rows sorted by
expert, one weight per expert. Accelerators have it as `jax.lax.ragged_dot`. On
a CPU that primitive multiplies all rows by all matrices, so there the groups
are cut into tiles, and a loop multiplies one tile at a time: work grows with
the rows, and a matrix without rows is not even read. TPUs and GPUs do the same
in kernels of their own (`grouped_tpu`, `grouped_gpu`).
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.layers.kernels import grouped_gpu, grouped_tpu

Array = jax.Array


@struct.dataclass
class Grouped:
  """A weight per group, in the place of a weight: `dot` knows it.

  Attributes:
    w: `[groups, in, out]`.
    sizes: how many rows each group has, int32 `[groups]`; groups lie one
      after another.
    bias: added to the rows of each group, `[groups, out]`, or None.
  """

  w: Array
  sizes: Array
  bias: Array | None = None

  def __call__(self, x: Array) -> Array:
    """Maps sorted rows `[rows, in]` to `[rows, out]`, float32."""
    y = grouped_dot(x, self.w, self.sizes)
    if self.bias is None:
      return y
    bias = self.bias.astype(y.dtype)
    return y + jnp.repeat(bias, self.sizes, 0, total_repeat_length=len(y))


@jax.custom_vjp
def grouped_dot(x: Array, w: Array, sizes: Array) -> Array:
  """Row r of group g: y_r = x_r W_g.

  Args:
    x: `[rows, in]`, sorted by group; the products are in its dtype.
    w: `[groups, in, out]`, in any float dtype.
    sizes: int32 `[groups]`, summing to the number of rows.

  Returns:
    `[rows, out]`, summed in float32.
  """
  w = w.astype(x.dtype)
  return _by_platform(
    x, w, sizes, jnp.float32, _tiles, _ragged, "times", axis=0
  )


def _by_platform(a, b, sizes, dtype, tiles, ragged, name, **options) -> Array:
  """One of four forms, settled when the program is lowered, in `dtype`.

  Args:
    a: rows.
    b: matrices, or rows again.
    sizes: of the groups.
    dtype: of the result.
    tiles: the form for CPUs.
    ragged: the primitive, for whatever else there is.
    name: of the kernels.
    **options: theirs.
  """

  def cast(form):
    return lambda *args: form(*args).astype(dtype)

  options |= {"dtype": dtype, "interpret": False}
  return jax.lax.platform_dependent(
    a,
    b,
    sizes,
    cpu=cast(tiles),
    tpu=functools.partial(getattr(grouped_tpu, name), **options),
    cuda=functools.partial(getattr(grouped_gpu, name), **options),
    default=cast(ragged),
  )


def _forward(x: Array, w: Array, sizes: Array) -> tuple[Array, tuple]:
  cast = w.astype(x.dtype)
  like = jnp.zeros((), w.dtype)
  return grouped_dot(x, cast, sizes), (x, cast, sizes, like)


def _backward(saved: tuple, dy: Array) -> tuple[Array, Array, None]:
  x, w, sizes, like = saved
  dy = dy.astype(x.dtype)
  dx = _by_platform(
    dy, w, sizes, x.dtype, _tiles_back, _ragged_back, "times", axis=1
  )
  dw = _by_platform(
    x, dy, sizes, like.dtype, _tiles_weight, _ragged_weight, "gradient"
  )
  return dx, dw, None


grouped_dot.defvjp(_forward, _backward)


# --- By the primitive -------------------------------------------------------


def _ragged(x: Array, w: Array, sizes: Array) -> Array:
  return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)


def _ragged_back(dy: Array, w: Array, sizes: Array) -> Array:
  return _ragged(dy, w.swapaxes(1, 2), sizes)


def _ragged_weight(x: Array, dy: Array, sizes: Array) -> Array:
  """The products x_g' dy_g of each group, `[groups, in, out]`."""
  rows = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(),
  )
  return jax.lax.ragged_dot_general(
    x, dy, sizes, rows, preferred_element_type=jnp.float32
  )


# --- By tiles ---------------------------------------------------------------


def _tile_rows(rows: int, groups: int) -> int:
  """Rows of a tile: a quarter of a usual group, so that little is wasted."""
  return max(8, min(256, rows // (4 * groups) // 8 * 8))


class _Plan:
  """Which tile belongs to which group; a group's last tile may hang over."""

  def __init__(self, rows: int, sizes: Array):
    self.size = _tile_rows(rows, sizes.shape[0])
    self.tiles = -(-sizes // self.size)
    self.past = jnp.cumsum(self.tiles)  # the first tile after each group
    self.ends = jnp.cumsum(sizes)
    self.starts = self.ends - sizes

  def __call__(self, i: Array) -> tuple[Array, Array, Array]:
    """Group of tile `i`, its first row, and the group's end."""
    g = jnp.searchsorted(self.past, i, side="right").astype(jnp.int32)
    within = i - (self.past[g] - self.tiles[g])
    return g, self.starts[g] + within * self.size, self.ends[g]

  def pad(self, x: Array) -> Array:
    """Room for the last tile to hang over."""
    return jnp.pad(x, ((0, self.size), (0, 0)))

  def cut(self, x: Array, row: Array) -> Array:
    """The rows of a tile."""
    return jax.lax.dynamic_slice_in_dim(x, row, self.size, 0)


def _product(a: Array, b: Array, i: int, j: int) -> Array:
  contract = (((i,), (j,)), ((), ()))
  return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def _tiles(x: Array, w: Array, sizes: Array, axis: int = 0) -> Array:
  """Contracts `axis` of each group's matrix.

  A tile that hangs over writes wrong rows into the next group, and the next
  group's tiles, which come later, write them again.
  """
  plan = _Plan(x.shape[0], sizes)
  padded = plan.pad(x)

  def body(i: Array, y: Array) -> Array:
    group, row, _ = plan(i)
    matrix = jax.lax.dynamic_index_in_dim(w, group, 0, keepdims=False)
    part = _product(plan.cut(padded, row), matrix, 1, axis)
    return jax.lax.dynamic_update_slice_in_dim(y, part, row, 0)

  y = jnp.zeros((padded.shape[0], w.shape[2 - axis]), jnp.float32)
  return jax.lax.fori_loop(0, plan.past[-1], body, y)[: x.shape[0]]


def _tiles_back(dy: Array, w: Array, sizes: Array) -> Array:
  return _tiles(dy, w, sizes, axis=1)


def _tiles_weight(x: Array, dy: Array, sizes: Array) -> Array:
  """The products x_g' dy_g of each group, `[groups, in, out]`."""
  plan = _Plan(x.shape[0], sizes)
  x, dy = plan.pad(x), plan.pad(dy)

  def body(i: Array, dw: Array) -> Array:
    group, row, end = plan(i)
    own = (row + jnp.arange(plan.size, dtype=jnp.int32) < end)[:, None]
    part = jnp.where(own, plan.cut(x, row), 0)
    return dw.at[group].add(_product(part, plan.cut(dy, row), 0, 0))

  dw = jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, plan.past[-1], body, dw)
