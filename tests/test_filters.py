"""Filters against transformers' processors, and against their definitions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.generate import filters
from jaxlm.generate.filters import Seen, TopP

FOLDER = Path(__file__).parent / "golden"
LOGITS = np.load(FOLDER / "samplers.npz")["logits"].astype(np.float32) / 256
GOLDEN = dict(np.load(FOLDER / "filters.npz"))

# As in golden/make_filters.py.
MASKS = {
  "min_p 0.05": filters.MinP(0.05),
  "min_p 0.4": filters.MinP(0.4),
  "typical 0.2": filters.Typical(0.2),
  "typical 0.9": filters.Typical(0.9),
  "eta 0.02": filters.Eta(0.02),
  "eta 0.3": filters.Eta(0.3),
  "epsilon 0.1": filters.Epsilon(0.1),
  "no_repeat 1": filters.NoRepeat(1),
  "no_repeat 2": filters.NoRepeat(2),
  "no_repeat 3": filters.NoRepeat(3),
  "banned": filters.Banned(((3,), (1, 4), (5, 2, 7))),
}


def text(tokens: np.ndarray, start: int = 0, spare: int = 4) -> Seen:
  """These tokens, with two empty places before and `spare` behind them."""
  tokens = np.pad(tokens, ((0, 0), (2, spare)), constant_values=-1)
  tokens[:, tokens.shape[1] - spare :] = 99  # what is there is not read
  end = tokens.shape[1] - spare
  return Seen(jnp.asarray(tokens, jnp.int32), jnp.int32(start), jnp.int32(end))


SEEN = text(GOLDEN["tokens"].astype(np.int32))


@pytest.mark.parametrize("name", MASKS)
def test_ten_thousand_masks_equal_transformers(name: str):
  """Every token of every row: kept there, kept here."""
  out = jax.jit(MASKS[name])(jnp.asarray(LOGITS), SEEN)
  want = np.unpackbits(GOLDEN[f"kept {name}"], axis=1, count=LOGITS.shape[1])
  kept = np.isfinite(out)
  assert 0 < kept.mean() < 1
  np.testing.assert_array_equal(kept, want.astype(bool))
  np.testing.assert_array_equal(np.asarray(out)[kept], LOGITS[kept])


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_transformers(penalty: float):
  """Positive and negative logits, once and several times seen."""
  some = Seen(SEEN.tokens[:200], SEEN.start, SEEN.end)
  out = filters.Repetition(penalty)(jnp.asarray(LOGITS[:200]), some)
  np.testing.assert_allclose(out, GOLDEN[f"repetition {penalty}"], rtol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_by_bisection_is_top_p_by_sort(p: float):
  """On ten thousand rows, and on rows full of equal logits."""
  rows = np.concatenate([LOGITS, np.round(LOGITS[:2000])])
  rows[::7, 3] = -np.inf  # what an earlier filter has ruled out
  by_sort = TopP(p, "sort")(jnp.asarray(rows))
  by_bisection = jax.jit(TopP(p))(jnp.asarray(rows))
  np.testing.assert_array_equal(by_bisection, by_sort)


def test_presence_and_frequency_count_new_tokens_alone():
  """By hand: token 1 came twice, once in the prompt; token 2 twice, new."""
  seen = text(np.array([[1, 5, 1, 2, 2]]), start=4)
  logits = jnp.zeros((1, 6))
  out = filters.Presence(0.5)(logits, seen)
  assert out[0].tolist() == [0, -0.5, -0.5, 0, 0, 0]
  out = filters.Frequency(0.5)(logits, seen)
  assert out[0].tolist() == [0, -0.5, -1.0, 0, 0, 0]


def test_bias_adds_and_bans():
  """-inf is a ban; several biases at once."""
  out = filters.Bias(((1, 2.0), (3, -np.inf)))(jnp.zeros((2, 4)), SEEN)
  assert out.tolist() == [[0, 2, 0, -np.inf]] * 2


def test_an_end_waits_for_its_time():
  """Two new tokens are there and three are asked for; then it may come."""
  seen = text(np.array([[1, 5, 1, 2]]), start=4)
  out = filters.AtLeast(3, (0, 2))(jnp.zeros((1, 4)), seen)
  assert np.isfinite(out)[0].tolist() == [False, True, False, True]
  assert np.isfinite(filters.AtLeast(2, (0,))(jnp.zeros((1, 4)), seen)).all()


def test_no_repeat_finds_nothing_in_an_empty_text():
  """Padding in front of the text makes no n-gram."""
  empty = Seen(jnp.full((1, 6), -1), jnp.int32(0), jnp.int32(3))
  assert np.isfinite(filters.NoRepeat(2)(jnp.zeros((1, 4)), empty)).all()


@pytest.mark.parametrize(
  "make",
  [
    lambda: filters.MinP(1.5),
    lambda: filters.Typical(0.0),
    lambda: filters.Eta(1.0),
    lambda: filters.Epsilon(-0.1),
    lambda: filters.Repetition(0.0),
    lambda: filters.NoRepeat(0),
    lambda: filters.Banned(((),)),
    lambda: TopP(0.5, "guess"),
  ],
)
def test_values_that_make_no_sense(make):
  """Said where they are made, not when they are used."""
  with pytest.raises(UserError, match=r"use|makes no sense|empty"):
    make()
