"""Small word problems, and recall of what was said.

Ann has 3 figs, finds 4, loses 2. How many?   5
Ann has 3 figs, finds 4, loses 2. How many?   3+4=7,7-2=5,#5     (worked)
b=47 k=12 q=80 k?   12
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxlm.tasks import task
from jaxlm.tasks.task import LETTERS, Draw, Question

NAMES = ("Ann", "Bo", "Cy", "Dee", "Eva", "Finn", "Gus", "Hal", "Ida", "Jo")
THINGS = ("figs", "pens", "cups", "hats", "nuts", "keys", "eggs", "caps")
GAINS = ("finds", "gets", "buys")
LOSSES = ("loses", "eats", "sells")


@dataclass(frozen=True)
class Story:
  """How many someone has in the end, after `level` events.

  Attributes:
    worked: whether the response shows a sum for each event.
  """

  worked: bool = False
  usual: ClassVar[tuple[int, ...]] = (1, 2)
  most: ClassVar[int] = 12

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    start = draw.between(1, 9)
    told = [f"{draw.choice(NAMES)} has {start} {draw.choice(THINGS)}"]
    changes, n = [], start
    for _ in range(level):
      gains = n == 0 or draw.below(2)
      by = draw.between(1, 9 if gains else min(n, 9))
      told.append(f"{draw.choice(GAINS if gains else LOSSES)} {by}")
      changes.append(by if gains else -by)
      n += changes[-1]
    prompt = ", ".join(told) + ". How many?"
    slip = draw.below(level)
    # The event forgotten, turned around, or counted wrongly.
    other = [0, -changes[slip], changes[slip] + 1, changes[slip] - 1]
    wrong = [_replaced(changes, slip, c) for c in other]
    wrong = [w for w in wrong if start + sum(w) >= 0]
    responses = tuple(self._told(start, w) for w in wrong)
    return Question(prompt, self._told(start, changes), responses, str(n))

  def score(self, answer: str, response: str) -> float:
    """1 for the right number, whatever the steps."""
    return task.last(answer, response)

  def _told(self, n: int, changes: list[int]) -> str:
    """The response to a start and changes."""
    steps = ""
    for change in changes:
      steps += f"{n}{change:+}={n + change},"
      n += change
    return f"{steps}#{n}" if self.worked else str(n)


@dataclass(frozen=True)
class Recall:
  """The value of one of `level` + 1 keys."""

  usual: ClassVar[tuple[int, ...]] = (1, 2, 3)
  most: ClassVar[int] = 25

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    keys = draw.some(LETTERS, level + 1)
    values = [str(v) for v in draw.some(range(10, 100), level + 1)]
    said = [f"{k}={v}" for k, v in zip(keys, values, strict=True)]
    asked = draw.below(level + 1)
    wrong = tuple(v for v in values if v != values[asked])
    prompt = f"{' '.join(said)} {keys[asked]}?"
    return Question(prompt, values[asked], wrong)

  def score(self, answer: str, response: str) -> float:
    """1 for the value."""
    return task.same(answer, response)


def _replaced(items: list[int], at: int, item: int) -> list[int]:
  return [*items[:at], item, *items[at + 1 :]]
