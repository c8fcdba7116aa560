"""Losses against closed forms and float64; objectives against their pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, VOCAB, random_params, random_tokens

from jaxlm.losses import (
  chunked_cross_entropy,
  cross_entropy,
  weighted_mean,
)
from jaxlm.models.decoder import forward
from jaxlm.objectives import next_token


def draw(*shape: int, seed: int = 0) -> np.ndarray:
  """Normal values, float32."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- Cross entropy ----------------------------------------------------------


def test_cross_entropy_in_closed_form():
  """Equal logits cost log V; a logit that wins by far costs nothing."""
  flat = jnp.zeros((2, 3, 10))
  targets = jnp.zeros((2, 3), jnp.int32)
  loss, log_z = cross_entropy(flat, targets)
  np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)
  np.testing.assert_allclose(log_z, np.log(10), rtol=1e-6)
  two = jnp.array([[0.0, np.log(3.0)]])  # probabilities 1/4 and 3/4
  loss, log_z = cross_entropy(two, jnp.array([1]))
  np.testing.assert_allclose(loss, np.log(4 / 3), rtol=1e-6)
  np.testing.assert_allclose(log_z, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_cross_entropy_equals_float64(shift: float):
  """Also where a naive exponential overflows: a shift changes only log Z."""
  logits = 5 * draw(4, 7, 33) + np.float32(shift)
  targets = np.random.default_rng(1).integers(0, 33, (4, 7))
  loss, log_z = jax.jit(cross_entropy)(logits, targets)
  wide = logits.astype(np.float64)
  top = wide.max(-1)
  want_z = np.log(np.exp(wide - top[..., None]).sum(-1)) + top
  want = want_z - np.take_along_axis(wide, targets[..., None], -1)[..., 0]
  tol = 2e-6 * max(1.0, abs(shift))
  np.testing.assert_allclose(loss, want, rtol=1e-6, atol=tol)
  np.testing.assert_allclose(log_z, want_z, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_softmax_minus_one_hot():
  """And that of log Z is the softmax itself."""
  logits, targets = draw(3, 5, 9), np.arange(15).reshape(3, 5) % 9
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)

  def total(part):
    return jax.grad(lambda x: cross_entropy(x, targets)[part].sum())

  np.testing.assert_allclose(
    total(0)(logits), probs - np.eye(9)[targets], atol=1e-6
  )
  np.testing.assert_allclose(total(1)(logits), probs, atol=1e-6)


# --- In chunks --------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
def test_chunks_equal_the_whole(chunk: int, softcap: float | None):
  """Values and gradients, at sizes that divide 13 positions and that do not.

  Both outputs are weighted, so that an output that loses its gradient shows.
  """
  x, w = draw(2, 13, 8), draw(8, 21, seed=1)
  targets = np.random.default_rng(2).integers(0, 21, (2, 13))
  a, b = draw(2, 13, seed=3), draw(2, 13, seed=4)

  def dense(x, w):
    y = jnp.einsum("btd,dv->btv", x, w)
    if softcap is not None:
      y = softcap * jnp.tanh(y / softcap)
    return cross_entropy(y, targets)

  def chunked(x, w):
    return chunked_cross_entropy(x, w, targets, chunk, softcap)

  def run(fn):
    def total(x, w):
      loss, log_z = fn(x, w)
      return jnp.sum(a * loss + b * log_z), (loss, log_z)

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w)

  (_, got), got_grads = run(chunked)
  (_, want), want_grads = run(dense)
  for one, other in zip((*got, *got_grads), (*want, *want_grads), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


def test_chunks_never_hold_all_the_logits():
  """That is their purpose: no array of seq x vocab in the compiled program."""
  x, w = jnp.zeros((1, 512, 8)), jnp.zeros((8, 1000))
  targets = jnp.zeros((1, 512), jnp.int32)

  def total(chunk):
    def fn(x, w):
      return chunked_cross_entropy(x, w, targets, chunk)[0].sum()

    compiled = jax.jit(jax.grad(fn, (0, 1))).lower(x, w).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert total(512) > 512 * 1000 * 4
  assert total(32) < 0.4 * 512 * 1000 * 4


# --- Means ------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 99))
@settings(max_examples=30)
def test_weighted_mean_is_the_mean_of_what_counts(mask: list, seed: int):
  """As numpy's mean over the chosen ones; of none at all it is zero."""
  x = draw(20, seed=seed)
  weights = np.array(mask + [False] * (20 - len(mask)))
  mean, total = weighted_mean(jnp.asarray(x), jnp.asarray(weights))
  assert float(total) == weights.sum()
  want = x[weights].mean() if weights.any() else 0.0
  np.testing.assert_allclose(mean, want, rtol=1e-5, atol=1e-6)


def test_no_weight_means_no_loss_and_no_gradient():
  """A batch that is all padding: zero, never NaN."""
  x, zero = jnp.ones((2, 3)), jnp.zeros((2, 3))
  assert weighted_mean(x, zero) == (0.0, 0.0)
  grad = jax.grad(lambda x: weighted_mean(x, zero)[0])(x)
  np.testing.assert_array_equal(grad, 0)
  mean, total = weighted_mean(x, None)
  assert (mean, total) == (1.0, 6.0)


# --- The objective ----------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 5])
def test_next_token_is_the_masked_mean(chunk: int):
  """From the model's own logits in float64, with the z term by hand."""
  model = MODELS["local"]  # with a softcap on the logits
  params, tokens = random_params(model), random_tokens(2, 13)
  mask = np.random.default_rng(0).integers(0, 2, (2, 12))
  batch = {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "mask": jnp.asarray(mask),
  }
  loss, metrics = jax.jit(
    lambda p: next_token(model, p, batch, z_loss=0.1, chunk=chunk)
  )(params)
  logits = jax.jit(lambda p: forward(model, p, tokens[:, :-1]))(params)
  logits = np.asarray(logits, np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  picked = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], -1)
  nll = np.sum((log_z - picked[..., 0]) * mask) / mask.sum()
  np.testing.assert_allclose(metrics["loss"], nll, rtol=1e-5)
  drift = np.sum(log_z**2 * mask) / mask.sum()
  np.testing.assert_allclose(loss, nll + 0.1 * drift, rtol=1e-5)
  assert float(metrics["weight"]) == mask.sum()


