"""Searches against exhaustive enumeration."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.generate import search
from jaxlm.generate.decode import scored
from jaxlm.generate.samplers import Sample
from jaxlm.layers.param import init
from jaxlm.models.families import llama

VOCAB, N = 5, 4


@functools.cache
def tiny(seed: int = 0):
  """A language of five tokens."""
  model = llama.decoder(
    VOCAB, 8, 2, 2, 2, mlp_dim=12, theta=100.0, max_positions=16
  )
  params = init(model.params(), jax.random.key(seed))
  params["head"] = params["head"] * 60
  return model, params


@functools.cache
def tree(seed: int = 0):
  """The expander of one prompt, and log p of every text of four tokens."""
  model, params = tiny(seed)
  expand = search.expander(model, params, [1, 2], N)
  texts = {
    text: sum(expand(text[:i])[t] for i, t in enumerate(text))
    for text in itertools.product(range(VOCAB), repeat=N)
  }
  return expand, texts


def likeliest(texts: dict, eot: int | None) -> tuple:
  """By enumeration, texts cut after their first end."""
  if eot is None:
    return max(texts.items(), key=lambda pair: pair[1])
  expand, _ = tree()
  found = {}
  for text in texts:
    cut = text[: text.index(eot) + 1] if eot in text else text
    found[cut] = sum(expand(cut[:i])[t] for i, t in enumerate(cut))
  return max(found.items(), key=lambda pair: pair[1])


@pytest.mark.parametrize("eot", [None, 0, 1, 2, 3, 4])
def test_dijkstra_is_exhaustive_search(eot: int | None):
  """The very best of 625 texts, or of those cut at their end."""
  expand, texts = tree()
  answer = search.most_likely(expand, N, eot)
  want, logprob = likeliest(texts, eot)
  assert answer.tokens == want
  assert answer.logprob == pytest.approx(logprob, abs=1e-6)
  assert answer.expanded < sum(VOCAB**i for i in range(N))


@pytest.mark.parametrize("seed", range(3))
def test_a_star_is_exact_and_expands_fewer(seed: int):
  """With the bound that the final norm gives."""
  model, params = tiny(seed)
  params = {**params, "head": params["head"] / 60}  # far from certain
  expand = search.expander(model, params, [1, 2], N)
  top = search.certainty(model, params)
  plain = search.most_likely(expand, N)
  star = search.most_likely(expand, N, bound=lambda left: -left * math.log(top))
  assert star.tokens == plain.tokens
  assert star.expanded < plain.expanded


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 20.0, 60.0]))
def test_no_token_is_more_certain_than_the_bound(seed: int, size: float):
  """Whatever the context, on random models and rows."""
  model, _ = tiny()
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), tiny()[1]
  )
  params["head"] = params["head"] * size / 60
  row = jnp.asarray(rng.integers(0, VOCAB, (3, 9)), jnp.int32)
  probs = jax.nn.softmax(search.forward(model, params, row))
  assert probs.max() <= search.certainty(model, params) + 1e-6


def test_limits_are_errors():
  """A sentence, not an endless search."""
  expand, _ = tree()
  with pytest.raises(UserError, match="2 expansions"):
    search.most_likely(expand, N, limit=2)
  with pytest.raises(UserError, match="2 expansions"):
    search.backtrack(expand, lambda t: False, N, limit=2)
  with pytest.raises(UserError, match="raise width"):
    search.backtrack(expand, lambda t: False, 2)
  with pytest.raises(UserError, match="do not fit"):
    search.expander(*tiny(), [1], 99)


def test_backtracking_finds_the_first_text_accepted():
  """In depth-first order of likelihood, whether or not branches are cut."""
  expand, texts = tree()

  def accepts(text):
    return sum(text) % 7 == 3

  ranks = {t: np.argsort(-expand(t)).tolist() for t in _prefixes(texts)}
  order = sorted(
    texts, key=lambda t: [ranks[t[:i]].index(x) for i, x in enumerate(t)]
  )
  want = next(t for t in order if accepts(t))
  found = search.backtrack(expand, accepts, N, width=VOCAB)
  assert found.tokens == want
  assert found.logprob == pytest.approx(texts[want], abs=1e-5)
  cut = search.backtrack(
    expand, accepts, N, width=VOCAB, allows=lambda t: t == want[: len(t)]
  )
  assert cut.tokens == want
  assert cut.expanded <= found.expanded


def _prefixes(texts) -> set:
  return {text[:i] for text in texts for i in range(N)}


def test_best_of_keeps_the_best_of_all_samples():
  """As sorting every one of them; in batches that do not divide n."""
  model, params = tiny()
  key = jax.random.key(3)
  found = search.best_of(
    model, params, [1, 2], N, 21, keep=4, key=key, eot=0, batch=8
  )
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(21))
  new = scored(model, params, [[1, 2]], N, Sample(), keys, eot=0, samples=21)
  every = []
  for row, logprobs in zip(new.tokens, new.logprobs, strict=True):
    text = search._whole(row, 0)
    every.append((float(logprobs[: len(text)].mean()), text))
  every.sort(key=lambda pair: -pair[0])
  np.testing.assert_allclose(
    [v for v, _ in found], [v for v, _ in every[:4]], rtol=1e-5
  )
  assert {t for _, t in found} <= {t for _, t in every}
  by_reward = search.best_of(
    model, params, [1, 2], N, 21, key=key, score=lambda t, _: -len(t), eot=0
  )
  assert len(by_reward[0][1]) == min(len(t) for _, t in every)


def test_minimum_risk_chooses_the_middle_of_the_belief():
  """By hand: the one that shares most tokens with the others."""
  texts = [(1, 2, 3), (1, 2, 4), (9, 9, 9), (1, 2, 4, 3)]
  assert search.minimum_risk(texts) == 3
  assert search.minimum_risk(texts, weights=[0, 0, 1, 0]) == 2
  assert search.token_f1((1, 1, 2), (1, 3, 3)) == pytest.approx(1 / 3)
  with pytest.raises(UserError, match="no texts"):
    search.minimum_risk([])


@pytest.mark.parametrize("seed", range(5))
def test_viterbi_is_exhaustive_search(seed: int):
  """All 81 paths through three states and four times."""
  rng = np.random.default_rng(seed)
  start, trans, emit = (
    rng.normal(size=s).astype(np.float32) for s in ((3,), (3, 3), (4, 3))
  )

  def score(path):
    steps = sum(trans[a, b] for a, b in itertools.pairwise(path))
    return (
      start[path[0]]
      + steps
      + sum(e[s] for e, s in zip(emit, path, strict=True))
    )

  want = max(itertools.product(range(3), repeat=4), key=score)
  path, top = search.viterbi(
    jnp.asarray(start), jnp.asarray(trans), jnp.asarray(emit)
  )
  assert tuple(path.tolist()) == want
  assert float(top) == pytest.approx(score(want), abs=1e-5)
