"""The example of docs/sft.md runs as it stands, and prints what is shown."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "sft.md"


def test_example(tmp_path: Path, monkeypatch, capsys) -> None:
  """The block, and the picture under it."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  text = PAGE.read_text("utf-8")
  found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.S)
  exec(compile(found[1], str(PAGE), "exec"), {})
  assert capsys.readouterr().out == found[2]
