"""One query per row against the pages its table names, for TPUs and GPUs.

Twin: reading by `layers.paged.Paged`, then `attend_reference`. There all pages
of a row are gathered into one array, as long as the longest row may become,
and then read again. Here a page goes from the pool to the chip once and lives
nowhere else (PagedAttention, arXiv:2309.06180), and pages that hold nothing the
mask lets the query see are not fetched.

Decoding waits for memory. So all heads of a page are multiplied with all heads
of the query at once, and the products of heads that do not belong together
count as unseen: that costs a matrix unit nothing it would not spend on filling
up rows, and keys stay as they lie. That is on TPUs; `paged_gpu` has another
order of work for the same lists of pages.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.layers.kernels import paged_gpu, visits
from jaxlm.layers.kernels.flash_forward import bent
from jaxlm.layers.kernels.tpu import (
  LANES,
  LEAST,
  LOG2E,
  LOW,
  grow,
  on_device,
  padded,
  product,
  spread,
)
from jaxlm.layers.mask import Mask

Array = jax.Array


@dataclass(frozen=True)
class Setting:
  """What is fixed when the kernel is compiled.

  Attributes:
    mask: who sees whom.
    scale: of the products.
    softcap: of the scores, or None.
    heads: of the query.
    groups: heads of keys and values.
    block: tokens of a page.
    pages: of a step.
  """

  mask: Mask
  scale: float
  softcap: float | None
  heads: int
  groups: int
  block: int
  pages: int


def paged_attention(
  q: Array,
  k: Array,
  v: Array,
  table: Array,
  positions: Array,
  mask: Mask,
  *,
  scale: float,
  softcap: float | None = None,
  sinks: Array | None = None,
  slopes: Array | None = None,
  pages: int = 8,
  gpu: bool = False,
) -> Array:
  """Attention of one query per row to a pool of pages, all of them written.

  Runs compiled on the chip and interpreted, slowly, on a CPU.

  Args:
    q: `[batch, heads, head_dim]`.
    k: `[blocks, block, kv_heads, head_dim]`.
    v: `[blocks, block, kv_heads, value_dim]`.
    table: which block holds positions c * block to (c + 1) * block - 1 of a
      row, int32 `[batch, columns]`; -1 means none.
    positions: of the queries, int32 `[batch]`.
    mask: a causal one.
    scale: of the products.
    softcap: of the scores, or None.
    sinks: learned logits `[heads]` in the denominator, or None.
    slopes: of ALiBi, float32 `[heads]`, or None.
    pages: how many are fetched in a step.
    gpu: whether the kernel is that for GPUs.

  Returns:
    `[batch, heads, value_dim]` in the dtype of `v`; zeros for a row that sees
    nothing.
  """
  heads, (block, groups) = q.shape[1], k.shape[1:3]
  pages = min(pages, table.shape[1])
  setting = Setting(mask, scale, softcap, heads, groups, block, pages)
  columns, count = _visited(setting, table, positions)
  numbers = {"sinks": sinks, "slopes": slopes}
  numbers = {
    name: x.astype(jnp.float32) * LOG2E
    for name, x in numbers.items()
    if x is not None
  }
  blocks = jnp.maximum(jnp.take_along_axis(table, columns, axis=1), 0)
  lists = columns, blocks, count, positions.astype(jnp.int32)
  run, chip = (paged_gpu.run, "cuda") if gpu else (_run, "tpu")
  run = functools.partial(run, setting)
  return on_device(run, lists, q.astype(k.dtype), k, v, numbers, chip=chip)


def _visited(setting: Setting, table: Array, at: Array) -> tuple[Array, Array]:
  """Columns of pages with a key that is seen, `[batch, whole steps]`.

  And how many these are of each row, `[batch]`. Behind them the last one is
  repeated, so that nothing is fetched.
  """
  first = jnp.arange(table.shape[1], dtype=jnp.int32)[None] * setting.block
  keys = visits.Bounds(first, first + setting.block - 1)
  query = visits.Bounds(at[:, None], at[:, None])
  seen = visits.meets(setting.mask, query, keys, jnp) & (table >= 0)
  columns, count = visits.lists(seen, jnp)
  columns = padded(columns, setting.pages, 1)
  places = jnp.arange(columns.shape[1], dtype=jnp.int32)[None]
  places = jnp.minimum(places, jnp.maximum(count - 1, 0)[:, None])
  return jnp.take_along_axis(columns, places, axis=1), count


def _run(setting: Setting, lists, q, k, v, numbers: dict, interpret: bool):
  """Output `[batch, heads, value_dim]`; see `paged_gpu.run`."""
  heads, q = q.shape[1], padded(q, 8, 1)
  numbers = {name: padded(x[:, None], 8, 0) for name, x in numbers.items()}
  (b, rows, h), d, n = q.shape, v.shape[3], setting.pages
  steps = pl.cdiv(jnp.max(lists[2]), n)

  def page(i: int):
    def index(row, step, columns, blocks, count, at):
      return blocks[row, step * n + i], 0, 0, 0

    return index

  def mine(row, step, *_):
    return row, 0, 0

  fetched = [
    pl.BlockSpec((1, *x.shape[1:]), page(i)) for x in (k, v) for i in range(n)
  ]
  whole = [pl.BlockSpec((rows, 1), lambda *_: (0, 0)) for _ in numbers]
  return pl.pallas_call(
    functools.partial(_kernel, setting, tuple(numbers)),
    name="paged_attention",
    out_shape=jax.ShapeDtypeStruct((b, rows, d), v.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(b, jnp.maximum(steps, 1)),
      in_specs=[pl.BlockSpec((1, rows, h), mine), *fetched, *whole],
      out_specs=pl.BlockSpec((1, rows, d), mine),
      scratch_shapes=[
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, d), jnp.float32),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    cost_estimate=pl.CostEstimate(  # if every row has all of its pages
      flops=2 * lists[1].size * rows * math.prod(k.shape[1:3]) * (h + d),
      transcendentals=0,
      bytes_accessed=lists[1].size * _page_bytes(k, v),
    ),
    interpret=interpret,
  )(*lists, q, *[k] * n, *[v] * n, *numbers.values())[:, :heads]


def _page_bytes(*pools: Array) -> int:
  return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in pools)


def _kernel(setting: Setting, names, columns, _, count, at, q, *refs):
  """One step: `pages` pages of one row, all heads."""
  n = setting.pages
  k, v, rest = refs[:n], refs[n : 2 * n], refs[2 * n :]
  numbers = dict(zip(names, rest, strict=False))
  out, top, total, acc = rest[len(names) :]
  row, step = pl.program_id(0), pl.program_id(1)

  @pl.when(step == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)
    if "sinks" in numbers:
      top[...] = jnp.broadcast_to(numbers["sinks"][...], top.shape)
      total[...] = jnp.ones_like(total)
    else:
      top[...] = jnp.full_like(top, LEAST)
      total[...] = jnp.zeros_like(total)

  @pl.when(step * n < count[row])
  def _():
    scores = []
    for i in range(n):
      place = step * n + i
      live = place < count[row]
      s = _scores(setting, numbers, q[0], k[i][0], columns[row, place], at[row])
      scores.append(jnp.where(live, s, LOW))
    weights, shrink = grow(jnp.concatenate(scores, axis=1), top, total)
    acc[...] *= spread(shrink, acc.shape[1])
    width = scores[0].shape[1]
    for i in range(n):
      values = v[i][0].reshape(-1, acc.shape[1])
      part = weights[:, i * width : (i + 1) * width]
      acc[...] += product(part.astype(values.dtype), values)

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    sums = jnp.where(total[...] == 0.0, 1.0, total[...])
    out[0] = (acc[...] / spread(sums, acc.shape[1])).astype(out.dtype)


def _scores(setting: Setting, numbers: dict, q, k, column, at) -> Array:
  """Scores of a page times log2(e), `[rows, block x kv_heads]`.

  What another key head says of a row is not seen.
  """
  groups, block = setting.groups, setting.block
  s = product(q, k.reshape(block * groups, -1), (1, 1))
  s, _ = bent(setting, s)
  number = jax.lax.broadcasted_iota(jnp.int32, (1, block * groups), 1)
  stood = column * block + jax.lax.div(number, groups)
  head = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], 1), 0)
  own = jax.lax.div(head, setting.heads // groups) == number % groups
  if "slopes" in numbers:
    s = s + numbers["slopes"][...] * (stood - at).astype(jnp.float32)
  return jnp.where(own & setting.mask.allows(at, stood), s, LOW)
