"""Edits of a string of letters: copy, reverse, sort, count.

reverse abcd=   dcba
count a:banana=   3
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxlm.tasks import task
from jaxlm.tasks.task import LETTERS, Draw, Question


@dataclass(frozen=True)
class _Edit:
  """Common to all: the string has `level` + 2 letters."""

  usual: ClassVar[tuple[int, ...]] = (1, 2, 3)
  most: ClassVar[int] = 30

  def score(self, answer: str, response: str) -> float:
    """1 for the very string."""
    return task.same(answer, response)


class Copy(_Edit):
  """The string as it is."""

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    word = draw.word(level + 2)
    return Question(f"copy {word}=", word, _slips(draw, word))


class Reverse(_Edit):
  """The string from its end to its beginning."""

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    word = draw.word(level + 2)
    right = word[::-1]
    return Question(f"reverse {word}=", right, (word, *_slips(draw, right)))


class Sort(_Edit):
  """The letters in the order of the alphabet."""

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    word = draw.word(level + 2)
    right = "".join(sorted(word))
    return Question(f"sort {word}=", right, (word, *_slips(draw, right)))


class Count(_Edit):
  """How often a letter occurs, in a string of few different letters."""

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    few = draw.some(LETTERS, 3)
    word = "".join(draw.choice(few) for _ in range(level + 2))
    n = word.count(few[0])
    wrong = tuple(str(m) for m in (n - 1, n + 1) if m >= 0)
    return Question(f"count {few[0]}:{word}=", str(n), wrong)


def _slips(draw: Draw, text: str) -> tuple[str, ...]:
  """A letter changed, one left out, one doubled, two exchanged."""
  i = draw.below(len(text) - 1)
  before, a, b, after = text[:i], text[i], text[i + 1], text[i + 2 :]
  other = draw.choice([c for c in LETTERS if c != a])
  return (
    before + other + b + after,
    before + b + after,
    before + a + a + b + after,
    before + b + a + after,
  )
