"""Guards of RL: each failure was met by somebody, and would be silent."""

import math

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.rl import advantages, guards, losses, questions, rewards
from jaxlm.rl.options import GRPO, PPO
from jaxlm.rl.rollout import Draw
from jaxlm.tasks import Example

FIRST = {"entropy": 2.0, "length": 20.0}
FINE = FIRST | {"loss": 0.1, "grad_norm": 1.0, "gap": 1e-6, "kl": 3.0}
FINE |= {"dead_groups": 0.3, "reward_std": 0.4}


def test_a_healthy_step_raises_no_alarm():
  """Nor does one of which little is known."""
  assert guards.alarms(FINE, FIRST) == []
  assert guards.alarms({}, {}) == []


@pytest.mark.parametrize(
  ("change", "stops"),
  [
    ({"loss": math.nan}, True),
    ({"grad_norm": math.inf}, True),
    ({"gap": math.nan}, True),  # a log-probability is NaN
    ({"gap": 5e-5}, False),  # rounding, but more than there should be
    ({"gap": 0.3}, True),  # T = 0.2 on one side, 1 on the other
    ({"kl": 80.0}, True),
    ({"entropy": 0.01}, False),
    ({"length": 2.0}, False),
    ({"dead_groups": 0.95}, False),
    ({"reward_std": 0.0}, False),
  ],
)
def test_each_failure_is_named(change, stops, tmp_path, capsys):
  """By name, value and step, and with what to do; some end the run."""
  (alarm,) = guards.alarms(FINE | change, FIRST)
  (name,) = change
  assert (alarm.name, alarm.stop) == (name, stops)
  if stops:
    with pytest.raises(UserError, match=f"{name} is .* at step 7.*before"):
      guards.act([alarm], 7, tmp_path, "stop")
  guards.act([alarm], 7, tmp_path, "warn")
  assert f"warning: {name} is" in capsys.readouterr().out


def test_part_of_a_group_is_refused():
  """A micro-batch of 3 of a group of 4, and rows out of order."""
  guards.check_groups(np.array([0, 0, 1, 1]), 2)
  for group in ([0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1, 1]):
    with pytest.raises(UserError, match="whole groups"):
      guards.check_groups(np.array(group), 2)
  with pytest.raises(UserError, match="group of one"):
    guards.check_groups(np.array([0, 1]), 1)


def test_a_part_of_a_group_has_other_advantages():
  """What the guard is for: the same rewards, cut in halves."""
  r = np.array([[1.0, 0, 0, 0]], np.float32)
  whole = advantages.group_relative(r)
  cut = advantages.group_relative(r.reshape(2, 2)).reshape(1, 4)
  assert abs(whole - cut).max() > 0.5


def test_padding_that_is_seen_is_found():
  """A score that reads the whole row, and one that reads the response."""
  tokens = np.array([[1, 2, 3, 0, 0], [1, 2, 3, 4, 0]])
  mask = np.array([[1, 0, 0], [1, 1, 0]], bool)
  starts = np.array([2, 2])

  def good(tokens):
    return np.cumsum(tokens, axis=1)[:, 2:].astype(float)

  guards.check_padding(good, tokens, mask, starts, 9)
  with pytest.raises(UserError, match="padding changes"):
    guards.check_padding(
      lambda t: good(t) + t.sum(1)[:, None], tokens, mask, starts, 9
    )


