"""`dot`: the one matmul of the library."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.layers.compute import active_mesh

Array = jax.Array


@functools.lru_cache(maxsize=256)
def _parse(spec: str) -> tuple[str, str, str, int]:
  """'btd,dnh->btnh' as operands, result and number of contracted axes."""
  operands, out = spec.split("->")
  x, w = operands.split(",")
  contracted = [c for c in x if c in w and c not in out]
  n = len(contracted)
  if n == 0 or x[-n:] != w[:n] or out != x[:-n] + w[n:]:
    raise ValueError(
      f"dot wants '(lead)(in),(in)(out)->(lead)(out)' and got {spec!r}"
    )
  return x, w, out, n


def dot(
  x: Array,
  w: Array,
  spec: str,
  out_sharding: PartitionSpec | None = None,
  dtype: Any = None,
) -> Array:
  """Multiplies activations by a weight stored `(in..., out...)`.

  Operands in the dtype of `x`, sums in float32.
  On one device both operands are flattened to two dimensions first: the CPU's
  matmul reaches its peak only there, and so do the gradients, whose
  contraction over batch and time becomes one axis.

  Args:
    x: activations `[lead..., in...]`.
    w: weight `[in..., out...]`.
    spec: einsum notation, as in `'btd,dnh->btnh'`; it documents the shapes and
      is checked against the layout above.
    out_sharding: where the result lies; needed where a contracted axis is
      sharded (row-parallel projections), harmless elsewhere.
    dtype: of the result; None means that of `x`.

  Returns:
    `[lead..., out...]`.
  """
  _, _, _, n = _parse(spec)
  w = w.astype(x.dtype)
  dtype = dtype or x.dtype
  if active_mesh() is not None:
    y = jnp.einsum(
      spec, x, w, preferred_element_type=jnp.float32, out_sharding=out_sharding
    )
    return y.astype(dtype)
  lead, inner, outer = x.shape[:-n], w.shape[:n], w.shape[n:]
  k = math.prod(inner)
  y = jnp.dot(
    x.reshape(math.prod(lead), k),
    w.reshape(k, math.prod(outer)),
    preferred_element_type=jnp.float32,
  )
  return y.astype(dtype).reshape(*lead, *outer)
