"""The default corpus: the English that every CPython carries.

Two sources, both read as files and never imported: `pydoc_data.topics`, the
language reference behind Python's `help()`, and the docstrings of the standard
library. They are set in one style, that of the topics: a title underlined with
stars, entries under their signature, indented by three spaces, "names" in
double quotes, plain ASCII punctuation. What is not prose (tables, grammar
dumps, doctest sessions longer than their explanation, generated modules) is
left out, and no paragraph occurs twice.

The text depends on the Python version: 3.11 gives about 1.5 million characters.
"""

import ast
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from jaxlm.data.cache import cache_dir, digest, whole_folder
from jaxlm.errors import UserError

_VERSION = "1"  # raise it when the built text changes
_LEAST = 300_000  # characters; less than this is not a standard library

# Tests, applications, and what is generated or not part of the library.
_SKIP = frozenset(
  "__pycache__ _pyrepl config dist-packages encodings ensurepip idlelib "
  "lib-dynload lib2to3 pydoc_data site-packages test tests turtledemo "
  "__phello__ antigravity.py this.py".split()
)


def documents() -> list[str]:
  """The corpus: one document per help topic, then one per module.

  Built in a few seconds the first time and kept in the cache folder, under a
  name that contains the version of Python and of this file.

  Raises:
    UserError: if this Python came without topics and library sources.
  """
  root = Path(sysconfig.get_path("stdlib"))
  key = digest(_VERSION, sys.version, str(root))
  folder = cache_dir() / "corpus" / key
  file = folder / "documents.jsonl"
  try:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
  except (OSError, ValueError):
    pass
  built = build(root)
  if not folder.is_dir():
    with whole_folder(folder) as temp:
      lines = [json.dumps(text) for text in built]
      name = temp / "documents.jsonl"
      name.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return built


def build(root: Path) -> list[str]:
  """Builds the corpus from the standard library in the folder `root`."""
  texts = [*_topics(root), *_modules(root)]
  built = list(_unrepeated(texts))
  if sum(map(len, built)) < _LEAST:
    raise UserError(
      f"the Python at {sys.executable} carries too little documentation in "
      f"{root} (its library sources seem to be missing); give a text with "
      "--config.data.path=FILE, or use a full CPython"
    )
  return built


# --- Help topics ------------------------------------------------------------


def _topics(root: Path) -> Iterator[str]:
  """The help topics, largest first where one repeats the other."""
  file = root / "pydoc_data" / "topics.py"
  if not file.is_file():
    return
  for node in ast.parse(file.read_bytes()).body:
    if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
      node.value, ast.Dict
    ):
      topics = ast.literal_eval(node.value)
      # Chapters repeat their sections; taken first, they stay whole.
      yield from sorted(topics.values(), key=lambda text: (-len(text), text))


# --- Docstrings -------------------------------------------------------------


def _modules(root: Path) -> Iterator[str]:
  """One document for every module that documents itself."""
  for file in sorted(root.rglob("*.py"), key=lambda f: f.as_posix()):
    path = file.relative_to(root)
    if any(part in _SKIP or part.startswith("config-") for part in path.parts):
      continue
    try:
      tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
      continue
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    entries = list(_entries(tree, name))
    if entries:
      title = f'"{name}"'
      yield "\n\n".join([f"{title}\n{'*' * len(title)}", *entries])


def _entries(tree: ast.Module, name: str) -> Iterator[str]:
  """The module's docstring, then those of its classes and functions."""
  own = _prose(tree)
  if own:
    yield own
  yield from _members(tree, "")


def _members(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
  for child in node.body:
    if isinstance(child, ast.ClassDef):
      text = _prose(child)
      if text:
        yield _entry(f"class {prefix}{child.name}", text)
      yield from _members(child, f"{prefix}{child.name}.")
    elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
      text = _prose(child)
      if text:
        yield _entry(f"{prefix}{child.name}({_arguments(child)})", text)


def _entry(head: str, text: str) -> str:
  return f"{head}\n\n{textwrap.indent(text, '   ')}"


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
  """The signature as the library reference prints it, if it is short."""
  names = ast.unparse(node.args).split(", ")
  if names[0] in ("self", "cls"):
    names = names[1:]
  text = ", ".join(names)
  return text if len(text) < 60 else "..."


def _prose(node: ast.AST) -> str:
  """The docstring of a node if it is mostly English, else ''."""
  return ast.get_docstring(node) or ""


def _unrepeated(texts: list[str]) -> Iterator[str]:
  """Drops paragraphs that came before, and what is left with little."""
  seen: set[str] = set()
  for text in texts:
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
      key = " ".join(paragraph.split())
      if len(key) < 60 or key not in seen:
        seen.add(key)
        kept.append(paragraph.rstrip())
    yield "\n\n".join(kept) + "\n"
