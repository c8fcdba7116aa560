"""Flash attention, forward (arXiv:2205.14135, algorithm 1; 2307.08691)."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.layers.kernels import visits
from jaxlm.layers.kernels.tpu import (
  LANES,
  LEAST,
  LOG2E,
  LOW,
  column,
  grow,
  product,
  spread,
)
from jaxlm.layers.mask import Mask

Array = jax.Array


@dataclass(frozen=True)
class Setting:
  """All that is fixed when the kernel is compiled.

  Attributes:
    mask: who sees whom.
    queries: of a block, a power of two.
    rows: of a block: queries times heads of a group, rounded up.
    keys: of a block.
    length: how many keys there are, the rest being padding.
    scale: of the products.
    softcap: of the scores, or None.
    fields: what comes with the data: 'positions', 'segments', 'blocks'.
    sinks, slopes: whether there are any.
  """

  mask: Mask
  queries: int
  rows: int
  keys: int
  length: int
  scale: float
  softcap: float | None
  fields: tuple[str, ...]
  sinks: bool
  slopes: bool


class Operands(NamedTuple):
  """What the kernels read; P is queries in blocks of rows, S is keys.

  Attributes:
    q: `[batch, kv_heads, P, head_dim]`, a row per head of a group and query.
    k: `[batch, kv_heads, S, head_dim]`.
    v: `[batch, kv_heads, S, value_dim]`.
    at: int32 `[batch, fields, P]`, or None.
    keys: int32 `[batch, fields, S]`, or None.
    sinks: times log2(e), float32 `[kv_heads, 1, rows]`, or None.
    slopes: likewise.
  """

  q: Array
  k: Array
  v: Array
  at: Array | None
  keys: Array | None
  sinks: Array | None
  slopes: Array | None


class Steps(NamedTuple):
  """The steps of a walk over blocks.

  Attributes:
    words: int32 `[batch or 1, steps]`, see `visits`.
    count: how many of them are taken, known on the device; None means all.
  """

  words: Array
  count: Array | None = None


def scores(
  setting: Setting, refs: dict, i, j, turned: bool = False
) -> tuple[Array, Array | None]:
  """Scores of query block `i` and key block `j`, times log2(e).

  Returns:
    Float32 `[rows, keys]`, or `[keys, rows]` if turned, and the soft cap's
    slope 1 - tanh(.)^2 in the same shape, or None.
  """
  q, k = refs["q"][0, 0], refs["k"][0, 0]
  s = product(k, q, (1, 1)) if turned else product(q, k, (1, 1))
  s, slope = bent(setting, s)
  where, stood, see = _sight(setting, refs, i, j, turned)
  if setting.slopes:
    per_row = refs["slopes"][0]
    per_row = per_row if turned else column(per_row)
    s = s + per_row * (stood - where).astype(jnp.float32)
  return jnp.where(see, s, LOW), slope


def bent(setting: Setting, s: Array) -> tuple[Array, Array | None]:
  """Products as scores times log2(e), soft-capped, and the cap's slope."""
  if setting.softcap is None:
    return s * (setting.scale * LOG2E), None
  tanh = jnp.tanh(s * (setting.scale / setting.softcap))
  return tanh * (setting.softcap * LOG2E), 1.0 - tanh * tanh


def _sight(setting: Setting, refs: dict, i, j, turned: bool):
  """Positions of queries and keys, to be broadcast, and who sees whom."""

  def count(n: int, axis: int) -> Array:
    shape = (n, 1) if axis == 0 else (1, n)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

  rows = count(setting.rows, int(turned))
  where = i * setting.queries + (rows & (setting.queries - 1))
  index = j * setting.keys + count(setting.keys, int(not turned))
  data = {}
  if setting.fields:
    at, keys = refs["at"][0], refs["keys"][0]
    at, keys = (at, keys.T) if turned else (at.T, keys)
    for n, name in enumerate(setting.fields):
      one = slice(n, n + 1)
      data[name] = (
        (at[one], keys[:, one]) if turned else (at[:, one], keys[one])
      )
  return sight(setting, where, index, data)


def sight(
  setting: Setting, where: Array, index: Array, data: dict
) -> tuple[Array, Array, Array]:
  """Who sees whom in a pair of blocks.

  Args:
    setting: what is fixed.
    where: numbers of the queries, in a shape that broadcasts with `index`.
    index: numbers of the keys.
    data: what came with the data, name -> (of the queries, of the keys).

  Returns:
    Positions of the queries and of the keys, and bool: what is seen.
  """
  where, stood = data.get("positions", (where, index))
  see = setting.mask.allows(where, stood)
  if "blocks" in data:
    a, b = data["blocks"]
    see = see | ((a == b) & (a >= 0))
  if "segments" in data:
    a, b = data["segments"]
    see = see & (a == b)
  if "positions" in data:
    see = see & (stood >= 0)
  elif setting.length % setting.keys:
    see = see & (index < setting.length)
  return where, stood, see


def forward(
  setting: Setting, x: Operands, steps: Steps, interpret: bool
) -> tuple[Array, Array]:
  """The output `[batch, kv_heads, P, value_dim]`, and log2 of the sums.

  The latter is float32 `[batch, kv_heads, 1, P]`: what the backward pass needs
  to make any block of probabilities again.
  """
  b, groups, p, _ = x.q.shape
  d, rows = x.v.shape[-1], setting.rows
  out = jax.ShapeDtypeStruct((b, groups, p, d), x.v.dtype)
  lse = jax.ShapeDtypeStruct((b, groups, 1, p), jnp.float32)
  return call(
    "flash_forward",
    functools.partial(_forward_kernel, setting),
    steps,
    "query",
    inputs(setting, x, "query"),
    {
      "out": (out, (1, 1, rows, d), "rows"),
      "lse": (lse, (1, 1, 1, rows), "numbers"),
    },
    {"top": (rows, LANES), "total": (rows, LANES), "acc": (rows, d)},
    2 * rows * setting.keys * (x.q.shape[3] + d),
    interpret,
  )


