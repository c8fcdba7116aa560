"""Flash attention, forward (arXiv:2205.14135, algorithm 1; 2307.08691)."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.layers.kernels import visits
from jaxlm.layers.mask import Mask, PrefixLM

Array = jax.Array

# Scores of unseen keys, and the least maximum: exp(LOW - LEAST) is exactly 0,
# so a row that sees nothing sums to 0 and not to NaN.
LOW, LEAST = -1e30, -5e29


@dataclass(frozen=True)
class Setting:
  """All that is fixed when the kernel is compiled.

  Attributes:
    mask: who sees whom.
    queries: of a block, a power of two.
    columns: of a block: queries times heads of a group, rounded up.
    keys: of a block.
    length: how many keys there are, the rest being padding.
    scale: of the products.
    softcap: of the scores, or None.
    fields: what comes with the data: 'positions', 'segments', 'blocks'.
    sinks, slopes: whether there are any.
  """

  mask: Mask
  queries: int
  columns: int
  keys: int
  length: int
  scale: float
  softcap: float | None
  fields: tuple[str, ...]
  sinks: bool
  slopes: bool


class Operands(NamedTuple):
  """What the kernels read; P is queries in blocks of columns, S keys.

  Attributes:
    q: `[batch, kv_heads, head_dim, P]`, a column per head of a group and
      query.
    k: `[batch, kv_heads, S, head_dim]`.
    v: `[batch, kv_heads, S, value_dim]`.
    at: int32 `[batch, fields, P]`, or None.
    keys: int32 `[batch, fields, S]`, or None.
    sinks: float32 `[kv_heads, 1, columns]`, or None.
    slopes: float32 `[kv_heads, 1, columns]`, or None.
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


def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
  """A matrix product with float32 sums."""
  axes = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def scores(setting: Setting, refs: dict, i, j) -> tuple[Array, Array | None]:
  """Scores of query block `i` and key block `j`: float32 [keys, columns].

  Keys lie along sublanes and queries along lanes, so that what belongs to a
  query (maximum, sum, position) is a row, and sums over keys add registers.

  Returns:
    The scores, and the soft cap's slope 1 - tanh(.)^2 or None.
  """
  s, slope = product(refs["k"][0, 0], refs["q"][0, 0], (1, 0)), None
  if setting.scale != 1.0:
    s = s * setting.scale
  if setting.softcap is not None:
    bent = jnp.tanh(s * (1.0 / setting.softcap))
    s, slope = bent * setting.softcap, 1.0 - bent * bent
  where, stood, see = _sight(setting, refs, i, j)
  if setting.slopes:
    s = s + refs["slopes"][0] * (stood - where).astype(jnp.float32)
  return jnp.where(see, s, LOW), slope


def _sight(setting: Setting, refs: dict, i, j):
  """Positions of queries [1, columns] and keys [keys, 1]; who sees whom."""
  columns = jax.lax.broadcasted_iota(jnp.int32, (1, setting.columns), 1)
  where = i * setting.queries + (columns & (setting.queries - 1))
  rows = jax.lax.broadcasted_iota(jnp.int32, (setting.keys, 1), 0)
  stood = index = j * setting.keys + rows
  data = {}
  if setting.fields:
    across, down = refs["at"][0], refs["keys"][0].T
    for n, name in enumerate(setting.fields):
      data[name] = across[n : n + 1], down[:, n : n + 1]
  where, stood = data.get("positions", (where, stood))
  see = setting.mask.allows(where, stood)
  if "blocks" in data and isinstance(setting.mask, PrefixLM):
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
  """The output `[batch, kv_heads, value_dim, P]`, and the log of the sums.

  The latter is float32 `[batch, kv_heads, 1, P]`: what the backward pass needs
  to make any block of probabilities again.
  """
  b, groups, _h, p = x.q.shape
  d, c = x.v.shape[-1], setting.columns
  named = inputs(setting, x, "query")
  named["v"] = jnp.swapaxes(x.v, 2, 3), (1, 1, d, setting.keys), "keys"
  out = jax.ShapeDtypeStruct((b, groups, d, p), x.v.dtype)
  lse = jax.ShapeDtypeStruct((b, groups, 1, p), jnp.float32)
  return call(
    functools.partial(_forward_kernel, setting),
    steps,
    "query",
    named,
    {"out": (out, (1, 1, d, c)), "lse": (lse, (1, 1, 1, c))},
    {"top": (1, c), "total": (1, c), "acc": (d, c)},
    interpret,
  )


