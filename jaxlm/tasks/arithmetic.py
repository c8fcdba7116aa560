"""Sums, differences and products, bare or with the steps written out.

    12+34=   46
    12+34=   2+4=6,1+3=4,#46     (worked)

Steps go from the last digit to the first, as on paper, so that each needs only
what stands before it; after '#' stands the result. Wrong responses are what
comes of one slip in one step, carried through to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxlm.tasks import task
from jaxlm.tasks.task import Draw, Question


@dataclass(frozen=True)
class _Sum:
  """Common to the operations: `worked` says whether steps are written."""

  worked: bool = False
  usual: ClassVar[tuple[int, ...]] = (1, 2)
  most: ClassVar[int] = 15

  def score(self, answer: str, response: str) -> float:
    """1 for the right result, whatever the steps."""
    return task.last(answer, response)

  def _question(
    self, prompt: str, right: str, wrong: Sequence[str]
  ) -> Question:
    result = right.rpartition("#")[2]
    if not self.worked:
      right, wrong = result, [w.rpartition("#")[2] for w in wrong]
    return Question(prompt, right, tuple(wrong), result)


class Add(_Sum):
  """a + b, both of `level` digits."""

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    a, b = draw.number(level), draw.number(level)
    slips = [(i, by) for i in range(level) for by in (-1, 1)]
    wrong = [added(a, b, *slip) for slip in slips]
    return self._question(f"{a}+{b}=", added(a, b), wrong)


class Subtract(_Sum):
  """a - b, both of `level` digits, never below zero."""

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    b, a = sorted((draw.number(level), draw.number(level)))
    slips = [(i, by) for i in range(level) for by in (-1, 1)]
    wrong = [subtracted(a, b, *slip) for slip in slips]
    return self._question(f"{a}-{b}=", subtracted(a, b), wrong)


class Multiply(_Sum):
  """a * b of `level` + 1 digits in all, as evenly as it goes."""

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    a, b = draw.number((level + 2) // 2), draw.number((level + 1) // 2)
    slips = [(i, by) for i in range(len(str(a))) for by in (-1, 1, -b, b)]
    wrong = [multiplied(a, b, *slip) for slip in slips if slip[1]]
    return self._question(f"{a}*{b}=", multiplied(a, b), wrong)


# --- On paper ---------------------------------------------------------------


def added(a: int, b: int, at: int = -1, by: int = 0) -> str:
  """A sum digit by digit, with a slip `by` in column `at`.

  >>> added(57, 68), added(57, 68, at=0, by=1)
  ('7+8=15,5+6+1=12,#125', '7+8=16,5+6+1=12,#126')
  """
  steps, digits, carry = [], "", 0
  for i, (x, y) in enumerate(_columns(a, b)):
    total = max(x + y + carry + by * (i == at), 0)
    steps.append(f"{x}+{y}{f'+{carry}' if carry else ''}={total}")
    carry, digit = divmod(total, 10)
    digits = f"{digit}{digits}"
  return _written(steps, int(f"{carry}{digits}"))


def subtracted(a: int, b: int, at: int = -1, by: int = 0) -> str:
  """A difference digit by digit, with a slip `by` in column `at`.

  Where a digit is too small, ten are borrowed from the next.

  >>> subtracted(52, 37)
  '12-7=5,5-3-1=1,#15'
  """
  steps, digits, borrowed = [], "", 0
  for i, (x, y) in enumerate(_columns(a, b)):
    owes = f"-{borrowed}" if borrowed else ""
    need = y + borrowed
    borrowed = int(x < need)
    x += 10 * borrowed
    digit = (x - need + by * (i == at)) % 10
    steps.append(f"{x}-{y}{owes}={digit}")
    digits = f"{digit}{digits}"
  return _written(steps, int(digits))


def multiplied(a: int, b: int, at: int = -1, by: int = 0) -> str:
  """A product digit by digit of `a`, with a slip `by` in product `at`.

  >>> multiplied(23, 45)
  '3*45=135,20*45=900,135+900=1035,#1035'
  """
  steps, parts = [], []
  for i, digit in enumerate(reversed(str(a))):
    x = int(digit) * 10**i
    parts.append(max(x * b + by * (i == at), 0))
    steps.append(f"{x}*{b}={parts[-1]}")
  total = parts[0]
  for part in parts[1:]:
    steps.append(f"{total}+{part}={total + part}")
    total += part
  return _written(steps, total)


def _columns(a: int, b: int) -> list[tuple[int, int]]:
  """The digits of two numbers side by side, the last ones first."""
  width = max(len(str(a)), len(str(b)))
  pairs = zip(str(a).zfill(width), str(b).zfill(width), strict=True)
  return [(int(x), int(y)) for x, y in pairs][::-1]


def _written(steps: list[str], result: int) -> str:
  return "".join(f"{step}," for step in steps) + f"#{result}"
