"""What the rungs share: flags, errors as one sentence, a folder of plots."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxlm.errors import UserError

COLORS = ("#2f6db3", "#d1495b", "#3a9a6b", "#e2a03f", "#7d5ba6", "#6b6b6b")


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are UserErrors."""

  def error(self, message: str) -> NoReturn:
    """Raises instead of printing and exiting."""
    raise UserError(f"{message}; --help shows all flags")


def parser(text: str) -> argparse.ArgumentParser:
  """The flags of a rung: where the plots go, and the seed.

  Args:
    text: the rung's docstring, shown whole by --help.
  """
  flags = Parser(
    description=text, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--out", type=Path, default=Path("runs/ladder"))
  flags.add_argument("--seed", type=int, default=0)
  return flags


def run(main: Callable[[], None]) -> None:
  """Runs a rung: wrong input is one line on stderr and exit status 2."""
  try:
    main()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


def figure(columns: int = 1, rows: int = 1, size: tuple = (4.4, 3.6)) -> tuple:
  """A figure and its axes, row by row, each `size` inches wide and high."""
  from matplotlib.figure import Figure

  width, height = size
  page = Figure(figsize=(columns * width, rows * height), layout="constrained")
  axes = page.subplots(rows, columns, squeeze=False).ravel()
  for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_prop_cycle(color=COLORS)
  return page, axes


def save(page: Any, out: Path, name: str) -> Path:
  """Writes a figure to `out/name.png`, says so, and returns the path."""
  path = Path(out) / f"{name}.png"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=110)
  except OSError as error:
    raise UserError(
      f"cannot write {path} ({error.strerror}); give a folder with --out"
    ) from None
  print(f"plot: {path}")
  return path
