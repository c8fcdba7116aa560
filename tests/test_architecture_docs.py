"""The examples of docs/architecture.md run as they stand, in order."""

import re
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def test_examples(capsys) -> None:
  """Each block in the page, sharing names; what it prints is what it says."""
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
  assert len(blocks) == 5
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  printed = capsys.readouterr().out
  for line in "\n".join(blocks).splitlines():
    said = re.search(r"^print\(.*\)  # (.*)$", line)
    if said and re.match(r"[(\[\dTPMS']", said[1]):
      text = re.split(r": |, \.\.\.", said[1])[0]
      assert text in printed, line
  assert np.asarray(names["metrics"]["loss"])[-1] < 2.0
