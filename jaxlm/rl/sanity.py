"""What can be wrong with a reward model, as functions of scores alone.

Arrays of NumPy, no model: `reward_check` asks the model and draws the pictures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def accuracy(good: Array, bad: Array) -> tuple[float, float]:
  """How often the better one scores higher, and the standard error of that.

  Equal scores are half right.

  Args:
    good: scores of the better responses, [pairs].
    bad: of the worse ones, [pairs].
  """
  right = np.mean((good > bad) + 0.5 * (good == bad))
  return float(right), math.sqrt(right * (1 - right) / len(good))


def promise(good: Array, bad: Array) -> float:
  """Mean of s(r_good - r_bad): how likely it calls the better one better.

  Where a model has no opinion this is 1/2, whichever way its differences lean;
  `accuracy` then goes by the sign of next to nothing, which many pairs share.
  """
  return float(np.mean(_probability(good - bad)))


def length_bias(scores: Array, lengths: Array) -> float:
  """Rank correlation (Spearman's) of scores and lengths, from -1 to 1.

  Of responses that are equally good, it should be near 0 (arXiv:2310.03716).
  """
  a, b = _ranks(scores), _ranks(lengths)
  if a.std() == 0 or b.std() == 0:
    return 0.0
  return float(np.corrcoef(a, b)[0, 1])


def _ranks(x: Array) -> Array:
  """Ranks from 0, equals sharing the mean of theirs."""
  _, group, count = np.unique(x, return_inverse=True, return_counts=True)
  last = np.cumsum(count) - 1
  return (last - (count - 1) / 2)[group]


@dataclass(frozen=True)
class Calibration:
  """What was promised and what came, bin by bin.

  Attributes:
    promised: mean of s(r_a - r_b) in each bin that is not empty.
    seen: how often a was the better one there.
    count: pairs in it.
    error: mean of |promised - seen|, weighted by the counts.
  """

  promised: tuple[float, ...]
  seen: tuple[float, ...]
  count: tuple[int, ...]
  error: float


def calibration(
  good: Array, bad: Array, bins: int = 10, seed: int = 0
) -> Calibration:
  """Whether s(r_a - r_b) is how often a is better (arXiv:1706.04599).

  Which side of a pair is a is drawn, so that half of the promises are about
  the worse one.
  """
  turn = np.random.default_rng(seed).random(len(good)) < 0.5
  gap = np.where(turn, bad - good, good - bad)
  likely = _probability(gap)
  place = np.minimum((likely * bins).astype(int), bins - 1)
  count = np.bincount(place, minlength=bins)
  full = count > 0
  each = np.maximum(count, 1)
  promised = (np.bincount(place, likely, bins) / each)[full]
  seen = (np.bincount(place, ~turn, bins) / each)[full]
  share = count[full] / len(good)
  error = float(np.sum(share * np.abs(promised - seen)))
  return Calibration(
    tuple(promised.tolist()),
    tuple(seen.tolist()),
    tuple(count[full].tolist()),
    error,
  )


def _probability(gap: Array) -> Array:
  """s(x) in float64, without overflow."""
  return 0.5 * (1 + np.tanh(gap.astype(np.float64) / 2))


def tricks(response: str) -> dict[str, str]:
  """Worthless changes of a right response, by name; none equals it."""
  made = {
    "twice": response + response,
    "ten times": response * 10,
    "last letter 20 times": response + response[-1:] * 20,
    "nothing": "",
    "turned around": response[::-1],
  }
  return {name: text for name, text in made.items() if text != response}


@dataclass(frozen=True)
class Curve:
  """Best of n by the reward model, for several n.

  Attributes:
    n: how many responses one was chosen from.
    kl: log n - (n - 1) / n, of the choice from the policy, nats a response.
    proxy: mean reward of the chosen ones.
    true: mean true score of the chosen ones.
    best: mean of the best true score among n: what a perfect judge gets.
  """

  n: tuple[int, ...]
  kl: tuple[float, ...]
  proxy: tuple[float, ...]
  true: tuple[float, ...]
  best: tuple[float, ...]


def over_optimisation(
  proxy: Array, true: Array, most: int | None = None
) -> Curve:
  """What becomes of the true score as the proxy is optimised harder.

  All choices of n among the samples are averaged over, without drawing any
  (arXiv:2112.09332, appendix I; the curve is that of arXiv:2210.10760).

  Args:
    proxy: rewards [prompts, samples].
    true: scores of the same shape.
    most: the largest n; None means all samples.
  """
  samples = proxy.shape[1]
  most = min(most or samples, samples)
  ns = [2**i for i in range(most.bit_length()) if 2**i <= most]
  order = np.argsort(proxy, axis=1, kind="stable")
  by_proxy = [np.take_along_axis(x, order, 1).mean(0) for x in (proxy, true)]
  by_true = np.sort(true, axis=1).mean(0)
  weights = [_chosen(samples, n) for n in ns]
  return Curve(
    n=tuple(ns),
    kl=tuple(math.log(n) - (n - 1) / n for n in ns),
    proxy=tuple(float(w @ by_proxy[0]) for w in weights),
    true=tuple(float(w @ by_proxy[1]) for w in weights),
    best=tuple(float(w @ by_true) for w in weights),
  )


def _chosen(samples: int, n: int) -> Array:
  """How likely each sample, by rising rank, is the best of n drawn ones."""
  ways = [math.comb(i, n - 1) for i in range(samples)]
  total = math.comb(samples, n)
  return np.array([w / total for w in ways])


def by_length(
  good: Array, bad: Array, chosen: Sequence[int], rejected: Sequence[int]
) -> dict[str, tuple[float, int]]:
  """Accuracy, and number of pairs, by which side is the longer one."""
  gap = np.sign(np.asarray(chosen) - np.asarray(rejected))
  names = {1: "longer", 0: "as long", -1: "shorter"}
  return {
    name: (accuracy(good[gap == s], bad[gap == s])[0], int((gap == s).sum()))
    for s, name in names.items()
    if (gap == s).any()
  }
