"""How sure a number is: the bootstrap over examples.

A metric is a function of sums over examples (for a mean: of the sum and of the
number). An example is drawn as often as there are examples, with replacement,
and the metric computed anew, a thousand times; the middle 95 % of what comes
out are the interval (Efron 1979; for BLEU: Koehn, W04-3250). Two systems are
compared on the same draws, so that what makes an example hard for both drops
out of the difference.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
TIMES = 1000
LEVEL = 0.95
_CELLS = 1 << 22  # draws that are held at a time


@dataclass(frozen=True)
class Estimate:
  """A number and the interval that holds it.

  Attributes:
    value: of all examples; nan where there is nothing to compute it from.
    low, high: the interval.
  """

  value: float
  low: float
  high: float


def sums(
  stats: Mapping[str, Array], times: int = TIMES, seed: int = 0
) -> dict[str, Array]:
  """Sums over resampled examples, the same resamples for all.

  Args:
    stats: named statistics of the same examples, [n, d] each.
    times: how many resamples.
    seed: of the draws.

  Returns:
    [times, d] for each name.
  """
  (n,) = {len(x) for x in stats.values()}
  found: dict[str, list[Array]] = {name: [] for name in stats}
  for counts in _counts(n, times, seed):
    for name, x in stats.items():
      found[name].append(counts @ x)
  return {name: np.concatenate(parts) for name, parts in found.items()}


def _counts(n: int, times: int, seed: int) -> Iterator[Array]:
  """How often each example is drawn, [some, n] float64 at a time."""
  rng = np.random.default_rng(seed)
  some = max(1, _CELLS // n)
  for first in range(0, times, some):
    rows = min(some, times - first)
    drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=rows * n)
    yield counts.reshape(rows, n).astype(np.float64)


def estimate(
  value: Callable[[Array], Array], stats: Array, drawn: Array
) -> Estimate:
  """A metric with its interval.

  Args:
    value: of sums, [..., d] -> [...].
    stats: of the examples, [n, d].
    drawn: sums over resamples, [times, d].
  """
  return interval(float(value(stats.sum(axis=0))), value(drawn))


def interval(value: float, drawn: Array) -> Estimate:
  """A value and the middle of what was drawn [times]; nan is passed over."""
  drawn = drawn[np.isfinite(drawn)]
  if not len(drawn):
    return Estimate(value, np.nan, np.nan)
  tail = (1 - LEVEL) / 2
  low, high = np.quantile(drawn, [tail, 1 - tail])
  return Estimate(value, float(low), float(high))
