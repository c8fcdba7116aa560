"""Exercises that check themselves, for the notebooks of the ladder."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def check(
  answer: Callable[..., Any],
  cases: Sequence[tuple[tuple, Any]],
  tolerance: float = 1e-9,
) -> bool:
  """Compares an answer with what is expected, and says what it found.

  Args:
    answer: the reader's function; one that returns None is not written yet.
    cases: pairs of (arguments, expected value).
    tolerance: largest difference, relative to one plus the expected size.

  Returns:
    True if right, False if not written yet.

  Raises:
    AssertionError: with the first case that is wrong.
  """
  for arguments, expected in cases:
    got = answer(*arguments)
    if got is None:
      print(f"{answer.__name__}: still to do")
      return False
    close = np.shape(got) == np.shape(expected) and np.allclose(
      got, expected, rtol=tolerance, atol=tolerance
    )
    if not close:
      raise AssertionError(
        f"{answer.__name__}{arguments} should be {expected}, and is {got}"
      )
  print(f"{answer.__name__}: right")
  return True
