"""Methods: how the program continues prompts, each as a frozen value.

A method is called with what is `Asked` and yields new tokens, some at a time
for those that can (`Draw`), all at once for those that compare whole texts.
`parse_method` reads one from a text such as `beam(beams=4)`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import numpy as np

from jaxlm.errors import UserError
from jaxlm.generate import decode, search
from jaxlm.generate.automaton import Constraint
from jaxlm.generate.beam import Beam, beam_search
from jaxlm.generate.contrastive import Contrastive, contrastive
from jaxlm.generate.drafts import DraftModel, Lookup
from jaxlm.generate.filters import Filter
from jaxlm.generate.new import New
from jaxlm.generate.options import Call, calls
from jaxlm.generate.samplers import Greedy, Sample, Sampler
from jaxlm.generate.speculative import speculate
from jaxlm.layers.cache import FULL
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder

Array = jax.Array
Tree = Any

_AT_ONCE = 16  # samples that the best of many are chosen from at a time


@dataclass(frozen=True)
class Asked:
  """What a method is to continue.

  Attributes:
    model, params: what writes; parameters as `decode.ready` makes them.
    tokens: prompts, padded on the left, int32 [batch, seq].
    lengths: how many tokens of each row are its prompt, int32 [batch].
    n: the most new tokens.
    keys: randomness of each text, [batch * samples].
    samples: texts of each prompt.
    ends: tokens that end a text.
    compute: how to run.
    top: log-probabilities wanted beside the chosen one's; None: none at all.
    pace: seconds between two looks at what is new.
    notes: what a method counts, for the figures.
  """

  model: Decoder
  params: Tree
  tokens: np.ndarray
  lengths: np.ndarray
  n: int
  keys: Array
  samples: int
  ends: tuple[int, ...]
  compute: Compute
  top: int | None = None
  pace: float = 0.02
  notes: Counter = field(default_factory=Counter)

  def given(self) -> tuple[Decoder, Tree, np.ndarray, int]:
    """What all functions of decoding begin with."""
    return self.model, self.params, self.tokens, self.n

  def how(self) -> dict[str, Any]:
    """What they share behind that."""
    ends = self.ends or None
    return {"lengths": self.lengths, "eot": ends, "compute": self.compute}


@dataclass(frozen=True)
class Draw:
  """One token after another, as a sampler chooses them.

  Attributes:
    sampler: `Greedy` or `Sample`, or any other.
    constraint: what the new tokens have to spell, as `constraints.compile`
      makes it.
    cache: how keys and values are remembered.
    streams: whether tokens come one by one, so that a text can be shown while
      it grows, and outgrow the model's positions.
    counts: how many different texts of a prompt there can be; None: any.
    scores: whether it can tell log-probabilities.
  """

  sampler: Sampler
  constraint: Constraint | None = field(default=None, compare=False, repr=False)
  cache: Any = FULL
  streams: ClassVar[bool] = True
  counts: ClassVar[int | None] = None
  scores: ClassVar[bool] = True

  def rows(self, samples: int) -> int:
    """Rows that a prompt takes in the cache."""
    return samples

  def __call__(self, asked: Asked) -> Iterator[New]:
    """New tokens `[rows, some]` again and again, until all rows have ended."""
    options = asked.how() | {"slide": True, "samples": asked.samples}
    options |= {"constraint": self.constraint, "cache": self.cache}
    given = (*asked.given(), self.sampler, asked.keys)
    if asked.top is not None:
      return iter([decode.scored(*given, top=asked.top, **options)])
    tokens = decode.stream(*given, pace=asked.pace, **options)
    return (New(column[:, None]) for column in tokens)


@dataclass(frozen=True)
class Beams:
  """The best texts of a beam search; several of a prompt are the next best."""

  beam: Beam
  streams: ClassVar[bool] = False
  cache: ClassVar[Any] = FULL
  scores: ClassVar[bool] = False

  @property
  def counts(self) -> int:
    """How many texts of a prompt there are."""
    return self.beam.beams

  def rows(self, samples: int) -> int:
    """Rows that a prompt takes in the cache."""
    del samples
    return self.beam.beams

  def __call__(self, asked: Asked) -> Iterator[New]:
    """All new tokens at once, `[rows, n]`."""
    found = beam_search(*asked.given(), self.beam, **asked.how())
    return iter([New(found.tokens[:, : asked.samples].reshape(-1, asked.n))])


@dataclass(frozen=True)
class Contrast:
  """Contrastive search."""

  how: Contrastive
  streams: ClassVar[bool] = False
  cache: ClassVar[Any] = FULL
  counts: ClassVar[int | None] = 1
  scores: ClassVar[bool] = False

  def rows(self, samples: int) -> int:
    """Rows that a prompt takes in the cache."""
    del samples
    return self.how.k

  def __call__(self, asked: Asked) -> Iterator[New]:
    """All new tokens at once, `[rows, n]`."""
    return iter([New(contrastive(*asked.given(), self.how, **asked.how()))])


@dataclass(frozen=True)
class Best:
  """The likeliest per token of `n` samples; several are the next best.

  Attributes:
    sampler: how they are drawn.
    n: how many of each prompt.
  """

  sampler: Sampler
  n: int = 8
  streams: ClassVar[bool] = False
  cache: ClassVar[Any] = FULL
  scores: ClassVar[bool] = False

  def __post_init__(self):
    if not isinstance(self.n, int) or self.n < 1:
      raise UserError(f"best_of n={self.n}: use a whole number from 1")

  @property
  def counts(self) -> int:
    """How many texts of a prompt there are."""
    return self.n

  def rows(self, samples: int) -> int:
    """Rows that a prompt takes in the cache."""
    del samples
    return min(self.n, _AT_ONCE)

  def __call__(self, asked: Asked) -> Iterator[New]:
    """All new tokens at once, `[rows, n]`, one prompt after another."""
    rows = []
    for i, length in enumerate(asked.lengths):
      found = search.best_of(
        asked.model,
        asked.params,
        asked.tokens[i, -length:].tolist(),
        asked.n,
        self.n,
        keep=asked.samples,
        sampler=self.sampler,
        key=asked.keys[i * asked.samples],
        eot=asked.ends or None,
        batch=min(self.n, _AT_ONCE),
        compute=asked.compute,
      )
      rows += [text for _, text in found]
    fill = asked.ends[0] if asked.ends else 0
    table = np.full((len(rows), asked.n), fill, np.int32)
    for row, text in zip(table, rows, strict=True):
      row[: len(text)] = text
    return iter([New(table)])


@dataclass(frozen=True)
class Speculate:
  """Draws, or greedy tokens, several of which a draft has proposed.

  Attributes:
    sampler: `Greedy` or `Sample`.
    draft: what proposes.
    gamma: how many at a time.
    draft_params: the draft's arrays, where it is a model.
  """

  sampler: Sampler
  draft: Any = Lookup()
  gamma: int = 4
  draft_params: Tree = field(default=None, compare=False, repr=False)
  streams: ClassVar[bool] = False
  cache: ClassVar[Any] = FULL
  counts: ClassVar[int | None] = None
  scores: ClassVar[bool] = False

  def rows(self, samples: int) -> int:
    """Rows that a prompt takes in the target's cache."""
    return samples

  def __call__(self, asked: Asked) -> Iterator[New]:
    """All new tokens at once, `[rows, n]`."""
    many = asked.samples
    tokens, stats = speculate(
      asked.model,
      asked.params,
      np.repeat(asked.tokens, many, axis=0),
      asked.n,
      self.draft,
      self.draft_params,
      self.sampler,
      asked.keys,
      gamma=self.gamma,
      **asked.how() | {"lengths": np.repeat(asked.lengths, many)},
    )
    asked.notes["speculation proposed"] += int(stats.proposed.sum())
    asked.notes["speculation accepted"] += int(stats.accepted.sum())
    asked.notes["target calls"] += stats.target_calls
    return iter([New(np.asarray(tokens)[:, asked.tokens.shape[1] :])])


