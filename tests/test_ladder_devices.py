"""Kernels in blocks and sums around a ring equal what JAX has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.ladder import kernels, parallel


def normal(*shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(sum(shape)), shape, jnp.float32)


def test_kernels_equal_jax():
  """Several blocks each way, so that a wrong index shows."""
  x, y = normal(16, 12), normal(12, 8)
  flat = normal(256)
  np.testing.assert_array_equal(kernels.add(flat, flat, 64), flat + flat)
  want = jax.nn.softmax(x, axis=1)
  np.testing.assert_allclose(kernels.softmax(x, 4), want, atol=1e-6)
  want = x / np.sqrt(np.mean(np.square(x), 1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(kernels.rms_norm(x, 4), want, atol=1e-6)
  want = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
  np.testing.assert_allclose(kernels.matmul(x, y, 4), want, atol=1e-5)


def test_a_block_that_does_not_divide():
  """Says so, instead of leaving the rest unwritten."""
  with pytest.raises(UserError, match="no multiple of the block size 64"):
    kernels.add(normal(100), normal(100), 64)


def test_traffic_by_counting():
  """Every product of blocks reads two blocks; every result is written once."""
  n, b = 8, 2
  reads = sum(2 * b * b for _ in range((n // b) ** 3))
  assert kernels.traffic(n, b) == reads + n * n


@pytest.mark.parametrize("size", [1, 8, 1001])
def test_the_ring_equals_psum(size):
  """Also where eight devices do not divide the array."""
  x = normal(len(jax.devices()), size)
  got = parallel.ring_sum(x)
  want = np.asarray(x, np.float64).sum(0)
  for row in np.asarray(got):
    np.testing.assert_allclose(row, want, atol=1e-5)


def test_training_on_eight_is_training_on_one():
  """The same losses, step by step."""
  x, y = normal(64, 5), normal(64)
  together, single = parallel.train(x, y, 20), parallel.alone(x, y, 20)
  np.testing.assert_allclose(together, single, rtol=1e-5)
