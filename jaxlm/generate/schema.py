"""JSON schemas as regular expressions, for the part of them that is regular.

The JSON is written on one line, the properties in their order, a space or none
after ':' and ','. What a schema allows and this does not write (other spellings
of a string or number, properties that are not named) it leaves out: all that is
written satisfies the schema.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxlm.errors import UserError
from jaxlm.generate.regex import (
  ANY,
  Chars,
  Either,
  Node,
  Repeat,
  Seq,
  complement,
  literal,
  parse,
  union,
)

_DEEPEST = 2  # arrays and objects within a value that may be anything
_NOTES = frozenset(
  ("title", "description", "default", "examples", "deprecated")
)
_NOTES |= {"readOnly", "writeOnly", "$schema", "$id", "$comment"}
_NOTES |= {"$defs", "definitions"}
_ESCAPES = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
_MUST_ESCAPE = union([(0, 31), (34, 34), (92, 92)])

Schema = dict[str, Any] | bool


class Irregular(Exception):
  """A schema asks for what these regular expressions do not express."""


def tree(schema: Schema) -> Node:
  """What spells the JSON values that satisfy a schema.

  Raises:
    Irregular: for a keyword, or a use of one, that is not understood here.
    UserError: if the schema is malformed.
  """
  return _Writer(schema).value(schema, _DEEPEST)


def read(text: str) -> Schema:
  """A schema from JSON.

  Raises:
    UserError: if it is none.
  """
  try:
    schema = json.loads(text)
  except ValueError as error:
    raise UserError(f"the JSON schema is not JSON: {error}") from error
  if not isinstance(schema, dict | bool):
    raise UserError(
      'a JSON schema is an object such as {"type": "integer"}, or true'
    )
  return schema


# --- Pieces -----------------------------------------------------------------

_BREAK = Repeat(literal(" "), 0, 1)
_COMMA = Seq((literal(","), _BREAK))
_COLON = Seq((literal(":"), _BREAK))
_QUOTE = literal('"')
_INTEGER = parse("-?(0|[1-9][0-9]{0,14})")
_NUMBER = parse(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?")
_PLAIN: dict[str, Node] = {
  "integer": _INTEGER,
  "number": _NUMBER,
  "boolean": Either((literal("true"), literal("false"))),
  "null": literal("null"),
}


def _exactly(value: Any) -> Node:
  """A value as Python's `json` spells it."""
  return literal(json.dumps(value, ensure_ascii=False))


def in_string(node: Node) -> Node:
  """The texts of a tree as JSON spells them between quotes."""
  if isinstance(node, Seq):
    return Seq(tuple(in_string(part) for part in node.parts))
  if isinstance(node, Either):
    return Either(tuple(in_string(option) for option in node.options))
  if isinstance(node, Repeat):
    return Repeat(in_string(node.node), node.least, node.most)
  others = complement(node.ranges)
  plain = complement(others + _MUST_ESCAPE)
  escaped = complement(others + complement(_MUST_ESCAPE))
  points = [p for low, high in escaped for p in range(low, high + 1)]
  short = [_ESCAPES[p] for p in points if p in _ESCAPES]
  long = [f"{p:02x}" for p in points if p not in _ESCAPES]
  spelled = [Seq((literal("\\"), _one_of(short)))]
  for first in "01":
    second = _one_of(h[1] for h in long if h[0] == first)
    spelled.append(Seq((literal(f"\\u00{first}"), second)))
  return Either((Chars(plain), *spelled))


def _one_of(letters: Iterable[str]) -> Chars:
  return Chars(union((ord(c), ord(c)) for c in letters))


def _listed(item: Node, least: int, most: int | None) -> Node:
  """Items with commas between, `least` to `most` of them."""
  if most == 0:
    return Seq(())
  more = Repeat(
    Seq((_COMMA, item)), max(least - 1, 0), None if most is None else most - 1
  )
  some = Seq((item, more))
  return some if least else Repeat(some, 0, 1)


# --- Schemas ----------------------------------------------------------------


