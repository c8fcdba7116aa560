"""Losses of preferences and distillation: hand values, closed forms, slopes.

All in float64, so that 1e-7 says something.
"""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import losses
from jaxlm import preference_losses as pref

W = (0.5, -1.0, 2.0, 0.25)  # chosen
L = (0.1, 0.5, -1.0, 0.25)  # rejected


@pytest.fixture(autouse=True)
def float64():
  """Double precision while a test of this file runs."""
  with jax.enable_x64(True):
    yield


def sigmoid(x: float) -> float:
  """As in a book."""
  return 1 / (1 + math.exp(-x))


def close(got, want) -> None:
  """Equal to 1e-7."""
  np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7)


def by_hand(fn) -> list[float]:
  """A formula of Python's, pair by pair."""
  return [fn(w, r) for w, r in zip(W, L, strict=True)]


def soft(h: float, e: float) -> float:
  """The logistic loss of h with a share e of labels wrong."""
  return -(1 - e) * math.log(sigmoid(h)) - e * math.log(sigmoid(-h))


# Each loss with its arguments, and its formula written out once more.
PAIRED = {
  "bradley_terry": (pref.bradley_terry, (), lambda w, r: soft(w - r, 0)),
  "margin": (
    pref.bradley_terry,
    (0.7, 0.2),
    lambda w, r: soft(w - r - 0.7, 0.2),
  ),
  "hinge": (pref.hinge, (0.5,), lambda w, r: max(0.0, 0.5 - w + r)),
  "dpo": (pref.dpo, (0.3, 0.1), lambda w, r: soft(0.3 * (w - r), 0.1)),
  "ipo": (pref.ipo, (0.2,), lambda w, r: (w - r - 2.5) ** 2),
  "simpo": (pref.simpo, (2.0, 0.5), lambda w, r: soft(2 * (w - r) - 0.5, 0)),
}


@pytest.mark.parametrize("name", PAIRED)
def test_losses_of_pairs_by_hand(name: str):
  """Each formula, written a second time over Python's floats."""
  fn, arguments, formula = PAIRED[name]
  close(fn(jnp.array(W), jnp.array(L), *arguments), by_hand(formula))


def test_losses_in_figures():
  """Figures that anyone can check: log 2 at no difference, and so on."""
  zero, one = jnp.zeros(1), jnp.ones(1)
  close(pref.bradley_terry(zero, zero), math.log(2))
  close(pref.bradley_terry(math.log(3) * one, zero), math.log(4 / 3))
  close(pref.dpo(zero, zero, 0.1, 0.3), math.log(2))
  close(pref.ipo(5 * one, zero, 0.1), 0.0)  # its goal is 1 / (2 beta)
  close(pref.simpo(one, one / 2, 2.0, 1.0), math.log(2))
  close(pref.hinge(2 * one, zero), 0.0)


@pytest.mark.parametrize("gap", [-800.0, 800.0])
def test_far_apart_is_no_overflow(gap: float):
  """Where exp(800) is not a number, the loss is 800 or 0, and has a slope."""
  chosen, rejected = jnp.full(1, gap), jnp.zeros(1)
  close(pref.bradley_terry(chosen, rejected), max(0.0, -gap))
  slope = jax.grad(lambda c: pref.bradley_terry(c, rejected).sum())(chosen)
  close(slope, -1.0 if gap < 0 else 0.0)


def test_margins_may_differ_by_pair():
  """As the degrees of preference of Llama 2 do."""
  margin = jnp.array([0.0, 1.0, 2.0, 3.0])
  got = pref.bradley_terry(jnp.array(W), jnp.array(L), margin)
  want = [soft(w - r - m, 0) for w, r, m in zip(W, L, margin, strict=True)]
  close(got, want)


# --- Rankings ---------------------------------------------------------------


def test_plackett_luce_by_hand():
  """Of three: the best of all three, then the better of the two left."""
  a, b, c = 0.3, -0.2, 1.1
  z = math.exp(a) + math.exp(b) + math.exp(c)
  first = math.log(math.exp(a) / z)
  second = math.log(math.exp(b) / (math.exp(b) + math.exp(c)))
  close(pref.plackett_luce(jnp.array([[a, b, c]])), -first - second)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=4, max_size=4))
def test_rankings_are_a_distribution(scores: list[float]):
  """The probabilities of all 24 orders of four answers sum to one."""
  orders = np.array(list(itertools.permutations(scores)))
  close(jnp.exp(-pref.plackett_luce(jnp.array(orders))).sum(), 1.0)


def test_a_ranking_of_two_is_a_pair():
  """And answers that are not there change nothing, whatever their score."""
  pairs = jnp.stack([jnp.array(W), jnp.array(L)], axis=1)
  want = pref.bradley_terry(jnp.array(W), jnp.array(L))
  close(pref.plackett_luce(pairs), want)
  more = jnp.concatenate([pairs, jnp.full((4, 2), 9.0)], axis=1)
  mask = jnp.array([[1, 1, 0, 0]] * 4)
  close(pref.plackett_luce(more, mask), want)
  slope = jax.jit(jax.grad(lambda x: pref.plackett_luce(x, mask).sum()))(more)
  assert np.isfinite(slope).all()
  assert (slope[:, 2:] == 0).all()


# --- Policies ---------------------------------------------------------------


def test_kto_by_hand():
  """Good and bad have their own sides of the baseline, and their weights."""
  ratio, good = jnp.array([0.5, 0.5, -1.0]), jnp.array([True, False, False])
  got = pref.kto(ratio, good, jnp.array(0.2), 0.4, (1.5, 0.5))
  want = [
    1.5 * (1 - sigmoid(0.4 * (0.5 - 0.2))),
    0.5 * (1 - sigmoid(0.4 * (0.2 - 0.5))),
    0.5 * (1 - sigmoid(0.4 * (0.2 + 1.0))),
  ]
  close(got, want)


