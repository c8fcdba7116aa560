"""Tasks by name, with options."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.tasks import gym, rows
from jaxlm.tasks.skills import GROUPS, SKILLS
from jaxlm.tasks.task import Generated, Mix, Task


def make(name: str, **options: Any) -> Task:
  """The task of a name.

  >>> make("add", levels=(1, 2)).example(0, 2).prompt
  '2+0='
  >>> make("add,copy", levels=3).name
  'add,copy'

  Args:
    name: a skill, a group ('arithmetic', 'edits', 'format', 'mix' for all), a
      file of examples (as `rows.read` reads them), 'gym:' and a generator of
      reasoning-gym, or several of these with commas between them.
    options: `levels`, a number or several (also as text, '1-3' or '1,3');
      `digits`, the same by the name it has in arithmetic; `worked`, whether
      responses show their steps. What some tasks of a mix do not take, the
      others do.

  Raises:
    UserError: for a name, an option or a level that there is not.
  """
  parts = [p.strip() for p in str(name).split(",")]
  wanted = list(dict.fromkeys(s for p in parts for s in GROUPS.get(p, (p,))))
  if len(wanted) == 1 and wanted[0].startswith(gym.PREFIX):
    return gym.make(wanted[0].removeprefix(gym.PREFIX), **options)
  levels = _levels(options)
  made = [_one(part, levels, options) for part in wanted]
  skills = [task.skill for task in made if isinstance(task, Generated)]
  taken = {f.name for skill in skills for f in dataclasses.fields(skill)}
  for option in options:
    if option not in taken:
      raise UserError(
        f"the task {name!r} takes no {option}; it takes "
        f"{', '.join(['levels', *sorted(taken)])}"
      )
  return made[0] if len(made) == 1 else Mix(tuple(made))


def _one(
  name: str, levels: tuple[int, ...] | None, options: dict[str, Any]
) -> Task:
  """The task of a name without commas."""
  if name in SKILLS:
    return _generated(name, levels, options)
  if name.startswith(gym.PREFIX):
    return gym.make(name.removeprefix(gym.PREFIX))
  if any(kind in Path(name).suffixes for kind in rows.KINDS):
    return rows.read(name)
  known = [*SKILLS, *GROUPS]
  near = difflib.get_close_matches(name, known, 1)
  hint = f"; did you mean {near[0]!r}?" if near else "."
  raise UserError(
    f"unknown task {name!r}{hint} There are {', '.join(known)}, files "
    "(.jsonl, .parquet) and gym:GENERATOR"
  )


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
