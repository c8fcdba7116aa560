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
  product,
  scores,
)

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
    lse: log of the sums, float32 `[batch, kv_heads, 1, P]`.
    delta: sums of do x out over a value, float32, in the shape of `lse`.
    do: gradient of the output, `[batch, kv_heads, value_dim, P]`.
    steps: by block of queries, and by block of keys.
    interpret: True runs it without a TPU, slowly.
  """
  h, d, c, keys = x.q.shape[2], x.v.shape[3], setting.columns, setting.keys
  more = {
    "v": (x.v, (1, 1, keys, d), "rows"),
    "do": (do, (1, 1, d, c), "columns"),
    "lse": (lse, (1, 1, 1, c), "columns"),
    "delta": (delta, (1, 1, 1, c), "columns"),
  }
  flat = {"kt": (jnp.swapaxes(x.k, 2, 3), (1, 1, h, keys), "keys")}

  def like(a: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)

  (dq,) = call(
    functools.partial(_query_kernel, setting),
    steps[0],
    "query",
    inputs(setting, x, "query") | more | flat,
    {"dq": (like(x.q), (1, 1, h, c))},
    {"sum": (h, c)},
    interpret,
  )
  dk, dv = call(
    functools.partial(_key_kernel, setting),
    steps[1],
    "key",
    inputs(setting, x, "key") | more,
    {"dk": (like(x.k), (1, 1, keys, h)), "dv": (like(x.v), (1, 1, keys, d))},
    {"dk_sum": (keys, h), "dv_sum": (keys, d)},
    interpret,
  )
  return dq, dk, dv


def _probabilities(setting: Setting, refs: dict, i, j):
  """P and dS of a pair of blocks, float32 [keys, columns].

  P = exp(S - lse), dP = V dO, dS = P (dP - delta), times the soft cap's slope.
  The scale is left to the end.
  """
  s, slope = scores(setting, refs, i, j)
  p = jnp.exp(s - refs["lse"][0, 0])
  dp = product(refs["v"][0, 0], refs["do"][0, 0], (1, 0))
  ds = p * (dp - refs["delta"][0, 0])
  return p, ds if slope is None else ds * slope


def _query_kernel(setting: Setting, word, refs: dict) -> None:
  total = refs["sum"]

  @pl.when(word & visits.FIRST != 0)
  def _():
    total[...] = jnp.zeros_like(total)

  @pl.when(word & visits.LIVE != 0)
  def _():
    i, j = visits.outer(word), visits.inner(word)
    kt = refs["kt"][0, 0]
    _, ds = _probabilities(setting, refs, i, j)
    total[...] += product(kt, ds.astype(kt.dtype), (1, 0))

  @pl.when(word & visits.LAST != 0)
  def _():
    refs["dq"][0, 0] = (total[...] * setting.scale).astype(refs["dq"].dtype)


def _key_kernel(setting: Setting, word, refs: dict) -> None:
  dk, dv = refs["dk_sum"], refs["dv_sum"]

  @pl.when(word & visits.FIRST != 0)
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  @pl.when(word & visits.LIVE != 0)
  def _():
    i, j = visits.inner(word), visits.outer(word)
    q, do = refs["q"][0, 0], refs["do"][0, 0]
    p, ds = _probabilities(setting, refs, i, j)
    dv[...] += product(p.astype(do.dtype), do, (1, 1))
    dk[...] += product(ds.astype(q.dtype), q, (1, 1))

  @pl.when(word & visits.LAST != 0)
  def _():
    refs["dk"][0, 0] = (dk[...] * setting.scale).astype(refs["dk"].dtype)
    refs["dv"][0, 0] = dv[...].astype(refs["dv"].dtype)
