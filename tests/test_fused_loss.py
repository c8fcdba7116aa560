"""The loss without logits, interpreted, against the loss with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, VOCAB, random_params

from jaxlm import losses
from jaxlm.layers.compute import Compute
from jaxlm.layers.kernels.fused_loss import fused_cross_entropy
from jaxlm.losses import chunked_cross_entropy, cross_entropy
from jaxlm.objectives import next_token
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset


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


def test_next_token_takes_it_on_a_tpu(monkeypatch):
  """The loss, its gradients and the drift of log Z are those of the twin; on a
  mesh each device has rows of its own.
  """
  model = MODELS["llama"]
  params, rules, used = random_params(model), preset("fsdp"), []
  rows = np.random.default_rng(0).integers(0, VOCAB, (8, 13))
  batch = {"inputs": rows[:, :-1], "targets": rows[:, 1:]}

  def run(params, compute):
    def loss(params):
      return next_token(model, params, batch, None, compute, 0.1, chunk=5)[0]

    return jax.jit(jax.value_and_grad(loss))(params)

  def kernel(*args, **options):
    used.append(1)
    return fused_cross_entropy(*args, **options, rows=8, columns=16)

  want = run(params, Compute())
  monkeypatch.setattr(losses, "platform", lambda: "tpu")
  monkeypatch.setattr(losses, "fused_cross_entropy", kernel)
  with jax.set_mesh(make_mesh(rules)):
    found = run(params, Compute(rules=rules))
  assert used
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    found,
    want,
  )


def test_a_cut_vocabulary_keeps_the_twin(monkeypatch):
  """No device has all of the words then, and the kernel wants them all."""
  monkeypatch.setattr(losses, "platform", lambda: "tpu")
  monkeypatch.setattr(losses, "fused_cross_entropy", None)
  x, w, targets = jnp.ones((8, 3, 4)), jnp.ones((4, 16)), jnp.ones((8, 3), int)
  rules = preset("tp")
  cut = (*rules.activations, ("vocab", "tensor"))
  rules = dataclasses.replace(rules, activations=cut)
  with jax.set_mesh(make_mesh(rules)):
    found, _ = losses.head_cross_entropy(
      x, w, targets, 2, compute=Compute(rules=rules)
    )
  np.testing.assert_allclose(found, np.log(16.0), rtol=1e-6)
