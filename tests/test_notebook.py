"""The notebook runs from start to end, and equals its text twin."""

from pathlib import Path

import pytest

COLAB = Path(__file__).parent.parent / "colab"


def test_the_notebook_equals_its_text():
  """Diffs are read in the text; a stale notebook would hide them."""
  import jupytext

  notebook = jupytext.read(COLAB / "quickstart.ipynb")
  text = jupytext.read(COLAB / "quickstart.py")
  cells = [[c.source for c in n.cells] for n in (notebook, text)]
  assert cells[0] == cells[1], "run: jupytext --to ipynb colab/quickstart.py"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
  """A newcomer's first ten minutes, in four steps."""
  import jupytext
  from nbclient import NotebookClient

  monkeypatch.setenv("QUICKSTART_STEPS", "4")
  monkeypatch.setenv("QUICKSTART_DIR", str(tmp_path / "run"))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  notebook = jupytext.read(COLAB / "quickstart.py")
  NotebookClient(
    notebook,
    timeout=600,
    kernel_name="python3",
    resources={"metadata": {"path": str(COLAB)}},
  ).execute()
  assert (tmp_path / "run" / "loss.png").exists()
