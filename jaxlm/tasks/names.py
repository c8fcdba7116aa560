"""Tasks by name, with options."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import Any

from jaxlm.errors import UserError
from jaxlm.tasks import arithmetic, edits, formats, stories
from jaxlm.tasks.task import Generated, Mix, Task

SKILLS: dict[str, Callable[..., Any]] = {
  "add": arithmetic.Add,
  "subtract": arithmetic.Subtract,
  "multiply": arithmetic.Multiply,
  "copy": edits.Copy,
  "reverse": edits.Reverse,
  "sort": edits.Sort,
  "count": edits.Count,
  "story": stories.Story,
  "recall": stories.Recall,
  "upper": formats.Upper,
  "list": formats.Bullets,
  "json": formats.Json,
}

GROUPS: dict[str, tuple[str, ...]] = {
  "arithmetic": ("add", "subtract", "multiply"),
  "edits": ("copy", "reverse", "sort", "count"),
  "format": ("upper", "list", "json"),
  "mix": tuple(SKILLS),
}


def make(name: str, **options: Any) -> Task:
  """The task of a name.

  >>> make("add", levels=(1, 2)).example(0, 2).prompt
  '2+0='
  >>> make("add,copy", levels=3).name
  'add,copy'

  Args:
    name: a skill, a group ('arithmetic', 'edits', 'format', 'mix' for all), or
      several with commas between them.
    options: `levels`, a number or several (also as text, '1-3' or '1,3');
      `digits`, the same by the name it has in arithmetic; `worked`, whether
      responses show their steps. What some tasks of a mix do not take, the
      others do.

  Raises:
    UserError: for a name, an option or a level that there is not.
  """
  parts = [p.strip() for p in str(name).split(",")]
  wanted = [s for part in parts for s in GROUPS.get(part, (part,))]
  wanted = list(dict.fromkeys(wanted))
  for part in wanted:
    if part not in SKILLS:
      raise UserError(_unknown(part))
  levels = _levels(options)
  made = [_generated(skill, levels, options) for skill in wanted]
  taken = {f.name for t in made for f in dataclasses.fields(t.skill)}
  for option in options:
    if option not in taken:
      raise UserError(
        f"the task {name!r} takes no {option}; it takes "
        f"{', '.join(['levels', *sorted(taken)])}"
      )
  return made[0] if len(made) == 1 else Mix(tuple(made))


def _generated(
  name: str, levels: tuple[int, ...] | None, options: dict[str, Any]
) -> Generated:
  """One skill with those of the options that it takes."""
  kind = SKILLS[name]
  takes = {f.name for f in dataclasses.fields(kind)}
  skill = kind(**{k: v for k, v in options.items() if k in takes})
  levels = levels or skill.usual
  if max(levels) > skill.most:
    raise UserError(
      f"the task {name!r} has levels 1 to {skill.most}, not {max(levels)}"
    )
  return Generated(name, levels, skill)


def _levels(options: dict[str, Any]) -> tuple[int, ...] | None:
  """Takes the levels out of the options."""
  given = [options.pop(k) for k in ("levels", "digits") if k in options]
  if not given:
    return None
  if len(given) > 1:
    raise UserError("levels and digits are the same thing; leave one out")
  try:
    levels = _numbers(given[0])
  except (TypeError, ValueError):
    levels = ()
  if not levels or min(levels) < 1:
    raise UserError(
      f"levels={given[0]!r}; give whole numbers from 1, as 2, (1, 2) or '1-3'"
    )
  return levels


def _numbers(given: int | str | Sequence[int]) -> tuple[int, ...]:
  """1, (1, 2), '1,2' and '1-2' as numbers."""
  if isinstance(given, str):
    ends = [[int(n) for n in part.split("-")] for part in given.split(",")]
    return tuple(n for e in ends for n in range(e[0], e[-1] + 1))
  many = given if isinstance(given, Sequence) else [given]
  if any(int(n) != n for n in many):
    raise ValueError("not whole")
  return tuple(int(n) for n in many)


def _unknown(name: str) -> str:
  known = [*SKILLS, *GROUPS]
  near = difflib.get_close_matches(name, known, 1)
  hint = f"; did you mean {near[0]!r}?" if near else "."
  return f"unknown task {name!r}{hint} There are {', '.join(known)}"
