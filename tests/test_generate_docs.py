"""The examples of docs/generate.md run as they stand, in order."""

import re
from pathlib import Path

import jax

import jaxlm
from jaxlm.data.tokenizers import Bytes
from jaxlm.layers.param import init
from jaxlm.models.families import modern

PAGE = Path(__file__).parents[1] / "docs" / "generate.md"


def test_examples(tmp_path: Path, monkeypatch, capsys) -> None:
  """Each block in the page, sharing names, as a reader would try them."""
  monkeypatch.chdir(tmp_path)
  tokenizer = Bytes(["<|endoftext|>"])
  model = modern.decoder(tokenizer.vocab_size, 16, 1, 2, max_positions=64)
  params = init(model.params(), jax.random.key(0))
  jaxlm.save("runs/tiny", model, params, tokenizer)
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
  assert len(blocks) == 5
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  assert names["tokens"].shape == (2, 29)
  assert capsys.readouterr().out.startswith("A list is")


def test_every_flag_is_in_the_table() -> None:
  """And the table has no others."""
  from jaxlm.generate.__main__ import parser

  flags = {o for a in parser()._actions for o in a.option_strings}
  told = set(re.findall(r"`(--[a-z_-]+)", PAGE.read_text("utf-8")))
  assert told == flags - {"-h", "--help", "--workdir"}


def test_every_name_is_in_its_table() -> None:
  """Filters and methods as the program knows them, and no others."""
  from jaxlm.generate import methods, options
  from jaxlm.generate.samplers import Sample

  page = PAGE.read_text("utf-8")
  table = page[page.index("### Methods") : page.index("### Samplers")]
  told = re.findall(r"^\| `\"?([a-z_]+)", table, re.M)
  assert told == ["sample", "greedy", *told[2:]]
  assert told == list(methods.makers(None, Sample()))
  for written in re.findall(r"^\| `\"?([a-z][^`\"]*)", table, re.M):
    methods.parse_method(written, None, Sample())
  table = page[page.index("### Samplers") : page.index("### Conversations")]
  rows = re.findall(r"^\| (`.*?) \|", table, re.M)
  told = re.findall(r"`([a-z_]+)\(", " ".join(rows))
  assert told == list(options.makers())
