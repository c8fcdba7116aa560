"""Measures of generated texts, against numbers worked out by hand."""

import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.generate import measures

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=4)


def test_distinct_by_hand():
  """1 2 1 2 has two kinds among three pairs; over both texts three of five."""
  assert measures.distinct([[1, 2, 1, 2]], 1) == 0.5
  assert measures.distinct([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
  assert measures.distinct([[1, 2, 1, 2], [1, 2, 3]], 2) == pytest.approx(3 / 5)
  assert measures.distinct([[1]], 2) == 0.0


def test_repetition_by_hand():
  """Of 5 overlapping 4-grams of a text of period two, three are old."""
  assert measures.repetition([[1, 2] * 4]) == pytest.approx(3 / 5)
  assert measures.repetition([[1, 2, 3, 4, 5]]) == 0.0
  mixed = [[1, 2] * 4, [1, 2, 3, 4, 5], [7]]  # the last is too short
  assert measures.repetition(mixed) == pytest.approx(0.3)
  assert measures.repetition([[7]]) == 0.0


def test_repetition_is_within_a_text():
  """What another text says is no repetition."""
  assert measures.repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0


def test_unigram_entropy_by_hand():
  """One token in two halves is log 2; one token alone is nothing."""
  assert measures.unigram_entropy([[1, 1], [2, 2]]) == pytest.approx(
    math.log(2)
  )
  assert measures.unigram_entropy([[3, 3, 3]]) == 0.0


def test_perplexity_by_hand():
  """The geometric mean of 1/2 and 1/8 is 1/4."""
  assert measures.perplexity([math.log(1 / 2), math.log(1 / 8)]) == (
    pytest.approx(4.0)
  )
  with pytest.raises(UserError, match="no tokens"):
    measures.perplexity([])


def test_entropy_by_hand():
  """Even odds among four is log 4, also where others are ruled out."""
  logits = jnp.array(
    [[0.0, 0.0, 0.0, 0.0, -jnp.inf], [9.0] + [-jnp.inf] * 4], jnp.float32
  )
  np.testing.assert_allclose(
    measures.entropy(logits), [math.log(4), 0.0], atol=1e-6
  )


def test_no_ngrams_of_nothing():
  """An n-gram of no tokens is a mistake, not an endless list."""
  with pytest.raises(UserError, match="n=0"):
    measures.ngrams([1, 2], 0)


@hypothesis.given(TEXTS, st.integers(1, 4))
def test_shares_are_shares(texts, n):
  """Between 0 and 1; what is said a second time is old."""
  assert 0.0 <= measures.distinct(texts, n) <= 1.0
  assert 0.0 <= measures.repetition(texts, n) <= 1.0
  for text in texts:
    if len(text) >= n:
      old = measures.repetition([list(text) * 2], n)
      assert old >= (len(text) - n + 1) / (2 * len(text) - n + 1) - 1e-9
