"""Regular expressions as trees, built to be read.

The language is that of `re.fullmatch(pattern, text, re.ASCII)`, for the part of
the syntax that describes regular languages: literals, escapes, `.`, classes
(also negated), groups, `|`, `*`, `+`, `?`, `{m,n}`. `dfa` makes an automaton of
a tree.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxlm.errors import UserError

_DEEPEST = 100  # parentheses within parentheses
_LAST = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]


# --- Trees ------------------------------------------------------------------


@dataclass(frozen=True)
class Chars:
  """One character of these code points: (first, last) pairs, in order."""

  ranges: Ranges


@dataclass(frozen=True)
class Seq:
  """One after the other; of nothing, the empty text."""

  parts: tuple["Node", ...]


@dataclass(frozen=True)
class Either:
  """One of them; of nothing, no text at all."""

  options: tuple["Node", ...]


@dataclass(frozen=True)
class Repeat:
  """A node `least` to `most` times; None: without end."""

  node: "Node"
  least: int
  most: int | None


Node = Chars | Seq | Either | Repeat


def literal(text: str) -> Node:
  """The text itself."""
  return Seq(tuple(Chars(((ord(c), ord(c)),)) for c in text))


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
  """The same code points, in order, without overlap.

  >>> union([(5, 9), (1, 3), (4, 6)])
  ((1, 9),)
  """
  merged: list[tuple[int, int]] = []
  for low, high in sorted(ranges):
    if merged and low <= merged[-1][1] + 1:
      merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
    else:
      merged.append((low, high))
  return tuple(merged)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
  """All other code points."""
  others, next_ = [], 0
  for low, high in union(ranges):
    if low > next_:
      others.append((next_, low - 1))
    next_ = high + 1
  return tuple(others) + (((next_, _LAST),) if next_ <= _LAST else ())


ANY = Chars(((0, _LAST),))
_DOT = Chars(complement([(10, 10)]))
_CLASSES = {
  "d": ((48, 57),),
  "w": ((48, 57), (65, 90), (95, 95), (97, 122)),
  "s": ((9, 13), (32, 32)),
}
_CLASSES |= {name.upper(): complement(r) for name, r in _CLASSES.items()}
_CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7, "0": 0}


# --- Text to tree -----------------------------------------------------------


def parse(pattern: str, search: bool = False) -> Node:
  """The tree of a regular expression.

  Args:
    pattern: the expression; `^` and `$` may stand at the ends of it, or of its
      outermost alternatives.
    search: whether it may be found anywhere in the text, as in `re.search`;
      else it is all of the text.

  Raises:
    UserError: where it is malformed, or no regular expression in the strict
      sense (look-around, references, ...).
  """
  reader = _Reader(pattern, search)
  tree = reader.either()
  if reader.peek():
    reader.fail("has a ')' too many")
  return tree


class _Reader:
  """A pattern, and how far it has been read."""

  def __init__(self, text: str, search: bool):
    self.text, self.search, self.at, self.depth = text, search, 0, 0

  def fail(self, problem: str) -> None:
    raise UserError(
      f"the regular expression {self.text!r} {problem} at position {self.at}; "
      "docs/constraints.md has the syntax"
    )

  def peek(self) -> str:
    return self.text[self.at : self.at + 1]

  def take(self) -> str:
    if self.at >= len(self.text):
      self.fail("stops short")
    self.at += 1
    return self.text[self.at - 1]

  def eat(self, text: str) -> bool:
    """Whether this comes next, which is then read."""
    found = self.text.startswith(text, self.at)
    self.at += len(text) * found
    return found

  def either(self) -> Node:
    """Alternatives, up to the end of a group."""
    options = [self.sequence()]
    while self.eat("|"):
      options.append(self.sequence())
    return options[0] if len(options) == 1 else Either(tuple(options))

  def sequence(self) -> Node:
    outermost = self.depth == 0
    from_start, to_end = outermost and self.eat("^"), False
    parts = []
    while self.peek() not in ("", "|", ")"):
      to_end = outermost and self.text[self.at :][:2] in ("$", "$|")
      if to_end:
        self.eat("$")
        break
      parts.append(self.repeated())
    if self.search and outermost:
      anything = Repeat(ANY, 0, None)
      parts = [anything] * (not from_start) + parts + [anything] * (not to_end)
    return parts[0] if len(parts) == 1 else Seq(tuple(parts))

  def repeated(self) -> Node:
    """An atom with what says how often."""
    node = self.atom()
    times = self.times()
    if times is None:
      return node
    self.eat("?")  # reluctant or not, the language is the same
    if self.peek() in ("*", "+", "?", "{") and self.peek():
      self.fail("repeats a repetition")
    return Repeat(node, *times)

  def times(self) -> tuple[int, int | None] | None:
    for mark, times in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
      if self.eat(mark):
        return times
    if not self.eat("{"):
      return None
    least = self.number()
    most = self.number() if self.eat(",") else least
    if not self.eat("}") or least is most is None:
      self.fail("has a '{' without numbers, as in {m,n} (a plain one is '\\{')")
    if most is not None and (least or 0) > most:
      self.fail("wants fewer repetitions than at least")
    return least or 0, most

  def number(self) -> int | None:
    digits = ""
    while self.peek().isascii() and self.peek().isdigit():
      digits += self.take()
    return int(digits[:9]) if digits else None

  def atom(self) -> Node:
    mark = self.take()
    if mark == "(":
      return self.group()
    if mark == "[":
      return Chars(self.members())
    if mark == ".":
      return _DOT
    if mark == "\\":
      return Chars(self.escape())
    if mark in "*+?{^$":
      self.at -= 1
      self.fail(f"has a {mark!r} where there is nothing for it to act on")
    return Chars(((ord(mark), ord(mark)),))

  def group(self) -> Node:
    self.depth += 1
    if self.depth > _DEEPEST:
      self.fail(f"has more than {_DEEPEST} groups within each other")
    if not self.eat("?:") and self.peek() == "?":
      self.fail("has a group (?...) that is not (?:...)")
    tree = self.either()
    if not self.eat(")"):
      self.fail("lacks a ')'")
    self.depth -= 1
    return tree

  def escape(self) -> Ranges:
    """What a backslash and the next characters stand for."""
    mark = self.take()
    if mark in _CLASSES:
      return _CLASSES[mark]
    if mark in "xu":
      digits = [self.take() for _ in range(2 if mark == "x" else 4)]
      try:
        point = int("".join(digits), 16)
      except ValueError:
        self.fail(f"has an unfinished \\{mark}")
    elif mark in _CONTROLS and not (mark == "0" and self.peek().isdigit()):
      point = _CONTROLS[mark]
    elif mark.isascii() and mark.isalnum():
      self.fail(f"has \\{mark}, which is not read here")
    else:
      point = ord(mark)
    return ((point, point),)

  def members(self) -> Ranges:
    """A class, from behind its '[' to behind its ']'."""
    others, found = self.eat("^"), []
    while not found or not self.eat("]"):
      first = self.member()
      if self.peek() != "-" or self.text[self.at :][:2] in ("-]", "-"):
        found += first
        continue
      self.eat("-")
      last = self.member()
      if any(r[0][0] != r[-1][1] for r in (first, last)) or first > last:
        self.fail("has a range between what cannot be its ends")
      found.append((first[0][0], last[0][1]))
    return complement(found) if others else union(found)

  def member(self) -> Ranges:
    mark = self.take()
    return self.escape() if mark == "\\" else ((ord(mark), ord(mark)),)
