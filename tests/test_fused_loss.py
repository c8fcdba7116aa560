"""The loss without logits, interpreted, against the loss with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.layers.kernels.fused_loss import fused_cross_entropy
from jaxlm.losses import chunked_cross_entropy, cross_entropy


def draw(*shape: int, seed: int = 0) -> jax.Array:
  """Normal values, float32."""
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


def both(batch, seq, dim, vocab, softcap=None, rows=8, columns=16):
  """(loss, log_z), and gradients of a mixture of them, of both forms."""
  x, w = draw(batch, seq, dim), draw(dim, vocab, seed=1)
  targets = np.random.default_rng(2).integers(0, vocab, (batch, seq))
  targets = jnp.asarray(targets, jnp.int32)
  a, b = draw(batch, seq, seed=3), draw(batch, seq, seed=4)

  def run(form):
    def mixture(x, w):
      loss, log_z = form(x, w)
      return jnp.sum(a * loss + b * log_z), (loss, log_z)

    return jax.jit(jax.grad(mixture, (0, 1), has_aux=True))(x, w)

  def fused(x, w):
    return fused_cross_entropy(x, w, targets, softcap, rows, columns)

  def plain(x, w):
    return chunked_cross_entropy(x, w, targets, 4, softcap)

  return run(fused), run(plain)


@settings(max_examples=8)
@given(
  st.integers(1, 2),
  st.integers(1, 20),
  st.integers(1, 12),
  st.integers(2, 50),
  st.sampled_from([None, 2.0]),
)
def test_equals_chunked(batch, seq, dim, vocab, softcap):
  """Values at 2e-6 and gradients at 1e-5, where nothing divides a block."""
  (grads, values), (grads_want, want) = both(batch, seq, dim, vocab, softcap)
  for a, b in zip(values, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
  for a, b in zip(grads, grads_want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_large_logits():
  """The largest logit is taken out: 1e4 in a logit is no overflow."""
  x, w = 100.0 * draw(1, 8, 4), 100.0 * draw(4, 40, seed=1)
  targets = jnp.arange(8, dtype=jnp.int32)[None]
  found = fused_cross_entropy(x, w, targets, rows=8, columns=16)
  want = cross_entropy(jnp.einsum("btd,dv->btv", x, w), targets)
  for a, b in zip(found, want, strict=True):
    assert np.all(np.isfinite(a))
    np.testing.assert_allclose(a, b, rtol=0, atol=0.01)  # two ulps of 5e4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str):
  """Products in the dtype of `x`, sums and results in float32."""
  x, w = draw(1, 8, 16), draw(16, 24, seed=1)
  targets = jnp.arange(8, dtype=jnp.int32)[None]
  loss, log_z = fused_cross_entropy(
    x.astype(dtype), w, targets, rows=8, columns=8
  )
  assert loss.dtype == log_z.dtype == jnp.float32
  want, _ = cross_entropy(jnp.einsum("btd,dv->btv", x, w), targets)
  np.testing.assert_allclose(loss, want, atol=0.1)
