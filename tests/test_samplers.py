"""Samplers: the sets they keep, and the distributions they draw from."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.generate.filters import Temperature, TopK, TopP
from jaxlm.generate.samplers import Greedy, Sample, largest, make_sampler


def softmax(x: np.ndarray) -> np.ndarray:
  x = np.exp(x.astype(np.float64) - x.max())
  return x / x.sum()


def top_k_set(row: np.ndarray, k: int) -> np.ndarray:
  """Not below the k-th largest: `TopKLogitsWarper` of transformers."""
  return row >= np.sort(row)[::-1][min(k, len(row)) - 1]


def top_p_set(row: np.ndarray, p: float) -> np.ndarray:
  """Smallest set of mass >= p: `TopPLogitsWarper`, by a stable sort."""
  order = np.argsort(row, kind="stable")[::-1]
  keep = np.zeros(len(row), bool)
  mass, probs = 0.0, softmax(row)
  for i in order:
    keep[i] = True
    mass += probs[i]
    if mass >= p:
      break
  return keep


def cases(n: int):
  """Rows of logits, a third of them on a coarse grid, so with many ties."""
  rng = np.random.default_rng(0)
  for i in range(n):
    row = rng.normal(size=17) * rng.choice([0.3, 1.0, 4.0])
    yield (np.round(row) if i % 3 == 0 else row).astype(np.float32)


# --- Sets -------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 17, 40])
def test_top_k_keeps_the_set_of_its_definition(k: int):
  """Ties with the last one stay, and k may exceed the vocabulary."""
  rows = np.stack([*cases(600)])
  kept = np.isfinite(TopK(k)(jnp.asarray(rows)))
  np.testing.assert_array_equal(kept, [top_k_set(row, k) for row in rows])


@pytest.mark.parametrize("p", [0.0, 0.1234, 0.51, 0.8, 0.937, 0.999])
def test_top_p_keeps_the_set_of_its_definition(p: float):
  """The border token stays, of ties the higher ids, and at least one."""
  rows = np.stack([*cases(600)])
  out = np.asarray(TopP(p)(jnp.asarray(rows)))
  kept = np.isfinite(out)
  np.testing.assert_array_equal(kept, [top_p_set(row, p) for row in rows])
  np.testing.assert_array_equal(out[kept], rows[kept])


def test_top_p_of_equal_tokens_keeps_the_higher_ids():
  """Four tokens of a quarter each: half the mass is two of them."""
  kept = np.isfinite(TopP(0.5)(jnp.zeros((1, 4))))
  assert kept.tolist() == [[False, False, True, True]]


@given(
  st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=9),
  st.floats(0.01, 1),
)
def test_top_p_keeps_enough_mass_and_no_more(row: list[float], p: float):
  """The law of the nucleus: mass >= p, and without its least token < p."""
  logits = np.asarray(row, np.float32)
  probs = softmax(logits)
  kept = np.isfinite(TopP(p)(jnp.asarray(logits)[None]))[0]
  assert logits[kept].max() == logits.max()
  assert probs[kept].sum() >= p - 1e-5
  assert probs[kept].sum() - probs[kept].min() < p + 1e-5
  assert logits[kept].min() >= logits[~kept].max(initial=-np.inf)


def test_filters_see_what_earlier_ones_left():
  """Top-p after top-k counts the mass of the k alone."""
  logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
  both = TopP(0.5)(TopK(2)(logits))  # 0.4 / 0.7 is more than half
  assert np.isfinite(both).tolist() == [[True, False, False, False]]
  assert np.isfinite(TopP(0.5)(logits)).tolist() == [[True, True, False, False]]


GOLDEN = Path(__file__).parent / "golden" / "samplers.npz"

# As in golden/make_samplers.py.
CHAINS = [
  *((1.0, None, 0.1), (1.0, None, 0.5), (1.0, None, 0.9), (1.0, None, 0.99)),
  *((1.0, 3, None), (0.7, 8, 0.8), (1.5, None, 0.95), (0.3, 5, 0.6)),
]


@pytest.mark.parametrize("part", range(len(CHAINS)))
def test_chains_keep_what_transformers_keeps(part: int):
  """The sets of its warpers on 10,000 rows, in eight chains."""
  with np.load(GOLDEN) as golden:
    logits = np.split(golden["logits"], len(CHAINS))[part]
    bits = np.split(golden["kept"], len(CHAINS))[part]
  scores = jnp.asarray(logits.astype(np.float32) / 256)
  for keep in Sample(*CHAINS[part]).filters:
    scores = keep(scores)
  kept = np.unpackbits(bits, axis=1, count=logits.shape[1]).astype(bool)
  np.testing.assert_array_equal(np.isfinite(scores), kept)


# --- Draws ------------------------------------------------------------------

LOGITS = np.log([0.35, 0.25, 0.2, 0.1, 0.06, 0.04]).astype(np.float32)


@pytest.mark.parametrize(
  ("sampler", "logits"),
  [
    (Sample(), LOGITS),
    (Sample(temperature=0.5), LOGITS * 2),
    (Sample(temperature=2.0), LOGITS / 2),
    (Sample(top_k=3), np.where(np.arange(6) < 3, LOGITS, -np.inf)),
    (Sample(top_p=0.7), np.where(np.arange(6) < 3, LOGITS, -np.inf)),
    (
      Sample(filters=(TopK(4), Temperature(0.5))),
      np.where(np.arange(6) < 4, LOGITS * 2, -np.inf),
    ),
  ],
  ids=str,
)
def test_draws_follow_the_filtered_softmax(sampler, logits: np.ndarray):
  """Chi-square of 20,000 draws below its 99.9 % point; none is ruled out."""
  n = 20_000
  rows = jnp.broadcast_to(jnp.asarray(LOGITS), (n, len(LOGITS)))
  tokens = sampler(rows, jax.random.key(7))
  assert tokens.shape == (n,)
  assert tokens.dtype == jnp.int32
  counts = np.bincount(tokens, minlength=len(LOGITS))
  expected = n * softmax(logits)
  assert (counts[expected == 0] == 0).all()
  drawn = expected > 0
  chi2 = np.sum((counts - expected)[drawn] ** 2 / expected[drawn])
  points = [10.83, 13.82, 16.27, 18.47, 20.52]  # of 1 to 5 degrees of freedom
  assert chi2 < points[drawn.sum() - 2]


def test_greedy_takes_the_first_of_the_likeliest():
  """And never asks for a key."""
  logits = jnp.asarray([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
  assert Greedy()(logits, None).tolist() == [1, 0]


def test_the_same_key_draws_the_same():
  """Nothing random but the key."""
  logits = jnp.asarray(np.stack([*cases(8)]))
  draws = [Sample()(logits, jax.random.key(k)).tolist() for k in (1, 1, 2)]
  assert draws[0] == draws[1] != draws[2]


# --- Values -----------------------------------------------------------------


def test_equal_samplers_are_equal_values():
  """Or each call of generate would compile anew."""
  one, other = Sample(0.8, top_k=5), Sample(0.8, top_k=5)
  assert one == other
  assert hash(one) == hash(other)
  assert one == Sample(filters=(Temperature(0.8), TopK(5)))
  assert one != Sample(0.8, top_k=6)
  assert Greedy() == Greedy()


def test_neutral_numbers_make_no_filters():
  """The config's way: 0 and 1 stand for off, temperature 0 for greedy."""
  assert make_sampler() == Sample()
  assert make_sampler(0, 5, 0.5) == Greedy()
  assert make_sampler(0.7, 0, 0.9) == Sample(0.7, top_p=0.9)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: Sample(temperature=0.0), "use Greedy"),
    (lambda: Sample(temperature=-1.0), "not a positive number"),
    (lambda: Sample(temperature=float("nan")), "not a positive number"),
    (lambda: Sample(top_k=0), "from 1"),
    (lambda: Sample(top_k=2.5), "whole number"),
    (lambda: Sample(top_p=1.5), "no probability"),
    (lambda: make_sampler(top_k=-3), "top_k=-3"),
    (lambda: make_sampler(0, top_p=7), "top_p=7"),
  ],
)
def test_senseless_values_are_refused(make, words: str):
  """When the sampler is made, not in the middle of a text."""
  with pytest.raises(UserError, match=words):
    make()


def test_largest_is_the_first_argmax():
  """Ties, infinities, and rows where nothing is left."""
  x = np.stack(list(cases(30)))
  x[3] = -np.inf
  x[4, 5:7] = np.inf
  np.testing.assert_array_equal(largest(jnp.asarray(x)), np.argmax(x, axis=-1))


def test_draws_are_those_of_categorical():
  """JAX's own draw from the same key."""
  x = jax.random.normal(jax.random.key(0), (50, 17), jnp.float32)
  key = jax.random.key(1)
  want = jax.random.categorical(key, x)
  np.testing.assert_array_equal(Sample()(x, key), want)
