"""Schedules at every step: against optax, and formulas written out here."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.errors import UserError
from jaxlm.optim import SCHEDULES, make_schedule
from jaxlm.optim.schedules import wsd

STEPS, WARMUP, PEAK, FINAL = 200, 30, 3e-3, 0.1


def values(schedule, n=STEPS + 50):
  """The rate at every step, under jit and strict promotion."""
  return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(n)))


def up(step):
  return PEAK * step / WARMUP


def reference(name, step, final=FINAL):
  """The textbook, in Python floats; transformers' formulas for all it has.

  `get_cosine_with_min_lr_schedule_with_warmup`, `get_linear_...`,
  `get_wsd_schedule(decay_type="linear")`, `get_inverse_sqrt_schedule`.
  """
  if step < WARMUP:
    return up(step)
  p = min((step - WARMUP) / (STEPS - WARMUP), 1.0)
  if name == "constant":
    return PEAK
  if name == "linear":
    return PEAK * (final + (1 - final) * (1 - p))
  if name == "cosine":
    return PEAK * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * p)))
  if name == "wsd":
    stable = STEPS - 40  # the last fifth decays
    q = min(max(step - stable, 0) / 40, 1.0)
    return PEAK * (final + (1 - final) * (1 - q))
  shift = WARMUP - WARMUP
  return PEAK * max(1 / math.sqrt((step + shift) / WARMUP), final)


@pytest.mark.parametrize(
  "name", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]
)
def test_every_step_is_the_formula(name):
  """From step 0 past the end, within float32."""
  got = values(make_schedule(name, PEAK, STEPS, WARMUP, FINAL))
  want = [reference(name, t) for t in range(len(got))]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


def test_every_step_is_optax():
  """Cosine with warm-up and one-cycle are optax's own functions."""
  steps = jnp.arange(STEPS + 50)
  with jax.numpy_dtype_promotion("standard"):
    cosine = optax.warmup_cosine_decay_schedule(
      0.0, PEAK, WARMUP, STEPS, PEAK * FINAL
    )
    cosine = jax.vmap(cosine)(steps)
    cycle = jax.vmap(optax.cosine_onecycle_schedule(STEPS, PEAK))(steps)
  got = values(make_schedule("cosine", PEAK, STEPS, WARMUP, FINAL))
  np.testing.assert_allclose(got, cosine, rtol=1e-6)
  got = values(make_schedule("one_cycle", PEAK, STEPS))
  np.testing.assert_allclose(got, cycle, rtol=1e-6)


def test_one_cycle_obeys_its_numbers():
  """The peak comes at the end of the warm-up; the end is a share of it."""
  got = values(make_schedule("one_cycle", PEAK, STEPS, WARMUP, FINAL))
  assert got.argmax() == WARMUP
  np.testing.assert_allclose(
    got[[0, WARMUP, STEPS, -1]],
    [PEAK / 25, PEAK, PEAK * FINAL, PEAK * FINAL],
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  ("shape", "middle"),
  [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)],
)
def test_wsd_decays(shape, middle):
  """Flat until the decay, half way down as its shape says, then at the end."""
  got = values(wsd(PEAK, STEPS, WARMUP, 0.0, 0.5, shape))
  assert (got[WARMUP:101] == np.float32(PEAK)).all()
  assert got[150] == pytest.approx(PEAK * middle, rel=1e-5)
  assert got[STEPS] == 0


def test_inverse_sqrt_without_warmup_starts_at_the_peak():
  """Time scale 10000, as transformers has it when there is no warm-up."""
  got = values(make_schedule("inverse_sqrt", PEAK, STEPS), 30_001)
  assert got[0] == np.float32(PEAK)
  assert got[30_000] == pytest.approx(PEAK / 2, rel=1e-5)


@hypothesis.given(
  name=st.sampled_from([n for n in SCHEDULES if n != "one_cycle"]),
  steps=st.integers(2, 400),
  share=st.floats(0, 0.9),
  final=st.floats(0, 1),
)
@hypothesis.settings(max_examples=30)
def test_rates_stay_between_zero_and_peak(name, steps, share, final):
  """Up to the peak, then never up again, never below the end."""
  warmup = int(share * steps)
  got = values(make_schedule(name, 1.0, steps, warmup, final), 500)
  assert got.min() >= 0
  assert got.max() <= 1 + 1e-6
  assert got[warmup] == pytest.approx(1.0, abs=1e-6)
  assert (np.diff(got[: warmup + 1]) >= 0).all()
  assert (np.diff(got[warmup:]) <= 1e-6).all()
  assert got[warmup:].min() >= final - 1e-6 or name == "constant"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"name": "cosin"}, "did you mean 'cosine'"),
    ({"warmup": 200}, "shorter than the run"),
    ({"warmup": -1}, "shorter than the run"),
    ({"final": 1.5}, "between 0 and 1"),
    ({"peak": -1.0}, "must not be negative"),
    ({"name": "wsd", "decay": 0.0}, "0 < share"),
  ],
)
def test_impossible_numbers_are_explained(change, message):
  """What cannot be scheduled is refused before the run."""
  numbers = {"name": "cosine", "peak": 1.0, "steps": 200, **change}
  with pytest.raises(UserError, match=message):
    make_schedule(**numbers)
