"""Words to be written in a form that is asked for: capitals, a list, JSON.

    upper: fig plum   FIG PLUM
    list: fig plum    - fig
                      - plum
    json: fig plum    ["fig", "plum"]

The scorer reads what the form says and no more: JSON may have other blanks, a
list other bullets.
"""

import json
from dataclasses import dataclass
from typing import ClassVar

from jaxlm.tasks import task
from jaxlm.tasks.task import Draw, Question

_WORDS = """
fig plum pear lime kiwi date bean corn rice oat rye pea leek beet dill mint sage
rose iris fern moss oak elm ash fir yew bee ant fox owl hen cod eel bat
"""
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class _Form:
  """Common to all: `level` + 1 words."""

  usual: ClassVar[tuple[int, ...]] = (1, 2)
  most: ClassVar[int] = 12

  def question(self, draw: Draw, level: int) -> Question:
    """As `Skill.question`."""
    words = [draw.choice(WORDS) for _ in range(level + 1)]
    others = [*words[:-1], draw.choice([w for w in WORDS if w != words[-1]])]
    plain = " ".join(words)
    wrong = (plain, self._form(others), self._form(words[:-1]))
    return Question(f"{self._said}: {plain}=", self._form(words), wrong)


class Upper(_Form):
  """The words in capitals."""

  _said: ClassVar[str] = "upper"

  def score(self, answer: str, response: str) -> float:
    """1 for the very words."""
    return task.same(answer, response)

  def _form(self, words: list[str]) -> str:
    return " ".join(words).upper()


class Bullets(_Form):
  """One word a line, a bullet before each."""

  _said: ClassVar[str] = "list"

  def score(self, answer: str, response: str) -> float:
    """1 for a list of the words, bulleted with '-' or '*'."""
    return float(_bulleted(response) == _bulleted(answer))

  def _form(self, words: list[str]) -> str:
    return "\n".join(f"- {word}" for word in words)


class Json(_Form):
  """The words as a JSON list."""

  _said: ClassVar[str] = "json"

  def score(self, answer: str, response: str) -> float:
    """1 for JSON that says the same."""
    try:
      return float(json.loads(response) == json.loads(answer))
    except (ValueError, RecursionError):
      return 0.0

  def _form(self, words: list[str]) -> str:
    return json.dumps(words)


def _bulleted(text: str) -> list[str] | None:
  """The items of a list; None for what is no list."""
  lines = [line.strip() for line in text.strip().splitlines()]
  if not all(line[:2] in ("- ", "* ") for line in lines):
    return None
  return [line[2:].strip() for line in lines]
