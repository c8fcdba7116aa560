"""Flash attention, backward (arXiv:2205.14135, appendix B.2; 2307.08691).

Two walks: over the keys of each block of queries for dq, and over the queries
of each block of keys for dk and dv. Both make the probabilities again from the
scores and the saved logarithm of their sums.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxlm.layers.kernels import visits
from jaxlm.layers.kernels.flash_forward import (
  Operands,
  Setting,
  Steps,
  call,
  inputs,
  scores,
)
from jaxlm.layers.kernels.tpu import column, product

Array = jax.Array


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
    interpret: True runs it without a TPU, slowly.
  """
  h, d, rows, keys = x.q.shape[3], x.v.shape[3], setting.rows, setting.keys
  more = {
    "do": (do, (1, 1, rows, d), "rows"),
    "lse": (lse, (1, 1, 1, rows), "numbers"),
    "delta": (delta, (1, 1, 1, rows), "numbers"),
  }

  def like(a: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)

  (dq,) = call(
    "flash_backward_queries",
    functools.partial(_query_kernel, setting),
    steps[0],
    "query",
    inputs(setting, x, "query") | more,
    {"dq": (like(x.q), (1, 1, rows, h), "rows")},
    {"sum": (rows, h), "lse_down": (rows, 1), "delta_down": (rows, 1)},
    2 * rows * keys * (2 * h + d),
    interpret,
  )
  dk, dv = call(
    "flash_backward_keys",
    functools.partial(_key_kernel, setting),
    steps[1],
    "key",
    inputs(setting, x, "key") | more,
    {
      "dk": (like(x.k), (1, 1, keys, h), "keys"),
      "dv": (like(x.v), (1, 1, keys, d), "keys"),
    },
    {"dk_sum": (keys, h), "dv_sum": (keys, d)},
    2 * rows * keys * (2 * h + 2 * d),
    interpret,
  )
  return dq, dk, dv


def _query_kernel(setting: Setting, word, refs: dict) -> None:
  """One pair of blocks, [rows, keys]: dQ += dS K.

  P = 2^(S - lse), dP = dO V', dS = P (dP - delta), times the soft cap's slope.
  The scale is left to the end.
  """
  total, lse, delta = refs["sum"], refs["lse_down"], refs["delta_down"]

  @pl.when(word & visits.FIRST != 0)
  def _():
    total[...] = jnp.zeros_like(total)
    lse[...] = column(refs["lse"][0, 0])
    delta[...] = column(refs["delta"][0, 0])

  @pl.when(word & visits.LIVE != 0)
  def _():
    i, j = visits.outer(word), visits.inner(word)
    k, v, do = refs["k"][0, 0], refs["v"][0, 0], refs["do"][0, 0]
    s, slope = scores(setting, refs, i, j)
    p = jnp.exp2(s - lse[...])
    ds = p * (product(do, v, (1, 1)) - delta[...])
    ds = ds if slope is None else ds * slope
    total[...] += product(ds.astype(k.dtype), k)

  @pl.when(word & visits.LAST != 0)
  def _():
    refs["dq"][0, 0] = (total[...] * setting.scale).astype(refs["dq"].dtype)


def _key_kernel(setting: Setting, word, refs: dict) -> None:
  """One pair of blocks, [keys, rows]: dV += P dO, dK += dS Q."""
  dk, dv = refs["dk_sum"], refs["dv_sum"]

  @pl.when(word & visits.FIRST != 0)
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  @pl.when(word & visits.LIVE != 0)
  def _():
    i, j = visits.inner(word), visits.outer(word)
    q, v, do = refs["q"][0, 0], refs["v"][0, 0], refs["do"][0, 0]
    s, slope = scores(setting, refs, i, j, turned=True)
    p = jnp.exp2(s - refs["lse"][0, 0])
    dv[...] += product(p.astype(do.dtype), do)
    ds = p * (product(v, do, (1, 1)) - refs["delta"][0, 0])
    ds = ds if slope is None else ds * slope
    dk[...] += product(ds.astype(q.dtype), q)

  @pl.when(word & visits.LAST != 0)
  def _():
    refs["dk"][0, 0] = (dk[...] * setting.scale).astype(refs["dk"].dtype)
    refs["dv"][0, 0] = dv[...].astype(refs["dv"].dtype)