def _forward_kernel(setting: Setting, word, refs: dict) -> None:
  i, j = visits.outer(word), visits.inner(word)
  top, total, acc = refs["top"], refs["total"], refs["acc"]

  @pl.when(word & visits.FIRST != 0)
  def _():
    acc[...] = jnp.zeros_like(acc)
    if setting.sinks:  # as if a key with this score and no value was seen
      top[...] = refs["sinks"][0]
      total[...] = jnp.ones_like(total)
    else:
      top[...] = jnp.full_like(top, LEAST)
      total[...] = jnp.zeros_like(total)

  @pl.when(word & visits.LIVE != 0)
  def _():
    s, _ = scores(setting, refs, i, j)
    new = jnp.maximum(top[...], jnp.max(s, axis=0, keepdims=True))
    weights, shrink = jnp.exp(s - new), jnp.exp(top[...] - new)
    total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
    v = refs["v"][0, 0]
    acc[...] = acc[...] * shrink + product(v, weights.astype(v.dtype), (1, 0))
    top[...] = new

  @pl.when(word & visits.LAST != 0)
  def _():
    sums = total[...]
    sums = jnp.where(sums == 0.0, 1.0, sums)
    refs["out"][0, 0] = (acc[...] / sums).astype(refs["out"].dtype)
    refs["lse"][0, 0] = top[...] + jnp.log(sums)


# --- The call that all kernels share ----------------------------------------


def inputs(setting: Setting, x: Operands, outer: str) -> dict[str, tuple]:
  """The operands every kernel reads: name -> (array, block, along what)."""
  h, c = x.q.shape[2], setting.columns
  at, keys = (0 if a is None else a.shape[1] for a in (x.at, x.keys))
  named = {
    "q": (x.q, (1, 1, h, c), "columns"),
    "k": (x.k, (1, 1, setting.keys, h), "rows"),
    "at": (x.at, (1, at, c), "at"),
    "keys": (x.keys, (1, keys, setting.keys), "at keys"),
    "sinks": (x.sinks if outer == "query" else None, (1, 1, c), "heads"),
    "slopes": (x.slopes, (1, 1, c), "heads"),
  }
  return {name: entry for name, entry in named.items() if entry[0] is not None}


def _index(along: str, outer: str, batched: bool):
  """Which block of an operand a grid step (batch, head, step) reads."""

  def index(b, h, s, words):
    word = words[b if batched else 0, s]
    a, z = visits.outer(word), visits.inner(word)
    i, j = (a, z) if outer == "query" else (z, a)
    return {
      "columns": (b, h, 0, i),
      "rows": (b, h, j, 0),
      "keys": (b, h, 0, j),
      "at": (b, 0, i),
      "at keys": (b, 0, j),
      "heads": (h, 0, 0),
    }[along]

  return index


def call(body, steps: Steps, outer: str, named, outs, scratch, interpret):
  """Runs `body(word, refs)` for every batch row, kv head and step.

  Args:
    body: the kernel; `refs` are the references by name.
    steps: which blocks meet.
    outer: 'query' or 'key': whose sums are kept.
    named: inputs, name -> (array, block shape, along what).
    outs: outputs, name -> (shape and dtype, block shape).
    scratch: float32 sums, name -> shape.
    interpret: True runs it without a TPU, slowly.

  Returns:
    The outputs in order.
  """
  batched = steps.words.shape[0] > 1
  count = steps.words.shape[1] if steps.count is None else steps.count
  along = "columns" if outer == "query" else "rows"
  names = [*named, *outs, *scratch]

  def kernel(words, *refs):
    word = words[pl.program_id(0) if batched else 0, pl.program_id(2)]
    body(word, dict(zip(names, refs, strict=True)))

  first = next(iter(named.values()))[0]
  return pl.pallas_call(
    kernel,
    out_shape=[shape for shape, _ in outs.values()],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(first.shape[0], first.shape[1], count),
      in_specs=[
        pl.BlockSpec(block, _index(where, outer, batched))
        for _, block, where in named.values()
      ],
      out_specs=[
        pl.BlockSpec(block, _index(along, outer, batched))
        for _, block in outs.values()
      ],
      scratch_shapes=[
        pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=interpret,
  )(steps.words, *(array for array, _, _ in named.values()))
