"""Scores, metrics and intervals, against closed forms and the libraries."""

import dataclasses
import itertools
import json
import math
import random
import sys
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import tasks
from jaxlm.errors import UserError
from jaxlm.evaluate import bootstrap, compare, measure, results, scores, show
from jaxlm.evaluate.bootstrap import Estimate

TASK = tasks.make("mix", worked=True)
EXAMPLES = tasks.examples(TASK, "test", 60)


def records(samples=1, seed=0, right=0.6):
  """Responses of which so many are gold and the others wrong or cut."""
  rng = random.Random(seed)

  def said(example):
    text = example.response if rng.random() < right else example.rejected
    return text if rng.random() < 0.8 else text[: len(text) // 2]

  texts = [[said(e) for _ in range(samples)] for e in EXAMPLES]
  ended = [[rng.random() < 0.5 for _ in t] for t in texts]
  return results.scored(TASK, EXAMPLES, texts, ended)


# --- One response -------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("46", "46"),
    ("it is -3.", "-3"),
    ("12-34", "34"),
    ("(2)-1", "1"),
    ("1,234.50 and", "1234.50"),
    ("3,4", "4"),
    ("12,3456", "3456"),
    ("5%", "5"),
    ("#0046", "46"),
    ("no number", None),
    ("", None),
  ],
)
def test_the_last_number(text, found):
  """Thousands, decimals and signs, and a minus that is none."""
  number = scores.number(text)
  assert number == (None if found is None else Decimal(found))


@given(st.text(), st.text())
def test_scores_of_any_texts(a, b):
  """In [0, 1], symmetric where they are, and 1 for the text itself."""
  for score in (scores.exact, scores.same_words, scores.token_f1):
    assert 0 <= score(a, b) == score(b, a) <= 1
    assert score(a, a) == 1
  assert scores.numeric(a, b) in (0, 1) or math.isnan(scores.numeric(a, b))


def test_token_f1_by_hand():
  """Repeated words count as often as both have them (SQuAD's script)."""
  assert scores.token_f1("owl owl owl", "an owl, owl") == 2 * 2 / 5
  assert scores.token_f1("The fox", "a hen") == 0
  assert scores.token_f1("the", "") == 1
  assert scores.token_f1("the", "fox") == 0
  assert scores.same_words("An owl!", "the Owl") == 1
  assert scores.same_words("an owl fox", "fox owl") == 0


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_counts_all_choices(n):
  """Equal to looking at every subset of k samples."""
  for right, k in itertools.product(range(n + 1), range(1, n + 1)):
    samples = [1] * right + [0] * (n - right)
    found = [any(s) for s in itertools.combinations(samples, k)]
    mean = sum(found) / len(found)
    assert scores.pass_at_k(n, right, k) == pytest.approx(mean, abs=1e-12)


def test_majority_by_hand():
  """Ties are drawn, groups are averaged, what is left over is left out."""
  right = [True, True, False, False, False]
  assert scores.maj_at_k(list("aabbb"), right, 5) == 0
  assert scores.maj_at_k(list("aabbb"), right, 3) == 1
  assert scores.maj_at_k(list("aabbb"), right, 4) == 0.5
  assert scores.maj_at_k(list("aabbb"), right, 2) == 0.5
  assert scores.maj_at_k(list("aabbb"), right, 1) == 0.4


# --- Many responses -----------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
def test_metrics_of_the_libraries(samples):
  """BLEU, chrF and ROUGE-L are those of sacrebleu and rouge-score."""
  from rouge_score.rouge_scorer import RougeScorer
  from sacrebleu.metrics import BLEU, CHRF

  found = records(samples)
  told = {m.name: m for m in measure.choose(found)[0]}
  texts = [text for r in found for text in r.texts]
  golds = [r.example.response for r in found for _ in r.texts]
  for name, judge in (("bleu", BLEU()), ("chrf", CHRF())):
    stats = told[name].stats(found)
    want = judge.corpus_score(texts, [golds]).score
    value = told[name].value(stats.sum(axis=0))
    assert float(value) == pytest.approx(want, abs=1e-9)
    some = [0, 3, 3, 7]  # and of a resample
    texts_of = [t for i in some for t in found[i].texts]
    golds_of = [g for i in some for g in [EXAMPLES[i].response] * samples]
    want = judge.corpus_score(texts_of, [golds_of]).score
    assert float(told[name].value(stats[some].sum(axis=0))) == pytest.approx(
      want, abs=1e-9
    )
  scorer = RougeScorer(["rougeL"])
  pairs = zip(golds, texts, strict=True)
  each = [scorer.score(g, t)["rougeL"].fmeasure for g, t in pairs]
  value = measure.measure(found, [told["rouge_l"]], times=1)["rouge_l"].value
  assert value == pytest.approx(100 * np.mean(each), abs=1e-9)


