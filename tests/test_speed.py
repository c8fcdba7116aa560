"""Rates count training and nothing else; the progress line says them."""

import math
import time

import jax.numpy as jnp
import pytest

from jaxlm import speed


@pytest.fixture
def now(monkeypatch):
  """A clock that goes when told to."""

  class Clock:
    at = 100.0

    def __call__(self):
      return self.at

  clock = Clock()
  monkeypatch.setattr(time, "perf_counter", clock)
  return clock


def test_throughput_leaves_out_what_interrupts(now):
  """10 tokens every 2 seconds, whatever compiling and evaluation take."""
  rate = speed.Throughput(tokens_per_step=10)
  assert math.isnan(rate.tokens_per_sec())
  now.at += 50  # compiling, and the first step
  rate.tick(1)
  assert math.isnan(rate.tokens_per_sec())
  assert math.isnan(rate.seconds_left(9))
  for step in (2, 3):
    now.at += 2
    with rate.paused():
      now.at += 30
    rate.tick(step)
  assert rate.tokens_per_sec() == pytest.approx(5)
  now.at += 1
  rate.tick(4)
  assert rate.tokens_per_sec() == pytest.approx(10)  # since last asked
  assert rate.mean() == pytest.approx(30 / 5)
  # The time left counts the pauses, which go on as they did: 65 s for 3 steps.
  assert rate.seconds_left(7) == pytest.approx(65)
  assert rate.seconds_left(4) == 0


def fails_in_pause(rate, now) -> None:
  with rate.paused(after=jnp.ones((2,))):
    now.at += 7
    raise KeyError


def test_a_pause_ends_by_an_error_too(now):
  rate = speed.Throughput(1)
  rate.tick(0)
  with pytest.raises(KeyError):
    fails_in_pause(rate, now)
  now.at += 1
  rate.tick(1)
  assert rate.mean() == pytest.approx(1)


def test_progress_line():
  """One line; what is not known is not said."""
  assert speed.progress(5, 2000, 3.0) == "step    5/2000 | loss 3.000"
  line = speed.progress(1200, 2000, 1.7312, 41_200, 0.61, 34.2, val_loss=1.8)
  assert line == (
    "step 1200/2000 | loss 1.731 | val_loss 1.8 | 41.2k tok/s | "
    "61% of matmul peak | 0:34 left"
  )
  assert "nan" in speed.progress(1, 2, math.nan)


@pytest.mark.parametrize(
  ("number", "words"),
  [
    (0, "0.00"),
    (9.994, "9.99"),
    (9.996, "10.0"),
    (99.96, "100"),
    (999.6, "1.00k"),
    (41_200, "41.2k"),
    (2.1e11, "210G"),
    (1e18, "1000P"),
  ],
)
def test_short_numbers(number, words):
  assert speed.short(number) == words


def test_clock():
  assert [speed.clock(s) for s in (0.4, 59.6, 3725)] == [
    "0:00",
    "1:00",
    "1:02:05",
  ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_peak(dtype):
  """Above what one scalar core could do, below any machine's sky; and soon."""
  peak = speed.matmul_peak(dtype, seconds=0.1)
  assert 5e8 < peak < 1e17


def test_memory():
  """This process holds JAX: more than 50 MB, less than the machine."""
  assert 50e6 < speed.memory()["host"] < 1e13