def test_accumulation_that_changes_the_loss_is_found():
  """Means of token losses joined without weights: rows of 1 and 4 tokens."""
  x = np.array([[4.0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
  mask = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], bool)
  whole = float(losses.aggregate(x, mask)[0])
  parts = [losses.aggregate(x[i : i + 1], mask[i : i + 1]) for i in (0, 1)]
  right = [(float(m), float(w)) for m, w in parts]
  guards.check_accumulation(whole, right)
  with pytest.raises(UserError, match="accumulation changes the loss"):
    guards.check_accumulation(whole, [(m, 1.0) for m, _ in right])


# --- Rewards ----------------------------------------------------------------

ASKED = [Example(f"{i}=", str(i), "x", str(i), "copy", 1) for i in range(4)]
TEXTS = ["0", "1", "2", "3"]


def test_rewards_that_are_fine():
  """They come through as they are."""
  got = rewards.judged(lambda e, t: [1, 0, 0.5, 1], ASKED, TEXTS)
  np.testing.assert_array_equal(got.rewards, [1, 0, 0.5, 1])
  assert got.valid.all()


@pytest.mark.parametrize(
  ("reward", "said"),
  [
    (lambda e, t: 1 / 0, "raised ZeroDivisionError"),
    (lambda e, t: [1.0], "returned 1 values for 4"),
    (lambda e, t: 0.5, "returned 0.5 for 4"),
    (lambda e, t: ["good"] * 4, "returned 4 values"),
    (lambda e, t: None, "returned None"),
    (lambda e, t: [math.nan] * 4, "no finite number"),
  ],
)
def test_rewards_that_make_no_sense(reward, said):
  """One sentence that names the function and what it did."""
  with pytest.raises(UserError, match=said):
    rewards.judged(reward, ASKED, TEXTS)


def test_a_reward_that_is_nan_is_counted_and_moves_nothing():
  """The others of its group keep their mean, and it gets that mean."""
  found = rewards.judged(lambda e, t: [1, math.nan, 0, 1], ASKED, TEXTS)
  assert found.valid.tolist() == [True, False, True, True]
  np.testing.assert_array_equal(rewards.filled(found, 2), [1, 1, 0, 1])
  np.testing.assert_allclose(rewards.filled(found, 4)[1], 2 / 3)


def test_a_missing_end_costs():
  """Only where it is missing."""
  ended = np.array([True, False])
  got = rewards.without_end(np.ones(2, np.float32), ended, 0.75)
  np.testing.assert_array_equal(got, [1, 0.25])


# --- Input ------------------------------------------------------------------


def test_prompts_too_long_are_counted_or_an_error():
  """Those that fit are kept; if none does, that is said."""
  longer = [Example("1" * n, "", "x", "", "copy", 1) for n in (2, 9, 3)]
  found = questions.encoded(longer, list, 5)
  assert (len(found), found.skipped) == (2, 1)
  with pytest.raises(UserError, match="the shortest of 3 has 2"):
    questions.encoded(longer, list, 1)


def test_questions_follow_from_seed_and_step():
  """The same again, others in other steps, none twice in one."""
  asked = questions.encoded(ASKED, lambda text: [1] * len(text), 5)
  first, again = (asked.of_step(3, 0, 5) for _ in range(2))
  assert first.examples == again.examples
  assert len({e.prompt for e in first.examples}) == 3
  steps = {asked.of_step(3, 0, n).examples for n in range(8)}
  assert len(steps) > 1
  assert len(asked.of_step(9, 0, 0)) == 9


def test_a_tokenizer_without_an_end():
  """Then no response could have one."""

  class Endless:
    eot = None

  with pytest.raises(UserError, match="no end of text"):
    questions.end_of(Endless())


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda: GRPO(samples=1), "group of one"),
    (lambda: GRPO(over="words"), "over='words'; known: token"),
    (lambda: GRPO(prompts=3).updates(16), "does not divide"),
    (lambda: PPO(kl_kind="k4"), "known: k1, k2, k3"),
    (lambda: PPO(lam=1.5), "lam=1.5"),
    (lambda: PPO(kl=-1.0), "must not be negative"),
    (lambda: Draw(0), "use 1 or more"),
    (lambda: Draw(4, temperature=0.0), "explores nothing"),
    (lambda: Draw(4, top_k=-1), "top_k=-1"),
  ],
)
def test_options_that_make_no_sense(make, said):
  """Refused with what is allowed."""
  with pytest.raises(UserError, match=said):
    make()
