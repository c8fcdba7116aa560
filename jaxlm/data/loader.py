"""Batches: number `step` is a pure function of (seed, step).

Nothing about the data order is ever saved. To resume, ask for the next step;
to resume on another number of hosts, ask with that number: row r of the
global batch is the same row on 1 process or on 100. Process p of P takes rows
p*B/P up to (p+1)*B/P, or those it is told to take.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxlm.data.pack import Layout, pack, render, tile
from jaxlm.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
  """One stream of token ids and where its documents lie.

  Attributes:
    ids: [N] uint16 or uint32, usually memory-mapped.
    docs: [D, 2] int64: pairs (ids[i], ids[i + 1]) with docs[d, 0] <= i <
      docs[d, 1] belong to document d. With an end-of-text token the stream is
      `eot doc eot doc eot`, and the pairs of a document begin at the eot before
      it and end with the eot after it: every token is a target once.
  """

  ids: np.ndarray
  docs: np.ndarray


def batches(
  tokens: Tokens | Sequence[Tokens],
  seq_len: int,
  batch_size: int,
  seed: int = 0,
  windows: str = "random",
  weights: Sequence[float] | None = None,
  process_index: int = 0,
  process_count: int = 1,
  rows: np.ndarray | None = None,
) -> "Batches":
  """Endless training batches; `batches(...)[step]` is a dict of [B, T] arrays.

  Args:
    tokens: one stream, or one per source of a mixture.
    seq_len: T, tokens in a row.
    batch_size: rows in the global batch; each process gets its share of them.
    seed: any integer; another seed, another order.
    windows: 'random', windows anywhere in the stream, drawn independently as
      nanoGPT does, giving only inputs and targets (int32); or 'packed', whole
      documents side by side, each epoch in a new order, giving segments,
      positions and mask as well (see `jaxlm.data.pack.render`).
    weights: share of the rows from each source (of equal size by default).
    process_index: which host this is.
    process_count: how many there are.
    rows: numbers of the rows to make, ascending; instead of the last two.

  Raises:
    UserError: if a stream is shorter than seq_len + 1, or sizes do not fit.
  """
  sources = [tokens] if isinstance(tokens, Tokens) else list(tokens)
  if rows is None:
    rows = _share(batch_size, process_index, process_count)
  makers = {"random": _RandomWindows, "packed": _PackedRows}
  if windows not in makers:
    raise UserError(f"windows is {windows!r}; it can be 'random' or 'packed'")
  for source in sources:
    _check_length(source, seq_len)
  made = [
    makers[windows](source, seq_len, seed, k)
    for k, source in enumerate(sources)
  ]
  mix = _Mix(_normalise(weights, len(sources)))
  return Batches(tuple(made), mix, batch_size, rows, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """An endless random-access sequence of batches; see `batches`."""

  sources: tuple
  mix: "_Mix | None"  # only asked where there are several
  batch_size: int
  rows: np.ndarray
  seed: int

  def __getitem__(self, step: int) -> Batch:
    """This process's rows of the global batch number `step` (from 0)."""
    bits = random_bits(self.batch_size, self.seed, step)[self.rows]
    numbers = step * self.batch_size + self.rows
    if len(self.sources) == 1:
      return self.sources[0].take(numbers, bits)
    source, rank = self.mix(numbers)
    out: Batch = {}
    for k in np.unique(source):
      here = np.flatnonzero(source == k)
      for name, part in self.sources[k].take(rank[here], bits[here]).items():
        shape = (len(numbers), part.shape[1])
        out.setdefault(name, np.empty(shape, part.dtype))[here] = part
    return out

  def __len__(self) -> int:
    """Endless, as far as an index can tell (grain asks)."""
    return 1 << 62

  def stream(self, start: int = 0, ahead: int = 2) -> Iterator[Batch]:
    """Batches from `start` on, up to `ahead` made beforehand in a thread.

    The iterator is grain's: the order is exact, and it has `get_state` and
    `set_state`.
    """
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    steps = grain.MapDataset.source(self)[start:]
    return iter(steps.to_iter_dataset(options))


