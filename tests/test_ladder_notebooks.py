"""The ladder's notebooks run as they are and solved, and equal their text."""

import ast
from pathlib import Path

import pytest

from jaxlm.ladder.exercise import check

COLAB = Path(__file__).parent.parent / "colab"
TEXTS = sorted(COLAB.glob("ladder_*.py"))

texts = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)


def cells(path: Path) -> list:
  """The cells of a notebook or of its text."""
  import jupytext

  return jupytext.read(path).cells


def solutions(text: Path) -> dict[str, str]:
  """The functions of the solutions, by name; '' holds their imports."""
  source = (text.parent / "solutions" / text.name).read_text("utf-8")
  found = {"": ""}
  for node in ast.parse(source).body:
    piece = ast.get_source_segment(source, node)
    if isinstance(node, ast.FunctionDef):
      found[node.name] = piece
    else:
      found[""] += piece + "\n"
  return found


def code(text: Path, answers: dict[str, str]) -> str:
  """The notebook as one program, the given functions in place of its own."""
  pieces = []
  for cell in cells(text):
    if cell.cell_type == "code":
      name = cell.source.removeprefix("def ").split("(")[0]
      pieces.append(answers.get(name, cell.source))
  return "\n\n".join([answers.get("", ""), *pieces])


def run(text: Path, answers: dict[str, str]) -> None:
  exec(compile(code(text, answers), str(text), "exec"), {"__name__": "nb"})


@texts
def test_a_notebook_equals_its_text(text):
  """Diffs are read in the text; a stale notebook would hide them."""
  notebook = [c.source for c in cells(text.with_suffix(".ipynb"))]
  assert notebook == [c.source for c in cells(text)], (
    f"run: jupytext --to ipynb colab/{text.name}"
  )


@texts
def test_a_notebook_runs_unsolved(text, tmp_path, monkeypatch, capsys):
  """A reader may run all cells first; every exercise says it is to do."""
  monkeypatch.chdir(tmp_path)
  run(text, {})
  said = capsys.readouterr().out
  assert said.count("still to do") == len(solutions(text)) - 1


@texts
def test_a_notebook_runs_solved(text, tmp_path, monkeypatch, capsys):
  """Each solution passes the check that stands in the notebook."""
  monkeypatch.chdir(tmp_path)
  answers = solutions(text)
  run(text, answers)
  said = capsys.readouterr().out
  names = [name for name in answers if name]
  assert [name for name in names if f"{name}: right" not in said] == []
  assert "still to do" not in said


def test_a_wrong_answer_is_told():
  """The check can fail: a value, a shape, and an answer not given."""
  with pytest.raises(AssertionError, match="should be 4, and is 3"):
    check(lambda x: x + 1, [((1,), 2), ((2,), 4)])
  with pytest.raises(AssertionError, match="should be"):
    check(lambda: [1.0], [((), 1.0)])
  assert not check(lambda: None, [((), 1.0)])
  assert check(lambda: 1.0, [((), 1.0)])
