"""What a task is: questions without end, each with its answer and a scorer.

    task = make("add", levels=(1, 2))
    example = task.example(seed=0, index=7)
    task.score(example, "46")

An example is a pure function of (seed, index), so nothing is stored and nothing
has to be downloaded. Train and test are told apart by a hash of the prompt:
whatever the seed, no prompt is ever in both.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxlm.errors import UserError

TEST_SHARE = 5  # one prompt in so many is a test's
_PATIENCE = 20_000  # draws without a new prompt before a task counts as empty


@dataclass(frozen=True)
class Example:
  """A question and what is known of its answers.

  Attributes:
    prompt: what the model reads.
    response: the gold response, without end-of-text.
    rejected: a plausible wrong response, scored below 1.
    answer: what the scorer looks for.
    skill: what it asks for, e.g. 'add'.
    level: how hard it is, from 1.
  """

  prompt: str
  response: str
  rejected: str
  answer: str
  skill: str
  level: int


class Task(Protocol):
  """Examples by number, and a judge of responses to them."""

  @property
  def name(self) -> str:
    """What it is called."""

  @property
  def levels(self) -> tuple[int, ...]:
    """The difficulties that occur."""

  @property
  def skills(self) -> tuple[str, ...]:
    """The skills that occur."""

  def example(self, seed: int, index: int) -> Example:
    """Example number `index` of a seed, always the same one."""

  def score(self, example: Example, response: str) -> float:
    """How right a response is, from 0 to 1; it may be any text."""


# --- Examples of a split ----------------------------------------------------


def split_of(prompt: str) -> str:
  """Whether a prompt belongs to 'train' or to 'test', by its hash."""
  digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
  return "train" if int.from_bytes(digest, "big") % TEST_SHARE else "test"


def examples(task: Task, split: str, n: int, seed: int = 0) -> list[Example]:
  """The first `n` examples of a split, no prompt twice.

  Args:
    task: where they come from.
    split: 'train' or 'test'; their prompts are disjoint for all seeds.
    n: how many.
    seed: of what is drawn.

  Raises:
    UserError: for another split, or if the task has not so many.
  """
  if split not in ("train", "test"):
    raise UserError(f"split={split!r}; a task has 'train' and 'test'")
  if n < 0:
    raise UserError(f"{n} examples of {task.name!r}; ask for 0 or more")
  found: dict[str, Example] = {}
  index = last = 0
  while len(found) < n:
    example = task.example(seed, index)
    index += 1
    if example.prompt not in found and split_of(example.prompt) == split:
      found[example.prompt] = example
      last = index
    elif index - last > _PATIENCE:
      raise UserError(
        f"the task {task.name!r} has no {n:,} different prompts to {split} on, "
        f"only about {len(found):,} on levels {task.levels}; ask for fewer, or "
        "for higher levels"
      )
  return list(found.values())


# --- Chance -----------------------------------------------------------------


class Draw:
  """Random choices that every version of Python makes alike.

  Of the standard generator only `random()` is promised to stay as it is.
  """

  def __init__(self, *of: Any):
    self._random = random.Random("/".join(map(str, of))).random

  def below(self, n: int) -> int:
    """A whole number from 0 to n - 1."""
    return int(self._random() * n)

  def between(self, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + self.below(high - low + 1)

  def choice(self, items: Sequence[Any]) -> Any:
    """One of them."""
    return items[self.below(len(items))]

  def some(self, items: Sequence[Any], n: int) -> list[Any]:
    """`n` different ones, in random order."""
    rest = list(items)
    return [rest.pop(self.below(len(rest))) for _ in range(n)]

  def number(self, digits: int) -> int:
    """A whole number of exactly so many digits; 0 has one."""
    return self.between(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)

  def word(self, length: int) -> str:
    """Lower-case letters."""
    return "".join(self.choice(LETTERS) for _ in range(length))


LETTERS = "abcdefghijklmnopqrstuvwxyz"


# --- Generated tasks --------------------------------------------------------


@dataclass(frozen=True)
class Question:
  """What a skill asks.

  Attributes:
    prompt: what the model reads.
    response: a right response.
    wrong: plausible ones that are not, at least one of which scores below 1.
    answer: what is looked for; by default the response.
  """

  prompt: str
  response: str
  wrong: tuple[str, ...]
  answer: str = ""


class Skill(Protocol):
  """One kind of question, as a frozen value.

  Attributes:
    usual: the levels it is asked at unless others are named.
    most: the highest level there is.
  """

  usual: tuple[int, ...]
  most: int

  def question(self, draw: Draw, level: int) -> Question:
    """A question of a level."""

  def score(self, answer: str, response: str) -> float:
    """How right a response is, from 0 to 1."""


@dataclass(frozen=True)
class Generated:
  """A task made of one skill.

  Attributes:
    name: of the skill.
    levels: one of them is drawn for each example.
    skill: asks and judges.
  """

  name: str
  levels: tuple[int, ...]
  skill: Skill

  @property
  def skills(self) -> tuple[str, ...]:
    """One: its name."""
    return (self.name,)

  def example(self, seed: int, index: int) -> Example:
    """As `Task.example`."""
    draw = Draw(self.name, seed, index)
    level = draw.choice(self.levels)
    asked = self.skill.question(draw, level)
    answer = asked.answer or asked.response
    wrong = [w for w in asked.wrong if self.skill.score(answer, w) < 1]
    return Example(
      prompt=asked.prompt,
      response=asked.response,
      rejected=draw.choice(wrong),
      answer=answer,
      skill=self.name,
      level=level,
    )

  def score(self, example: Example, response: str) -> float:
    """As `Task.score`."""
    return self.skill.score(example.answer, response)


@dataclass(frozen=True)
class Mix:
  """Several tasks; each example is one of a task drawn at random."""

  tasks: tuple[Task, ...]

  @property
  def name(self) -> str:
    """The names of its tasks, with commas."""
    return ",".join(task.name for task in self.tasks)

  @property
  def levels(self) -> tuple[int, ...]:
    """Those of all its tasks."""
    return tuple(sorted({n for task in self.tasks for n in task.levels}))

  @property
  def skills(self) -> tuple[str, ...]:
    """Those of all its tasks."""
    return tuple(skill for task in self.tasks for skill in task.skills)

  def example(self, seed: int, index: int) -> Example:
    """As `Task.example`."""
    task = Draw("mix", seed, index).choice(self.tasks)
    return task.example(seed, index)

  def score(self, example: Example, response: str) -> float:
    """As `Task.score`, by the task that the example is of."""
    task = next(t for t in self.tasks if example.skill in t.skills)
    return task.score(example, response)


def same(answer: str, response: str) -> float:
  """1 if a response is the answer, blanks around it apart, else 0."""
  return float(response.strip() == answer.strip())


def last(answer: str, response: str) -> float:
  """The same for what follows the last '#' of a response, if it has one."""
  return same(answer, response.rpartition("#")[2])