def windows(
  tokens: Tokens | Sequence[Tokens],
  seq_len: int,
  batch_size: int,
  packed: bool = False,
  process_index: int = 0,
  process_count: int = 1,
  rows: np.ndarray | None = None,
) -> "Windows":
  """The whole of a split once, for an exact loss: a sequence of batches.

  Every target of the split occurs exactly once with mask 1; the end is padded
  to full rows and batches, so that one compiled step serves them all:
  sum(loss * mask) / sum(mask) over all batches is the loss of the split.

  Args:
    tokens: the split's stream or streams.
    seq_len: T.
    batch_size: rows in the global batch.
    packed: lay out as the 'packed' batches (with segments and positions);
      otherwise rows are consecutive stretches of the stream.
    process_index: which host this is.
    process_count: how many there are.
    rows: numbers of the rows to make, ascending; instead of the last two.

  Raises:
    UserError: if the split is empty or sizes do not fit.
  """
  sources = [tokens] if isinstance(tokens, Tokens) else list(tokens)
  if rows is None:
    rows = _share(batch_size, process_index, process_count)
  if sum(len(source.ids) - 1 for source in sources) <= 0:
    raise UserError(
      "the validation split is empty; raise data.val_fraction or give more text"
    )
  layouts = [
    pack(source.docs, seq_len)
    if packed
    else tile(max(len(source.ids) - 1, 0), seq_len)
    for source in sources
  ]
  return Windows(
    tuple(sources), tuple(layouts), seq_len, batch_size, rows, packed
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """A finite sequence of batches that covers a split once; see `windows`."""

  tokens: tuple[Tokens, ...]
  layouts: tuple[Layout, ...]
  seq_len: int
  batch_size: int
  rows: np.ndarray
  packed: bool

  def __len__(self) -> int:
    return -(-sum(map(len, self.layouts)) // self.batch_size)

  def __getitem__(self, i: int) -> Batch:
    """Batch number i: inputs, targets, mask (and segments, positions)."""
    if not 0 <= i < len(self):
      raise IndexError(f"window batch {i} of {len(self)}")
    rows = i * self.batch_size + self.rows
    out: Batch = {}
    for tokens, layout in zip(self.tokens, self.layouts, strict=True):
      mine = np.where(rows >= 0, rows, len(layout))
      part = render(tokens.ids, layout, mine, self.seq_len)
      out = {k: out[k] + v if out else v for k, v in part.items()}
      rows = rows - len(layout)
    if not self.packed:
      del out["segments"], out["positions"]
    return out


class _RandomWindows:
  """Windows at independent uniform places, as in nanoGPT's get_batch."""

  def __init__(self, tokens: Tokens, seq_len: int, seed: int, source: int):
    # A plain view: indexing the memmap subclass costs several microseconds.
    self._ids = np.asarray(tokens.ids)
    self._span = np.arange(seq_len + 1)
    self._places = np.uint64(len(tokens.ids) - seq_len)

  def take(self, rows: np.ndarray, bits: np.ndarray) -> Batch:
    offsets = (bits % self._places).astype(np.int64)
    window = self._ids[offsets[:, None] + self._span].astype(np.int32)
    return {"inputs": window[:, :-1], "targets": window[:, 1:]}


class _PackedRows:
  """Packed documents; every epoch visits every row once in its own order."""

  def __init__(self, tokens: Tokens, seq_len: int, seed: int, source: int):
    self._ids = np.asarray(tokens.ids)
    self._layout = pack(tokens.docs, seq_len)
    self._seq_len, self._shuffle = seq_len, Shuffle(seed, 1 + source)

  def take(self, rows: np.ndarray, bits: np.ndarray) -> Batch:
    chosen = self._shuffle(len(self._layout), rows)
    return render(self._ids, self._layout, chosen, self._seq_len)


class Shuffle:
  """Which of `count` things comes as number n: each once in every epoch."""

  def __init__(self, seed: int, purpose: int = 1):
    """`purpose` tells apart what is shuffled under one seed."""
    self._seed, self._purpose = seed, purpose
    self._epochs: dict[tuple[int, int], np.ndarray] = {}

  def __call__(self, count: int, numbers: np.ndarray) -> np.ndarray:
    """The things with these numbers, which are ascending, int64 [n]."""
    epoch, place = np.divmod(numbers, count)
    if epoch[0] == epoch[-1]:
      return self.epoch(count, int(epoch[0]))[place]
    pairs = zip(epoch.tolist(), place.tolist(), strict=True)
    return np.array([self.epoch(count, e)[p] for e, p in pairs])

  def epoch(self, count: int, epoch: int) -> np.ndarray:
    """The epoch's permutation; the latest few are remembered."""
    key = (count, epoch)
    if key not in self._epochs:
      for old in sorted(self._epochs)[:-1]:
        del self._epochs[old]
      bits = random_bits(count, self._seed, epoch, self._purpose)
      self._epochs[key] = np.argsort(bits, kind="stable")
    return self._epochs[key]


class _Mix:
  """Which source row r comes from, and which row of that source it is.

  The sources take turns in a fixed pattern of 1,000 rows in which each has
  its share, spread evenly; so both answers are arithmetic on r.
  """

  def __init__(self, weights: np.ndarray, length: int = 1000):
    share = weights * length
    counts = np.maximum(np.floor(share).astype(np.int64), 1)
    while counts.sum() < length:
      counts[np.argmax(share - counts)] += 1
    while counts.sum() > length:
      counts[np.argmin(np.where(counts > 1, share - counts, np.inf))] -= 1
    rank = np.concatenate([np.arange(n) for n in counts])
    source = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort((rank + 0.5) / counts[source], kind="stable")
    self._source, self._rank, self._counts = source[order], rank[order], counts
    self._length = length

  def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    turn, place = np.divmod(rows, self._length)
    source = self._source[place]
    return source, turn * self._counts[source] + self._rank[place]


def random_bits(
  count: int, seed: int, index: int, purpose: int = 0
) -> np.ndarray:
  """[count] random uint64, a pure function of the other arguments.

  Philox is counter-based: (seed, index) is its key, so no state is carried.
  Its raw output is fixed for good, unlike the methods of numpy's Generator.
  """
  key = np.array([seed % (1 << 64), index], np.uint64)
  counter = np.array([0, 0, 0, purpose], np.uint64)
  return np.random.Philox(key=key, counter=counter).random_raw(count)


def _normalise(weights: Sequence[float] | None, count: int) -> np.ndarray:
  if not weights:
    weights = [1.0] * count
  if count > 1000:
    raise UserError(f"a mixture of {count} paths; at most 1,000 are possible")
  given = np.asarray(weights, np.float64)
  if given.shape != (count,) or not np.all(given > 0) or given.sum() == np.inf:
    raise UserError(
      f"weights {list(weights)} must be {count} positive numbers, one per path"
    )
  return given / given.sum()


def _share(
  batch_size: int, process_index: int, process_count: int
) -> np.ndarray:
  """The rows of the global batch that this process makes."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f"batch_size {batch_size} does not divide among {process_count} "
      "processes; make it a positive multiple of that"
    )
  if not 0 <= process_index < process_count:
    raise UserError(f"process {process_index} is not one of {process_count}")
  each = batch_size // process_count
  return np.arange(process_index * each, (process_index + 1) * each)


def _check_length(tokens: Tokens, seq_len: int) -> None:
  """A sequence and the target of its last token must fit the stream."""
  if seq_len < 1:
    raise UserError(f"the sequence length is {seq_len}; it must be positive")
  count = len(tokens.ids)
  if count < 2 or not np.any(tokens.docs[:, 1] > tokens.docs[:, 0]):
    raise UserError("the training split is empty; give more text")
  if count < seq_len + 1:
    raise UserError(
      f"a sequence of {seq_len} tokens is longer than the training text "
      f"({count} tokens); use a shorter sequence or more text"
    )
