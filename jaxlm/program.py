"""What every program shares: its command line, its errors, its compile cache.

def main(argv):
  run = program.load(argv, program.parser("Trains a model."))
  ...

if __name__ == "__main__":
  program.run(main)
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ml_collections import FrozenConfigDict

from jaxlm import config, host, keys
from jaxlm.errors import UserError

# --- The command line -------------------------------------------------------


@dataclass(frozen=True)
class Run:
  """What a command line asks for.

  Attributes:
    config: every key with its value.
    workdir: where the run lives.
    explain: True to print what would run, and stop.
    flags: all flags, the program's own among them.
  """

  config: FrozenConfigDict
  workdir: Path
  explain: bool
  flags: argparse.Namespace


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are UserErrors."""

  def error(self, message: str) -> NoReturn:
    """Raises instead of printing and exiting."""
    raise UserError(f"{message}; --help shows all flags")


def parser(description: str) -> argparse.ArgumentParser:
  """A parser with the flags every program has; add the program's own to it."""
  flags = Parser(
    description=description,
    epilog="keys (--config.KEY=VALUE) and their defaults:\n" + keys.table(),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  flags.add_argument("--config", metavar="FILE", help="the config file")
  flags.add_argument("--workdir", metavar="DIR", help="where the run lives")
  flags.add_argument(
    "--explain", action="store_true", help="print what would run, and stop"
  )
  return flags


def load(
  argv: Sequence[str], flags: argparse.ArgumentParser | None = None
) -> Run:
  """The run that a command line describes.

  The config comes from `--config=FILE`, or else from `config.json` in the
  workdir, so that an existing run needs no more than its directory. Switches
  are applied first, then the other keys. Without `--workdir`, a run lives in
  `runs/NAME`, from the file's name and its switches.

  Args:
    argv: the arguments, without the program's name.
    flags: a parser made by `parser`, with the program's own flags added.

  Raises:
    UserError: for unknown flags, keys and files, and values that do not fit.
  """
  known, rest = (flags or parser("")).parse_known_args(list(argv))
  texts = _overrides(rest, known)
  workdir = Path(known.workdir) if known.workdir else None
  if known.config:
    flat, name = config.from_file(Path(known.config), texts)
    workdir = workdir or Path("runs") / name
  elif workdir:
    flat = keys.flatten(config.read(workdir))
  else:
    raise UserError(
      "nothing to run; name a config, as in --config=configs/tiny.py, or the "
      "directory of a run, as in --workdir=runs/tiny"
    )
  for name, text in texts.items():
    flat[name] = config.parse_value(name, text, keys.KEYS.get(name))
  return Run(config.freeze(flat), workdir, known.explain, known)


def _overrides(
  rest: Sequence[str], known: argparse.Namespace
) -> dict[str, str]:
  """`--config.KEY=VALUE` and `--config.KEY VALUE` as texts by key."""
  texts, left = {}, list(rest)
  while left:
    flag = left.pop(0)
    name, equals, text = flag.partition("=")
    if not name.startswith("--config."):
      flags = ["--help", *(f"--{f.replace('_', '-')}" for f in vars(known))]
      flags += [f"--config.{key}" for key in keys.KEYS]
      hint = keys.nearest(name, flags) or "; --help shows all flags"
      raise UserError(f"unknown flag {flag}{hint}")
    if not equals and (not left or left[0].startswith("--")):
      raise UserError(f"{name} needs a value, as in {name}=VALUE")
    texts[name.removeprefix("--config.")] = text if equals else left.pop(0)
  return texts


# --- The process ------------------------------------------------------------

# What the operating system refuses is not a defect of ours.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
  """Runs `main(argv)` as this process, and ends it.

  A `UserError` is one sentence on the terminal and exit status 2, as is a full
  disk or a missing permission; Ctrl-C ends with 130 and a reader that left
  (`| head`) with 141, both in silence. Anything else is a defect and keeps its
  traceback.
  """
  try:
    host.prepare()
    main(sys.argv[1:])
    sys.stdout.flush()
  except UserError as e:
    _fail(str(e))
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:
    # Python would complain once more when it closes the broken stdout.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)
  except OSError as e:
    if e.errno not in _REFUSALS:
      raise
    _fail(f"{e.strerror}: {e.filename}" if e.filename else f"{e.strerror}")
  sys.exit(0)


def _fail(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)
