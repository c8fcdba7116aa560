"""The data order is a function of (seed, step), on any number of hosts."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxlm.data import Tokens, batches, windows
from jaxlm.errors import UserError

B, T = 12, 8


def stream(sizes: list[int], base: int = 0) -> Tokens:
  """A stream whose token at place i is base + i, cut into documents."""
  ends = np.cumsum(sizes)
  ids = np.arange(base, base + ends[-1] + 1, dtype=np.uint16)
  return Tokens(ids, np.stack([ends - sizes, ends], 1))


ONE = stream([500])
MANY = stream([3, 20, 8, 1, 7, 40, 5, 16, 2, 9, 30])
MIX = (MANY, stream([200], 1000), stream([5, 6, 7] * 9, 2000))
CASES = {
  "random": {"tokens": ONE, "windows": "random"},
  "packed": {"tokens": MANY, "windows": "packed"},
  "mixed": {"tokens": MIX, "windows": "random", "weights": (5, 3, 2)},
  "mixed packed": {"tokens": MIX, "windows": "packed", "weights": (5, 3, 2)},
}


def make(case: str, **kw):
  return batches(seq_len=T, batch_size=B, **(CASES[case] | kw))


def equal(a: dict, b: dict) -> bool:
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", CASES)
def test_exact_resume_on_another_host_count(case: str) -> None:
  """Steps asked for in any order, by new objects, on 1 to 12 hosts.

  The rows of all hosts together are the rows of one host: so a run continues
  exactly after a restart, whatever the number of hosts before and after.
  """
  before = make(case, seed=3)
  steps = [0, 1, 2, 30, 31, 1_000_000]
  expected = {step: before[step] for step in steps}
  for count in (1, 2, 3, 12):
    hosts = [
      make(case, seed=3, process_index=i, process_count=count)
      for i in range(count)
    ]
    for step in reversed(steps):
      parts = [host[step] for host in hosts]
      joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
      assert equal(joined, expected[step])


@pytest.mark.parametrize("case", CASES)
def test_seed_changes_the_order(case: str) -> None:
  one, two = make(case, seed=0), make(case, seed=1)
  assert not all(equal(one[step], two[step]) for step in range(3))
  assert not equal(one[0], one[1])
  negative = make(case, seed=-1)
  assert equal(negative[2], make(case, seed=-1)[2])


@pytest.mark.parametrize("case", CASES)
def test_targets_follow_inputs(case: str) -> None:
  """Where a target counts, it is the stream's next token."""
  for step in range(20):
    batch = make(case)[step]
    mask = batch.get("mask", np.ones((B, T))).astype(bool)
    assert np.array_equal(batch["targets"][mask], batch["inputs"][mask] + 1)
    assert all(v.shape == (B, T) for v in batch.values())
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32


def test_random_windows_are_minimal_and_uniform() -> None:
  """Only inputs and targets, and each place equally likely.

  501 tokens give 493 places; over 60,000 draws the chi-square statistic stays
  within six standard deviations of its mean.
  """
  many = batches(ONE, T, 6000, seed=5)
  assert many[0].keys() == {"inputs", "targets"}
  starts = np.concatenate([many[step]["inputs"][:, 0] for step in range(10)])
  places = len(ONE.ids) - T
  assert starts.min() == 0
  assert starts.max() == places - 1
  counts = np.bincount(starts, minlength=places)
  mean = len(starts) / places
  chi = ((counts - mean) ** 2 / mean).sum()
  assert abs(chi - (places - 1)) < 6 * np.sqrt(2 * places)


def test_packed_epochs() -> None:
  """Every epoch predicts every token of every document once, in a new order."""
  rows = len(windows(MANY, T, 1, packed=True))
  one = batches(MANY, T, 1, seed=2, windows="packed")
  orders = []
  for epoch in range(3):
    seen = [one[epoch * rows + i] for i in range(rows)]
    targets = [b["targets"][b["mask"] > 0] for b in seen]
    flat = np.sort(np.concatenate(targets))
    assert np.array_equal(flat, MANY.ids[1:])
    orders.append([int(b["inputs"][0, 0]) for b in seen])
  assert orders[0] != orders[1] != orders[2]


def test_batch_across_epochs_equals_its_rows() -> None:
  """A batch that holds the end of one epoch and several more is no exception.

  70 rows of a layout of 19 rows: four epochs within one batch.
  """
  big = batches(MANY, T, 70, windows="packed")[1]
  rows = [batches(MANY, T, 1, windows="packed")[70 + i] for i in range(70)]
  assert equal(big, {k: np.concatenate([r[k] for r in rows]) for k in big})


