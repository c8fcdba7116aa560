"""Packing keeps documents whole and apart, and loses no target."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from jaxlm.data.pack import Layout, pack, render, tile

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30)
WIDTH = st.integers(1, 17)


def documents(sizes: list[int]) -> np.ndarray:
  """[D, 2] for documents of so many pairs, each after the other."""
  ends = np.cumsum(sizes)
  return np.stack([ends - sizes, ends], 1)


def predicted(layout: Layout) -> np.ndarray:
  """The place in the stream of every pair that the layout holds."""
  spans = zip(layout.start, layout.length, strict=True)
  places = [np.arange(start, start + length) for start, length in spans]
  return np.concatenate([*places, np.zeros(0, np.int64)])


@hypothesis.given(SIZES, WIDTH)
def test_every_pair_once(sizes: list[int], seq_len: int) -> None:
  """Packed or tiled, each (input, target) pair lies in exactly one place."""
  total = sum(sizes)
  for layout in (pack(documents(sizes), seq_len), tile(total, seq_len)):
    assert sorted(predicted(layout).tolist()) == list(range(total))
    assert np.all(layout.column + layout.length <= seq_len)


@hypothesis.given(SIZES, WIDTH)
def test_whole_documents_stay_whole(sizes: list[int], seq_len: int) -> None:
  """A document that fits a row is one piece; a longer one is cut in order."""
  layout = pack(documents(sizes), seq_len)
  pieces = {
    int(s): int(n) for s, n in zip(layout.start, layout.length, strict=True)
  }
  for begin, end in documents(sizes).tolist():
    for start in range(begin, end, seq_len):
      assert pieces.pop(start) == min(seq_len, end - start)
  assert not pieces


@hypothesis.given(SIZES, WIDTH)
def test_best_fit_is_tight(sizes: list[int], seq_len: int) -> None:
  """At most one row of rests is half empty: two such would have been one."""
  layout = pack(documents(sizes), seq_len)
  rests = [n % seq_len for n in sizes]
  rows = len(layout) - sum(n // seq_len for n in sizes)
  # Two rests above one half never share a row.
  assert rows >= max(
    -(-sum(rests) // seq_len), sum(2 * r > seq_len for r in rests)
  )
  assert rows <= 2 * sum(rests) // seq_len + 1
  half = [
    int(layout.length[a:b].sum()) * 2 <= seq_len
    for a, b in zip(layout.first[:-1], layout.first[1:], strict=True)
  ]
  assert sum(half) <= 1


@hypothesis.given(SIZES, WIDTH)
def test_render(sizes: list[int], seq_len: int) -> None:
  """Rows against the definition, pair by pair.

  Inputs and targets are neighbours of the stream; positions count up from 0
  in each segment; the mask is where there is a segment; segments of a row are
  1, 2, ... from the left with padding only at its end.
  """
  ids = np.random.default_rng(0).integers(1, 1000, sum(sizes) + 1)
  layout = pack(documents(sizes), seq_len)
  rows = np.arange(len(layout) + 1)  # one row too many: padding
  out = render(ids.astype(np.uint16), layout, rows, seq_len)
  shapes = {v.shape for v in out.values()}
  assert shapes == {(len(rows), seq_len)}
  assert not any(v[-1].any() for v in out.values())
  for r in rows[:-1]:
    expected = {name: np.zeros(seq_len) for name in out}
    for n, p in enumerate(range(layout.first[r], layout.first[r + 1])):
      start, length = layout.start[p], layout.length[p]
      here = slice(layout.column[p], layout.column[p] + length)
      expected["inputs"][here] = ids[start : start + length]
      expected["targets"][here] = ids[start + 1 : start + length + 1]
      expected["segments"][here] = n + 1
      expected["positions"][here] = np.arange(length)
      expected["mask"][here] = 1
    for name, value in out.items():
      assert np.array_equal(value[r], expected[name]), name
    used = np.flatnonzero(out["segments"][r])
    assert np.array_equal(used, np.arange(len(used)))
    assert np.all(np.diff(out["segments"][r][used]) >= 0)
  kinds = {name: v.dtype for name, v in out.items()}
  assert kinds.pop("mask") == np.float32
  assert set(kinds.values()) == {np.dtype(np.int32)}


def test_targets_never_cross_documents() -> None:
  """With end-of-text tokens, by hand: eot aa eot b eot, rows of 3.

  The first document predicts a, a, eot from eot, a, a; the second b, eot from
  eot, b; nothing predicts across the boundary.
  """
  ids = np.array([0, 1, 1, 0, 2, 0], np.uint16)
  layout = pack(np.array([[0, 3], [3, 5]]), 3)
  out = render(ids, layout, np.arange(2), 3)
  assert out["inputs"].tolist() == [[0, 1, 1], [0, 2, 0]]
  assert out["targets"].tolist() == [[1, 1, 0], [2, 0, 0]]
  assert out["mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
  both = render(ids, pack(np.array([[0, 3], [3, 5]]), 6), np.arange(1), 6)
  assert both["segments"].tolist() == [[1, 1, 1, 2, 2, 0]]
  assert both["positions"].tolist() == [[0, 1, 2, 0, 1, 0]]


def test_no_documents_no_rows() -> None:
  assert len(pack(np.zeros((0, 2), np.int64), 8)) == 0
  assert len(tile(0, 8)) == 0