def _forward_kernel(setting: Setting, word, refs: dict) -> None:
  i, j = visits.outer(word), visits.inner(word)
  top, total, acc = refs["top"], refs["total"], refs["acc"]

  @pl.when(word & visits.FIRST != 0)
  def _():
    acc[...] = jnp.zeros_like(acc)
    if setting.sinks:  # as if a key with this score and no value was seen
      top[...] = jnp.broadcast_to(column(refs["sinks"][0]), top.shape)
      total[...] = jnp.ones_like(total)
    else:
      top[...] = jnp.full_like(top, LEAST)
      total[...] = jnp.zeros_like(total)

  @pl.when(word & visits.LIVE != 0)
  def _():
    s, _ = scores(setting, refs, i, j)
    v = refs["v"][0, 0]
    weights, shrink = grow(s, top, total)
    part = product(weights.astype(v.dtype), v)
    acc[...] = acc[...] * spread(shrink, v.shape[1]) + part

  @pl.when(word & visits.LAST != 0)
  def _():
    sums = total[...]
    sums = jnp.where(sums == 0.0, 1.0, sums)
    out = acc[...] / spread(sums, acc.shape[1])
    refs["out"][0, 0] = out.astype(refs["out"].dtype)
    refs["lse"][0, 0] = (top[...] + jnp.log2(sums)).T[:1]


# --- The call that all kernels share ----------------------------------------


def inputs(setting: Setting, x: Operands, outer: str) -> dict[str, tuple]:
  """The operands every kernel reads: name -> (array, block, along what)."""
  h, d, rows = x.q.shape[3], x.v.shape[3], setting.rows
  named = {
    "q": (x.q, (1, 1, rows, h), "rows"),
    "k": (x.k, (1, 1, setting.keys, h), "keys"),
    "v": (x.v, (1, 1, setting.keys, d), "keys"),
    "at": (x.at, (1, 8, rows), "fields"),
    "keys": (x.keys, (1, 8, setting.keys), "key fields"),
    "sinks": (x.sinks if outer == "query" else None, (1, 1, rows), "heads"),
    "slopes": (x.slopes, (1, 1, rows), "heads"),
  }
  return {name: entry for name, entry in named.items() if entry[0] is not None}


def _index(along: str, outer: str, batched: bool):
  """Which block of an operand a grid step (batch, head, step) reads."""

  def index(b, h, s, words):
    word = words[b if batched else 0, s]
    i, j = visits.outer(word), visits.inner(word)
    i, j = (i, j) if outer == "query" else (j, i)
    return {
      "rows": (b, h, i, 0),
      "keys": (b, h, j, 0),
      "numbers": (b, h, 0, i),
      "fields": (b, 0, i),
      "key fields": (b, 0, j),
      "heads": (h, 0, 0),
    }[along]

  return index


def call(
  name, body, steps: Steps, outer: str, named, outs, scratch, work, interpret
):
  """Runs `body(word, refs)` for every batch row, kv head and step.

  Args:
    name: of the kernel, for profiles.
    body: what it does; `refs` are the references by name.
    steps: which blocks meet.
    outer: 'query' or 'key': whose sums are kept.
    named: inputs, name -> (array, block shape, along what).
    outs: outputs, name -> (shape and dtype, block shape, along what).
    scratch: float32 sums, name -> shape.
    work: operations of a step.
    interpret: True runs it without a TPU, slowly.

  Returns:
    The outputs in order.
  """
  batched = steps.words.shape[0] > 1
  count = steps.words.shape[1] if steps.count is None else steps.count
  names = [*named, *outs, *scratch]

  def kernel(words, *refs):
    word = words[pl.program_id(0) if batched else 0, pl.program_id(2)]
    body(word, dict(zip(names, refs, strict=True)))

  first = next(iter(named.values()))[0]
  times = first.shape[0] * first.shape[1] * steps.words.shape[1]
  return pl.pallas_call(
    kernel,
    out_shape=[shape for shape, _, _ in outs.values()],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(first.shape[0], first.shape[1], count),
      in_specs=[
        pl.BlockSpec(block, _index(where, outer, batched))
        for _, block, where in named.values()
      ],
      out_specs=[
        pl.BlockSpec(block, _index(where, outer, batched))
        for _, block, where in outs.values()
      ],
      scratch_shapes=[
        pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    cost_estimate=pl.CostEstimate(
      flops=times * work,
      transcendentals=0,
      bytes_accessed=_bytes(outer, times, named, outs),
    ),
    interpret=interpret,
    name=name,
  )(steps.words, *(array for array, _, _ in named.values()))


def _bytes(outer: str, times: int, named: dict, outs: dict) -> int:
  """What moves: blocks that are met once a step, all others once."""
  met = {"query": ("keys", "key fields"), "key": ("rows", "numbers", "fields")}
  total = 0
  for x, block, where in named.values():
    often = where in met[outer]
    n = times * math.prod(block) if often else math.prod(x.shape)
    total += n * x.dtype.itemsize
  written = (x for x, _, _ in outs.values())
  return total + sum(math.prod(x.shape) * x.dtype.itemsize for x in written)
