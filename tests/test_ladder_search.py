"""Heaps, selection, nucleus and shortest paths against the plain way."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.ladder import dijkstra, topk

VALUES = st.lists(st.integers(-20, 20), min_size=1, max_size=60)


@given(VALUES, st.integers(0, 70))
def test_the_heap_keeps_the_largest(values, k):
  """Values and places, of equal ones the first, as a stable sort has it."""
  order = np.argsort(-np.array(values), kind="stable")[:k]
  assert topk.largest(values, k) == [(values[i], i) for i in order]


@given(VALUES, st.data())
def test_quickselect_is_a_sort(values, data):
  """The k-th largest, whatever the pivots."""
  k = data.draw(st.integers(1, len(values)))
  seed = data.draw(st.integers(0, 99))
  found = topk.quickselect(np.array(values), k, seed)
  assert found == sorted(values, reverse=True)[k - 1]


@given(st.lists(st.lists(st.integers(-9, 9)), max_size=6), st.integers(0, 30))
def test_a_merge_is_a_sort(lists, k):
  """Sorted lists, some empty, joined until k items are out."""
  rows = [sorted(((x, 0) for x in part), reverse=True) for part in lists]
  want = sorted(itertools.chain(*lists), reverse=True)[:k]
  assert [x for x, _ in topk.merge(rows, k)] == want


def test_nearest_equals_a_tree():
  """The neighbours that scipy's k-d tree finds."""
  from scipy.spatial import cKDTree

  rng = np.random.default_rng(0)
  points, query = rng.normal(size=(300, 3)), rng.normal(size=3)
  want = list(cKDTree(points).query(query, 7)[1])
  assert topk.nearest(points, query, 7) == want


@given(st.integers(0, 2**31), st.floats(0.01, 0.99))
def test_the_nucleus_is_the_sorted_one(seed, p):
  """The smallest set of the likeliest tokens whose mass is p or more."""
  probs = np.random.default_rng(seed).dirichlet(np.full(50, 0.3))
  order = np.sort(probs)[::-1]
  need = int(np.searchsorted(np.cumsum(order), p)) + 1
  kept = probs >= topk.nucleus(probs, p)
  assert kept.sum() == need


@pytest.mark.parametrize("sharp", [0.3, 3.0])
def test_dijkstra_equals_enumeration(sharp):
  """All 4^5 texts; a certain language needs fewer prefixes."""
  step = dijkstra.chain(4, sharp, seed=2)

  def worth(text):
    return sum(step(text[:i])[text[i]] for i in range(5))

  best = max(itertools.product(range(4), repeat=5), key=worth)
  text, value, expanded = dijkstra.likeliest(step, 5)
  assert text == best
  assert value == pytest.approx(worth(best), abs=1e-12)
  assert expanded < sum(4**n for n in range(5)) / (1 if sharp < 1 else 4)
