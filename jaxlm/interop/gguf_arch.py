"""The translation between a GGUF architecture and the hub, as a value.

`gguf_tables` has one `Arch` for each architecture; here is what it is made of
and how its names are matched with those of a file.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxlm.errors import UserError
from jaxlm.interop.gguf_layouts import Layout, Same
from jaxlm.interop.gguf_numbers import Number


@dataclass(frozen=True)
class Line:
  """Tensors that hold the same numbers in the file and on the hub.

  Attributes:
    file: names in the file, `{}` for the layer.
    hub: names on the hub; `{expert}` where the file's tensor stacks them.
    layout: between the two.
  """

  file: tuple[str, ...]
  hub: tuple[str, ...]
  layout: Layout = Same()


def lines(layout: Layout, *pairs: tuple[str, str]) -> tuple[Line, ...]:
  """Lines of one layout from pairs (file, hub), names parted by spaces.

  A name that ends in `.*` stands for its weight and its bias.
  """
  out = []
  for file, hub in pairs:
    ends = ("weight", "bias") if "*" in file else ("",)
    out += [
      Line(
        tuple(file.replace("*", end).split()),
        tuple(hub.replace("*", end).split()),
        layout,
      )
      for end in ends
    ]
  return tuple(out)


@dataclass(frozen=True)
class Arch:
  """The translation of one architecture.

  Attributes:
    name: as `general.architecture` has it.
    types: `model_type`s on the hub that are stored so; reading gives the
      first.
    lines: tensors.
    numbers: pairs (key in the file without the name, key of the config).
    implied: what the config says and the file does not, because llama.cpp
      takes it for granted.
    flags: config keys that are true where the file has a tensor.
    also: numbers that are no mere pairs.
    needs: a number of the file and its least value; tells architectures of
      one name apart.
    rope: what `rope_parameters` of the config says and the file does not;
      None where positions do not rotate.
    local_theta: the rotary base of layers with a window, where it differs
      and the file does not say.
  """

  name: str
  types: tuple[str, ...]
  lines: tuple[Line, ...]
  numbers: tuple[tuple[str, str], ...]
  implied: Mapping[str, Any] = field(default_factory=dict)
  flags: Mapping[str, str] = field(default_factory=dict)
  also: tuple[Number, ...] = ()
  needs: tuple[str, int] | None = None
  rope: Mapping[str, Any] | None = field(default_factory=dict)
  local_theta: float | None = None


def matches(
  arch: Arch, names: Iterable[str], side: str
) -> Iterator[tuple[Line, list[tuple[str, ...]], int | None]]:
  """Lines and layers whose tensors are among `names`.

  Args:
    arch: the architecture.
    names: all tensors there are.
    side: which names they are, 'file' or 'hub'.

  Yields:
    A line, the names of one use of it (on the hub one tuple per expert where
    the file stacks them), and the layer.

  Raises:
    UserError: for a name that has no place, or a partner that is missing.
  """
  firsts = [(_pattern(getattr(line, side)[0]), line) for line in arch.lines]
  given, taken, uses = list(names), set(), {}
  for name in given:
    for pattern, line in firsts:
      if found := pattern.fullmatch(name):
        numbers = {k: int(n) for k, n in found.groupdict().items()}
        place = uses.setdefault((line, numbers.get("layer")), {})
        place[numbers.get("expert", 0)] = tuple(
          other.format(numbers.get("layer"), expert=numbers.get("expert"))
          for other in getattr(line, side)
        )
  for (line, layer), place in uses.items():
    rows = [place[e] for e in sorted(place)]
    taken.update(name for row in rows for name in row)
    yield line, rows, layer
  if missing := sorted(taken - set(given)):
    raise UserError(f"it has no tensor {missing[0]!r}, its partner is there")
  if extra := sorted(set(given) - taken):
    raise UserError(
      f"tensor {extra[0]!r} has no place in a model of GGUF's architecture "
      f"{arch.name!r} ({len(extra)} such)"
    )


def _pattern(name: str) -> re.Pattern:
  """A name of the table as a regular expression."""
  text = re.escape(name).replace(r"\{\}", r"(?P<layer>\d+)")
  return re.compile(text.replace(r"\{expert\}", r"(?P<expert>\d+)"))
