"""Before and after: two sets of responses to the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.evaluate import bootstrap
from jaxlm.evaluate.bootstrap import Estimate
from jaxlm.evaluate.measure import Metric, slices
from jaxlm.evaluate.results import Record


@dataclass(frozen=True)
class Change:
  """One metric of both.

  Attributes:
    before, after: each with its own interval.
    difference: after - before, with the interval of the difference, which is
      narrower than the two suggest: both are judged on the same draws.
    wins: the share of draws in which `after` is the better one; below 0.025 or
      above 0.975 the difference is hardly chance.
  """

  before: Estimate
  after: Estimate
  difference: Estimate
  wins: float


def pairs(
  before: Sequence[Record], after: Sequence[Record]
) -> tuple[list[Record], list[Record]]:
  """The records of those examples that both have, in the order of `after`.

  Raises:
    UserError: if they share none.
  """
  first = {(r.example.prompt, r.example.response): r for r in before}
  keys = [(r.example.prompt, r.example.response) for r in after]
  both = [(first[k], r) for k, r in zip(keys, after, strict=True) if k in first]
  if not both:
    raise UserError(
      "before and after have no example in common, so there is nothing to "
      "compare; evaluate both on the same task, split and seed"
    )
  return [a for a, _ in both], [b for _, b in both]


def compare(
  before: Sequence[Record],
  after: Sequence[Record],
  metrics: Sequence[Metric],
  times: int = bootstrap.TIMES,
  seed: int = 0,
) -> dict[str, Change]:
  """Every metric of both, record i of one beside record i of the other.

  The paired bootstrap of Koehn (W04-3250).
  """
  stats = {
    (side, m.name): m.stats(records)
    for side, records in enumerate((before, after))
    for m in metrics
  }
  drawn = bootstrap.sums(stats, times, seed)
  found = {}
  for m in metrics:
    old, new = (
      (m.value(stats[side, m.name].sum(axis=0)), m.value(drawn[side, m.name]))
      for side in (0, 1)
    )
    found[m.name] = _change(*old, *new)
  return found


def sliced(
  before: Sequence[Record],
  after: Sequence[Record],
  metric: Metric,
  times: int = bootstrap.TIMES,
  seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
  """One metric of both in every slice: `[kind][name]` has `n` and `change`."""
  found: dict[str, dict[str, dict[str, Any]]] = {}
  for kind, parts in slices(after).items():
    found[kind] = {}
    for name, where in parts.items():
      sides = ([side[i] for i in where] for side in (before, after))
      change = compare(*sides, [metric], times, seed)[metric.name]
      found[kind][name] = {"n": len(where), "change": change}
  return found


def _change(
  old: np.ndarray, old_drawn: np.ndarray, new: np.ndarray, new_drawn: np.ndarray
) -> Change:
  apart = new_drawn - old_drawn
  return Change(
    bootstrap.interval(float(old), old_drawn),
    bootstrap.interval(float(new), new_drawn),
    bootstrap.interval(float(new - old), apart),
    # A draw in which both are equal is half a win of each.
    float(np.mean((apart > 0) + 0.5 * (apart == 0))),
  )


def flips(
  before: Sequence[Record], after: Sequence[Record]
) -> tuple[list[int], list[int]]:
  """Numbers of the records that have come right, and that have gone wrong."""
  both = list(enumerate(zip(before, after, strict=True)))
  fixed = [i for i, (a, b) in both if b.right and not a.right]
  broken = [i for i, (a, b) in both if a.right and not b.right]
  return fixed, broken
