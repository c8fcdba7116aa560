"""Writes examples of a task as JSON lines, to be read and edited.

    python -m jaxlm.tasks --task=add --n=5
    python -m jaxlm.tasks --task=mix --worked --levels=1-3 --n=100 --out=F.jsonl

A file that was written so, or any other with a prompt and a response a line,
is a task too: --task=F.jsonl.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm import files, program, tasks
from jaxlm.config import parse_value
from jaxlm.errors import UserError


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flags = program.Parser(
    prog="python -m jaxlm.tasks",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  known = ", ".join([*tasks.SKILLS, *tasks.GROUPS])
  add = flags.add_argument
  add("--task", required=True, metavar="NAME", help=f"one or more of {known}")
  add_options(flags)
  add("--n", type=int, default=10, help="how many; default: 10")
  add("--split", default="train", help="train or test")
  add("--seed", type=int, default=0, metavar="N", help="of what is drawn")
  add("--out", metavar="FILE", help="JSON lines; else stdout")
  return flags


def add_options(flags: argparse.ArgumentParser) -> None:
  """Adds the flags that are options of a task."""
  flags.add_argument("--levels", metavar="1-3", help="difficulties, from 1")
  flags.add_argument("--worked", action="store_true", help="show the steps")
  flags.add_argument(
    "--option",
    action="append",
    default=[],
    metavar="NAME=VALUE",
    help="another option of the task; repeatable",
  )


def options(flags: argparse.Namespace) -> dict[str, Any]:
  """The options that `add_options` read, for `tasks.make`."""
  given: dict[str, Any] = {}
  if flags.levels is not None:
    given["levels"] = flags.levels
  if flags.worked:
    given["worked"] = True
  for text in flags.option:
    name, equals, value = text.partition("=")
    if not equals:
      raise UserError(f"--option={text}: write a name and a value, NAME=VALUE")
    given[name] = parse_value(name, value)
  return given


def main(argv: Sequence[str]) -> None:
  """Runs the program.

  Raises:
    UserError: as `tasks.make` and `tasks.examples`, or if the file cannot be
      written.
  """
  flags = parser().parse_args(argv)
  task = tasks.make(flags.task, **options(flags))
  found = tasks.examples(task, flags.split, flags.n, flags.seed)
  text = "".join(
    json.dumps(dataclasses.asdict(e), ensure_ascii=False) + "\n" for e in found
  )
  if flags.out is None:
    sys.stdout.write(text)
    return
  try:
    files.replace(Path(flags.out), text)
  except OSError as error:
    why = files.reason(error)
    raise UserError(f"cannot write {flags.out}: {why}") from error


if __name__ == "__main__":
  program.run(main)