def test_next_token_knows_documents():
  """Segments and positions reach the model: a packed row's loss is the mean.

  Of the losses of its two documents, weighted by their lengths.
  """
  model = MODELS["gpt2"]
  params = random_params(model)
  rows = [random_tokens(1, n + 1, seed=n) for n in (5, 8)]

  def loss(batch):
    return jax.jit(lambda p: next_token(model, p, batch)[0])(params)

  alone = [loss({"inputs": r[:, :-1], "targets": r[:, 1:]}) for r in rows]
  packed = loss(
    {
      "inputs": jnp.concatenate([r[:, :-1] for r in rows], 1),
      "targets": jnp.concatenate([r[:, 1:] for r in rows], 1),
      "positions": jnp.concatenate([jnp.arange(5), jnp.arange(8)])[None],
      "segments": jnp.repeat(jnp.arange(2), jnp.array([5, 8]))[None],
    }
  )
  want = (5 * alone[0] + 8 * alone[1]) / 13
  np.testing.assert_allclose(packed, want, rtol=1e-5)


def test_an_untrained_model_costs_log_vocab():
  """With a head of zeros, which is how "modern" starts."""
  model = MODELS["modern"]
  params = random_params(model) | {"head": jnp.zeros((model.dim, VOCAB))}
  tokens = random_tokens(1, 9)
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
  loss, _ = next_token(model, params, batch)
  np.testing.assert_allclose(loss, np.log(VOCAB), rtol=1e-6)
