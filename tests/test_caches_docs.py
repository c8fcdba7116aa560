"""The examples of docs/caches.md run as they stand, in order."""

import re
from pathlib import Path

from jaxlm.layers.cache import Full, Quantised, Ring, n_bytes
from jaxlm.models.families import deepseek, gemma3, llama

PAGE = Path(__file__).parents[1] / "docs" / "caches.md"


def test_examples(capsys) -> None:
  """Each block in the page, sharing names; what it prints is what it says."""
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
  assert len(blocks) == 5
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  out = capsys.readouterr().out
  assert "(8, 6) 2" in out
  assert re.search(r"llama3-8b +131,200 bytes a token", out)
  assert names["number"] == 199
  assert names["out"][:, :3].tolist() == [[1, 2, 3], [0, 0, 4]]


def test_the_table_of_bytes() -> None:
  """Recomputed from the declarations, for three kinds of attention."""
  page = PAGE.read_text("utf-8")
  rows = {
    "Llama 3 8B": llama.PUBLISHED["llama3-8b"],
    "Gemma 3 27B": gemma3.PUBLISHED["gemma3-27b"],
    "DeepSeek V3": deepseek.PUBLISHED["deepseek-v3"],
  }
  long = 2**17
  for name, model in rows.items():
    told = next(r for r in page.splitlines() if r.startswith(f"| {name}"))
    cells = [cell.strip() for cell in told.split("|")[2:]]
    each, whole = [], []
    for kind in (Full(), Quantised()):
      one, two = (
        n_bytes(model.cache(1, n, kind), "bfloat16") for n in (long, 2 * long)
      )
      each.append(f"{(two - one) // long:,}")
      whole.append(f"{one / 2**30:.1f}")
    ring = n_bytes(model.cache(1, 1, Ring(1020, 4)), "bfloat16") / 2**20
    assert cells[:5] == [*each, *whole, f"{ring:.0f}"]
