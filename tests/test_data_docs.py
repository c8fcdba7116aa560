"""The examples of docs/data.md run as they stand, in order."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "data.md"


def test_examples(tmp_path: Path, monkeypatch, capsys) -> None:
  """Each block in the page, sharing names, as a reader would try them."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
  assert len(blocks) == 4
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  printed = capsys.readouterr().out
  assert "(12, 64)\n899.0\nThe lazy 🦊!\n4096" in printed
