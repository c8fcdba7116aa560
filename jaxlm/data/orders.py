"""Orders of training examples: curricula, as values.

Each says which of `n` examples, sorted from easy to hard, the rows of a batch
are, as a pure function of their numbers and the seed. So a curriculum resumes
like everything else: there is no state.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxlm.data.loader import Shuffle
from jaxlm.errors import UserError


class Order(Protocol):
  """Which examples are trained on, and when.

  Attributes:
    graded: whether difficulty matters, so that easy ones must not be packed
      into a row with hard ones.
  """

  graded: bool

  def pick(
    self,
    grades: np.ndarray,
    numbers: np.ndarray,
    bits: np.ndarray,
    share: float,
    shuffle: Shuffle,
  ) -> np.ndarray:
    """The examples of some rows, int64 [rows].

    Args:
      grades: how hard each example is, ascending, [n].
      numbers: of the rows since the run began, ascending, [rows].
      bits: random numbers that belong to the rows, uint64 [rows].
      share: how much of the run is over, from 0 to 1.
      shuffle: the run's permutations.
    """


@dataclass(frozen=True)
class Random:
  """Every epoch in a new random order."""

  graded = False

  def pick(self, grades, numbers, bits, share, shuffle) -> np.ndarray:
    """As `Order.pick`."""
    return shuffle(len(grades), numbers)


@dataclass(frozen=True)
class ShortToLong:
  """Every epoch from easy to hard; equals in a new random order."""

  graded = True

  def pick(self, grades, numbers, bits, share, shuffle) -> np.ndarray:
    """As `Order.pick`."""
    epochs, place = np.divmod(numbers, len(grades))
    chosen = np.empty_like(place)
    for epoch in np.unique(epochs):
      tie = shuffle.epoch(len(grades), int(epoch))
      order = tie[np.argsort(grades[tie], kind="stable")]
      chosen[epochs == epoch] = order[place[epochs == epoch]]
    return chosen


@dataclass(frozen=True)
class Competence:
  """The easiest first, and more of them as the model learns.

  When a share t of the run is over, examples are drawn from the easiest c(t):

      c(t) = min(1, sqrt(t / T (1 - c0^2) + c0^2))

  (Platanios et al., arXiv:1903.09848, equation 6, with the rank of an example
  for its difficulty). From c = 1 on, the order is that of `Random`.

  Attributes:
    start: c0, the share of the examples that is seen at first.
    until: T, the share of the run after which all are.
  """

  start: float = 0.01
  until: float = 0.5

  graded = True

  def __post_init__(self):
    if not (0 < self.start <= 1 and 0 < self.until <= 1):
      raise UserError(
        f"a competence that starts at {self.start} and is whole at "
        f"{self.until} of the run; both are shares above 0"
      )

  def at(self, share: float) -> float:
    """C(t), how much of the examples is seen when so much of a run is over."""
    c2 = share / self.until * (1 - self.start**2) + self.start**2
    return min(1.0, c2**0.5)

  def pick(self, grades, numbers, bits, share, shuffle) -> np.ndarray:
    """As `Order.pick`."""
    competence = self.at(share)
    if competence == 1.0:
      return shuffle(len(grades), numbers)
    seen = max(1, round(competence * len(grades)))
    return (bits % np.uint64(seen)).astype(np.int64)


ORDERS = {
  "random": Random,
  "short_to_long": ShortToLong,
  "competence": Competence,
}
