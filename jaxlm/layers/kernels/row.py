"""One row times a matrix, at the speed of memory, on a CPU.

Decoding one text is a product of one row with each matrix, and all it costs is
reading them. XLA's product of one row does not read as fast as a CPU can:

- in float32 each core reads its own columns, a piece of every row of the
  matrix. A core that reads one stretch of memory is up to 1.5 times as fast.
- bfloat16 it has no vector code for, and is three times slower than float32
  with half as much to read. Of uint16 it has. So such a weight comes as both,
  the same bytes seen as numbers and as integers, and is widened by hand: the
  bits of a bfloat16 are the upper half of a float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array

STRETCHES = (4, 2)  # into which a float32 matrix is cut, the first that fits
FEW = 16  # rows for which that is faster
PARTS = 8  # into which the inputs of a bfloat16 one are cut
MOST = 48  # the same of a transposed one, at most: what is left is a vector
LANES = 16  # numbers of a vector


@struct.dataclass
class Rowwise:
  """A weight in the place of an array: `dot` knows how one row meets it.

  Whatever else reads it finds the array, by `astype` and the like.

  Attributes:
    w: float32 or bfloat16 [in..., out...].
    bits: of bfloat16 the same as uint16; of a transposed weight, as before.
    turned: whether it is transposed.
  """

  w: Array
  bits: Array | None
  turned: bool = struct.field(pytree_node=False, default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weight."""
    return self.w.shape

  @property
  def dtype(self) -> Any:
    """Of the weight."""
    return self.w.dtype

  @property
  def T(self) -> "Rowwise":
    """The transposed matrix, which lies in memory as before."""
    return Rowwise(self.w.T, self.bits, not self.turned)

  def astype(self, dtype: Any) -> Array:
    """The weight as an array."""
    return self.w.astype(dtype)

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    """For numpy."""
    del copy
    return np.asarray(self.w, dtype)

  def lookup(self, index: Array) -> Array:
    """Rows by index, the nearest where there is none.

    Of the bits: to look up one row of bfloat16, XLA widens all of them.
    """
    if self.bits is None:
      return self.w.at[index].get(mode="clip")
    rows = self.bits.at[index].get(mode="clip")
    return jax.lax.bitcast_convert_type(rows, self.dtype)

  def times(self, x: Array) -> Array | None:
    """Maps rows `[rows, in]` to `[rows, out]`, float32.

    None where the usual product is the best.
    """
    if x.dtype != self.dtype:
      return None
    if len(x) == 1 and self.bits is not None:
      return _by_parts(x, self.bits, self.turned)
    w = self.w.reshape(x.shape[1], -1)
    if self.turned:
      return _by_outputs(x, w.T)
    return _by_inputs(x, w) if len(x) == 1 else None


def _by_inputs(x: Array, w: Array) -> Array | None:
  """`x` [1, in] times `w` [in, out], a stretch of inputs after the other."""
  cuts = _cuts(len(w))
  if cuts is None:
    return None
  x, w = x.reshape(cuts, 1, -1), w.reshape(cuts, len(w) // cuts, -1)
  return jax.lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,)))).sum(0)


def _by_outputs(x: Array, w: Array) -> Array:
  """`x` [rows, in] times the transpose of `w` [out, in].

  Few rows of float32 by stretches of outputs. Else contracted as `w` lies: to
  turn a bfloat16 matrix round first takes longer than to multiply it.
  """
  cuts = _cuts(len(w))
  if w.dtype != jnp.float32 or len(x) > FEW or cuts is None:
    return jax.lax.dot_general(
      x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
  w = w.reshape(cuts, -1, x.shape[1])
  x = jnp.broadcast_to(x, (cuts, *x.shape))
  y = jax.lax.dot_general(w, x, (((2,), (2,)), ((0,), (0,))))
  return y.reshape(-1, x.shape[1]).T


def _cuts(n: int) -> int | None:
  """Into how many stretches n inputs or outputs are cut."""
  return next((c for c in STRETCHES if n % c == 0), None)


def _by_parts(x: Array, bits: Array, turned: bool) -> Array | None:
  """`x` [1, in] times the bfloat16 weight of which these are the bits.

  The inputs are cut into parts: the sum over parts is one loop that reads
  each weight once and vectorises over what is left, and a small product
  with ones sums that.

      y_m = sum_g sum_p x_pg w_pgm
  """
  parts = _parts(x.shape[1], turned)
  if parts is None:
    return None
  left = x.shape[1] // parts
  # Tied to x, which changes with every token: else the compiler takes the
  # widening out of the loop over tokens, and each step reads float32.
  x, bits = jax.lax.optimization_barrier((x, bits))
  x = x.astype(jnp.float32).reshape(parts, left)
  if turned:
    w = bits.reshape(-1, parts, left)
    terms = (x[p][None] * widen(w[:, p]) for p in range(parts))
  else:
    w = bits.reshape(parts, left, -1)
    terms = (x[p][:, None] * widen(w[p]) for p in range(parts))
  # The barrier keeps the product from becoming part of the loop.
  z = jax.lax.optimization_barrier(sum(terms))
  ones, axis = jnp.ones((1, left), jnp.float32), 1 if turned else 0
  return jax.lax.dot_general(ones, z, (((1,), (axis,)), ((), ())))


def _parts(n_in: int, turned: bool) -> int | None:
  """Into how many parts; what is left of a transposed weight is vectors."""
  if not turned:
    return None if n_in % PARTS else PARTS
  fits = [p for p in range(PARTS, MOST + 1) if n_in % (p * LANES) == 0]
  return fits[-1] if fits else None


def widen(bits: Array) -> Array:
  """Float32 of the bits of bfloat16: they are its upper half."""
  return jax.lax.bitcast_convert_type(
    bits.astype(jnp.uint32) << 16, jnp.float32
  )


def rowwise(w: Array) -> Rowwise:
  """A matrix and, if it is bfloat16, without a copy its bits."""
  if w.dtype == jnp.float32:
    return Rowwise(w, None)
  bits = np.asarray(w).view(np.uint16)
  return Rowwise(w, jax.device_put(bits, w.sharding, may_alias=True))


def ready(params: Any, paths: tuple[tuple[str, ...], ...]) -> Any:
  """Parameters whose matrices below `paths` are `Rowwise`, if they should be.

  That is on one CPU. Experts are sorted by their own products.
  """

  def one(path: tuple, x: Any) -> Any:
    keys = tuple(str(getattr(k, "key", getattr(k, "idx", ""))) for k in path)
    here = any(keys[: len(p)] == p for p in paths) and "experts" not in keys
    if not here or x.ndim < 2 or x.dtype not in (jnp.float32, jnp.bfloat16):
      return x
    alone = not isinstance(x, jax.core.Tracer) and len(x.devices()) == 1
    return rowwise(x) if alone and _on_cpu(x) else x

  return jax.tree_util.tree_map_with_path(one, params)


def _on_cpu(x: Array) -> bool:
  return next(iter(x.devices())).platform == "cpu"
