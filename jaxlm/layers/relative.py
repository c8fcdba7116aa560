"""Relative position biases: a learned number per head and distance.

Scores get a number that depends on how far the key stands from the query
(T5, arXiv:1910.10683, section 2.1). Near distances have a bucket each, far
ones share buckets that grow with the logarithm. All layers of a stack read one
table, which therefore comes with the tokens (`At.table`), not with a layer.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.layers.compute import Compute
from jaxlm.layers.param import Init, Normal, Param

Array = jax.Array


@dataclass(frozen=True)
class RelativeBias:
  """Which of the learned biases belongs to a distance.

  Attributes:
    buckets: rows of the table.
    far: from this distance on all share the last bucket.
    both: half of the buckets are for keys after the query (encoders); else
      those count as distance zero, and a causal mask hides them.
    init: initializer of the table.
  """

  buckets: int = 32
  far: int = 128
  both: bool = False
  init: Init = Normal(0.02)

  def params(self, heads: int) -> Param:
    """The table [buckets, heads]; it is looked up, so no hidden matrix."""
    shape = (self.buckets, heads)
    return Param(shape, ("positions", "heads"), 1, self.init, jnp.float32)

  def bucket(self, distance: Array) -> Array:
    """The row of the table for integer distances, key minus query."""
    n = self.buckets // 2 if self.both else self.buckets
    first = jnp.where(distance > 0, n, 0) if self.both else 0
    away = jnp.abs(distance) if self.both else jnp.maximum(-distance, 0)
    exact = n // 2
    ratio = jnp.maximum(away, 1).astype(jnp.float32) / exact
    steps = jnp.log(ratio) / math.log(self.far / exact) * (n - exact)
    large = jnp.minimum(exact + steps.astype(jnp.int32), n - 1)
    return first + jnp.where(away < exact, away, large)

  def __call__(
    self, table: Array, q: Array, k: Array, compute: Compute
  ) -> Array:
    """Biases [batch or 1, heads, seq, keys], float32.

    Args:
      table: `[buckets, heads]`.
      q: positions of the queries, int `[batch or 1, seq]`.
      k: positions of the keys, int `[batch or 1, keys]`.
      compute: where rows and heads lie on a mesh.
    """
    bucket = self.bucket(k[:, None, :] - q[:, :, None])
    shape = (*bucket.shape, table.shape[1])
    spec = compute.spec(("batch", None, None, "heads"), shape)
    bias = table.astype(jnp.float32).at[bucket].get(out_sharding=spec)
    return jnp.moveaxis(bias, -1, 1)
