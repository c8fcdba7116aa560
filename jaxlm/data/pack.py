"""Which tokens lie where in the rows of a batch.

A model trains on pairs (input, target) of neighbouring tokens. A `Layout`
says which stretches of such pairs fill each row of `seq_len`:

    tile(n)      the whole stream cut into rows, for validation
    pack(docs)   whole documents put side by side, for training without
                 attention across documents

and `render` turns rows of a layout into arrays. Everything is vectorised: a
batch costs a few dozen microseconds.
"""

import bisect
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """Rows made of pieces, as flat arrays (row r owns pieces first[r:r + 1]).

  Attributes:
    first: [rows + 1] index of each row's first piece.
    start: [pieces] place of the piece's first input in the token stream.
    length: [pieces] number of (input, target) pairs.
    column: [pieces] where in its row the piece begins.
  """

  first: np.ndarray
  start: np.ndarray
  length: np.ndarray
  column: np.ndarray

  def __len__(self) -> int:
    return len(self.first) - 1


def tile(pairs: int, seq_len: int) -> Layout:
  """Cuts `pairs` consecutive pairs into rows; the last one may be short."""
  start = np.arange(0, pairs, seq_len)
  length = np.minimum(seq_len, pairs - start)
  return Layout(np.arange(len(start) + 1), start, length, np.zeros_like(start))


def pack(docs: np.ndarray, seq_len: int) -> Layout:
  """Fits documents into rows, leaving as little padding as it can.

  A document longer than a row is cut into full rows and a rest; the rests and
  the short documents go, longest first, each into the fullest row that still
  has room (best-fit decreasing, arXiv:2404.10830). No document that fits a row
  is ever cut, so each is seen with its whole context.

  Args:
    docs: [D, 2] first and last-plus-one pair of each document.
    seq_len: pairs in a row.
  """
  lengths = docs[:, 1] - docs[:, 0]
  full = lengths // seq_len
  whole = np.repeat(docs[:, 0], full) + seq_len * _ranges(full)
  rest = lengths - full * seq_len
  keep = rest > 0
  tail, size = (docs[:, 0] + full * seq_len)[keep], rest[keep]
  row, column = _best_fit(size, seq_len)
  row = np.concatenate([row + len(whole), np.arange(len(whole))])
  start = np.concatenate([tail, whole])
  length = np.concatenate([size, np.full(len(whole), seq_len)])
  column = np.concatenate([column, np.zeros(len(whole), np.int64)])
  return _layout(row, start, length, column)


def render(
  ids: np.ndarray, layout: Layout, rows: np.ndarray, seq_len: int
) -> dict[str, np.ndarray]:
  """The rows of a layout as arrays [len(rows), seq_len].

  Returns:
    inputs, targets: int32 token ids, 0 where there is padding.
    segments: int32, 1, 2, ... for the pieces of a row and 0 for padding:
      attention is to stay within equal numbers.
    positions: int32, counted from 0 within each piece.
    mask: float32, 1 where a target counts, 0 at padding.
    A row number outside the layout gives a row of padding.
  """
  inside = rows < len(layout)
  low = layout.first[np.where(inside, rows, 0)]
  count = layout.first[np.where(inside, rows + 1, 0)] - low
  row = np.repeat(np.arange(len(rows)), count)
  nth = _ranges(count)  # which piece of its row
  piece = low[row] + nth
  # From here one entry per pair: its piece, place in it, place in the stream.
  of = np.repeat(np.arange(len(piece)), layout.length[piece])
  within = _ranges(layout.length[piece])
  source = layout.start[piece][of] + within
  target = (row * seq_len + layout.column[piece])[of] + within
  out = np.zeros((4, len(rows) * seq_len), np.int32)
  out[0][target] = ids[source]
  out[1][target] = ids[source + 1]
  out[2][target] = (nth + 1)[of]
  out[3][target] = within
  names = ("inputs", "targets", "segments", "positions")
  made = dict(zip(names, out.reshape(4, len(rows), seq_len), strict=True))
  return made | {"mask": (made["segments"] > 0).astype(np.float32)}


def _best_fit(size: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
  """Row and column for every item, by best-fit decreasing.

  Rows with equal room left are interchangeable, so one stack per amount of
  room and a sorted list of the amounts that occur is all the search needs.
  """
  row, column = np.zeros_like(size), np.zeros_like(size)
  stacks: dict[int, list[int]] = {}
  amounts: list[int] = []
  rows = 0
  for item in np.argsort(-size, kind="stable").tolist():
    need = int(size[item])
    at = bisect.bisect_left(amounts, need)
    if at == len(amounts):
      left, rows = room, rows + 1
      row[item] = rows - 1
    else:
      left = amounts[at]
      row[item] = stacks[left].pop()
      if not stacks[left]:
        del stacks[left], amounts[at]
    column[item] = room - left
    left -= need
    if left and left not in stacks:
      stacks[left] = []
      bisect.insort(amounts, left)
    if left:
      stacks[left].append(int(row[item]))
  return row, column


def _layout(
  row: np.ndarray, start: np.ndarray, length: np.ndarray, column: np.ndarray
) -> Layout:
  """Sorts pieces into rows, and rows by where in the stream they begin."""
  opening = np.full(row.max(initial=-1) + 1, np.iinfo(np.int64).max)
  np.minimum.at(opening, row, start)
  place = np.empty_like(opening)
  place[np.argsort(opening, kind="stable")] = np.arange(len(opening))
  row = place[row]
  order = np.lexsort((column, row))
  counts = np.bincount(row, minlength=len(opening))
  first = np.concatenate([[0], np.cumsum(counts)])
  return Layout(first, start[order], length[order], column[order])


def _ranges(counts: np.ndarray) -> np.ndarray:
  """[2, 0, 3] -> [0, 1, 0, 1, 2]."""
  ends = np.cumsum(counts)
  total = int(ends[-1]) if len(ends) else 0
  return np.arange(total) - np.repeat(ends - counts, counts)
