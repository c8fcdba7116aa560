"""Checks of reward models, and choosing the best of several responses."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.tokenizer import EOT
from jaxlm.data.tokenizers import Chars
from jaxlm.errors import UserError
from jaxlm.layers.param import FanIn, init
from jaxlm.models.families import llama
from jaxlm.models.heads import ScalarHead
from jaxlm.models.reward import RewardModel
from jaxlm.objectives.distil import Divergence
from jaxlm.rl import reward_check, sanity
from jaxlm.rl.best_of import choose
from jaxlm.rl.candidates import Candidates, candidates
from jaxlm.rl.rewards import Learned, Verifier
from jaxlm.tasks import examples, make

# --- Figures ----------------------------------------------------------------


def test_accuracy_and_its_error():
  """Three of four, a tie for a half, and the binomial's deviation."""
  good, bad = np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 1.0, 2.0, 1.0])
  assert sanity.accuracy(good, bad) == (0.75, math.sqrt(0.75 * 0.25 / 4))
  assert sanity.accuracy(good, good)[0] == 0.5
  right, wrong = sanity.accuracy(good, bad), sanity.accuracy(bad, good)
  assert right[0] + wrong[0] == 1.0  # the two sides swapped


def test_length_bias_finds_a_lover_of_length():
  """One that scores by length has 1, one that does not has about 0."""
  draw = np.random.default_rng(0)
  lengths, scores = draw.integers(1, 9, 500), draw.normal(size=500)
  assert sanity.length_bias(lengths**3, lengths) == pytest.approx(1.0)
  assert sanity.length_bias(-lengths, lengths) == pytest.approx(-1.0)
  assert abs(sanity.length_bias(scores, lengths)) < 0.1
  assert sanity.length_bias(np.ones(5), np.arange(5)) == 0.0


def test_calibration_finds_boasting():
  """Labels drawn from the promises are calibrated; tripled scores are not."""
  draw = np.random.default_rng(0)
  gap = draw.normal(size=20_000)
  better = draw.random(20_000) < 1 / (1 + np.exp(-gap))
  good, bad = np.where(better, gap, -gap) / 2, np.where(better, -gap, gap) / 2
  honest = sanity.calibration(good, bad)
  assert honest.error < 0.01
  assert sum(honest.count) == 20_000
  assert sanity.calibration(3 * good, 3 * bad).error > 0.1


def test_the_curve_averages_all_choices():
  """Best of n by the proxy, over every subset of n samples, by brute force."""
  draw = np.random.default_rng(0)
  proxy, true = draw.normal(size=(2, 3, 4))
  curve = sanity.over_optimisation(proxy, true)
  assert curve.n == (1, 2, 4)
  for i, n in enumerate(curve.n):
    picks = [
      [max(pick, key=lambda j, row=row: proxy[row, j]) for row in range(3)]
      for pick in itertools.combinations(range(4), n)
    ]
    want = np.mean([[true[r, p] for r, p in enumerate(pick)] for pick in picks])
    assert curve.true[i] == pytest.approx(want)
    assert curve.kl[i] == pytest.approx(math.log(n) - (n - 1) / n)
  assert curve.best[-1] == pytest.approx(true.max(1).mean())
  assert list(curve.proxy) == sorted(curve.proxy)
  cheat = sanity.over_optimisation(-true, true)  # a proxy that is all wrong
  assert list(cheat.true) == sorted(cheat.true, reverse=True)


def test_tricks_are_changes():
  """None is the response itself, also where it reads the same both ways."""
  assert "turned around" not in sanity.tricks("abba")
  assert set(sanity.tricks("ab")) >= set(sanity.tricks("abba"))
  for text in ("a", "ab", "46"):
    assert text not in sanity.tricks(text).values()


# --- The program ------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
  """A policy and a reward model that have learned nothing."""
  task = make("reverse", levels=1)
  tokenizer = Chars("abcdefghijklmnopqrstuvwxyz= ", (EOT,))
  trunk = llama.decoder(
    vocab=tokenizer.vocab_size,
    dim=16,
    layers=1,
    heads=2,
    kv_heads=2,
    max_positions=48,
  )
  scorer = RewardModel(trunk, ScalarHead(16, False, FanIn()))
  params = init(scorer.params(), jax.random.key(0))
  judge = Learned(scorer, params, tokenizer)
  return task, tokenizer, trunk, judge


