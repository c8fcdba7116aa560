"""The page on Hugging Face: its examples run, its lists are whole."""

import re
from pathlib import Path

from jaxlm.models import hub

PAGE = Path(__file__).parents[1] / "docs" / "hugging-face.md"


def test_examples(tmp_path: Path, monkeypatch, capsys) -> None:
  """Each block in the page, sharing names, as a reader would try them."""
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
  assert len(blocks) == 3
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  assert capsys.readouterr().out.startswith("(1, ")
  assert names["params"]["norm"]["scale"].dtype == "bfloat16"


def test_every_model_type_is_told() -> None:
  """Those that are read, and no others."""
  text = PAGE.read_text("utf-8").split("`model_type`s:")[1].split("[A new")[0]
  assert set(re.findall(r"`(\w+)`", text)) == {h.type for h in hub.hubs()}
