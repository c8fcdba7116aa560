"""Advantages and losses of RL: hand values and closed forms, to 1e-7."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.rl import advantages as adv
from jaxlm.rl import losses

EXACT = {"rtol": 1e-7, "atol": 1e-7}
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)


@pytest.fixture(autouse=True)
def float64():
  """A formula is right to more digits than float32 has."""
  with jax.enable_x64(True):
    yield


def array(*x) -> jax.Array:
  return jnp.asarray(x, jnp.float64)


def random(*shape: int, seed: int = 0) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def close(got, want) -> None:
  np.testing.assert_allclose(got, want, **EXACT)


# --- Advantages -------------------------------------------------------------


def test_token_rewards_pay_the_score_at_the_last_token():
  """By hand; what stands behind the end earns nothing."""
  kl = array([0.1, 0.2, 0.3, 9.0], [0.4, 0.5, 9.0, 9.0])
  got = adv.token_rewards(array(1.0, 2.0), kl, MASK, array(0.5)[0])
  close(got, [[-0.05, -0.1, 0.85, 0], [-0.2, 1.75, 0, 0]])


def test_gae_by_hand():
  """Gamma 0.9, lam 0.5, so A decays by 0.45 from the end."""
  r, v = array([0, 0, 1, 7.0]), array([0.5, 0.25, 0.5, 7.0])
  a, target = adv.gae(r, v, MASK[:1], 0.9, 0.5)
  last = 1 - 0.5
  middle = 0.9 * 0.5 - 0.25 + 0.45 * last
  first = 0.9 * 0.25 - 0.5 + 0.45 * middle
  close(a, [[first, middle, last, 0]])
  close(target, [[first + 0.5, middle + 0.25, 1, 0]])


def test_gae_between_its_two_ends():
  """Lam = 0: the temporal difference; lam = 1: the return minus the value."""
  r, v = random(2, 4), random(2, 4, seed=1)
  m = MASK.astype(float)
  following = np.pad((v * m)[:, 1:], ((0, 0), (0, 1)))
  close(adv.gae(r, v, MASK, 0.9, 0.0)[0], (r + 0.9 * following - v) * m)
  togo = np.zeros((2, 5))
  for t in reversed(range(4)):
    togo[:, t] = (r[:, t] + 0.9 * togo[:, t + 1]) * m[:, t]
  close(adv.returns(r, MASK, 0.9), togo[:, :4])
  a, target = adv.gae(r, v, MASK, 0.9, 1.0)
  close(a, togo[:, :4] - v * m)
  close(target, togo[:, :4])


def test_whiten():
  """Mean 0 and sample variance 1 over the mask; or the mean stays."""
  x = random(2, 4) * 3 + 5
  there = np.asarray(x)[MASK]
  y = np.asarray(adv.whiten(x, MASK))
  close(y[MASK], (there - there.mean()) / np.sqrt(there.var(ddof=1) + 1e-8))
  assert (y[~MASK] == 0).all()
  close(np.asarray(adv.whiten(x, MASK, False))[MASK] - there.mean(), y[MASK])


def test_group_relative():
  """Rewards 1, 0, 0, 1: mean 1/2, deviation 1/sqrt 3."""
  r = array([1, 0, 0, 1], [2, 2, 2, 2])
  a = 0.5 / (3**-0.5 + 1e-4)
  close(adv.group_relative(r), [[a, -a, -a, a], [0, 0, 0, 0]])
  close(adv.group_relative(r, "none")[0], [0.5, -0.5, -0.5, 0.5])
  std = np.std(r, ddof=1) + 1e-4
  close(adv.group_relative(r, "batch")[0, 0], 0.5 / std)


def test_leave_one_out():
  """Against the mean of the others, computed as such."""
  r = random(3, 4)
  others = [[np.delete(row, i).mean() for i in range(4)] for row in r]
  close(adv.leave_one_out(r), r - np.array(others))


def test_reinforce():
  """The baseline comes off, nothing else."""
  close(adv.reinforce(array([1, 0.5]), jnp.asarray(0.75)), [[0.25, -0.25]])


@hypothesis.settings(max_examples=8)
@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_running_statistics_do_not_depend_on_how_rewards_came(sizes):
  """In whatever parts: count, mean and deviation are those of all."""
  zero = jnp.zeros((), jnp.float64)
  running, x = adv.Running(zero, zero, zero), random(sum(sizes)) * 2 + 3
  for part in np.split(x, np.cumsum(sizes)[:-1]):
    running = adv.seen(running, jnp.asarray(part))
  close(running.mean, x.mean())
  close(running.std, np.std(x, ddof=1) if len(x) > 1 else 1.0)
  close(adv.scaled(x, running) * running.std, x)


# --- Losses -----------------------------------------------------------------


def test_policy_loss_by_hand():
  """Both signs of A, inside and outside of both bounds."""
  w = array([1.1, 1.5, 0.5, 1.5, 0.5])
  a = array([2.0, 2, 2, -2, -2])
  loss, clipped = losses.policy_loss(jnp.log(w), a, 0.2, 0.3)
  close(loss, [[-2.2, -2.6, -1.0, 3.0, 1.6]])
  close(clipped, [[0, 1, 0, 0, 1]])


def test_clipped_tokens_have_no_gradient():
  """The other three push, and as hard as w A."""
  w = array([1.1, 1.5, 0.5, 1.5, 0.5])
  a = array([2.0, 2, 2, -2, -2])
  grad = jax.grad(lambda x: losses.policy_loss(x, a, 0.2, 0.3)[0].sum())
  close(grad(jnp.log(w)), [[-2.2, 0, -1.0, 3.0, 0]])


def test_log_ratio_of_a_sequence_is_the_mean_of_its_tokens():
  """GSPO: the geometric mean of the token ratios, for every token."""
  p, q = random(2, 4), random(2, 4, seed=1)
  w = np.exp(losses.log_ratio(p, q, MASK, "sequence"))
  for i, row in enumerate(MASK):
    ratios = np.exp(np.asarray(p - q))[i, row]
    close(w[i], np.prod(ratios) ** (1 / row.sum()) * np.ones(4))
  close(losses.log_ratio(p, q, MASK), np.where(MASK, p - q, 0))


def test_value_loss_by_hand():
  """The worse of the plain and the clipped error counts."""
  v, old, target = array([2.0, 0.0]), array([1.0, 1.0]), array([3.0, 3.0])
  loss, clipped = losses.value_loss(v, old, target, 0.2)
  close(loss, [[0.5 * 1.8**2, 0.5 * 3.0**2]])
  close(clipped, [[1, 0]])
  close(losses.value_loss(v, old, target, 0.0)[0], [[0.5, 4.5]])


def test_kl_estimators_by_hand():
  """D = log 2: k1, k2, k3."""
  d = np.log(2.0)
  p, q = array([d]), array([0.0])
  wanted = {"k1": d, "k2": d**2 / 2, "k3": 0.5 - 1 + d}
  for kind, value in wanted.items():
    close(losses.kl(p, q, kind), [[value]])


def test_kl_estimators_estimate_kl():
  """Their mean under p is the closed form; k3 is never negative."""
  logits = random(2, 7)
  logp, logq = jax.nn.log_softmax(logits)
  exact = jnp.sum(jnp.exp(logp) * (logp - logq))
  for kind in ("k1", "k3"):
    each = losses.kl(logp[None], logq[None], kind)
    close(jnp.sum(jnp.exp(logp) * each[0]), exact)
  assert (losses.kl(logp[None], logq[None], "k3") >= 0).all()


def test_the_gradient_of_k2_is_that_of_kl():
  """E_p grad k2 = grad KL(p | q), which is why it is used as a loss."""
  logits, logq = random(7), jax.nn.log_softmax(random(7, seed=1))

  def exact(x):
    logp = jax.nn.log_softmax(x)
    return jnp.sum(jnp.exp(logp) * (logp - logq))

  def sampled(x):
    logp = jax.nn.log_softmax(x)
    p = jax.lax.stop_gradient(jnp.exp(logp))
    return jnp.sum(p * losses.kl(logp[None], logq[None], "k2")[0])

  close(jax.grad(sampled)(logits), jax.grad(exact)(logits))


def test_controller():
  """By hand: inside and outside the bounds of the error; off."""
  control = losses.Controller(6.0, 0.1)
  close(control(0.2, 6.6), 0.2 * 1.01)
  close(control(0.2, 60.0), 0.2 * 1.02)
  close(control(0.2, 0.0), 0.2 * 0.98)
  assert losses.Controller()(0.2, 60.0) == 0.2


def test_entropy():
  """Of a uniform choice among 5 of 7 tokens: log 5; and of any softmax."""
  logits = jnp.where(jnp.arange(7) < 5, 3.0, -jnp.inf)[None]
  close(losses.entropy(logits), [np.log(5)])
  assert np.isfinite(jax.grad(lambda x: losses.entropy(x).sum())(logits)).all()
  p = jax.nn.softmax(random(2, 7))
  close(losses.entropy(random(2, 7)), -jnp.sum(p * jnp.log(p), -1))


def test_aggregate_by_hand():
  """Rows of 3 and 2 tokens with sums 6 and 10, room for 4."""
  x = array([1, 2, 3, 99], [4, 6, 99, 99])
  close(losses.aggregate(x, MASK, "token"), (16 / 5, 5))
  close(losses.aggregate(x, MASK, "sequence"), ((2 + 5) / 2, 2))
  close(losses.aggregate(x, MASK, "constant", 4), (16 / 8, 2))


@pytest.mark.parametrize("over", ["token", "sequence", "constant"])
def test_parts_of_a_batch_join_to_the_whole(over):
  """Accumulation changes no loss, though rows differ in length; the plain
  mean of the parts, a mistake of several trainers, is another number.
  """
  x, lengths = random(6, 5), np.array([1, 5, 2, 3, 5, 4])
  mask = np.arange(5)[None] < lengths[:, None]
  whole, weight = losses.aggregate(x, mask, over, 5)
  cuts = [slice(0, 1), slice(1, 3), slice(3, 6)]
  parts = [losses.aggregate(x[c], mask[c], over, 5) for c in cuts]
  close(sum(w for _, w in parts), weight)
  close(sum(m * w for m, w in parts) / weight, whole)
  assert abs(np.mean([m for m, _ in parts]) - whole) > 1e-3


def test_padding_changes_nothing():
  """More room behind the responses, filled with anything: the same numbers."""
  pad = ((0, 0), (0, 3))
  mask = np.pad(MASK, pad)
  r, v = random(2, 4), random(2, 4, seed=1)
  rr, vv = (jnp.pad(x, pad, constant_values=1e3) for x in (r, v))
  close(
    adv.gae(rr, vv, mask, 1.0, 0.9)[0][:, :4], adv.gae(r, v, MASK, 1, 0.9)[0]
  )
  close(adv.whiten(rr, mask)[:, :4], adv.whiten(r, MASK))
  for over in ("token", "sequence"):
    close(losses.aggregate(rr, mask, over), losses.aggregate(r, MASK, over))
