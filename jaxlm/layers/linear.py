"""`dot`: the one matmul of the library; `lookup` of rows of a table."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from jaxlm.layers.compute import active_mesh
from jaxlm.layers.kernels.grouped import Grouped
from jaxlm.layers.kernels.row import Rowwise

Array = jax.Array


@functools.lru_cache(maxsize=256)
def _parse(spec: str) -> int:
  """How many axes 'btd,dnh->btnh' contracts; checks the layout."""
  operands, out = spec.split("->")
  x, w = operands.split(",")
  contracted = [c for c in x if c in w and c not in out]
  n = len(contracted)
  if n == 0 or x[-n:] != w[:n] or out != x[:-n] + w[n:]:
    raise ValueError(
      f"dot wants '(lead)(in),(in)(out)->(lead)(out)' and got {spec!r}"
    )
  return n


def dot(
  x: Array,
  w: Array | Grouped | Rowwise,
  spec: str,
  out_sharding: PartitionSpec | None = None,
  dtype: Any = None,
) -> Array:
  """Multiplies activations by a weight stored `(in..., out...)`.

  Operands in the dtype of `x`, sums in float32. On one device both operands
  are flattened to two dimensions first: a CPU's matmul reaches its peak only
  there, and so do the gradients, whose contraction over batch and time becomes
  one axis.

  Args:
    x: activations `[lead..., in...]`.
    w: weight `[in..., out...]`, in any float dtype: a float32 master weight
      gets a float32 gradient, whatever the dtype of `x`. Or a weight for each
      group of rows, where `x` is rows sorted by group (experts); or one that
      a CPU reads in its own way where `x` is a single row (`Rowwise`).
    spec: einsum notation, as in `'btd,dnh->btnh'`; it documents the shapes and
      is checked against the layout above.
    out_sharding: where the result lies; needed where a contracted axis is
      sharded (row-parallel projections), harmless elsewhere.
    dtype: of the result; None means that of `x`.

  Returns:
    `[lead..., out...]`.
  """
  n = _parse(spec)
  dtype = dtype or x.dtype
  if isinstance(w, Grouped):
    y = w(x.reshape(-1, x.shape[-1])).astype(dtype)
    return y.reshape(*x.shape[:-1], -1)
  if active_mesh() is not None:
    y = jnp.einsum(
      spec,
      x,
      w.astype(x.dtype),
      preferred_element_type=jnp.float32,
      out_sharding=out_sharding,
    )
    return y.astype(dtype)
  lead, inner, outer = x.shape[:-n], w.shape[:n], w.shape[n:]
  k = math.prod(inner)
  y = _flat(x.reshape(math.prod(lead), k), w)
  return y.astype(dtype).reshape(*lead, *outer)


def lookup(
  table: Array | Rowwise,
  index: Array,
  out_sharding: PartitionSpec | None = None,
) -> Array:
  """Rows of a table `[rows, dim]` by index `[...]`: `[..., dim]`.

  An index outside gets the nearest row.
  """
  if isinstance(table, Rowwise):
    return table.lookup(index)
  return table.at[index].get(mode="clip", out_sharding=out_sharding)


def _flat(x: Array, w: Array | Rowwise) -> Array:
  """`x` [rows, in] times `w` [in..., out...], float32 [rows, out]."""
  if isinstance(w, Rowwise):
    y = w.times(x)
    if y is not None:
      return y
    w = w.w
  return _matmul(x, w.reshape(x.shape[1], -1))


def _product(a: Array, b: Array, i: int, j: int) -> Array:
  """Contracts axis `i` of `a` with axis `j` of `b`; float32 result."""
  contract = (((i,), (j,)), ((), ()))
  return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _matmul(x: Array, w: Array) -> Array:
  """`x` [rows, in] times `w` [in, out] in the dtype of `x`, float32 result."""
  return _product(x, w.astype(x.dtype), 1, 0)


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple]:
  cast = w.astype(x.dtype)
  return _product(x, cast, 1, 0), (x, cast, jnp.zeros((), w.dtype))


def _matmul_backward(saved: tuple, dy: Array) -> tuple[Array, Array]:
  x, w, like = saved
  dy = dy.astype(x.dtype)
  dx = _product(dy, w, 1, 1).astype(x.dtype)
  dw = jax.lax.platform_dependent(
    x, dy, cpu=_weight_gradient_cpu, default=_weight_gradient
  )
  return dx, dw.astype(like.dtype)


def _weight_gradient(x: Array, dy: Array) -> Array:
  """The product x' dy, float32 [in, out]."""
  return _product(x, dy, 0, 0)


def _weight_gradient_cpu(x: Array, dy: Array) -> Array:
  """The same from a transpose that is really written to memory.

  XLA's CPU backend has a fast matmul only for a left operand contracted over
  its last axis; for the other layout bfloat16 runs at a third of the speed. The
  layout constraint makes it that case, and the barrier keeps a transpose of the
  result (a tied head's) from being folded back into the product.
  """
  xt = with_layout_constraint(x.T, Layout((0, 1)))
  return jax.lax.optimization_barrier(_product(xt, dy, 1, 0))


_matmul.defvjp(_matmul_forward, _matmul_backward)
