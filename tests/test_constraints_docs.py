"""The examples of docs/constraints.md run as they stand, in order."""

import json
import re
from pathlib import Path

import jax

import jaxlm
from jaxlm.data.tokenizers import Bytes
from jaxlm.layers.param import init
from jaxlm.models.families import modern

PAGE = Path(__file__).parents[1] / "docs" / "constraints.md"


def test_examples(capsys) -> None:
  """Each block, sharing names; what is printed is what the schema asks for."""
  tokenizer = Bytes(["<|endoftext|>"])
  model = modern.decoder(tokenizer.vocab_size, 16, 1, 2, max_positions=128)
  params = init(model.params(), jax.random.key(0))
  names = {"jaxlm": jaxlm, "model": model, "params": params}
  names["tokenizer"] = tokenizer
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
  assert len(blocks) == 3
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  assert '"name": ' in capsys.readouterr().out.replace("'", '"')
  assert json.loads(json.dumps(names["schema"])) == names["schema"]
