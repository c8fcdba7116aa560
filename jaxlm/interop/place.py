"""Arrays that are filled piece by piece, where they will stay.

A checkpoint has one tensor for each layer and expert, a model one array for
all of them, perhaps spread over devices. A `Leaf` is such an array while it is
being read: each piece goes straight into its place on each device that keeps
some of it, so no more than a piece is ever held besides.

On a CPU the place is plain memory, which JAX then takes over without a copy;
on an accelerator a buffer there, which each update is given to reuse.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ALIGNED = 64  # bytes: what JAX asks of memory that it takes over
_BLOCK = 64  # elements copied side by side where memory runs the other way


class Leaf:
  """An array in the making.

  Args:
    shape: of the whole.
    sharding: where its parts will lie.
    dtype: of the array; None means that of the first piece.
  """

  def __init__(
    self,
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    dtype: Any = None,
  ):
    self.shape, self.sharding, self.dtype = shape, sharding, dtype
    self._shards: list[_HostShard | _DeviceShard] = []

  def write(self, index: tuple[int, ...], x: np.ndarray) -> None:
    """Puts a piece at `index` of the leading dimensions, cast to the dtype."""
    if not self._shards:
      self.dtype = jnp.dtype(self.dtype or x.dtype)
      self._shards = self._start()
    for shard in self._shards:
      shard.write(index, x)

  def array(self) -> jax.Array:
    """The finished array; call it once, after every piece was written."""
    arrays = [shard.array() for shard in self._shards]
    return jax.make_array_from_single_device_arrays(
      self.shape, self.sharding, arrays
    )

  def _start(self) -> list:
    """An empty shard on each device of this process."""
    places = self.sharding.addressable_devices_indices_map(self.shape)
    shards = []
    for device, slices in places.items():
      bounds = [
        range(*s.indices(n)) for s, n in zip(slices, self.shape, strict=True)
      ]
      kind = _HostShard if device.platform == "cpu" else _DeviceShard
      shards.append(kind(device, bounds, self.dtype))
    return shards


class _Shard:
  """The part of a leaf on one device: from where to where in each dimension."""

  def __init__(self, device: jax.Device, bounds: list[range], dtype: np.dtype):
    self.device, self.bounds, self.dtype = device, bounds, dtype
    self.shape = tuple(len(b) for b in bounds)

  def write(self, index: tuple[int, ...], x: np.ndarray) -> None:
    """Keeps what of the piece is in here."""
    lead, rest = self.bounds[: len(index)], self.bounds[len(index) :]
    if any(i not in b for i, b in zip(index, lead, strict=True)):
      return
    x = x[tuple(slice(b.start, b.stop) for b in rest)]
    at = tuple(i - b.start for i, b in zip(index, lead, strict=True))
    self._put(at, x)

  def _put(self, index: tuple[int, ...], x: np.ndarray) -> None:
    raise NotImplementedError


class _HostShard(_Shard):
  """In memory that JAX can take over."""

  def __init__(self, *arguments: Any):
    super().__init__(*arguments)
    n = math.prod(self.shape) * self.dtype.itemsize
    raw = np.empty(n + _ALIGNED, np.uint8)  # in huge pages, where it is large
    start = -raw.ctypes.data % _ALIGNED
    raw = raw[start : start + n]
    self._buffer = raw.view(self.dtype).reshape(self.shape)

  def array(self) -> jax.Array:
    """The buffer as JAX's own."""
    buffer, self._buffer = self._buffer, None
    return jax.device_put(buffer, self.device)

  def _put(self, index: tuple[int, ...], x: np.ndarray) -> None:
    copy(self._buffer[(*index, ...)], x)


class _DeviceShard(_Shard):
  """On an accelerator."""

  _buffer = None

  def array(self) -> jax.Array:
    """The buffer."""
    return self._buffer

  def _put(self, index: tuple[int, ...], x: np.ndarray) -> None:
    x = jax.device_put(x, self.device)
    if not index:
      self._buffer = x.astype(self.dtype)
      return
    if self._buffer is None:
      self._buffer = jnp.empty(self.shape, self.dtype, device=self.device)
    index = (*index, *[0] * x.ndim)
    self._buffer = _update(self._buffer, x, index)
    self._buffer.block_until_ready()  # or pieces would queue up in memory


@functools.partial(jax.jit, donate_argnums=0)
def _update(
  buffer: jax.Array, x: jax.Array, index: tuple[jax.Array, ...]
) -> jax.Array:
  """The buffer with `x` at `index`, in place."""
  x = x.astype(buffer.dtype)
  lead = (1,) * (buffer.ndim - x.ndim)
  return jax.lax.dynamic_update_slice(buffer, x.reshape(lead + x.shape), index)


def copy(to: np.ndarray, x: np.ndarray) -> None:
  """`to[...] = x`, in blocks that fit the caches where axes are swapped.

  Twice as fast as NumPy's own order for a transposed matrix.
  """
  if to.dtype == x.dtype:  # bits: NumPy is slow with dtypes not its own
    to, x = (y.view(f"u{y.dtype.itemsize}") for y in (to, x))
  fast = int(np.argmin(x.strides)) if x.ndim > 1 else x.ndim
  if fast >= x.ndim - 1:
    np.copyto(to, x, casting="unsafe")
    return
  axis = fast + 1  # x is contiguous along `fast`, `to` along the last
  width = max(1, _BLOCK // math.prod(x.shape[axis + 1 :]))
  for start in range(0, x.shape[axis], width):
    block = (*[slice(None)] * axis, slice(start, start + width))
    np.copyto(to[block], x[block], casting="unsafe")