class _Writer:
  """A whole schema, and the references that are being followed."""

  def __init__(self, root: Schema):
    self.root = root
    self.within: tuple[str, ...] = ()

  def value(self, schema: Schema, depth: int) -> Node:
    """A value of a schema; where it is free, with at most `depth` levels."""
    if schema is False:
      return Either(())
    if schema is True or not set(schema) - _NOTES:
      return self.anything(depth)
    keys = set(schema) - _NOTES
    if "$ref" in schema:
      _only(keys, "$ref")
      return self.reference(schema["$ref"], depth)
    if "anyOf" in schema:
      _only(keys, "anyOf")
      options = _list_of(schema, "anyOf")
      return Either(tuple(self.value(_schema(s), depth) for s in options))
    if "enum" in schema or "const" in schema:
      return self.chosen(schema, keys)
    return self.typed(schema, keys, depth)

  def anything(self, depth: int) -> Node:
    """Any value at all."""
    options = [_string(ANY, 0, None), _NUMBER]
    options += [_PLAIN["boolean"], _PLAIN["null"]]
    if depth:
      options.append(self.array({}, depth))
      options.append(self.object({}, depth))
    return Either(tuple(options))

  def reference(self, name: str, depth: int) -> Node:
    """What a reference within this schema stands for."""
    if not isinstance(name, str) or not name.startswith("#/"):
      raise Irregular(f'"$ref": {json.dumps(name)}')
    if name in self.within:
      raise Irregular(f'"$ref": "{name}", which leads back to itself')
    found: Any = self.root
    for part in name[2:].split("/"):
      part = part.replace("~1", "/").replace("~0", "~")
      if not isinstance(found, dict) or part not in found:
        raise UserError(
          f'the JSON schema refers to "{name}", which is not in it'
        )
      found = found[part]
    outer, self.within = self.within, (*self.within, name)
    node = self.value(_schema(found), depth)
    self.within = outer
    return node

  def chosen(self, schema: dict, keys: set[str]) -> Node:
    """One of some values."""
    _only(keys, "enum", "const", "type")
    if "const" in schema:
      _only(keys, "const", "type")
    values = (
      [schema["const"]] if "const" in schema else _list_of(schema, "enum")
    )
    types = _types(schema)
    fitting = [v for v in values if not types or any(_is(v, t) for t in types)]
    return Either(tuple(_exactly(value) for value in fitting))

  def typed(self, schema: dict, keys: set[str], depth: int) -> Node:
    """A value of one of the types that are named, or that keywords imply."""
    types = _types(schema) or [
      t for t, known in _KEYWORDS.items() if keys & known and known
    ]
    unknown = keys - {"type"}.union(*(_KEYWORDS[t] for t in types))
    if unknown or not types:
      raise Irregular(f'"{min(unknown)}"' if unknown else "no type")
    make: dict[str, Callable[[], Node]] = {
      "string": lambda: self.string(schema),
      "array": lambda: self.array(schema, depth),
      "object": lambda: self.object(schema, depth),
    }
    return Either(tuple(make.get(t, lambda t=t: _PLAIN[t])() for t in types))

  def string(self, schema: dict) -> Node:
    """A string by its length or by its pattern."""
    least, most = _bounds(schema, "minLength", "maxLength")
    if "pattern" not in schema:
      return _string(ANY, least, most)
    if least or most is not None:
      raise Irregular('"pattern" together with a length')
    if not isinstance(schema["pattern"], str):
      raise _malformed("pattern", "a regular expression")
    inner = parse(schema["pattern"], search=True)
    return Seq((_QUOTE, in_string(inner), _QUOTE))

  def array(self, schema: dict, depth: int) -> Node:
    """An array of items that are all alike."""
    least, most = _bounds(schema, "minItems", "maxItems")
    inner = depth if "items" in schema else depth - 1
    item = self.value(_schema(schema.get("items", True)), inner)
    return Seq((literal("["), _listed(item, least, most), literal("]")))

  def object(self, schema: dict, depth: int) -> Node:
    """An object with its properties in order, some of them perhaps left out.

    Without any named, all are of `additionalProperties`.
    """
    named = schema.get("properties", {})
    required = schema.get("required", [])
    if not isinstance(named, dict):
      raise _malformed("properties", "an object of schemas")
    if not isinstance(required, list) or any(
      not isinstance(name, str) for name in required
    ):
      raise _malformed("required", "a list of names")
    rest = _schema(schema.get("additionalProperties", True))
    if not named and not required and rest is not False:
      return self.free_object(rest, schema, depth)
    names = dict.fromkeys([*named, *required])
    members = [
      (
        Seq(
          (_exactly(n), _COLON, self.value(_schema(named.get(n, rest)), depth))
        ),
        n in required,
      )
      for n in names
    ]
    return Seq((literal("{"), _members(members), literal("}")))

  def free_object(self, rest: Schema, schema: dict, depth: int) -> Node:
    """An object of any names, with values of one schema."""
    inner = depth if "additionalProperties" in schema else depth - 1
    name = _string(ANY, 0, None)
    member = Seq((name, _COLON, self.value(rest, inner)))
    return Seq((literal("{"), _listed(member, 0, None), literal("}")))


