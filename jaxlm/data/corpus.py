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
import shutil
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
_SKIP = {
  *("__phello__", "dist-packages", "distutils", "encodings", "ensurepip"),
  *("idlelib", "lib-dynload", "lib2to3", "pydoc_data", "site-packages"),
  *("test", "tests", "tkinter", "turtledemo"),
}

_ASCII = str.maketrans(
  {
    **{"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'},
    **{"\u2013": "-", "\u2014": "--", "\u2026": "...", "\u00a0": " "},
  }
)
_ROLE = re.compile(r":[a-z:]+:`~?([^`]+)`|``([^`\n]+)``|`([^`'\n]+)['`]")
_PROSE = re.compile(r"[A-Za-z ,.:'\"()_*\n-]")
_SESSION = re.compile(r">>>|::=")
_TABLE = re.compile(r"^\s*[|+][-=|+ ]|[|+]$", re.MULTILINE)


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
  shutil.rmtree(folder, ignore_errors=True)  # there only if it was damaged
  with whole_folder(folder) as temp:
    lines = "".join(json.dumps(text) + "\n" for text in built)
    (temp / file.name).write_text(lines, encoding="utf-8")
  return built


def build(root: Path) -> list[str]:
  """Builds the corpus from the standard library in the folder `root`."""
  built = [*_topics(root), *_modules(root)]
  if sum(map(len, built)) < _LEAST:
    raise UserError(
      f"the Python at {sys.executable} carries too little documentation in "
      f"{root} (its library sources seem to be missing); give a text with "
      "--config.data.path=FILE, or use a full CPython"
    )
  return built


# --- Help topics ------------------------------------------------------------


def _topics(root: Path) -> Iterator[str]:
  """The help topics, without the sections that several of them share.

  Chapters contain the topics that are their sections: so the longest come
  first, and what then has little of its own left is dropped.
  """
  seen: set[str] = set()
  for text in sorted(_all_topics(root), key=lambda t: (-len(t), t)):
    paragraphs = _paragraphs(text)
    fresh = [p for p in paragraphs if len(p) < 60 or p not in seen]
    seen.update(paragraphs)
    if sum(map(len, fresh)) > sum(map(len, paragraphs)) / 2:
      yield "\n\n".join(fresh) + "\n"


def _all_topics(root: Path) -> list[str]:
  """The values of the dict that pydoc_data/topics.py is."""
  file = root / "pydoc_data" / "topics.py"
  if not file.is_file():
    return []
  for node in ast.parse(file.read_bytes()).body:
    value = getattr(node, "value", None)
    if isinstance(value, ast.Dict):
      return list(ast.literal_eval(value).values())
  return []


# --- Docstrings -------------------------------------------------------------


def _modules(root: Path) -> Iterator[str]:
  """One document for every module that documents itself."""
  seen: set[str] = set()
  for file in sorted(root.rglob("*.py"), key=lambda f: f.as_posix()):
    path = file.relative_to(root)
    if _SKIP.intersection(path.parts) or any(map(_is_private, path.parts)):
      continue
    try:
      tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
      continue
    entries = list(_entries(tree, "", seen))
    if entries:
      title = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
      head = f'"{title}"\n{"*" * (len(title) + 2)}'
      yield "\n\n".join([head, *entries]) + "\n"


def _entries(
  node: ast.Module | ast.ClassDef, prefix: str, seen: set[str]
) -> Iterator[str]:
  """What a module or class says, then what its members say, in order.

  Args:
    node: the module or class.
    prefix: 'Class.' in front of the names of its members.
    seen: docstrings that came before; each is used once.
  """
  if isinstance(node, ast.Module):
    text = _docstring(node, seen)
    if text:
      yield text
  for child in node.body:
    head = _head(child, prefix)
    text = _docstring(child, seen) if head else ""
    if text:
      yield f"{head}\n\n{textwrap.indent(text, '   ')}"
    if head and isinstance(child, ast.ClassDef):
      yield from _entries(child, f"{prefix}{child.name}.", seen)


def _is_private(name: str) -> bool:
  """_name, but neither __name__ nor _pyio, where io's documentation is."""
  return name[0] == "_" and name[:2] != "__" and name != "_pyio.py"


def _head(node: ast.stmt, prefix: str) -> str:
  """'class Name' or 'name(arguments)', as the library reference has it."""
  if isinstance(node, ast.ClassDef):
    return "" if _is_private(node.name) else f"class {prefix}{node.name}"
  if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
    return ""
  if _is_private(node.name):
    return ""
  for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
    a.annotation = None
  arguments = ast.unparse(node.args)
  arguments = re.sub(r"^(self|cls|mcs|mcls)(, |$)(/, )?", "", arguments)
  head = f"{prefix}{node.name}({arguments})"
  return head if len(head) < 78 else f"{prefix}{node.name}(...)"


def _docstring(node: ast.AST, seen: set[str]) -> str:
  """The docstring of a node as prose; '' if it has none or came before."""
  text = ast.get_docstring(node) or ""
  text = "\n\n".join(_paragraphs(text))
  words = sum(word.isalpha() for word in text.split())
  if text in seen or words < 4:
    return ""
  seen.add(text)
  return text


# --- Text -------------------------------------------------------------------


def _paragraphs(text: str) -> list[str]:
  """The paragraphs that are prose or short code, in plain ASCII quotes."""
  text = text.translate(_ASCII).expandtabs()
  text = _ROLE.sub(lambda m: f'"{m[1] or m[2] or m[3]}"', text)
  lines = "\n".join(line.rstrip() for line in text.split("\n"))
  found = re.split(r"\n\n+", lines.strip("\n"))
  return [p for p in found if _is_readable(p)]


def _is_readable(paragraph: str) -> bool:
  """Not a table, a drawing, a dump of symbols or another script."""
  bare = paragraph.strip()
  if not bare.isascii() or any(x.search(bare) for x in (_TABLE, _SESSION)):
    return False
  if set(bare.split("\n")[-1]) <= set("*=-^~"):  # the title of a section
    return True
  return len(_PROSE.findall(bare)) > 0.85 * len(bare)
