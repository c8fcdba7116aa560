"""Pairs of responses, one better than the other: files, tasks, batches.

    {"prompt": "12+34=", "chosen": "46", "rejected": "56"}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}
    {"messages": [messages], "rejected": "56"}

Conversations and names of fields are those of `jaxlm.objectives.talks`; the
last answer is what is compared. Both sides are encoded segment by segment, so
that the place where the response begins is exact and the same in both.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import tasks
from jaxlm.data import sources
from jaxlm.data.dataset import held_out
from jaxlm.data.loader import Batch, Batches, Shuffle, random_bits
from jaxlm.data.tokenizer import Tokenizer, utf8
from jaxlm.errors import UserError
from jaxlm.objectives import talks
from jaxlm.objectives.talks import Talk
from jaxlm.objectives.writing import Writing, writing

Pair = tuple[Talk, Talk]  # the chosen conversation and the rejected one
_NOISE = 1 << 21  # the purpose of random bits

# --- Encoded ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sides:
  """A pair as tokens: the prompt, and both responses with their ends.

  Attributes:
    prompt: int32 [n].
    responses: the chosen and the rejected one, int32 each.
  """

  prompt: np.ndarray
  responses: tuple[np.ndarray, np.ndarray]

  def __len__(self) -> int:
    """Tokens of the longer side."""
    return len(self.prompt) + max(map(len, self.responses))

  def flipped(self) -> "Sides":
    """With the label of the other."""
    return dataclasses.replace(self, responses=self.responses[::-1])


def render(
  pairs: Sequence[Sides], numbers: np.ndarray, seq_len: int, sides: int = 2
) -> Batch:
  """Pairs as arrays; a number that there is not is a row of padding.

  Args:
    pairs: none longer than `seq_len`.
    numbers: which of them, [rows].
    seq_len: tokens of a side.
    sides: 2; or 3, the third being the prompt with the chosen response of the
      next pair, cut where it is too long.

  Returns:
    `tokens` int32 [rows, sides, seq_len], and as bool of that shape `mask`, of
    the responses, and `text`, of all that is not padding.
  """
  shape = (len(numbers), sides, seq_len)
  tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
  text = np.zeros(shape, bool)
  for row, number in enumerate(numbers):
    if number >= len(pairs):
      continue
    pair, other = pairs[number], pairs[(number + 1) % len(pairs)]
    start = len(pair.prompt)
    responses = (*pair.responses, other.responses[0])[:sides]
    for side, response in enumerate(responses):
      response = response[: seq_len - start]
      end = start + len(response)
      tokens[row, side, :start] = pair.prompt
      tokens[row, side, start:end] = response
      mask[row, side, start:end] = True
      text[row, side, :end] = True
  return {"tokens": tokens, "mask": mask, "text": text}


@dataclass(frozen=True)
class Corpus:
  """Encoded pairs; see `objective.Corpus`."""

  tokenizer: Tokenizer
  train: tuple[Sides, ...]
  val: tuple[Sides, ...]
  counts: dict[str, int | float]
  skipped: tuple[tuple[str, int], ...]

  def describe(self) -> str:
    """How many there are, and what was left out."""
    text = (
      f"{len(self.train):,} training and {len(self.val):,} validation pairs, "
      f"{self.counts['train_tokens']:,} training tokens of "
      f"{self.counts['vocab']:,} kinds"
    )
    if not self.skipped:
      return text
    told = ", ".join(f"{n:,} with {reason}" for reason, n in self.skipped)
    return f"{text}; left out: {told}"


# --- Data -------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
  """Pairs from files or a task, encoded by a template.

  Attributes:
    seq_len: of a side; a pair with a longer one is left out.
    template: as for `sft`.
    examples: how many pairs are made of a generated task.
    noise: the share of pairs, held out ones as well, whose label is turned.
    sides: as for `render`.
  """

  seq_len: int
  template: str = ""
  examples: int = 5000
  noise: float = 0.0
  sides: int = 2

  def __post_init__(self):
    if not 0.0 <= self.noise <= 1.0:
      raise UserError(
        f"config.objective.noise={self.noise} is no share: 0 to 1"
      )

  @property
  def sequences(self) -> int:
    """As `objective.Data`."""
    return self.sides

  def read(
    self,
    path: Any,
    tokenizer: str | Tokenizer,
    vocab: int,
    val_fraction: float,
    text_key: str = "text",
    weights: Sequence[float] | None = None,
  ) -> Corpus:
    """Reads, encodes, and leaves out what cannot be compared.

    Raises:
      UserError: if nothing is left, or as `pairs` and `segments`.
    """
    if weights:
      raise UserError("data.weights mixes plain text; give pairs as one path")
    found, held, skipped = pairs(path, self.examples, val_fraction)
    sides = [side for part in (found, held) for pair in part for side in pair]
    write = writing(self.template, sides, tokenizer, vocab)
    count = Counter(skipped)
    train, val = (
      self._encoded(write, part, count, turn)
      for turn, part in enumerate((found, held))
    )
    if not train:
      told = ", ".join(f"{n:,} with {reason}" for reason, n in count.items())
      raise UserError(f"no pair is left to train on: {told}")
    size = sum(len(utf8(m["content"])) for t in sides for m in t)
    n = sum(len(p.prompt) * 2 + sum(map(len, p.responses)) for p in train)
    counts = {
      "vocab": write.tokenizer.vocab_size,
      "train_tokens": n,
      "val_tokens": sum(len(p) for p in val),
      "bytes_per_token": size / max(n, 1),
    }
    return Corpus(write.tokenizer, train, val, counts, tuple(count.items()))

  def _encoded(
    self, write: Writing, part: Sequence[Pair], count: Counter, turn: int
  ) -> tuple[Sides, ...]:
    """One split as tokens, with `noise`, without what is too long."""
    kept = []
    for pair in encode(write, part):
      if len(pair.prompt) >= self.seq_len:
        count[f"a prompt that fills seq_len={self.seq_len}"] += 1
      elif len(pair) > self.seq_len:
        count[f"more than seq_len={self.seq_len} tokens"] += 1
      elif np.array_equal(*pair.responses):
        count["equal sides"] += 1
      else:
        kept.append(pair)
    bits = random_bits(len(kept), turn, 0, _NOISE)
    turned = bits < np.uint64(min(self.noise * 2.0**64, 2**64 - 1))
    return tuple(
      pair.flipped() if wrong else pair
      for pair, wrong in zip(kept, turned, strict=True)
    )

  def batches(
    self, corpus: Corpus, config: FrozenConfigDict, rows: np.ndarray
  ) -> Batches:
    """Every pair once in each epoch, in a new random order."""
    drawn = _Drawn(corpus.train, self, Shuffle(config.seed))
    return Batches((drawn,), None, config.batch_size, rows, config.seed)

  def held_out(
    self, corpus: Corpus, config: FrozenConfigDict, size: int, rows: np.ndarray
  ) -> Sequence[Batch]:
    """Every pair once."""
    return Windows(corpus.val, self, size, rows) if corpus.val else ()


@dataclass(frozen=True, eq=False)
class _Drawn:
  """Pairs in random order: a source of `Batches`."""

  pairs: Sequence[Sides]
  data: Pairs
  shuffle: Shuffle

  def take(self, numbers: np.ndarray, bits: np.ndarray) -> Batch:
    del bits
    chosen = self.shuffle(len(self.pairs), numbers)
    return render(self.pairs, chosen, self.data.seq_len, self.data.sides)


@dataclass(frozen=True, eq=False)
class Windows:
  """All pairs once, in batches of `size` of which `rows` are made."""

  pairs: Sequence[Sides]
  data: Pairs
  size: int
  rows: np.ndarray

  def __len__(self) -> int:
    return -(-len(self.pairs) // self.size)

  def __getitem__(self, i: int) -> Batch:
    """Batch number i."""
    if not 0 <= i < len(self):
      raise IndexError(f"batch {i} of {len(self)}")
    numbers = i * self.size + self.rows
    return render(self.pairs, numbers, self.data.seq_len, self.data.sides)


def encode(write: Writing, part: Sequence[Pair]) -> list[Sides]:
  """Pairs as tokens; what is compared is the last answer of each side."""
  good = write.encode([chosen for chosen, _ in part])
  bad = write.encode([rejected for _, rejected in part])
  return [_sides(a, b) for a, b in zip(good, bad, strict=True)]


def _sides(good: tuple, bad: tuple) -> Sides:
  """One pair, from ids and what is learned of either side."""
  (ids, learned), (others, _) = good, bad
  start = len(ids) - int(np.argmin(learned[::-1])) if not learned.all() else 0
  return Sides(ids[:start], (ids[start:], others[start:]))


# --- Reading ----------------------------------------------------------------


def pairs(
  path: str | Sequence[str] | None, examples: int, val_fraction: float
) -> tuple[list[Pair], list[Pair], dict[str, int]]:
  """Pairs for training and for validation, and what was left out.

  Args:
    path: as for `talks`; records have `rejected` beside the better answer.
    examples: how many a task makes for training.
    val_fraction: as for `talks`.

  Returns:
    Two lists, and reasons with the number of pairs each.

  Raises:
    UserError: for a path, a file, a line or a task that is wrong, or if no pair
      is left.
  """
  if not path:
    raise UserError(
      "preferences need pairs; set config.data.path to a file of them, or to a "
      "task that makes them, as in --config.data.path=task:add"
    )
  if isinstance(path, str) and path.startswith(talks.TASK):
    return (*_made(path, examples, val_fraction), {})
  found, skipped = [], Counter()
  for where, record in sources.records(talks.paths(path)):
    pair = _blamed(where, record)
    reason = _useless(*pair)
    skipped[reason] += 1
    if not reason:
      found.append(pair)
  del skipped[""]
  if not found:
    told = ", ".join(f"{n:,} with {reason}" for reason, n in skipped.items())
    raise UserError(
      f"{path} has no pair to learn from: {told or 'it is empty'}"
    )
  sizes = np.array([sum(len(m["content"]) for m in pair[0]) for pair in found])
  held = held_out(sizes, val_fraction if len(found) > 1 else 0.0)
  train = [pair for pair, out in zip(found, held, strict=True) if not out]
  val = [pair for pair, out in zip(found, held, strict=True) if out]
  return train, val, dict(skipped)


def _made(
  name: str, examples: int, val_fraction: float
) -> tuple[list[Pair], list[Pair]]:
  """What a task makes: its training split, and its test split to validate."""
  task, held = talks.named_task(name), round(examples * val_fraction)
  return tuple(
    [
      (talks.asked(e.prompt, e.response), talks.asked(e.prompt, e.rejected))
      for e in tasks.examples(task, split, n)
    ]
    for split, n in (("train", examples), ("test", held))
  )


def _blamed(where: str, record: Mapping[str, Any]) -> Pair:
  try:
    return _pair({k: v for k, v in record.items() if v is not None})
  except UserError as error:
    raise UserError(f"{where}: {error}") from None


def _pair(record: dict[str, Any]) -> Pair:
  """The two conversations that a record says."""
  if "rejected" not in record:
    raise UserError(
      f"there is no 'rejected' among the fields {', '.join(record)}; a pair "
      "has a better answer and a worse one"
    )
  rejected, chosen = record.pop("rejected"), record.get("chosen")
  listed = isinstance(chosen, list)
  good = _listed(record, chosen) if listed else talks.talk_of(record)
  if isinstance(rejected, list):
    bad = _listed(record, rejected)
  elif isinstance(rejected, str):
    bad = [*good[:-1], {"role": "assistant", "content": rejected}]
  else:
    raise UserError(f"the rejected side {rejected!r} is not a text")
  if good[:-1] != bad[:-1]:
    raise UserError(
      "the chosen and the rejected side differ before their last message, so "
      "they do not answer the same question"
    )
  return good, bad


def _listed(record: Mapping[str, Any], messages: list) -> Talk:
  """A conversation from messages, behind a prompt where they lack it."""
  said, prompt = talks.talk_of({"messages": messages}), record.get("prompt")
  if isinstance(prompt, str):
    prompt = [{"role": "user", "content": prompt}]
  before = talks.talk_of({"messages": prompt}) if prompt else []
  return said if said[: len(before)] == before else [*before, *said]


def _useless(good: Talk, bad: Talk) -> str:
  """Why nothing can be learned from a pair; '' if something can."""
  if reason := talks.useless(good):
    return reason
  if not bad[-1]["content"].strip():
    return "an empty rejected side"
  return "equal sides" if good[-1] == bad[-1] else ""