def test_a_report_of_a_model_that_knows_nothing(models, tmp_path):
  """It is at chance, its scores do not depend on their place, all is drawn."""
  task, tokenizer, trunk, judge = models
  found = examples(task, "test", 100)
  report = reward_check.about_pairs(judge, task, found)
  assert 0.3 < report["accuracy"] < 0.7
  assert report["place"] < 1e-5
  assert {"twice", "ten times", "nothing"} <= set(report["tricks"])
  params = init(trunk.params(), jax.random.key(0))
  said = candidates(trunk, params, tokenizer, found[:5], 4, new=4)
  proxy, true = said.judged(judge), said.judged(Verifier(task))
  curve = dataclasses.asdict(sanity.over_optimisation(proxy, true))
  more = {"length_bias_of_wrong": 0.0, "prompts": 5}
  reward_check.write(report | {"best_of_n": curve | more}, tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert "| best of 4 by reward: true score |" in text
  assert (tmp_path / "report.png").stat().st_size > 1000


def test_candidates_depend_on_their_prompt_alone(models):
  """Whatever is asked beside it, and however many at a time."""
  task, tokenizer, trunk, _ = models
  found = examples(task, "test", 5)
  params = init(trunk.params(), jax.random.key(0))
  many = candidates(trunk, params, tokenizer, found, 4, new=4)
  few = candidates(trunk, params, tokenizer, found, 4, new=4, rows=8)
  assert many.texts == few.texts
  assert len(many.texts) == 5
  assert len({text for row in many.texts for text in row}) > 5


def test_the_best_are_kept_and_the_rest_counted():
  """Highest score first, lowest beside it; what teaches nothing is left out."""
  asked = tuple(examples(make("copy", levels=1), "test", 3))
  said = (("a", "b", "c"), ("d", "e", "f"), (" ", "g", "h"))
  scores = np.array([[0.2, 1.0, 0.1], [0.0, 0.5, 0.0], [2.0, 1.0, 0.0]])
  kept, skipped = choose(Candidates(asked, said), scores, least=1.0)
  assert [(k.best, k.worse, k.score) for k in kept] == [("b", ("c",), 1.0)]
  assert skipped == {"no sample that is good enough": 1, "an empty response": 1}
  kept, _ = choose(Candidates(asked, said), scores, least=None)
  assert [k.best for k in kept] == ["b", "e"]


def test_pairs_are_of_the_best_and_different_worse_ones():
  """None is as good as the best, none comes twice; the gold one may be best."""
  asked = tuple(examples(make("copy", levels=1), "test", 2))
  found = Candidates(asked, (("a", "b", "a", "c"), ("d", "e", "f", "g")))
  scores = np.array([[0.1, 0.9, 0.1, 0.3], [1.0, 1.0, 1.0, 1.0]])
  kept, _ = choose(found, scores, least=None, pairs=3)
  assert [(k.best, k.worse) for k in kept] == [("b", ("a", "c")), ("d", ("d",))]
  task = make("copy", levels=1)
  known = found.with_gold()
  best, _ = choose(known, known.judged(Verifier(task)), least=1.0, pairs=9)
  assert [k.best for k in best] == [e.response for e in asked]
  assert [k.worse for k in best] == [("a", "b", "c"), ("d", "e", "f", "g")]


def test_divergences_have_names_and_temperatures():
  """Gradients keep their size as the temperature rises; errors are said."""
  teacher, student = np.random.default_rng(0).normal(size=(2, 9)) * 0.1
  slopes = [
    jax.grad(lambda x, t=t: Divergence(temperature=t)(teacher, x))(
      jnp.asarray(student, jnp.float32)
    )
    for t in (1.0, 4.0)
  ]
  ratio = jnp.linalg.norm(slopes[1]) / jnp.linalg.norm(slopes[0])
  assert 0.9 < float(ratio) < 1.1
  slope = jax.grad(lambda x: Divergence()(x, student))(jnp.asarray(teacher))
  assert not np.any(slope)  # the teacher does not learn
  for wrong in ({"kind": "l2"}, {"beta": 1.0}, {"temperature": 0.0}):
    with pytest.raises(
      UserError, match=next(iter(wrong)).replace("kind", "kl")
    ):
      Divergence(**wrong)
