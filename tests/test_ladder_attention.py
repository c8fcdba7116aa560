"""Attention by hand, by code, with positions, and where it blurs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ladder import attention, copying, largest, recurrent, word2vec


def test_the_worked_example_equals_the_code():
  """Weights and outputs, causal; and a number that can be checked on paper."""
  hand = attention.by_hand()
  out, weights = attention.attend(
    *(jnp.asarray(hand[n], jnp.float32) for n in "qkv"), True
  )
  np.testing.assert_allclose(out, hand["output"], atol=1e-6)
  np.testing.assert_allclose(weights, hand["weights"], atol=1e-6)
  e = np.exp(np.sqrt(2))  # the second token: q = (0, 2), k = (0, 1) and (1, 0)
  np.testing.assert_allclose(hand["weights"][1], [e / (1 + e), 1 / (1 + e), 0])


def test_additive_attention_by_loops():
  """score_ij = v . tanh(W q_i + U k_j)."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(n, 3)) for n in (2, 4, 4))
  p = {"W": rng.normal(size=(3, 5)), "U": rng.normal(size=(3, 5))}
  p["v"] = rng.normal(size=5)
  want = np.array(
    [[p["v"] @ np.tanh(a @ p["W"] + b @ p["U"]) for b in k] for a in q]
  )
  want = np.exp(want) / np.exp(want).sum(1, keepdims=True)
  as32 = [
    jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for t in (p, q, k, v)
  ]
  out, weights = attention.additive(*as32)
  np.testing.assert_allclose(weights, want, atol=1e-6)
  np.testing.assert_allclose(out, want @ v, atol=1e-5)


def test_a_sum_knows_no_order_and_positions_do():
  """Shuffled neighbours move the last token only where there are positions."""
  moved = attention.shuffle_test(0)
  assert moved["none"] < 1e-5
  assert moved["added"] > 1e-2
  assert moved["turned"] > 1e-2


def test_bands_are_what_turning_does():
  """Pair by pair; their sum is the product of turned vectors of ones."""
  d = 8
  ones = jnp.ones((6, d), jnp.float32)
  turned = attention.turn(ones, jnp.arange(6))
  want = np.asarray(turned @ turned[0])
  found = attention.bands(d, np.arange(6))
  np.testing.assert_allclose(found.sum(0), want, atol=1e-5)


def test_the_writer_s_cell_is_the_ladder_s_gru():
  """The rung before has it against torch."""
  p = copying.gru_params(jax.random.key(0), 5, 6)["read"]
  zero = jnp.zeros(18, jnp.float32)
  x, h = jax.random.normal(jax.random.key(1), (2, 3, 6), jnp.float32)
  x = x[:, :5]
  (want,) = recurrent.cell("gru", p | {"x_bias": zero, "h_bias": zero}, (h,), x)
  np.testing.assert_allclose(copying.cell(p, h, x), want, atol=1e-6)


def test_both_copiers_are_of_one_size():
  """Within two percent: what the comparison rests on."""
  sizes = [
    copying.size(copying.attention_params(jax.random.key(0), 64)),
    copying.size(copying.gru_params(jax.random.key(0), 24, 42)),
  ]
  assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]


@pytest.mark.slow
def test_attention_reverses():
  """At least 99 % of thirty symbols."""
  p = copying.attention_params(jax.random.key(0), 64)
  p, _ = copying.train("attention", p, True, 300, 3e-3, jax.random.key(1))
  assert copying.accuracy("attention", p, True, 0) >= 0.99


@pytest.mark.parametrize("n", [16, 300])
def test_sharpening_gives_the_entropy_back(n):
  """To 1e-3 where the scores were softer; those that are sharper stay."""
  scores = jax.random.normal(jax.random.key(n), (5, n), jnp.float32)
  target = jnp.float32(1.0)
  found = largest.entropy(largest.sharpened(scores, target))
  np.testing.assert_allclose(found, 1.0, atol=1e-3)
  sharp = 50.0 * scores
  kept = largest.sharpened(sharp, target)
  np.testing.assert_allclose(kept, jax.nn.softmax(sharp), atol=1e-3)


@pytest.mark.slow
def test_the_largest_blurs_and_is_sharpened():
  """99 % among 16; at least half of what 1,024 lose comes back."""
  found = largest.measure(largest.train(jax.random.key(0), 1000), 0)
  plain, cured = found["plain"], found["cured"]
  assert plain[0] >= 0.99
  assert plain[-1] < plain[0] - 0.02
  assert cured[-1] - plain[-1] >= (plain[0] - plain[-1]) / 2
  assert np.all(np.diff(found["top"]) < 0)


def test_vectors_are_counts():
  """Analogies, and products against PMI - log k from counting in loops."""
  texts, words = word2vec.corpus(3000, 0)
  seen = word2vec.pairs(texts)
  loops = [
    (t[i], t[j])
    for t in texts.tolist()
    for i in range(4)
    for j in range(4)
    if 0 < abs(i - j) <= 2
  ]
  assert sorted(map(tuple, seen.tolist())) == sorted(loops)
  noise = texts.ravel()
  v, losses = word2vec.train(
    word2vec.skip_gram, seen[:, 0], seen[:, 1], noise, len(words), 800
  )
  right, total = word2vec.analogies(np.asarray(v["words"]), words)
  assert right >= 0.9 * total
  assert losses[-1] < losses[0]
  pmi = word2vec.shifted_pmi(seen, noise, len(words))
  there = ~np.isnan(pmi)
  product = np.asarray(v["words"] @ v["contexts"].T)
  assert np.corrcoef(pmi[there], product[there])[0, 1] > 0.9
