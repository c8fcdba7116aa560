"""One query per row against its pages, on GPUs. Twin: that of `paged`.

A GPU wants many programs, and decoding has few rows. So a row's pages are cut
into runs, each of which is a program that leaves its part of the values and the
log of its sum; a little XLA joins them (flash decoding). Compiled by Triton,
which counts in powers of two: heads and pages have to be such.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlm.layers.kernels.flash_forward import bent
from jaxlm.layers.kernels.tpu import LEAST, LOW, padded, product

Array = jax.Array

ROWS = 16  # of the smallest product a tensor core takes


def fits(head_dim: int, block: int) -> bool:
  """Whether Triton can count in such heads and pages."""
  return all(n >= ROWS and n & (n - 1) == 0 for n in (head_dim, block))


def run(setting, lists, q, k, v, numbers: dict, interpret: bool) -> Array:
  """Output `[batch, heads, value_dim]`.

  Args:
    setting: what is fixed; `setting.pages` make a run.
    lists: columns of the pages to visit and their blocks, `[batch, whole
      runs]`, how many these are `[batch]`, and where queries stand `[batch]`.
    q: `[batch, heads, head_dim]`.
    k: `[blocks, block, kv_heads, head_dim]`.
    v: `[blocks, block, kv_heads, value_dim]`.
    numbers: of `sinks` and `slopes` those there are, times log2(e), float32
      `[heads]`.
    interpret: True runs it without a GPU, slowly.
  """
  (b, heads, h), d, groups = q.shape, v.shape[3], k.shape[2]
  group = heads // groups
  rows = max(ROWS, pl.next_power_of_2(group))
  runs = lists[0].shape[1] // setting.pages
  slopes = numbers.get("slopes", jnp.zeros((heads,), jnp.float32))

  def pool(x: Array) -> pl.BlockSpec:
    shape = (*x.shape[:2], None, x.shape[3])
    return pl.BlockSpec(shape, lambda r, g, row: (0, 0, g, 0))

  part = pl.BlockSpec(
    (None, None, None, rows, d), lambda r, g, row: (row, g, r, 0, 0)
  )
  number = pl.BlockSpec(
    (None, None, None, rows), lambda r, g, row: (row, g, r, 0)
  )
  out, lse = pl.pallas_call(
    functools.partial(_kernel, setting),
    name="paged_attention",
    grid=(runs, groups, b),
    in_specs=[
      *[pl.BlockSpec((None, x.shape[1]), _row) for x in lists[:2]],
      *[pl.BlockSpec(x.shape, lambda *_: (0,)) for x in lists[2:]],
      pl.BlockSpec((None, None, rows, h), lambda r, g, row: (row, g, 0, 0)),
      pool(k),
      pool(v),
      pl.BlockSpec((None, rows), lambda r, g, row: (g, 0)),
    ],
    out_specs=[part, number],
    out_shape=[
      jax.ShapeDtypeStruct((b, groups, runs, rows, d), jnp.float32),
      jax.ShapeDtypeStruct((b, groups, runs, rows), jnp.float32),
    ],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
  )(
    *lists,
    padded(q.reshape(b, groups, group, h), rows, 2),
    k,
    v,
    padded(slopes.reshape(groups, group), rows, 1),
  )
  out, lse = out[:, :, :, :group], lse[:, :, :, :group]
  return _joined(out, lse, numbers.get("sinks")).astype(v.dtype)


def _row(r, g, row) -> tuple:
  """The list of a row, whichever run."""
  return row, 0


def _joined(out: Array, lse: Array, sinks: Array | None) -> Array:
  """Runs `[batch, kv_heads, runs, group, d]` as `[batch, heads, d]`."""
  b, groups, _, group, d = out.shape
  top = jnp.max(lse, axis=2, keepdims=True)
  if sinks is not None:
    sinks = sinks.reshape(1, groups, 1, group)
    top = jnp.maximum(top, sinks)
  weights = jnp.exp2(lse - top)
  total = jnp.sum(weights, axis=2, keepdims=True)
  if sinks is not None:
    total = total + jnp.exp2(sinks - top)
  parts = (weights / total)[..., None] * out
  return jnp.sum(parts, axis=2).reshape(b, groups * group, d)


def _kernel(setting, columns, blocks, count, at, q, k, v, slopes, out, lse):
  """One run of pages of one row and key head."""
  run, row = pl.program_id(0), pl.program_id(2)
  here, queries = at[row], q[...]
  rows, block = q.shape[0], k.shape[1]
  number = jax.lax.broadcasted_iota(jnp.int32, (block,), 0)

  def page(place: Array, sums: tuple) -> tuple:
    top, total, acc = sums
    s = bent(setting, product(queries, k[blocks[place], :, :], (1, 1)))[0]
    stood = (columns[place] * block + number)[None]
    s = s + slopes[...][:, None] * (stood - here).astype(jnp.float32)
    s = jnp.where(setting.mask.allows(here, stood), s, LOW)
    new = jnp.maximum(top, jnp.max(s, axis=1))
    weights, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(top - new)
    values = v[blocks[place], :, :]
    acc = acc * shrink[:, None] + product(weights.astype(values.dtype), values)
    return new, total * shrink + jnp.sum(weights, axis=1), acc

  first = run * setting.pages
  last = jnp.minimum(first + setting.pages, count[row])
  init = (
    jnp.full((rows,), LEAST, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
    jnp.zeros((rows, v.shape[2]), jnp.float32),
  )
  top, total, acc = jax.lax.fori_loop(first, last, page, init)
  total = jnp.where(total == 0.0, 1.0, total)
  out[...] = acc / total[:, None]
  lse[...] = top + jnp.log2(total)