def test_means_by_hand():
  """Of every record alike; what does not apply to one is not counted."""
  example = dataclasses.replace(EXAMPLES[0], response="7", answer="7")
  words = dataclasses.replace(example, response="fig", answer="fig")
  found = results.scored(
    tasks.Listed("x", (example,)),
    [example, example, words],
    [["7", "8", "7", "9"], ["6", "6", "#7", "6"], ["fig", "7", "", "a"]],
  )
  told = measure.measure(found, measure.choose(found)[0], times=10)
  value = {name: e.value for name, e in told.items()}
  third = 100 / 3
  assert value["score"] == pytest.approx(third * (0.5 + 0.25 + 0.25))
  assert value["exact"] == pytest.approx(third * (0.5 + 0 + 0.25))
  assert value["numeric"] == pytest.approx(50 * (0.5 + 0.25))
  assert value["pass@1"] == pytest.approx(value["score"])
  assert value["pass@2"] == pytest.approx(third * (5 / 6 + 0.5 + 0.5))
  assert value["pass@4"] == pytest.approx(100)
  assert value["maj@4"] == pytest.approx(third * (1 + 0 + 0.25))
  assert "finished" not in value


def test_unknown_and_missing_metrics(monkeypatch):
  """Those that are asked for must be there; else they are left out, by name."""
  found = records()
  with pytest.raises(UserError, match=r"unknown metric 'bleurt'.*rouge_l$"):
    measure.choose(found, ["bleurt"])
  with pytest.raises(UserError, match="unknown metric 'pass@2'"):
    measure.choose(found, ["pass@2"])
  monkeypatch.setitem(sys.modules, "sacrebleu", None)
  monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
  with pytest.raises(UserError, match=r"chrf needs sacrebleu.*jaxlm\[eval\]"):
    measure.choose(found, ["chrf"])
  metrics, missing = measure.choose(found)
  assert missing == ["bleu", "chrf"]
  assert "rouge_l" in {m.name for m in metrics}


def test_slices_part_the_records():
  """Each kind of slice holds every record once; one piece is no slice."""
  found = records()
  parts = measure.slices(found)
  assert [*parts] == ["skill", "level", "length"]
  for places in parts.values():
    numbers = sorted(i for where in places.values() for i in where)
    assert numbers == [*range(len(found))]
  for name, where in parts["skill"].items():
    assert {found[i].example.skill for i in where} == {name}
  copies = tasks.examples(tasks.make("copy", levels=1), "test", 9)
  same = results.scored(TASK, copies, [[e.response] for e in copies])
  assert measure.slices(same) == {}
  told = measure.sliced(found, measure.choose(found, ["score"])[0], times=5)
  part = told["level"]["1"]
  own = [found[i] for i in parts["level"]["1"]]
  assert part["n"] == len(own)
  mean = 100 * np.mean([r.scores[0] for r in own])
  assert part["metrics"]["score"].value == pytest.approx(mean)


# --- Intervals ----------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_normal_one():
  """Where theory knows it: mean +- 1.96 sd / sqrt(n)."""
  x = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
  stats = np.concatenate([x, np.ones_like(x)], axis=1)
  drawn = bootstrap.sums({"x": stats}, 4000)["x"]
  found = bootstrap.estimate(lambda s: s[..., 0] / s[..., 1], stats, drawn)
  half = 1.96 * x.std() / 20
  assert found.value == pytest.approx(x.mean())
  assert found.low == pytest.approx(x.mean() - half, abs=0.02)
  assert found.high == pytest.approx(x.mean() + half, abs=0.02)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
  """Coverage of a mean of 100 coins, over 400 experiments."""
  rng = np.random.default_rng(0)
  hits = 0
  for seed in range(400):
    coins = (rng.random((100, 1)) < 0.7).astype(np.float64)
    drawn = bootstrap.sums({"x": coins}, 200, seed)["x"][:, 0]
    found = bootstrap.interval(0.7, drawn / 100)
    hits += found.low <= 0.7 <= found.high
  assert 0.90 < hits / 400 < 0.98


