"""A model somebody published, with all it takes to talk to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm import workdir
from jaxlm.data.chat import ChatTemplate, turn_ends
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop import gguf
from jaxlm.models.decoder import Decoder

Tree = Any


@dataclass(frozen=True)
class Pretrained:
  """A model that can be talked to.

  Attributes:
    model, params: what answers.
    tokenizer: between text and tokens.
    template: how a conversation is written, or None if nothing says.
    ends: ids of the tokens that end a text or a turn.
    start: ids of the tokens that plain text begins with.
  """

  model: Decoder
  params: Tree
  tokenizer: Tokenizer
  template: ChatTemplate | None
  ends: tuple[int, ...]
  start: tuple[int, ...] = ()


def read(path: str | Path, dtype: str = "float32") -> Pretrained:
  """Reads a GGUF file, a Hugging Face directory, or a directory of ours.

  Args:
    path: the file or directory.
    dtype: of the parameters.

  Raises:
    UserError: if there is nothing, or nothing that can be read.
  """
  path = Path(path)
  if path.is_dir():
    return _read_directory(path, dtype)
  if not path.exists():
    raise UserError(
      f"there is no {path}; give a .gguf file or the directory of a model"
    )
  found = gguf.read(path, dtype)
  model, params = found.load()
  return Pretrained(
    model=model,
    params=params,
    tokenizer=found.tokenizer,
    template=found.template,
    ends=found.ends,
    start=(found.bos,) if found.add_bos and found.bos is not None else (),
  )


def _read_directory(path: Path, dtype: str) -> Pretrained:
  """Reads a directory: the model, the tokenizer, what is said beside them."""
  model, params = workdir.load(path, dtype)
  tokenizer = workdir.load_tokenizer(path)
  said = _json(path / "tokenizer_config.json")
  ends: list[int] = []
  for name in ("generation_config.json", "config.json"):
    given = _json(path / name).get("eos_token_id")
    ends += given if isinstance(given, list) else [given]
  ends += [tokenizer.eot, *turn_ends(tokenizer)]
  bos = _content(said.get("bos_token"))
  start = (tokenizer.specials.get(bos),) if said.get("add_bos_token") else ()
  return Pretrained(
    model=model,
    params=params,
    tokenizer=tokenizer,
    template=_template(path, said),
    ends=tuple(dict.fromkeys(i for i in ends if i is not None)),
    start=tuple(i for i in start if i is not None),
  )


def _template(path: Path, said: dict[str, Any]) -> ChatTemplate | None:
  """The chat template of a directory: a file, or in tokenizer_config.json."""
  file = path / "chat_template.jinja"
  source = said.get("chat_template")
  if isinstance(source, list):  # several, by name
    source = {x["name"]: x["template"] for x in source}.get("default")
  if file.exists():
    source = file.read_text(encoding="utf-8")
  if not source:
    return None
  bos, eos = _content(said.get("bos_token")), _content(said.get("eos_token"))
  return ChatTemplate(source, bos, eos)


def _content(token: Any) -> str:
  """The text of a token: a string, or a dict that describes it."""
  return (token.get("content") if isinstance(token, dict) else token) or ""


def _json(path: Path) -> dict[str, Any]:
  """A JSON file, or {} if there is none."""
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not JSON: {error}") from error