def _string(char: Node, least: int, most: int | None) -> Node:
  return Seq((_QUOTE, Repeat(in_string(char), least, most), _QUOTE))


def _members(members: Sequence[tuple[Node, bool]]) -> Node:
  """Members in order, the second value says which must be there."""
  first: Node = Seq(())  # what may come where nothing has been written
  after: Node = Seq(())  # and where a comma is needed
  for member, needed in reversed(members):
    begun = Seq((member, after))
    first = begun if needed else Either((begun, first))
    more = Seq((_COMMA, member))
    after = Seq((more if needed else Repeat(more, 0, 1), after))
  return first


_KEYWORDS: dict[str, frozenset[str]] = {
  "string": frozenset({"minLength", "maxLength", "pattern"}),
  "array": frozenset({"items", "minItems", "maxItems"}),
  "object": frozenset({"properties", "required", "additionalProperties"}),
  "integer": frozenset(),
  "number": frozenset(),
  "boolean": frozenset(),
  "null": frozenset(),
}
_OF: dict[str, tuple[type, ...]] = {
  "string": (str,),
  "array": (list,),
  "object": (dict,),
  "number": (int, float),
  "boolean": (bool,),
  "null": (type(None),),
}


def _is(value: Any, kind: str) -> bool:
  """Whether a value is of a type of JSON schema's."""
  if kind == "integer":
    return _is(value, "number") and value == int(value)
  return isinstance(value, _OF[kind]) and isinstance(value, bool) == (
    kind == "boolean"
  )


def _types(schema: dict) -> list[str]:
  """The types that a schema names."""
  named = schema.get("type", [])
  types = [named] if isinstance(named, str) else named
  if not isinstance(types, list) or any(t not in _KEYWORDS for t in types):
    raise _malformed("type", f"one or a list of {', '.join(_KEYWORDS)}")
  return types


def _bounds(schema: dict, low: str, high: str) -> tuple[int, int | None]:
  """Two lengths of a schema."""
  least, most = schema.get(low, 0), schema.get(high)
  for name, value in ((low, least), (high, most)):
    if value is not None and (not _is(value, "integer") or value < 0):
      raise _malformed(name, "a number that is not negative")
  if most is not None and least > most:
    raise UserError(f"the JSON schema has {low} {least} above {high} {most}")
  return int(least), None if most is None else int(most)


def _list_of(schema: dict, key: str) -> list:
  if not isinstance(schema[key], list):
    raise _malformed(key, "a list")
  return schema[key]


def _schema(found: Any) -> Schema:
  if not isinstance(found, dict | bool):
    raise UserError(
      f"the JSON schema has {json.dumps(found)[:40]} where a schema belongs"
    )
  return found


def _only(keys: set[str], *known: str) -> None:
  """Raises where other keywords stand beside these."""
  other = keys - set(known)
  if other:
    raise Irregular(f'"{min(other)}" beside "{known[0]}"')


def _malformed(key: str, what: str) -> UserError:
  return UserError(f'the JSON schema is malformed: "{key}" has to be {what}')
