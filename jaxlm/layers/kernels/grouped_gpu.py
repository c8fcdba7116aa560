"""Grouped products on GPUs. Twins: the forms by tiles in `grouped`.

The steps of `grouped_tpu`, a program each: a step writes the rows of its own
group and no others, so steps that share a tile do not meet. The gradient of a
group's matrix is one program for each of its tiles, which walks over the rows
of the group. Compiled by Triton. What XLA makes of `ragged_dot` on a GPU holds
the rows once for every group.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlm.layers.kernels.grouped_tpu import Steps, plan
from jaxlm.layers.kernels.tpu import padded, product

Array = jax.Array

SIDE = 64  # of a tile; so many are contracted at once


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

  As `grouped_tpu.times`.
  """
  rows, n_in, n_out = x.shape[0], x.shape[1], w.shape[2 - axis]
  x = padded(x, SIDE, 0)
  steps = plan(sizes, x.shape[0], SIDE, empty=False)
  shapes = (x.shape[0], _up(n_in)), tuple(map(_up, w.shape[1:]))
  y = pl.pallas_call(
    functools.partial(_times_kernel, n_in, n_out, w.shape[0], axis),
    name="grouped_product",
    grid=(pl.cdiv(n_out, SIDE), steps.tiles.shape[0]),
    in_specs=[
      *[pl.BlockSpec(a.shape, lambda *_: (0,)) for a in steps],
      pl.BlockSpec(shapes[0], lambda *_: (0, 0)),
      pl.BlockSpec((w.shape[0], *shapes[1]), lambda *_: (0, 0, 0)),
    ],
    out_specs=pl.BlockSpec((x.shape[0], _up(n_out)), lambda *_: (0, 0)),
    out_shape=jax.ShapeDtypeStruct((x.shape[0], n_out), dtype),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
  )(*steps, x, w)
  return y[:rows]


def _up(n: int) -> int:
  """The next multiple of a tile's side."""
  return -(-n // SIDE) * SIDE


def _times_kernel(n_in, n_out, groups, axis, *refs) -> None:
  steps, (x, w, y) = Steps(*refs[:5]), refs[5:]
  column, s = pl.program_id(0), pl.program_id(1)

  @pl.when(s < steps.count[0])
  def _():
    g = steps.groups[s]
    row = _indices(steps.tiles[s])
    own = (row >= steps.starts[g]) & (row < steps.ends[g])
    real = g < groups  # rows of no group become zeros
    at = pl.ds(steps.tiles[s] * SIDE, SIDE)
    out, wide = pl.ds(column * SIDE, SIDE), _indices(column) < n_out

    def part(c: Array, total: Array) -> Array:
      inner = pl.ds(c * SIDE, SIDE)
      deep = _indices(c) < n_in
      a = triton.load(x.at[at, inner], mask=deep[None], other=0.0)
      if axis:
        place, keep = (out, inner), wide[:, None] & deep[None]
      else:
        place, keep = (inner, out), deep[:, None] & wide[None]
      there = w.at[jnp.minimum(g, groups - 1), *place]
      b = triton.load(there, mask=keep & real, other=0.0)
      return total + product(a, b, (1, axis))

    total = jnp.zeros((SIDE, SIDE), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(n_in, SIDE), part, total)
    keep = own[:, None] & wide[None]
    triton.store(y.at[at, out], total.astype(y.dtype), mask=keep)


def gradient(
  x: Array,
  dy: Array,
  sizes: Array,
  dtype: Any = jnp.float32,
  *,
  interpret: bool,
) -> Array:
  """The products x_g' dy_g of each group; as `grouped_tpu.gradient`."""
  groups, n_in, n_out = sizes.shape[0], x.shape[1], dy.shape[1]
  x, dy = padded(x, SIDE, 0), padded(dy, SIDE, 0)
  ends = jnp.cumsum(sizes)
  return pl.pallas_call(
    functools.partial(_gradient_kernel, n_in, n_out),
    name="grouped_gradient",
    grid=(pl.cdiv(n_in, SIDE), pl.cdiv(n_out, SIDE), groups),
    in_specs=[
      *[pl.BlockSpec((groups,), lambda *_: (0,))] * 2,
      pl.BlockSpec((x.shape[0], _up(n_in)), lambda *_: (0, 0)),
      pl.BlockSpec((x.shape[0], _up(n_out)), lambda *_: (0, 0)),
    ],
    out_specs=pl.BlockSpec(
      (None, _up(n_in), _up(n_out)), lambda i, j, g: (g, 0, 0)
    ),
    out_shape=jax.ShapeDtypeStruct((groups, n_in, n_out), dtype),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
  )(ends - sizes, ends, x, dy)


def _gradient_kernel(n_in, n_out, starts, ends, x, dy, dw) -> None:
  i, j, g = (pl.program_id(axis) for axis in range(3))
  start, end = starts[g], ends[g]
  high, wide = pl.ds(i * SIDE, SIDE), pl.ds(j * SIDE, SIDE)
  tall, broad = _indices(i) < n_in, _indices(j) < n_out

  def part(tile: Array, total: Array) -> Array:
    row = _indices(tile)
    own = ((row >= start) & (row < end))[:, None]
    at = pl.ds(tile * SIDE, SIDE)
    a = triton.load(x.at[at, high], mask=own & tall[None], other=0.0)
    b = triton.load(dy.at[at, wide], mask=own & broad[None], other=0.0)
    return total + product(a, b, (0, 0))

  total = jnp.zeros((SIDE, SIDE), jnp.float32)
  side = jnp.int32(SIDE)  # a plain number would be 64 bits wide under x64
  last = jax.lax.div(end + side - 1, side)
  first = jnp.minimum(jax.lax.div(start, side), last)
  total = jax.lax.fori_loop(first, last, part, total)
  keep = tall[:, None] & broad[None]
  triton.store(dw.at[high, wide], total.astype(dw.dtype), mask=keep)


def _indices(block: Array) -> Array:
  """Numbers of a block of `SIDE`, int32 `[SIDE]`."""
  return block * SIDE + jax.lax.broadcasted_iota(jnp.int32, (SIDE,), 0)
