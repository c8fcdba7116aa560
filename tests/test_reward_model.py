"""Heads that say one number, and reward models built of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import DIM, MODELS, VOCAB, random_tokens

import jaxlm
from jaxlm.errors import UserError
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import FanIn, init
from jaxlm.layers.recurrent import RNN
from jaxlm.models.decoder import Block, Decoder, hidden
from jaxlm.models.heads import ScalarHead
from jaxlm.models.reward import Last, Mean, RewardModel, encoder

# --- Heads ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8)])
def test_a_head_is_a_product_and_a_sum(shape: tuple[int, ...]):
  """At any rank: PPO asks at every position, a reward once a text."""
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  p = {"w": jnp.arange(8.0), "b": jnp.float32(0.5)}
  want = x @ np.arange(8.0) + 0.5
  np.testing.assert_allclose(ScalarHead(8)(p, jnp.asarray(x)), want, rtol=1e-5)
  half = ScalarHead(8)(p, jnp.asarray(x, jnp.bfloat16))
  assert half.dtype == jnp.float32


def test_a_head_starts_without_opinion():
  """Zeros by default; else the usual start, of variance 1 / dim."""
  head = ScalarHead(4096)
  p = init(head.params(), jax.random.key(0))
  assert float(jnp.abs(head(p, jnp.ones((2, 4096)))).max()) == 0.0
  p = init(ScalarHead(4096, False, FanIn()).params(), jax.random.key(0))
  assert set(p) == {"w"}
  np.testing.assert_allclose(p["w"].std() * 64, 1.0, atol=0.05)


def test_a_head_needs_a_width():
  """Said where it is made, not where shapes clash later."""
  with pytest.raises(UserError, match="width 0"):
    ScalarHead(0)


# --- Reward models ----------------------------------------------------------

TRUNK = MODELS["llama"]
KINDS = {
  "decoder": RewardModel(TRUNK, ScalarHead(DIM, False, FanIn())),
  "encoder": RewardModel(
    encoder(TRUNK), ScalarHead(DIM, True, FanIn()), Mean()
  ),
}


@pytest.fixture(params=KINDS)
def kind(request):
  """A reward model, and random arrays of it."""
  model = KINDS[request.param]
  return model, init(model.params(), jax.random.key(1))


def test_padding_does_not_change_a_reward(kind):
  """Nor which side it is on, nor what tokens it is made of."""
  model, params = kind
  tokens = np.asarray(random_tokens(3, 6))
  want = model(params, tokens)
  assert float(jnp.ptp(want)) > 0.01  # texts are told apart
  junk = np.asarray(random_tokens(3, 4, seed=9))
  text, none = np.ones((3, 6), bool), np.zeros((3, 4), bool)
  right = np.concatenate([tokens, junk], 1), np.concatenate([text, none], 1)
  left = np.concatenate([junk, tokens], 1), np.concatenate([none, text], 1)
  run = jax.jit(model.__call__)
  for rows, mask in (right, left):
    np.testing.assert_allclose(run(params, rows, mask), want, atol=2e-6)


def test_a_reward_is_the_head_on_what_is_pooled(kind):
  """Last token or mean, over the trunk's own hidden states."""
  model, params = kind
  tokens = random_tokens(2, 5)
  x, _ = hidden(model.trunk, params["trunk"], tokens)
  x = x[:, -1] if isinstance(model.pool, Last) else x.mean(1)
  want = model.head(params["head"], x)
  np.testing.assert_allclose(model(params, tokens), want, rtol=1e-5, atol=1e-6)


def test_an_encoder_sees_both_ways():
  """A later token changes the first hidden state; a decoder's never."""
  tokens = random_tokens(1, 6)
  other = tokens.at[0, -1].set((tokens[0, -1] + 1) % VOCAB)
  params = init(TRUNK.params(), jax.random.key(0))
  for model, sees in ((TRUNK, False), (encoder(TRUNK), True)):
    a, b = (hidden(model, params, t)[0][0, 0] for t in (tokens, other))
    assert bool(jnp.abs(a - b).max() > 1e-4) == sees


def test_a_text_of_nothing_is_no_nan(kind):
  """A row that is all padding (a batch filled up) stays a number."""
  model, params = kind
  mask = jnp.array([[True] * 4, [False] * 4])
  assert np.isfinite(model(params, random_tokens(2, 4), mask)).all()


def test_a_recurrent_layer_is_no_encoder():
  """It has no mask to lift, and says so."""
  block = Block(RNN(DIM, DIM), GLU(DIM, 24, silu), RMSNorm(DIM))
  with pytest.raises(UserError, match="left to right"):
    encoder(Decoder(VOCAB, DIM, (((block,), 1),), RMSNorm(DIM), 32))


def test_a_reward_model_is_saved_as_any_model(kind, tmp_path):
  """Equal value and equal bits come back."""
  model, params = kind
  jaxlm.save(tmp_path / "rm", model, params)
  found, again = jaxlm.load(tmp_path / "rm")
  assert found == model
  jax.tree.map(np.testing.assert_array_equal, again, params)