@pytest.mark.parametrize("windows_", ["random", "packed"])
def test_mixture_shares(windows_: str) -> None:
  """The weights are the shares of the rows, exactly over 1,000 rows."""
  mixed = batches(MIX, T, 100, windows=windows_, weights=(5, 3, 2))
  first = [mixed[step]["inputs"][:, 0] // 1000 for step in range(10)]
  assert np.bincount(np.concatenate(first)).tolist() == [500, 300, 200]
  assert all(len(set(f.tolist())) == 3 for f in first)  # spread evenly
  equal_shares = batches(MIX, T, 100, windows=windows_)
  count = np.bincount(equal_shares[0]["inputs"][:, 0] // 1000)
  assert count.min() >= 32


@hypothesis.given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_any_weights(weights: list[float]) -> None:
  """Each source gets its share to within one row in 1,000, at least one."""
  mixed = batches([ONE] * len(weights), T, B, weights=weights).mix
  source, _ = mixed(np.arange(1000))
  counts = np.bincount(source, minlength=len(weights))
  share = 1000 * np.array(weights) / sum(weights)
  assert counts.min() >= 1
  if share.min() >= 1:
    assert np.abs(counts - share).max() < 1 + 1e-6


def test_mixture_rows_are_numbered_without_gaps() -> None:
  """Rows of one source are its rows 0, 1, 2, ...: epochs stay whole."""
  mix = batches(MIX, T, B, weights=(0.61, 0.28, 0.11)).mix
  source, rank = mix(np.arange(5000))
  for k in range(3):
    assert np.array_equal(rank[source == k], np.arange((source == k).sum()))


@hypothesis.given(
  st.lists(st.integers(1, 50), min_size=1, max_size=12),
  st.integers(1, 20),
  st.integers(1, 5),
  st.booleans(),
)
def test_validation_covers_the_split_once(
  sizes: list[int], seq_len: int, batch_size: int, packed: bool
) -> None:
  """Every target exactly once, in batches of one shape; also over two hosts.

  So the masked sum over all batches is the exact loss of the split.
  """
  split = (stream(sizes), stream(sizes[::-1], 5000))
  count = 2 if batch_size % 2 == 0 else 1
  hosts = [
    windows(split, seq_len, batch_size, packed, i, count) for i in range(count)
  ]
  found = []
  for host in hosts:
    for batch in host:
      assert batch["inputs"].shape == (batch_size // count, seq_len)
      mask = batch["mask"] > 0
      assert np.array_equal(batch["inputs"][mask] + 1, batch["targets"][mask])
      assert ("segments" in batch) == packed
      found.append(batch["targets"][mask])
  total = sum(sizes) + 1
  expected = [*range(1, total), *range(5001, 5000 + total)]
  assert sorted(np.concatenate(found).tolist()) == expected


def test_validation_by_hand() -> None:
  """Seven tokens in rows of 2, batches of 2: the last row is padding."""
  batch = windows(stream([6]), 2, 2)[1]
  assert batch["inputs"].tolist() == [[4, 5], [0, 0]]
  assert batch["targets"].tolist() == [[5, 6], [0, 0]]
  assert batch["mask"].tolist() == [[1, 1], [0, 0]]
  with pytest.raises(IndexError):
    windows(stream([6]), 2, 2)[2]


@pytest.mark.parametrize("case", CASES)
def test_prefetch_keeps_the_order(case: str) -> None:
  """An iterator gives steps 7, 8, 9, ... and resumes from its state."""
  made = make(case)
  ahead = made.stream(7, ahead=3)
  for step in range(7, 17):
    assert equal(next(ahead), made[step])
  state = ahead.get_state()
  other = made.stream(7)
  other.set_state(state)
  assert equal(next(other), made[17])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 10, "process_count": 4}, "10 does not divide among 4"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"process_index": 2, "process_count": 2}, "process 2 is not one of 2"),
    ({"seq_len": 501}, r"501 tokens is longer.*\(501 tokens\)"),
    ({"seq_len": 501, "windows": "packed"}, "501 tokens is longer"),
    ({"seq_len": 0}, "must be positive"),
    ({"windows": "other"}, "'random' or 'packed'"),
    ({"weights": (1, 2)}, "1 positive numbers"),
    ({"weights": (0,)}, "1 positive numbers"),
    ({"tokens": Tokens(np.zeros(0, np.uint16), ONE.docs[:0])}, "is empty"),
  ],
)
def test_errors(change: dict, message: str) -> None:
  with pytest.raises(UserError, match=message):
    batches(**({"tokens": ONE, "seq_len": T, "batch_size": B} | change))


def test_empty_validation_split() -> None:
  for nothing in ((), (Tokens(np.zeros(0, np.uint16), ONE.docs[:0]),)):
    with pytest.raises(UserError, match="validation split is empty"):
      windows(nothing, T, B)
