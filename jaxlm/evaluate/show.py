"""Results as tables for a terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.evaluate.bootstrap import Estimate
from jaxlm.evaluate.compare import Change


def metrics(found: Mapping[str, Estimate]) -> str:
  """A line for each metric.

  >>> print(metrics({"exact": Estimate(68.0, 65.58, 70.5)}))
  metric  value          95 %
  exact    68.0  65.6 to 70.5
  """
  rows = [("metric", "value", "95 %")]
  rows += [(name, _number(e.value), _range(e)) for name, e in found.items()]
  return table(rows)


def slices(found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
  """A line for each slice, with some of the metrics."""
  rows: list[Sequence[str]] = [("slice", "", "n", *_twice(names))]
  for kind, parts in found.items():
    for name, part in parts.items():
      told = [part["metrics"][m] for m in names]
      cells = [c for e in told for c in (_number(e.value), _range(e))]
      rows.append((kind, name, f"{part['n']:,}", *cells))
  return table(rows, left=2)


_CHANGE = ("before", "after", "change", "95 %", "wins")


def changes(found: Mapping[str, Change]) -> str:
  """A line for each metric of two systems."""
  return table(
    [("metric", *_CHANGE), *((name, *_cells(c)) for name, c in found.items())]
  )


def changed(found: Mapping[str, Mapping[str, Any]]) -> str:
  """A line for each slice, with one metric of two systems."""
  rows: list[Sequence[str]] = [("slice", "", "n", *_CHANGE)]
  for kind, parts in found.items():
    for name, part in parts.items():
      rows.append((kind, name, f"{part['n']:,}", *_cells(part["change"])))
  return table(rows, left=2)


def _cells(c: Change) -> tuple[str, ...]:
  return (
    _number(c.before.value),
    _number(c.after.value),
    _number(c.difference.value, "+"),
    _range(c.difference, "+"),
    f"{100 * c.wins:.1f} %",
  )


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
  """Columns side by side, the first ones to the left, others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.ljust(width) if i < left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def _twice(names: Sequence[str]) -> list[str]:
  return [cell for name in names for cell in (name, "95 %")]


def _number(x: float, sign: str = "") -> str:
  return format(x, f"{sign}.1f") if math.isfinite(x) else "-"


def _range(e: Estimate, sign: str = "") -> str:
  return f"{_number(e.low, sign)} to {_number(e.high, sign)}"