def test_the_baseline_of_kto():
  """A mean over what counts, never below zero, and no way for gradients."""
  ratio = jnp.array([1.0, 2.0, 30.0])
  close(pref.kl_baseline(ratio), 11.0)
  close(pref.kl_baseline(ratio, jnp.array([1, 1, 0])), 1.5)
  close(pref.kl_baseline(-ratio), 0.0)
  close(pref.kl_baseline(ratio, jnp.zeros(3)), 0.0)
  close(jax.grad(lambda x: pref.kl_baseline(x))(ratio), 0.0)

  def loss(z):
    return pref.kto(ratio, ratio > 0, z).sum()

  close(jax.grad(loss)(jnp.array(0.3)), 0.0)


def test_orpo_by_hand():
  """From probabilities: odds 3 against odds 1/3 are nine to one."""
  high, low = jnp.log(jnp.array([0.75])), jnp.log(jnp.array([0.25]))
  close(pref.log_odds(high), math.log(3))
  close(pref.orpo(high, low, 0.5), 0.5 * math.log(10 / 9))


@pytest.mark.parametrize("logp", [-1e-9, -0.5, -800.0])
def test_odds_are_exact_at_both_ends(logp: float):
  """Where 1 - p rounds to 0, and where p does."""
  want = {-1e-9: 9 * math.log(10), -0.5: 0.43275212956, -800.0: -800.0}[logp]
  close(pref.log_odds(jnp.array(logp)), want)


# --- Distillation -----------------------------------------------------------

P = (0.5, 0.25, 0.25)
Q = (0.25, 0.5, 0.25)


def test_divergences_by_hand():
  """Of distributions with figures in halves: all are multiples of log 2.

  The logits are shifted, which must not matter.
  """
  teacher, student = jnp.log(jnp.array(P)) + 7, jnp.log(jnp.array(Q)) - 3
  close(losses.forward_kl(teacher, student), 0.25 * math.log(2))
  close(losses.reverse_kl(teacher, student), 0.25 * math.log(2))
  m = [0.3 * p + 0.7 * q for p, q in zip(P, Q, strict=True)]
  kl_p = sum(p * math.log(p / x) for p, x in zip(P, m, strict=True))
  kl_q = sum(q * math.log(q / x) for q, x in zip(Q, m, strict=True))
  got = losses.jensen_shannon(teacher, student, 0.3)
  close(got, 0.3 * kl_p + 0.7 * kl_q)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_divergences_behave(seed: int):
  """None is negative; at one half none is above log 2; the ends are the KLs."""
  p, q = np.random.default_rng(seed).normal(size=(2, 5, 7))
  forward, reverse = losses.forward_kl(p, q), losses.reverse_kl(p, q)
  half = losses.jensen_shannon(p, q)
  assert min(forward.min(), reverse.min(), half.min()) > 0
  assert half.max() <= math.log(2)
  close(half, losses.jensen_shannon(q, p))
  low = losses.jensen_shannon(p, q, 1e-7) / 1e-7
  high = losses.jensen_shannon(p, q, 1 - 1e-7) / 1e-7
  np.testing.assert_allclose(low, forward, rtol=1e-3)
  np.testing.assert_allclose(high, reverse, rtol=1e-3)
  close(losses.forward_kl(p, p + 1), 0.0)


# --- Slopes -----------------------------------------------------------------


def slopes():
  """Every loss as a function of one vector of 8 numbers."""
  yield from (
    (name, lambda x, fn=fn, a=a: fn(x[:4], x[4:], *a).sum())
    for name, (fn, a, _) in PAIRED.items()
  )
  good, z = jnp.array([1, 0, 1, 0, 1, 0, 1, 0], bool), 0.1
  yield "kto", lambda x: pref.kto(x, good, jnp.array(z), 0.5, (1.0, 2.0)).sum()
  yield "orpo", lambda x: pref.orpo(-jnp.exp(x[:4]), -jnp.exp(x[4:])).sum()
  yield "plackett_luce", lambda x: pref.plackett_luce(x.reshape(2, 4)).sum()
  for name in ("forward_kl", "reverse_kl", "jensen_shannon"):
    fn = getattr(losses, name)
    yield name, lambda x, fn=fn: fn(x[:4], x[4:]).sum()


def test_slopes_are_those_of_finite_differences():
  """Of every loss, in every argument that is learned."""
  x, losses_of = np.random.default_rng(0).normal(size=8), dict(slopes())
  steps = 1e-6 * np.eye(8)

  @jax.jit
  def run(x, near):
    got = {name: jax.grad(fn)(x) for name, fn in losses_of.items()}
    return got, {name: jax.vmap(fn)(near) for name, fn in losses_of.items()}

  got, both = run(x, np.concatenate([x + steps, x - steps]))
  for name, y in both.items():
    want = (y[:8] - y[8:]) / 2e-6
    np.testing.assert_allclose(got[name], want, 1e-7, 1e-8, err_msg=name)


def test_ranks_are_checked():
  """A matrix where a vector is meant would be a mean over the wrong things."""
  wrong = jnp.zeros((2, 3))
  for fn in (pref.bradley_terry, pref.hinge, pref.dpo, pref.ipo, pref.simpo):
    with pytest.raises(AssertionError):
      fn(wrong, wrong)
  with pytest.raises(AssertionError):
    losses.forward_kl(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
  chex.assert_rank(pref.plackett_luce(wrong), 1)
