"""The generators of `reasoning-gym` as tasks: 'gym:chain_sum' and its kind.

    task = make("gym:chain_sum", max_terms=2, max_digits=2)

More than a hundred generators with scorers of their own; each option of one is
an option of its task.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

from jaxlm.errors import UserError
from jaxlm.tasks.task import Example

PREFIX = "gym:"
_SIZE = 2**31 - 1  # as many numbers as an index can be
_OTHERS = 8  # entries whose answers are tried as wrong ones, and then
_GUESSES = ("False", "True", "0", "-")


@dataclass(frozen=True)
class Gym:
  """One generator.

  `Example.answer` is JSON: the answer, and from what the scorer makes the
  entry again: generator, options, seed and index.

  Attributes:
    generator: its name in reasoning-gym.
    options: its options, as pairs.
  """

  generator: str
  options: tuple[tuple[str, Any], ...] = ()

  @property
  def name(self) -> str:
    """The generator's name, with a prefix."""
    return f"{PREFIX}{self.generator}"

  @property
  def skills(self) -> tuple[str, ...]:
    """One: its name."""
    return (self.name,)

  @property
  def levels(self) -> tuple[int, ...]:
    """One: options make a generator harder."""
    return (1,)

  def example(self, seed: int, index: int) -> Example:
    """As `Task.example`; `rejected` is the answer to a later question."""
    entries = _entries(self.generator, self.options, seed)
    entry = entries[index % _SIZE]
    others = (entries[(index + i) % _SIZE] for i in range(1, _OTHERS))
    answers = [*(str(other["answer"]) for other in others), *_GUESSES]
    wrong = [a for a in answers if _score(entries, entry, a) < 1]
    if not wrong:
      raise UserError(
        f"{self.name} takes every response for right; choose another generator"
      )
    answer = str(entry["answer"])
    said = {"answer": answer, "generator": self.generator}
    said |= {"options": self.options, "seed": seed, "index": index}
    return Example(
      prompt=entry["question"],
      response=answer,
      rejected=wrong[0],
      answer=json.dumps(said),
      skill=self.name,
      level=1,
    )

  def score(self, example: Example, response: str) -> float:
    """As `Task.score`, by the generator's own scorer."""
    return score(example, response)


def make(generator: str, **options: Any) -> Gym:
  """A generator with its options.

  Raises:
    UserError: if reasoning-gym is not installed, has no such generator or
      option, or the generator has no answers.
  """
  made = Gym(generator, tuple(sorted(options.items())))
  if _entries(made.generator, made.options, 0)[0]["answer"] is None:
    raise UserError(
      f"gym:{generator} knows a scorer but no answers, and examples have one; "
      "choose another generator"
    )
  return made


def score(example: Example, response: str) -> float:
  """How right a response is, by the generator that the example is of."""
  said = json.loads(example.answer)
  options = tuple((name, value) for name, value in said["options"])
  entries = _entries(said["generator"], options, said["seed"])
  return _score(entries, entries[said["index"] % _SIZE], response)


@functools.lru_cache(maxsize=32)
def _entries(generator: str, options: tuple, seed: int) -> Any:
  """All entries of a seed, made as they are asked for."""
  try:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
  except ImportError as error:
    raise UserError(
      f"gym:{generator} needs reasoning-gym: pip install 'jaxlm[reasoning-gym]'"
    ) from error
  if generator not in DATASETS:
    raise UserError(
      f"reasoning-gym has no generator {generator!r}; it has "
      f"{', '.join(sorted(DATASETS))}"
    )
  try:
    return reasoning_gym.create_dataset(
      generator, seed=seed, size=_SIZE, **dict(options)
    )
  except (TypeError, ValueError, AssertionError) as error:
    raise UserError(f"gym:{generator}: {error}") from error


def _score(entries: Any, entry: dict[str, Any], response: str) -> float:
  """What the generator says of a response; what it chokes on is wrong."""
  try:
    score = float(entries.score_answer(answer=response.strip(), entry=entry))
  except Exception:  # each generator parses in its own way
    return 0.0
  return min(max(score, 0.0), 1.0)
