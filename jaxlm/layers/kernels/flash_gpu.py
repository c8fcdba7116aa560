"""Flash attention on GPUs, forward and backward. Twin: `attend_reference`.

The same operands, sums and gradients as on a TPU, in another order of work.
There a grid walks over the pairs of blocks one after the other; here every
block of queries (or of keys, for their gradients) is a program of its own, and
all run at once. A program loops over the list of blocks it has to visit, which
`visits.lists` made, and keeps its sums in registers.

Compiled by Triton, through Pallas: it takes any mask that can be computed on
integers, float32 as well as bfloat16, and every GPU since Ampere. JAX announces
to follow Mosaic GPU alone from 0.11 on; that one multiplies no float32 and
wants layouts per generation, so it would be other kernels behind `forward` and
`backward`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlm.layers.kernels.flash_forward import (
  Operands,
  Setting,
  Steps,
  bent,
  sight,
)
from jaxlm.layers.kernels.tpu import LEAST, LOW, product

Array = jax.Array


class Rows(NamedTuple):
  """An array `[rows, width]` that is read and written in blocks of rows.

  Attributes:
    ref: its reference, as wide as the next power of two, which is what Triton
      counts in.
    width: how much of that there is.
  """

  ref: Any
  width: int

  def load(self, block: Array, size: int) -> Array:
    """Block `[size, power of two]`, filled up with zeros."""
    rows = self.ref.at[_slice(block, size), :]
    if self.ref.shape[1] == self.width:
      return rows[...]
    return triton.load(rows, mask=self._real(size), other=0.0)

  def store(self, block: Array, x: Array) -> None:
    """Writes what is no filling."""
    rows, x = self.ref.at[_slice(block, len(x)), :], x.astype(self.ref.dtype)
    if self.ref.shape[1] == self.width:
      rows[...] = x
    else:
      triton.store(rows, x, mask=self._real(len(x)))

  def _real(self, size: int) -> Array:
    shape = (size, self.ref.shape[1])
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) < self.width


class Side(NamedTuple):
  """A block of queries or of keys.

  Attributes:
    x: its numbers `[n, head_dim up to a power of two]`.
    index: which they are, int32 `[n]`.
    data: what came with them, name -> int32 `[n]`.
  """

  x: Array
  index: Array
  data: dict[str, Array]


def forward(
  setting: Setting, x: Operands, steps: Steps, interpret: bool
) -> tuple[Array, Array]:
  """The output `[batch, kv_heads, P, value_dim]`, and log2 of the sums.

  The latter is float32 `[batch, kv_heads, 1, P]`.
  """
  b, groups, p, _ = x.q.shape
  outs = {
    "out": jax.ShapeDtypeStruct((b, groups, p, x.v.shape[3]), x.v.dtype),
    "lse": jax.ShapeDtypeStruct((b, groups, 1, p), jnp.float32),
  }
  named = _inputs(x) | ({"sinks": x.sinks} if setting.sinks else {})
  body = functools.partial(_forward_kernel, setting)
  return _call("flash_forward", body, steps, named, outs, interpret)


def backward(
  setting: Setting,
  x: Operands,
  lse: Array,
  delta: Array,
  do: Array,
  steps: tuple[Steps, Steps],
  interpret: bool,
) -> tuple[Array, Array, Array]:
  """Gradients of q, k and v, in the layouts of `Operands`.

  Args:
    setting: what is fixed.
    x: the operands of the forward pass.
    lse: log2 of the sums, float32 `[batch, kv_heads, 1, P]`.
    delta: sums of do x out over a value, float32, in the shape of `lse`.
    do: gradient of the output, `[batch, kv_heads, P, value_dim]`.
    steps: by block of queries, and by block of keys.
    interpret: True runs it without a GPU, slowly.
  """
  named = _inputs(x) | {"do": do, "lse": lse, "delta": delta}
  like = {
    "d" + name: jax.ShapeDtypeStruct(named[name].shape, named[name].dtype)
    for name in "qkv"
  }
  queries = functools.partial(_query_kernel, setting)
  keys = functools.partial(_key_kernel, setting)
  of_q, of_kv = {"dq": like.pop("dq")}, like
  name = "flash_backward"
  (dq,) = _call(f"{name}_queries", queries, steps[0], named, of_q, interpret)
  dk, dv = _call(f"{name}_keys", keys, steps[1], named, of_kv, interpret)
  return dq, dk, dv


# --- Kernels ----------------------------------------------------------------


def _forward_kernel(setting: Setting, i, visited, refs: dict):
  q = _queries(setting, refs, i)
  rows = setting.rows
  if setting.sinks:  # as if a key with this score and no value was seen
    top = refs["sinks"][0, :]
    total = jnp.ones((rows,), jnp.float32)
  else:
    top = jnp.full((rows,), LEAST, jnp.float32)
    total = jnp.zeros((rows,), jnp.float32)

  def step(j: Array, sums: tuple) -> tuple:
    top, total, acc = sums
    s, _ = _scores(setting, refs, q, _keys(setting, refs, j), False)
    new = jnp.maximum(top, jnp.max(s, axis=1))
    weights, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(top - new)
    v = refs["v"].load(j, setting.keys)
    acc = acc * shrink[:, None] + product(weights.astype(v.dtype), v)
    return new, total * shrink + jnp.sum(weights, axis=1), acc

  acc = jnp.zeros((rows, refs["v"].ref.shape[1]), jnp.float32)
  top, total, acc = visited(step, (top, total, acc))
  total = jnp.where(total == 0.0, 1.0, total)
  refs["out"].store(i, acc / total[:, None])
  refs["lse"][0, _slice(i, rows)] = top + jnp.log2(total)


def _query_kernel(setting: Setting, i, visited, refs: dict):
  """Sums dQ = dS K over keys; P = 2^(S - lse), dS = P (dO V' - delta)."""
  q = _queries(setting, refs, i)
  do = refs["do"].load(i, setting.rows)
  lse, delta = (
    refs[name][0, _slice(i, setting.rows)][:, None] for name in ("lse", "delta")
  )

  def step(j: Array, dq: Array) -> Array:
    k = _keys(setting, refs, j)
    s, slope = _scores(setting, refs, q, k, False)
    v = refs["v"].load(j, setting.keys)
    ds = jnp.exp2(s - lse) * (product(do, v, (1, 1)) - delta)
    ds = ds if slope is None else ds * slope
    return dq + product(ds.astype(k.x.dtype), k.x)

  dq = visited(step, jnp.zeros(q.x.shape, jnp.float32))
  refs["dq"].store(i, dq * setting.scale)


def _key_kernel(setting: Setting, j, visited, refs: dict):
  """Sums dV = P' dO and dK = dS' Q over queries."""
  k = _keys(setting, refs, j)
  v = refs["v"].load(j, setting.keys)

  def step(i: Array, sums: tuple) -> tuple:
    dk, dv = sums
    q = _queries(setting, refs, i)
    do = refs["do"].load(i, setting.rows)
    lse, delta = (
      refs[name][0, _slice(i, setting.rows)][None] for name in ("lse", "delta")
    )
    s, slope = _scores(setting, refs, q, k, True)
    p = jnp.exp2(s - lse)
    dv = dv + product(p.astype(do.dtype), do)
    ds = p * (product(v, do, (1, 1)) - delta)
    ds = ds if slope is None else ds * slope
    return dk + product(ds.astype(q.x.dtype), q.x), dv

  sums = (jnp.zeros(a.shape, jnp.float32) for a in (k.x, v))
  dk, dv = visited(step, tuple(sums))
  refs["dk"].store(j, dk * setting.scale)
  refs["dv"].store(j, dv)


def _scores(setting: Setting, refs: dict, q: Side, k: Side, turned: bool):
  """As `flash_forward.scores`: `[rows, keys]`, or `[keys, rows]` if turned."""

  def along(of_q: Array, of_k: Array) -> tuple[Array, Array]:
    if turned:
      return of_q[None], of_k[:, None]
    return of_q[:, None], of_k[None]

  s = product(k.x, q.x, (1, 1)) if turned else product(q.x, k.x, (1, 1))
  s, slope = bent(setting, s)
  data = {name: along(q.data[name], k.data[name]) for name in q.data}
  where, stood, see = sight(setting, *along(q.index, k.index), data)
  if setting.slopes:
    per_row, _ = along(refs["slopes"][0, :], k.index)
    s = s + per_row * (stood - where).astype(jnp.float32)
  return jnp.where(see, s, LOW), slope


# --- Memory -----------------------------------------------------------------


def _slice(block: Array, size: int) -> pl.Slice:
  return pl.ds(block * size, size)


def _queries(setting: Setting, refs: dict, i: Array) -> Side:
  """Block `i` of the queries: row r is query r mod the queries of a block."""
  x = refs["q"].load(i, setting.rows)
  row = jax.lax.broadcasted_iota(jnp.int32, (setting.rows,), 0)
  index = i * setting.queries + (row & (setting.queries - 1))
  return Side(x, index, _data(setting, refs, "at", i, setting.rows))


def _keys(setting: Setting, refs: dict, j: Array) -> Side:
  """Block `j` of the keys."""
  x = refs["k"].load(j, setting.keys)
  index = jax.lax.broadcasted_iota(jnp.int32, (setting.keys,), 0)
  index = j * setting.keys + index
  return Side(x, index, _data(setting, refs, "keys", j, setting.keys))


def _data(setting: Setting, refs: dict, name: str, block: Array, size: int):
  """What came with the data of a block, name -> int32 `[size]`."""
  return {
    field: refs[name][n, _slice(block, size)]
    for n, field in enumerate(setting.fields)
  }


# --- The call that all kernels share ----------------------------------------


def _inputs(x: Operands) -> dict[str, Array]:
  """What every kernel reads, by name."""
  named = {name: getattr(x, name) for name in ("q", "k", "v", "at", "keys")}
  named["slopes"] = x.slopes
  return {name: array for name, array in named.items() if array is not None}


def _spec(name: str, x: Array) -> pl.BlockSpec:
  """What of an array a program (block, kv head, row of the batch) may read."""
  if name in ("sinks", "slopes"):
    return pl.BlockSpec((None, *x.shape[1:]), lambda i, h, b: (h, 0, 0))
  if name in ("at", "keys"):
    return pl.BlockSpec((None, *x.shape[1:]), lambda i, h, b: (b, 0, 0))
  width = x.shape[3] if _is_number(name) else pl.next_power_of_2(x.shape[3])
  shape = (None, None, x.shape[2], width)
  return pl.BlockSpec(shape, lambda i, h, b: (b, h, 0, 0))


def _is_number(name: str) -> bool:
  """True for what is one number a row."""
  return name in ("lse", "delta")


def _warps(named: dict[str, Array]) -> int:
  """Groups of 32 threads: wide heads need the registers of twice as many."""
  sizes = (named[x].shape[3] * named[x].dtype.itemsize for x in ("q", "v"))
  return 8 if max(sizes) > 256 else 4


def _call(name, body, steps: Steps, named, outs, interpret: bool):
  """Runs `body(block, visited, refs)` for every block, kv head and batch row.

  Args:
    name: of the kernel, for profiles.
    body: what it does. `visited(step, init)` loops over the blocks to visit,
      `step(block, sums) -> sums`; `refs` are the references by name.
    steps: the lists of blocks.
    named: inputs by name.
    outs: shapes and dtypes of the outputs by name.
    interpret: True runs it without a GPU, slowly.

  Returns:
    The outputs in order.
  """
  batched = steps.words.shape[0] > 1
  arrays = named | outs

  def kernel(words, count, *refs):
    block = pl.program_id(0)

    def visited(step, init):
      def one(n, sums):
        return step(words[n], sums)

      return jax.lax.fori_loop(0, count[block], one, init)

    refs = dict(zip(arrays, refs, strict=True))
    for key, x in arrays.items():
      if x.ndim == 4 and not _is_number(key):
        refs[key] = Rows(refs[key], x.shape[3])
    body(block, visited, refs)

  def row(i, h, b):
    return b if batched else 0

  _, blocks, longest = steps.words.shape
  lists = [
    pl.BlockSpec((None, None, longest), lambda i, h, b: (row(i, h, b), i, 0)),
    pl.BlockSpec((None, blocks), lambda i, h, b: (row(i, h, b), 0)),
  ]
  b, groups = named["q"].shape[:2]
  return pl.pallas_call(
    kernel,
    name=name,
    grid=(blocks, groups, b),
    in_specs=[*lists, *(_spec(key, x) for key, x in named.items())],
    out_specs=[_spec(key, x) for key, x in outs.items()],
    out_shape=list(outs.values()),
    compiler_params=triton.CompilerParams(
      num_warps=_warps(named), num_stages=2
    ),
    interpret=interpret,
  )(steps.words, steps.count, *named.values())
