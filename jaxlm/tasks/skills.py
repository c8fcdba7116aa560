"""The skills there are, and groups of them."""

from collections.abc import Callable
from typing import Any

from jaxlm.tasks import arithmetic, edits, formats, stories

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
