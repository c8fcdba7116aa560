"""One row times a bfloat16 matrix, at the speed of memory, on a CPU.

XLA's CPU compiler has no vector code for arrays of bfloat16: a product of a
single row, which is what decoding one text consists of, is three times slower
than in float32, though it reads half as much. Of uint16 it has. So a weight
that is read so comes as both, the same bytes seen as numbers and as integers,
and a bfloat16 is widened by hand: its bits are the upper half of a float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array

PARTS = 8  # into which the inputs are cut, at most
LANES = 16  # numbers of a vector


@struct.dataclass
class Halves:
  """A bfloat16 weight in the place of an array: `dot` knows it.

  Whatever else reads it finds the array, by `astype`, `at` and the like.

  Attributes:
    w: bfloat16 [in..., out...].
    bits: the same as uint16; of a transposed weight, as before.
    turned: whether it is transposed.
  """

  w: Array
  bits: Array
  turned: bool = struct.field(pytree_node=False, default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weight."""
    return self.w.shape

  @property
  def dtype(self) -> Any:
    """Of the weight: bfloat16."""
    return self.w.dtype

  @property
  def T(self) -> "Halves":
    """The transposed matrix, of the same integers."""
    return Halves(self.w.T, self.bits, not self.turned)

  @property
  def at(self) -> Any:
    """Rows by index, as of an array."""
    return self.w.at

  def astype(self, dtype: Any) -> Array:
    """The weight as an array."""
    return self.w.astype(dtype)

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    """For numpy."""
    del copy
    return np.asarray(self.w, dtype)

  def row(self, x: Array) -> Array | None:
    """Maps one row `[1, in]` to `[1, out]`, float32; None where it cannot.

    The inputs are cut into parts: the sum over parts is one loop that reads
    each weight once and vectorises over what is left, and a small product
    with ones sums that.

        y_m = sum_g sum_p x_pg w_pgm
    """
    n_in = x.shape[-1]
    unit = LANES if self.turned else 1  # what is left lies side by side
    fits = [p for p in range(8, PARTS + 1) if n_in % (p * unit) == 0]
    if not fits:
      return None
    parts = fits[-1]
    left = n_in // parts
    x = x.astype(jnp.float32).reshape(parts, left)
    if self.turned:
      w = self.bits.reshape(-1, parts, left)
      terms = (x[p][None] * widen(w[:, p]) for p in range(parts))
    else:
      w = self.bits.reshape(parts, left, -1)
      terms = (x[p][:, None] * widen(w[p]) for p in range(parts))
    # The barrier keeps the product from becoming part of the loop.
    z = jax.lax.optimization_barrier(sum(terms))
    ones, axis = jnp.ones((1, left), jnp.float32), 1 if self.turned else 0
    return jax.lax.dot_general(ones, z, (((1,), (axis,)), ((), ())))


def widen(bits: Array) -> Array:
  """Float32 of the bits of bfloat16: they are its upper half."""
  return jax.lax.bitcast_convert_type(
    bits.astype(jnp.uint32) << 16, jnp.float32
  )


def halves(w: Array) -> Halves:
  """A bfloat16 array and, without a copy, its bits."""
  bits = np.asarray(w).view(np.uint16)
  return Halves(w, jax.device_put(bits, w.sharding, may_alias=True))


def pair(params: Any, paths: tuple[tuple[str, ...], ...]) -> Any:
  """Parameters whose matrices below `paths` are `Halves`, if they should be.

  That is for bfloat16 on one CPU. Experts are sorted by their own products.
  """

  def one(path: tuple, x: Any) -> Any:
    keys = tuple(str(getattr(k, "key", getattr(k, "idx", ""))) for k in path)
    here = any(keys[: len(p)] == p for p in paths) and "experts" not in keys
    if not here or x.ndim < 2 or x.dtype != jnp.bfloat16:
      return x
    alone = not isinstance(x, jax.core.Tracer) and len(x.devices()) == 1
    return halves(x) if alone and _on_cpu(x) else x

  return jax.tree_util.tree_map_with_path(one, params)


def _on_cpu(x: Array) -> bool:
  return next(iter(x.devices())).platform == "cpu"
