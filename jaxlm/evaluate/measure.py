"""Metrics of many records, each with its interval, whole and by slices.

All are percentages. What sacrebleu and rouge-score define is computed by them.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.evaluate import bootstrap, scores
from jaxlm.evaluate.bootstrap import Estimate
from jaxlm.evaluate.results import Record

Array = np.ndarray


@dataclass(frozen=True)
class Metric:
  """A number about many records, from statistics that add up.

  Attributes:
    name: what it is called.
    stats: records to [n, d].
    value: sums of these, [..., d], to percentages [...].
  """

  name: str
  stats: Callable[[Sequence[Record]], Array]
  value: Callable[[Array], Array]


def measure(
  records: Sequence[Record],
  metrics: Sequence[Metric],
  times: int = bootstrap.TIMES,
  seed: int = 0,
) -> dict[str, Estimate]:
  """Every metric of some records, with its interval."""
  stats = {m.name: m.stats(records) for m in metrics}
  drawn = bootstrap.sums(stats, times, seed)
  return {
    m.name: bootstrap.estimate(m.value, stats[m.name], drawn[m.name])
    for m in metrics
  }


# --- Means --------------------------------------------------------------------


def mean(name: str, of: Callable[[Record], float]) -> Metric:
  """100 times the mean of a number of each record; nan counts as absent."""

  def stats(records: Sequence[Record]) -> Array:
    found = np.array([of(record) for record in records], np.float64)
    there = ~np.isnan(found)
    return np.stack([np.where(there, found, 0.0), there], axis=1)

  return Metric(name, stats, _percent)


def _percent(total: Array) -> Array:
  with np.errstate(invalid="ignore"):
    return 100 * total[..., 0] / total[..., 1]


def _each(of: Callable[[str, str], float]) -> Callable[[Record], float]:
  """The mean over the samples of a record of something like `scores.exact`."""

  def one(record: Record) -> float:
    gold = record.example.response
    found = [of(text, gold) for text in record.texts]
    return sum(found) / len(found)

  return one


def _score(record: Record) -> float:
  return sum(record.scores) / len(record.scores)


def _finished(record: Record) -> float:
  ended = record.finished
  return sum(ended) / len(ended) if ended else math.nan


def _pass(record: Record, k: int) -> float:
  right = sum(score >= 1 for score in record.scores)
  return scores.pass_at_k(len(record.texts), right, k)


def _majority(record: Record, k: int) -> float:
  answers = [scores.final(text) for text in record.texts]
  return scores.maj_at_k(answers, [s >= 1 for s in record.scores], k)


def _rouge() -> Metric:
  """ROUGE-L, the longest common subsequence of words (rouge-score)."""
  from rouge_score.rouge_scorer import RougeScorer

  scorer = RougeScorer(["rougeL"])
  return mean(
    "rouge_l",
    _each(lambda text, gold: scorer.score(gold, text)["rougeL"].fmeasure),
  )


# --- Sums of counts -----------------------------------------------------------


def _sacrebleu(name: str) -> Metric:
  """BLEU or chrF of the whole corpus, from sacrebleu's own counts."""
  from sacrebleu.metrics import BLEU, CHRF

  metric: Any = {"bleu": BLEU, "chrf": CHRF}[name]()

  def stats(records: Sequence[Record]) -> Array:
    # The counts of a segment, and below the score of counts, are what the
    # library's own bootstrap is made of; their names are as old as its 2.0.
    rows = []
    for record in records:
      gold = [record.example.response] * len(record.texts)
      counts = metric._extract_corpus_statistics(list(record.texts), [gold])
      rows.append(np.sum(np.array(counts, np.float64), axis=0))
    return np.array(rows)

  def value(total: Array) -> Array:
    flat = total.reshape(-1, total.shape[-1])
    found = [_of_counts(metric, row) for row in flat]
    return np.array(found).reshape(total.shape[:-1])

  return Metric(name, stats, value)


def _of_counts(metric: Any, counts: Array) -> float:
  return metric._compute_score_from_stats(counts.astype(int).tolist()).score


# --- Which there are ----------------------------------------------------------

_MADE: dict[str, Callable[[], Metric]] = {
  "score": lambda: mean("score", _score),
  "exact": lambda: mean("exact", _each(scores.exact)),
  "em": lambda: mean("em", _each(scores.same_words)),
  "f1": lambda: mean("f1", _each(scores.token_f1)),
  "numeric": lambda: mean("numeric", _each(scores.numeric)),
  "finished": lambda: mean("finished", _finished),
  "bleu": lambda: _sacrebleu("bleu"),
  "chrf": lambda: _sacrebleu("chrf"),
  "rouge_l": _rouge,
}


def known(records: Sequence[Record]) -> list[str]:
  """Names of the metrics that make sense of some records."""
  names = [*_MADE]
  if not all(record.finished for record in records):
    names.remove("finished")
  if all(scores.number(r.example.response) is None for r in records):
    names.remove("numeric")
  most = min(len(record.texts) for record in records)
  if most > 1:
    ks = sorted({2**i for i in range(most.bit_length())} | {most})
    names += [f"pass@{k}" for k in ks] + [f"maj@{k}" for k in ks if k > 2]
  return names


def choose(
  records: Sequence[Record], names: Sequence[str] = ()
) -> tuple[list[Metric], list[str]]:
  """Metrics by name, or else all that there are.

  Returns:
    The metrics, and the names of those that are left out because their
    library is not installed.

  Raises:
    UserError: for a name that there is not, or whose library is missing.
  """
  there, missing = known(records), []
  found = []
  for name in names or there:
    if name not in there:
      raise UserError(
        f"unknown metric {name!r}; of these responses there are "
        f"{', '.join(there)}"
      )
    try:
      found.append(_make(name))
    except ImportError as error:
      if names:
        raise UserError(
          f"{name} needs {error.name}: pip install 'jaxlm[eval]'"
        ) from error
      missing.append(name)
  return found, missing


def _make(name: str) -> Metric:
  kind, at, k = name.partition("@")
  if not at:
    return _MADE[name]()
  of = {"pass": _pass, "maj": _majority}[kind]
  return mean(name, functools.partial(of, k=int(k)))


# --- Slices -------------------------------------------------------------------


def slices(records: Sequence[Record]) -> dict[str, dict[str, list[int]]]:
  """Numbers of the records by skill, by level and by length of the gold text.

  A kind of slice that would be everything in one piece is left out.
  """
  lengths = [len(record.example.response) for record in records]
  edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75, 1]).round())
  of = {
    "skill": [r.example.skill for r in records],
    "level": [r.example.level for r in records],
    "length": [int(edges[np.searchsorted(edges, n)]) for n in lengths],
  }
  found = {}
  for kind, keys in of.items():
    where = {key: [i for i, k in enumerate(keys) if k == key] for key in keys}
    if len(where) > 1:
      found[kind] = {_named(kind, k): where[k] for k in sorted(where)}
  return found


def _named(kind: str, key: Any) -> str:
  return f"up to {key}" if kind == "length" else str(key)


def sliced(
  records: Sequence[Record],
  metrics: Sequence[Metric],
  times: int = bootstrap.TIMES,
  seed: int = 0,
) -> Mapping[str, Mapping[str, dict[str, Any]]]:
  """Metrics of every slice: `[kind][name]` has `n` and `metrics`."""
  return {
    kind: {
      name: {
        "n": len(where),
        "metrics": measure([records[i] for i in where], metrics, times, seed),
      }
      for name, where in parts.items()
    }
    for kind, parts in slices(records).items()
  }
