"""Gradients by depth are what the theory says, and the norms are norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ladder import depth


def test_gradient_norms_by_hand():
  """Three linear-like layers: the chain rule written out for each."""
  w = depth.weights(3, 0.01, 0)  # so small that tanh is the identity
  x = jax.random.normal(jax.random.key(1), (4, depth.WIDTH), jnp.float32)
  got = depth.gradient_norms(w, x, "tanh", "none", False)
  r = jax.random.normal(jax.random.key(99), x.shape, jnp.float32)
  r = np.asarray(r, np.float64) / x.size**0.5
  a, b, c = np.asarray(w, np.float64)
  x = np.asarray(x, np.float64)
  want = [x.T @ (r @ c.T @ b.T), (x @ a).T @ (r @ c.T), (x @ a @ b).T @ r]
  np.testing.assert_allclose(got, [np.linalg.norm(g) for g in want], rtol=1e-3)


def test_sigmoids_lose_the_gradient_and_residuals_keep_it():
  """Each layer takes a factor of four or more; the sum takes none."""
  plain = [depth.first_over_last(n, "sigmoid", "none", False) for n in (4, 8)]
  assert plain[1] < plain[0] / 4**4
  assert depth.first_over_last(8, "sigmoid", "none", True) > 0.1


def test_the_right_gain_keeps_the_signal():
  """sqrt(2) for ReLU, within a factor; 30 % more or less does not."""
  assert 0.02 < depth.signal(32, 2**0.5, "relu") < 50
  assert depth.signal(32, 0.7 * 2**0.5, "relu") < 1e-3
  assert depth.signal(32, 1.3 * 2**0.5, "relu") > 50


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_norms(name):
  """Against the library's, and one claim of course texts is false."""
  from jaxlm.layers.norm import LayerNorm, RMSNorm

  x = 3.0 * jax.random.normal(jax.random.key(0), (5, 48), jnp.float32) + 1.0
  norm = {"layer": LayerNorm, "rms": RMSNorm}[name](48, 1e-5, scale=False)
  y = depth.NORMS[name](x)
  np.testing.assert_allclose(y, norm({}, x), atol=1e-5)
  assert float(jnp.abs(y).max()) > 1  # it does not bound anything by one
