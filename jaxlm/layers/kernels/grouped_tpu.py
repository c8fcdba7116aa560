"""Grouped products on TPUs. Twins: the forms by tiles in `grouped`.

A step is a tile of rows and a group that has rows in it. Rows are sorted, so
the steps are, by tile and by group at once: a tile's results, or a group's
gradient, stay on the chip over the steps that add to them, and a matrix is
read once however many rows its group has (MegaBlocks, arXiv:2211.15841). A
group without rows has no step, but for the zeros of its gradient. XLA's own
`ragged_dot` has kernels for the products with rows, and none for the gradient
of the matrices, where it multiplies all rows for each group.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.layers.kernels.tpu import padded, product

Array = jax.Array

MEMORY = 48 << 20  # bytes on the chip that a kernel may use
WIDE = 512  # columns of a result's tile


class Steps(NamedTuple):
  """What is done in which order; known on the device.

  Attributes:
    tiles: of rows, int32 `[steps]`.
    groups: whose rows are meant, int32 `[steps]`.
    starts: first row of each group, int32 `[groups + 1]`; the last belongs to
      no group: what rows there are beyond.
    ends: the row after its last.
    count: of the steps that are taken, int32 `[1]`.
  """

  tiles: Array
  groups: Array
  starts: Array
  ends: Array
  count: Array


def height(rows: int, groups: int) -> int:
  """Rows of a tile: about as many as a usual group has."""
  usual = 1 << max(0, (rows // groups).bit_length() - 1)
  return max(128, min(512, usual))


def plan(sizes: Array, rows: int, tile: int, empty: bool) -> Steps:
  """The steps over groups of `sizes`.

  Args:
    sizes: int32 `[groups]`.
    rows: of all, whole tiles.
    tile: rows of each.
    empty: whether a group without rows has a step; then rows that belong to no
      group have none, and else they do.
  """
  ends = jnp.cumsum(sizes)
  starts = jnp.append(ends - sizes, ends[-1])
  ends = jnp.append(ends, rows)
  first = jnp.minimum(starts // tile, rows // tile - 1)
  each = jnp.where(ends > starts, (ends - 1) // tile - first + 1, int(empty))
  each = each.at[-1].set(0) if empty else each
  past = jnp.cumsum(each)
  step = jnp.arange(rows // tile + len(sizes), dtype=jnp.int32)
  groups = jnp.searchsorted(past, step, side="right").astype(jnp.int32)
  groups = jnp.minimum(groups, len(sizes))
  tiles = first[groups] + step - (past - each)[groups]
  tiles = jnp.clip(tiles, 0, rows // tile - 1)
  return Steps(tiles, groups, starts, ends, past[-1:])


def times(
  x: Array,
  w: Array,
  sizes: Array,
  dtype: Any = jnp.float32,
  *,
  axis: int,
  interpret: bool,
) -> Array:
  """Row r of group g: x_r W_g, or x_r W_g' where `axis` is 1.

  Args:
    x: `[rows, in]`.
    w: `[groups, in, out]`, or `[groups, out, in]`.
    sizes: int32 `[groups]`.
    dtype: of the result; sums are float32.
    axis: of a matrix that is contracted.
    interpret: True runs it without a TPU, slowly.

  Returns:
    `[rows, out]`; zeros for rows of no group.
  """
  rows, tile = x.shape[0], height(x.shape[0], w.shape[0])
  x = padded(x, tile, 0)
  n_in, n_out = x.shape[1], w.shape[2 - axis]
  wide, deep = min(WIDE, n_out), min(8192 // x.dtype.itemsize, n_in)
  steps = plan(sizes, x.shape[0], tile, empty=False)
  last = w.shape[0] - 1

  def matrix(j, s, c, tiles, groups, *_):
    g = jnp.minimum(groups[s], last)
    return (g, j, c) if axis else (g, c, j)

  y = pl.pallas_call(
    functools.partial(_times_kernel, tile, n_in, deep, axis),
    name="grouped_product",
    out_shape=jax.ShapeDtypeStruct((x.shape[0], n_out), dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(steps),
      grid=(pl.cdiv(n_out, wide), steps.count[0], pl.cdiv(n_in, deep)),
      in_specs=[
        pl.BlockSpec((tile, deep), lambda j, s, c, tiles, *_: (tiles[s], c)),
        pl.BlockSpec((1, wide, deep) if axis else (1, deep, wide), matrix),
      ],
      out_specs=pl.BlockSpec(
        (tile, wide), lambda j, s, c, tiles, *_: (tiles[s], j)
      ),
      scratch_shapes=[pltpu.VMEM((tile, wide), jnp.float32)],
    ),
    compiler_params=_params("parallel", "arbitrary", "arbitrary"),
    cost_estimate=_cost(x, w, n_in, n_out, (x.shape[0], n_out), dtype),
    interpret=interpret,
  )(*steps, x, w)
  return y[:rows]


def _times_kernel(tile, n_in, deep, axis, *refs) -> None:
  """One step: the rows of one group in a tile, all others left alone."""
  steps, (x, w, y, total) = Steps(*refs[:5]), refs[5:]
  s, c = pl.program_id(1), pl.program_id(2)
  own = _own(steps, s, tile)

  @pl.when(c == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  a, b = x[...], w[0]
  if n_in % deep:  # what hangs over is no number at all
    a = jnp.where(_within(a.shape, 1, n_in - c * deep), a, 0)
    b = jnp.where(_within(b.shape, axis, n_in - c * deep), b, 0)
  total[...] += product(a, b, (1, axis))

  @pl.when(c == pl.num_programs(2) - 1)
  def _():
    fresh = (s == 0) | (steps.tiles[s] != steps.tiles[jnp.maximum(s - 1, 0)])
    old = jnp.where(fresh, 0.0, y[...].astype(jnp.float32))
    y[...] = jnp.where(own, total[...], old).astype(y.dtype)


def gradient(
  x: Array,
  dy: Array,
  sizes: Array,
  dtype: Any = jnp.float32,
  *,
  interpret: bool,
) -> Array:
  """The products x_g' dy_g of each group.

  Args:
    x: `[rows, in]`.
    dy: `[rows, out]`.
    sizes: int32 `[groups]`.
    dtype: of the result; sums are float32.
    interpret: True runs it without a TPU, slowly.

  Returns:
    `[groups, in, out]`.
  """
  tile = height(x.shape[0], sizes.shape[0])
  x, dy = padded(x, tile, 0), padded(dy, tile, 0)
  steps = plan(sizes, x.shape[0], tile, empty=True)
  high, wide = (min(WIDE, a.shape[1]) for a in (x, dy))
  return pl.pallas_call(
    functools.partial(_gradient_kernel, tile),
    name="grouped_gradient",
    out_shape=jax.ShapeDtypeStruct(
      (sizes.shape[0], x.shape[1], dy.shape[1]), dtype
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(steps),
      grid=(
        pl.cdiv(x.shape[1], high),
        pl.cdiv(dy.shape[1], wide),
        steps.count[0],
      ),
      in_specs=[
        pl.BlockSpec((tile, high), lambda i, j, s, tiles, *_: (tiles[s], i)),
        pl.BlockSpec((tile, wide), lambda i, j, s, tiles, *_: (tiles[s], j)),
      ],
      out_specs=pl.BlockSpec(
        (1, high, wide), lambda i, j, s, tiles, groups, *_: (groups[s], i, j)
      ),
      scratch_shapes=[pltpu.VMEM((high, wide), jnp.float32)],
    ),
    compiler_params=_params("parallel", "parallel", "arbitrary"),
    cost_estimate=_cost(
      x,
      dy,
      x.shape[1],
      dy.shape[1],
      (len(sizes), x.shape[1], dy.shape[1]),
      dtype,
    ),
    interpret=interpret,
  )(*steps, x, dy)


def _gradient_kernel(tile, *refs) -> None:
  """One step: what a tile adds to the gradient of one group."""
  steps, (x, dy, dw, total) = Steps(*refs[:5]), refs[5:]
  s, last = pl.program_id(2), pl.num_programs(2) - 1
  g = steps.groups[s]

  @pl.when((s == 0) | (g != steps.groups[jnp.maximum(s - 1, 0)]))
  def _():
    total[...] = jnp.zeros_like(total)

  @pl.when(steps.ends[g] > steps.starts[g])
  def _():
    rows = jnp.where(_own(steps, s, tile), x[...], 0)
    total[...] += product(rows, dy[...], (0, 0))

  @pl.when((s == last) | (g != steps.groups[jnp.minimum(s + 1, last)]))
  def _():
    dw[0] = total[...].astype(dw.dtype)


def _own(steps: Steps, s: Array, tile: int) -> Array:
  """Which rows of a step's tile are its group's, bool `[tile, 1]`."""
  g = steps.groups[s]
  row = jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
  row = row + steps.tiles[s] * tile
  real = g < steps.starts.shape[0] - 1
  return (row >= steps.starts[g]) & (row < steps.ends[g]) & real


def _within(shape: tuple[int, int], axis: int, n: Array) -> Array:
  """True for the first `n` along an axis."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < n


def _params(*semantics: str) -> pltpu.CompilerParams:
  return pltpu.CompilerParams(
    dimension_semantics=semantics, vmem_limit_bytes=MEMORY
  )


def _cost(a, b, n_in: int, n_out: int, shape, dtype) -> pl.CostEstimate:
  """What XLA is told of a product `[rows, in] x [in, out]` of all groups."""
  there = a.size * a.dtype.itemsize + b.size * b.dtype.itemsize
  back = math.prod(shape) * jnp.dtype(dtype).itemsize
  return pl.CostEstimate(2 * a.shape[0] * n_in * n_out, 0, there + back)
