"""Encoded examples and the rows they lie in.

An example is a short stream of tokens some of which are learned; `Examples`
holds many, one behind the other, and `lay` says which share a row. Rows are
rendered as for pretraining (`jaxlm.data.pack`), with a mask that counts what is
learned and nothing else, and with segments, so that no example sees another.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxlm.data.loader import Batch, Batches, Shuffle
from jaxlm.data.orders import Order
from jaxlm.data.pack import Layout, pack, render

_ROWS = 32  # that examples of like difficulty are packed into at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Encoded examples, one behind the other.

  Attributes:
    ids: all their tokens, int32 [N].
    trained: which of these are learned, bool [N].
    docs: first and last-plus-one (input, target) pair of each, int64 [D, 2].
  """

  ids: np.ndarray
  trained: np.ndarray
  docs: np.ndarray

  def __len__(self) -> int:
    return len(self.docs)


def join(made: Sequence[tuple[np.ndarray, np.ndarray]]) -> Examples:
  """Examples from token ids and which of them are learned, one by one."""
  ends = np.cumsum([len(ids) for ids, _ in made], dtype=np.int64)
  starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)]
  ids = [ids for ids, _ in made]
  trained = [trained for _, trained in made]
  return Examples(
    np.concatenate([*ids, np.zeros(0, np.int32)]),
    np.concatenate([*trained, np.zeros(0, bool)]),
    np.stack([starts, ends - 1], axis=1).reshape(-1, 2),
  )


# --- Rows -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Laid:
  """Examples in rows of `seq_len`; the rows come from easy to hard."""

  examples: Examples
  layout: Layout
  seq_len: int

  def __len__(self) -> int:
    return len(self.layout)

  @property
  def grades(self) -> np.ndarray:
    """The length of the longest example of each row, [rows]."""
    return np.maximum.reduceat(self.layout.length, self.layout.first[:-1])

  def take(self, rows: np.ndarray) -> Batch:
    """Rows as arrays [rows, seq_len]; one that there is not is all padding.

    Returns:
      As `jaxlm.data.pack.render`, the mask being 1 where the target is learned.
    """
    e = self.examples
    made = render(e.ids, self.layout, rows, self.seq_len)
    learned = render(e.trained, self.layout, rows, self.seq_len)["targets"]
    return made | {"mask": learned.astype(np.float32)}


def lay(
  examples: Examples, seq_len: int, packed: bool = True, graded: bool = False
) -> Laid:
  """Which examples share a row.

  Args:
    examples: none longer than a row.
    seq_len: (input, target) pairs in a row.
    packed: as many as fit; otherwise one.
    graded: pack only with examples of about the same length.
  """
  docs = examples.docs
  length = docs[:, 1] - docs[:, 0]
  docs = docs[np.argsort(length, kind="stable")]
  if not packed:
    parts = [_alone(docs)]
  elif graded:
    turn = np.cumsum(docs[:, 1] - docs[:, 0]) // (_ROWS * seq_len)
    parts = [pack(docs[turn == i], seq_len) for i in np.unique(turn)]
  else:
    parts = [pack(docs, seq_len)]
  return Laid(examples, _behind(parts), seq_len)


def _alone(docs: np.ndarray) -> Layout:
  """One document a row."""
  rows = np.arange(len(docs))
  length = docs[:, 1] - docs[:, 0]
  return Layout(np.arange(len(docs) + 1), docs[:, 0], length, 0 * rows)


def _behind(parts: Sequence[Layout]) -> Layout:
  """The rows of some layouts, one layout after the other."""
  firsts, pieces = [np.zeros(1, np.int64)], 0
  for part in parts:
    firsts.append(part.first[1:] + pieces)
    pieces += part.first[-1]
  start, length, column = (
    np.concatenate([getattr(part, name) for part in parts])
    for name in ("start", "length", "column")
  )
  return Layout(np.concatenate(firsts), start, length, column)


# --- Batches ----------------------------------------------------------------


def example_batches(
  laid: Laid,
  order: Order,
  batch_size: int,
  seed: int,
  steps: int,
  rows: np.ndarray,
) -> Batches:
  """Endless batches for training; number `step` follows from (seed, step).

  Args:
    laid: the examples; `graded` if the order is.
    order: which rows come when.
    batch_size: rows of the global batch.
    seed: of the order.
    steps: of the whole run: a curriculum has to know how far it is.
    rows: numbers of the rows to make, ascending.
  """
  total = max(steps, 1) * batch_size
  drawn = _Drawn(laid, order, Shuffle(seed), total, batch_size)
  return Batches((drawn,), None, batch_size, rows, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class _Drawn:
  """Rows of examples in an order: a source of `Batches`."""

  laid: Laid
  order: Order
  shuffle: Shuffle
  total: int
  batch_size: int

  def __post_init__(self):
    grades = self.laid.grades
    sort = np.argsort(grades, kind="stable")
    object.__setattr__(self, "_sort", sort)
    object.__setattr__(self, "_grades", grades[sort])

  def take(self, numbers: np.ndarray, bits: np.ndarray) -> Batch:
    first = numbers[0] // self.batch_size * self.batch_size
    share = min(first / self.total, 1.0)
    picked = self.order.pick(self._grades, numbers, bits, share, self.shuffle)
    return self.laid.take(self._sort[picked])


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleWindows:
  """All examples once, in batches of `size` of which `rows` are made."""

  laid: Laid
  size: int
  rows: np.ndarray

  def __len__(self) -> int:
    return -(-len(self.laid) // self.size)

  def __getitem__(self, i: int) -> Batch:
    """Batch number i."""
    if not 0 <= i < len(self):
      raise IndexError(f"batch {i} of {len(self)}")
    return self.laid.take(i * self.size + self.rows)
