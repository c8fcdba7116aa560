"""The default corpus: enough prose, in one style, the same every time."""

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from jaxlm.data import corpus
from jaxlm.errors import UserError

ROOT = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def built() -> list[str]:
  return corpus.build(ROOT)


def test_enough_english(built: list[str]) -> None:
  """More than a million characters, mostly letters, with known sentences."""
  text = "".join(built)
  assert len(text) > 1_000_000
  assert len(built) > 200
  assert text.isascii()
  letters = sum(c.isalpha() or c == " " for c in text) / len(text)
  assert letters > 0.85
  assert "Assert statements are a convenient way to insert debugging" in text
  assert 'Serialize "obj" to a JSON formatted "str"' in text


def test_noise_is_gone(built: list[str]) -> None:
  text = "".join(built)
  for noise in (">>> ", "::=", "|===", "\t", "\n\n\n", "’"):
    assert noise not in text


def test_nothing_twice(built: list[str]) -> None:
  """No document twice, and little of any long paragraph."""
  assert len(set(built)) == len(built)
  long = [p for t in built for p in t.split("\n\n") if len(p) > 200]
  assert len(set(long)) > 0.98 * len(long)


def test_same_every_time(built: list[str]) -> None:
  """The order comes from names, not from the file system or a hash seed."""
  code = (
    "import hashlib, pathlib, sys\n"
    "from jaxlm.data import corpus\n"
    "text = repr(corpus.build(pathlib.Path(sys.argv[1])))\n"
    "print(hashlib.sha256(text.encode()).hexdigest())"
  )
  run = subprocess.run(
    [sys.executable, "-c", code, str(ROOT)],
    capture_output=True,
    text=True,
    check=True,
    env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])},
  )
  here = hashlib.sha256(repr(built).encode()).hexdigest()
  assert run.stdout.strip() == here


def test_cached(tmp_path: Path, monkeypatch, built: list[str]) -> None:
  """Built once; a damaged cache file is built again."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  calls = []
  monkeypatch.setattr(corpus, "build", lambda root: calls.append(root) or built)
  assert corpus.documents() == corpus.documents() == built
  assert calls == [ROOT]
  file = next(tmp_path.glob("jaxlm/corpus/*/documents.jsonl"))
  file.write_bytes(file.read_bytes()[:1000])
  assert corpus.documents() == corpus.documents() == built
  assert len(calls) == 2


def test_python_without_its_library(tmp_path: Path) -> None:
  with pytest.raises(UserError, match=r"too little documentation.*data\.path"):
    corpus.build(tmp_path)


def test_entries(tmp_path: Path) -> None:
  """One module by hand: public things in order, set as the help topics are."""
  (tmp_path / "shapes.py").write_text(
    '"""Shapes and what can be done with them."""\n'
    "class Circle:\n"
    '  """A round thing with a ``radius``."""\n'
    "  def area(self, unit: str = 'm'):\n"
    '    """Return the area of this circle.\n\n    >>> 1 + 1\n    2\n    """\n'
    "  def _hidden(self):\n"
    '    """Not for the eyes of others."""\n'
    "def draw(*things):\n"
    '  """A round thing with a ``radius``."""\n'
    "async def wait(seconds, /):\n"
    '  """Wait."""\n'
  )
  assert list(corpus._modules(tmp_path)) == [
    '"shapes"\n********\n\n'
    "Shapes and what can be done with them.\n\n"
    "class Circle\n\n"
    '   A round thing with a "radius".\n\n'
    "Circle.area(unit='m')\n\n"
    "   Return the area of this circle.\n"
  ]
