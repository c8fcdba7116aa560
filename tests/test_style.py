"""The house style that a linter does not know.

Each rule is a function from sources to a list of violations, and is first fed
a small planted violation, to prove that it can fail.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxlm"
MOST_LINES = 500
VAGUE_FILES = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
VAGUE_CLASSES = ("Manager", "Handler", "Factory", "Helper")
COPY_LINES = 4  # bodies of this length are worth writing once

Function = ast.FunctionDef | ast.AsyncFunctionDef
Sources = dict[str, str]  # path to text


def sources() -> Sources:
  """Every file of the package."""
  return {
    str(path.relative_to(PACKAGE.parent)): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
  }


def public(tree: ast.Module | ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
  """Public functions, classes and methods, by dotted name."""
  for node in tree.body:
    if not isinstance(node, Function | ast.ClassDef):
      continue
    if node.name.startswith("_"):
      continue
    yield node.name, node
    if isinstance(node, ast.ClassDef):
      for name, inner in public(node):
        yield f"{node.name}.{name}", inner


def unexplained(files: Sources) -> list[str]:
  """Files, public functions, classes and methods without a docstring."""
  found = []
  for path, text in files.items():
    tree = ast.parse(text)
    named = [("", tree), *public(tree)]
    found += [f"{path} {n}".strip() for n, x in named if not doc(x)]
  return found


def doc(node: ast.AST) -> str | None:
  return ast.get_docstring(node)


def long(files: Sources) -> list[str]:
  """Files that have grown past what is read in one sitting."""
  return [p for p, text in files.items() if text.count("\n") > MOST_LINES]


def vague(files: Sources) -> list[str]:
  """Names that say nothing of what is inside."""
  found = [path for path in files if Path(path).name in VAGUE_FILES]
  for path, text in files.items():
    found += [
      f"{path} {node.name}"
      for node in ast.walk(ast.parse(text))
      if isinstance(node, ast.ClassDef) and node.name.endswith(VAGUE_CLASSES)
    ]
  return found


def copies(files: Sources) -> list[list[str]]:
  """Functions whose bodies are the same, names of arguments included."""
  places = defaultdict(list)
  for path, text in files.items():
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, Function):
        body = node.body[1:] if doc(node) else node.body
        if body and body[-1].end_lineno - body[0].lineno + 1 >= COPY_LINES:
          places["".join(map(ast.dump, body))].append(f"{path} {node.name}")
  return [names for names in places.values() if len(names) > 1]


# --- The rules can fail -----------------------------------------------------


def test_unexplained_finds():
  """Private names, fields and functions inside functions may be silent."""
  text = '''
def f():
  def inner(): pass
def _g(): pass
class C:
  """Has one."""
  x: int = 0
  def method(self): pass
  def __call__(self): pass
  def _private(self): pass
  async def told(self):
    """Has one."""
'''
  assert unexplained({"a.py": text}) == ["a.py", "a.py f", "a.py C.method"]


def test_long_finds():
  """One line over the limit is over it."""
  files = {"a.py": "x = 1\n" * MOST_LINES, "b.py": "x = 1\n" * 501}
  assert long(files) == ["b.py"]


def test_vague_finds():
  """As a file and as a class, and not inside a longer word."""
  files = {"a/utils.py": "", "b.py": "class TaskManager: pass\nclass Man: pass"}
  assert vague(files) == ["a/utils.py", "b.py TaskManager"]


def test_copies_finds():
  """The docstring may differ; a shorter body may repeat."""
  body = "  a = x\n  b = a\n  c = b\n  return c\n"
  files = {
    "a.py": f'def f(x):\n  """One."""\n{body}def h():\n  return 1\n',
    "b.py": f"def g(x):\n{body}def k():\n  return 1\n",
  }
  assert copies(files) == [["a.py f", "b.py g"]]


# --- The package ------------------------------------------------------------


@pytest.mark.parametrize("rule", [unexplained, long, vague, copies])
def test_package_keeps(rule):
  """Docstrings, short files, telling names, nothing written twice."""
  assert rule(sources()) == []
