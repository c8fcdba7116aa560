"""One command climbs the whole ladder."""

import ast
from pathlib import Path

import pytest

from jaxlm.ladder import __main__ as ladder

FOLDER = Path(ladder.__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "ladder.md"


def programs() -> set[str]:
  """Files of the ladder that run as programs."""
  return {
    path.stem
    for path in FOLDER.glob("*.py")
    if path.stem != "__main__" and "__main__" in path.read_text("utf-8")
  }


def test_every_rung_is_climbed_and_told():
  """The command knows each program, and the page shows how to run it."""
  assert programs() == set(ladder.RUNGS)
  page = PAGE.read_text("utf-8")
  assert [n for n in ladder.RUNGS if f"jaxlm.ladder.{n}" not in page] == []


def test_every_rung_says_what_it_could_not_do():
  """The reason for the next one."""
  for name in ladder.RUNGS:
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    assert "What it could not do" in ast.get_docstring(ast.parse(text)).replace(
      "What they could", "What it could"
    ), name


@pytest.mark.slow
def test_one_command_makes_every_plot(tmp_path, capsys):
  """Each rung leaves its picture."""
  pytest.importorskip("sklearn")
  ladder.main([f"--out={tmp_path}", "--quick"])
  made = {path.stem for path in tmp_path.glob("*.png")}
  assert made == set(ladder.RUNGS) - {"einsum_grad", "quiz"}