def test_resamples_do_not_depend_on_what_is_summed(monkeypatch):
  """The same draws for all names, all memory limits; others for a new seed."""
  x = np.random.default_rng(0).random((50, 2))
  one = bootstrap.sums({"x": x}, 30)["x"]
  both = bootstrap.sums({"y": 2 * x, "x": x}, 30)
  np.testing.assert_array_equal(one, both["x"])
  np.testing.assert_allclose(2 * one, both["y"])
  monkeypatch.setattr(bootstrap, "_CELLS", 7 * 50)
  np.testing.assert_array_equal(one, bootstrap.sums({"x": x}, 30)["x"])
  assert not np.array_equal(one, bootstrap.sums({"x": x}, 30, 1)["x"])


def test_a_paired_difference_is_surer_than_two_intervals():
  """What is hard for both drops out; equal systems neither win nor lose."""
  old, new = records(right=0.6), records(right=0.6)
  metrics = measure.choose(old, ["score", "chrf"])[0]
  for change in compare.compare(old, new, metrics).values():
    assert change.difference == Estimate(0.0, 0.0, 0.0)
    assert change.wins == 0.5
    assert change.before == change.after
  better = [
    dataclasses.replace(r, texts=(r.example.response,), scores=(1.0,))
    if i % 5 == 0
    else r
    for i, r in enumerate(new)
  ]
  change = compare.compare(old, better, metrics)["score"]
  alone = measure.measure(better, metrics)["score"]
  assert change.after == alone
  assert change.wins > 0.99
  assert change.difference.low > 0
  width = change.difference.high - change.difference.low
  assert width < alone.high - alone.low
  fixed, broken = compare.flips(old, better)
  gain = 100 * (len(fixed) - len(broken)) / len(old)
  assert gain == pytest.approx(change.difference.value)
  assert compare.flips(better, old) == (broken, fixed)


def test_pairs_are_of_the_same_question():
  """In the order of the second; nothing shared is an error."""
  old, new = records(seed=0), records(seed=1)[::-1]
  a, b = compare.pairs(old[:30], new)
  assert [r.example for r in a] == [r.example for r in b]
  assert [r.example for r in b] == EXAMPLES[29::-1]
  with pytest.raises(UserError, match="no example in common"):
    compare.pairs(old[:30], old[30:])


# --- Files and tables ---------------------------------------------------------


def test_results_come_back(tmp_path):
  """Every record as it was, and what they are about; no NaN in JSON."""
  found = records(2)
  text = results.to_json({"name": "x", "bad": math.nan}, found)
  results.write(tmp_path / "a.json", text)
  about, again = results.read_results(tmp_path / "a.json")
  assert again == found
  assert about == {"name": "x", "bad": None}
  with pytest.raises(UserError, match="cannot write"):
    results.write(tmp_path / "no" / "a.json", text)


@pytest.mark.parametrize(
  "text",
  ["[]", "{}", '{"examples": []}', '{"examples": [{"prompt": "a"}]}'],
)
def test_what_is_no_results(tmp_path, text):
  """Other JSON."""
  (tmp_path / "a.json").write_text(text)
  with pytest.raises(UserError, match="holds no results"):
    results.read_results(tmp_path / "a.json")
  (tmp_path / "a.json").write_text("{")
  with pytest.raises(UserError, match="is not JSON"):
    results.read_results(tmp_path / "a.json")


def test_responses_join_their_examples(tmp_path):
  """By prompt, as `jaxlm.generate` writes them; an error says nothing."""
  lines = [
    {"prompt": e.prompt, "text": t, "finish_reason": "stop"}
    for e in EXAMPLES[:3]
    for t in (e.response, e.rejected)
  ]
  lines += [{"prompt": EXAMPLES[3].prompt, "error": "too long"}]
  path = tmp_path / "a.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  said = results.read_responses(path)
  found = results.joined(TASK, EXAMPLES, said, path)
  assert [r.example for r in found] == EXAMPLES[:4]
  assert [r.scores for r in found] == [(1, 0)] * 3 + [(0,)]
  assert not found[0].finished  # not known of all
  with pytest.raises(UserError, match="responds to none of the 2 prompts"):
    results.joined(TASK, EXAMPLES[4:6], said, path)
  for text in ('{"prompt": "a"}', '{"prompt": 1, "text": "a"}', "[]", "{"):
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.jsonl line 1"):
      results.read_responses(path)


def test_tables_line_up():
  """What is not a number is a dash."""
  told = show.metrics({"a": Estimate(math.nan, math.nan, math.nan)})
  assert told.splitlines()[1].split() == ["a", "-", "-", "to", "-"]
  change = compare.Change(*[Estimate(1.0, 0.5, 2.0)] * 3, wins=0.97)
  assert show.changes({"a": change}).splitlines()[1].split() == (
    ["a", "1.0", "1.0", "+1.0", "+0.5", "to", "+2.0", "97.0", "%"]
  )