Method = Draw | Beams | Contrast | Best | Speculate


# --- As text ----------------------------------------------------------------


def makers(
  filters: tuple[Filter, ...] | None,
  usual: Sampler,
  draft: tuple[Decoder, Tree] | None = None,
) -> dict[str, Callable[..., Method]]:
  """What makes a method, by the name it has in a text.

  Args:
    filters: what was asked for beside it; None for nothing.
    usual: the sampler, if no filters are asked for.
    draft: a smaller model with its parameters, to speculate with.
  """
  sampler = usual if filters is None else Sample(filters=filters)
  kept = filters or ()

  def sample() -> Method:
    return Draw(sampler)

  def greedy() -> Method:
    return Draw(Greedy(kept))

  def beam(
    beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
  ) -> Method:
    return Beams(Beam(beams, length_penalty, early_stopping, filters=kept))

  def diverse_beam(
    beams: int = 4,
    groups: int | None = None,
    diversity: float = 0.5,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
  ) -> Method:
    groups = beams if groups is None else groups
    how = (beams, length_penalty, early_stopping, groups, diversity, kept)
    return Beams(Beam(*how))

  def contrastive(k: int = 4, alpha: float = 0.6) -> Method:
    if filters is not None:
      raise UserError("contrastive search draws nothing; leave --sampler out")
    return Contrast(Contrastive(k, alpha))

  def best_of(n: int = 8) -> Method:
    return Best(sampler, n)

  def speculative(gamma: int = 4, n: int = 3, min_n: int = 1) -> Method:
    if draft is None:
      return Speculate(sampler, Lookup(n, min_n), gamma)
    if (n, min_n) != (3, 1):
      raise UserError(
        "n and min_n say how words are looked up in the text; leave them out "
        "with --draft"
      )
    return Speculate(sampler, DraftModel(draft[0]), gamma, draft[1])

  return {
    "sample": sample,
    "greedy": greedy,
    "beam": beam,
    "diverse_beam": diverse_beam,
    "contrastive": contrastive,
    "best_of": best_of,
    "speculative": speculative,
  }


def parse_method(
  text: str,
  filters: tuple[Filter, ...] | None,
  usual: Sampler,
  draft: tuple[Decoder, Tree] | None = None,
) -> Method:
  """The method that a text names, with its numbers.

  >>> parse_method("greedy", None, Sample())
  Draw(sampler=Greedy(filters=()), cache=Full())

  Raises:
    UserError: for an unknown name, or numbers that make no sense.
  """
  found: Sequence[Call] = calls(text)
  if len(found) != 1:
    raise UserError(
      f"--method={text!r} names {len(found)} methods; name one, as in "
      "'beam(beams=4)'"
    )
  return found[0](makers(filters, usual, draft))
