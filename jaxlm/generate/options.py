"""Values written as text: `temperature(0.8) top_p(0.9)`, `beam(beams=4)`.

What a command line can say of sampling and searching. A text is a row of
calls, `name(number, name=number)`, brackets only where there is something to
say; their order is the order in which filters are applied. Nothing is
evaluated: values are numbers, `true`, `false`, `none` and plain words.
"""

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxlm import keys
from jaxlm.errors import UserError
from jaxlm.generate import filters
from jaxlm.generate.filters import Filter
from jaxlm.layers.cache import Full, Quantised, Ring

_CALL = re.compile(r"[\s,]*([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?(?=[\s,]|$)")
_NAME = re.compile(r"\s*([A-Za-z_]\w*)\s*=(.*)", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Call:
  """One `name(given, ..., word=given, ...)`."""

  name: str
  given: tuple[Any, ...]
  named: tuple[tuple[str, Any], ...]

  def __call__(self, makers: Mapping[str, Callable[..., Any]]) -> Any:
    """What the maker of that name makes of the arguments.

    Raises:
      UserError: for a name or an argument that there is not.
    """
    if self.name not in makers:
      near = keys.nearest(self.name, makers) or "."
      raise UserError(
        f"unknown name {self.name!r}{near} There are {', '.join(makers)}"
      )
    make = makers[self.name]
    words = inspect.signature(make)
    try:
      given = words.bind(*self.given, **dict(self.named)).arguments
    except TypeError as error:
      raise UserError(
        f"{self.name}: {error}; it is {form(self.name, make)}"
      ) from None
    for name, value in given.items():
      many = words.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
      for one in value if many else (value,):
        _check(self.name, name, one, words.parameters[name].annotation)
    return make(*self.given, **dict(self.named))


def _check(call: str, name: str, value: Any, kind: Any) -> None:
  """Raises UserError unless a value is of the kind that an argument has."""
  kinds = typing.get_args(kind) or (kind,)
  kinds += (int,) if float in kinds else ()
  if type(value) not in kinds:
    names = {int: "a whole number", float: "a number", str: "a word"}
    wanted = next((names[k] for k in kinds if k in names), "of its kind")
    raise UserError(f"{call}: {name}={value!r} is not {wanted}")


def form(name: str, make: Callable[..., Any]) -> str:
  """How a call is written.

  >>> form("top_p", filters.TopP)
  'top_p(p, by=bisect)'
  """
  words = []
  for word in inspect.signature(make).parameters.values():
    many = word.kind is inspect.Parameter.VAR_POSITIONAL
    given = word.default is not inspect.Parameter.empty
    default = f"={word.default}" if given else ""
    words.append(f"{word.name}{', ...' * many}{default}")
  return f"{name}({', '.join(words)})"


def calls(text: str) -> list[Call]:
  """The calls that a text is a row of.

  >>> [call.name for call in calls("temperature(0.8) top_k(40)")]
  ['temperature', 'top_k']

  Raises:
    UserError: if it is no such row.
  """
  return [*_calls(text)]


def _calls(text: str) -> Iterator[Call]:
  at = 0
  while text[at:].strip(" \t\n,"):
    found = _CALL.match(text, at)
    if found is None:
      raise UserError(
        f"cannot read {text[at:].strip()!r}; write names with numbers in "
        "brackets, as in 'temperature(0.8) top_p(0.9)'"
      )
    at = found.end()
    yield _call(found[1], found[2] or "")


def _call(name: str, inside: str) -> Call:
  given, named = [], {}
  for part in inside.split(",") if inside.strip() else ():
    word = _NAME.fullmatch(part)
    if word is None and named:
      raise UserError(f"{name}({inside}): what has a name comes last")
    if word is None:
      given.append(_value(name, part))
    elif word[1] in named:
      raise UserError(f"{name}({inside}): {word[1]} is given twice")
    else:
      named[word[1]] = _value(name, word[2])
  return Call(name, tuple(given), tuple(named.items()))


def _value(name: str, text: str) -> Any:
  """A number, a truth value, or a word."""
  text = text.strip()
  if text.lower() == "nan":
    raise UserError(f"{name}: nan is no number to reckon with")
  for read in (int, float):
    try:
      return read(text)
    except ValueError:
      pass
  if text.lower() in _WORDS:
    return _WORDS[text.lower()]
  if not re.fullmatch(r"[\w./-]+", text):
    raise UserError(f"{name}: {text!r} is neither a number nor a word")
  return text


# --- Filters ----------------------------------------------------------------


def makers(
  ends: Sequence[int] = (), vocab: int | None = None
) -> dict[str, Callable[..., Filter]]:
  """What makes a filter, by the name it has in a text.

  Args:
    ends: the tokens that end a text, which `at_least` holds back.
    vocab: how many tokens there are, if known.
  """

  def known(token: int) -> int:
    if not 0 <= token < (vocab or 2**31):
      raise UserError(
        f"token {token} is outside the vocabulary of {vocab} tokens; tokens "
        "are whole numbers from 0"
      )
    return token

  def bias(token: int, add: float) -> Filter:
    return filters.Bias(((known(token), float(add)),))

  def banned(*tokens: int) -> Filter:
    return filters.Banned((tuple(map(known, tokens)),))

  def at_least(n: int) -> Filter:
    return filters.AtLeast(n, tuple(ends))

  return {
    "temperature": filters.Temperature,
    "top_k": filters.TopK,
    "top_p": filters.TopP,
    "min_p": filters.MinP,
    "typical": filters.Typical,
    "eta": filters.Eta,
    "epsilon": filters.Epsilon,
    "repetition": filters.Repetition,
    "presence": filters.Presence,
    "frequency": filters.Frequency,
    "no_repeat": filters.NoRepeat,
    "bias": bias,
    "banned": banned,
    "at_least": at_least,
  }


def parse_filters(
  text: str, ends: Sequence[int] = (), vocab: int | None = None
) -> tuple[Filter, ...]:
  """The filters that a text names, in its order.

  >>> parse_filters("temperature(0.8) top_k(40)")
  (Temperature(value=0.8), TopK(k=40))

  Args:
    text: a row of calls.
    ends: the tokens that end a text.
    vocab: how many tokens there are, if known.

  Raises:
    UserError: for an unknown name, or numbers that make no sense.
  """
  known = makers(ends, vocab)
  return tuple(call(known) for call in calls(text))


_CACHES = {
  "full": Full,
  "ring": Ring,
  "int8": lambda: Quantised("int8"),
  "float8": lambda: Quantised("float8_e4m3fn"),
}


def parse_cache(text: str) -> Full | Ring | Quantised:
  """The kind of cache that a text names.

  >>> parse_cache("ring(1024, sinks=4)")
  Ring(window=1024, sinks=4, move=True)

  A number format after it says what it is kept in: "ring(1024) int8".

  Raises:
    UserError: for an unknown name, or kinds that cannot go together.
  """
  kinds = [call(_CACHES) for call in calls(text)] or [Full()]
  first, *formats = kinds
  if not formats:
    return first
  if len(formats) > 1 or not isinstance(formats[0], Quantised):
    raise UserError(
      f"--cache={text}: a cache is full or a ring(window, sinks), and then "
      "perhaps int8 or float8"
    )
  return replace(formats[0], inner=first)
