"""Tables of (path pattern, value): learning rates, decay and freezing by name.

A table is a tuple of pairs; a pattern is a regular expression that must match
a parameter's whole path ('layers/0/mixer/q'), and the first that does wins:

  (('embed/.*', 10.0), ('.*', 1.0))

Silence is where such tables go wrong, so two mistakes are errors: a pattern
that matches no parameter (a typing error), and a parameter that no pattern
matches (end with '.*').
"""

import re
from typing import Any

import jax

from jaxlm.errors import UserError
from jaxlm.layers.param import Param, Tree, path_name

Table = tuple[tuple[str, Any], ...]


def lookup(table: Table, tree: Tree, name: str) -> Tree:
  """The value of every parameter: a tree of the table's values.

  Args:
    table: pairs of (regular expression, value).
    tree: the parameters (`Param` or arrays).
    name: of the table, for messages.

  Raises:
    UserError: for a malformed pattern, a pattern that matches no path, or a
      path that no pattern matches.
  """
  rows = [(_compile(pattern, name), value) for pattern, value in table]
  found, hits = {}, set()
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_param)
  for path in (path_name(path) for path, _ in leaves):
    matches = [i for i, (p, _) in enumerate(rows) if p.fullmatch(path)]
    if not matches:
      raise UserError(
        f"{name}: no pattern matches the parameter {path!r};"
        " add a row for it, or end the table with ('.*', value)"
      )
    hits.update(matches)
    found[path] = rows[matches[0]][1]
  for i, (pattern, _) in enumerate(rows):
    if i not in hits:
      raise UserError(
        f"{name}: the pattern {pattern.pattern!r} matches no parameter;"
        f" the first of them is {next(iter(found), 'missing')!r}"
        " (patterns must match the whole path)"
      )
  return jax.tree_util.tree_map_with_path(
    lambda path, _: found[path_name(path)], tree, is_leaf=_is_param
  )


def _is_param(x: Any) -> bool:
  return isinstance(x, Param)


def _compile(pattern: str, name: str) -> re.Pattern[str]:
  try:
    return re.compile(pattern)
  except re.error as e:
    raise UserError(f"{name}: {pattern!r} is no regular expression: {e}") from e
