"""A model somebody published, with all it takes to talk to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.data.chat import ChatTemplate
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop import beside, load
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
    UserError: if there is nothing, or nothing that can be read, or a model
      without a tokenizer.
  """
  model, params, tokenizer = load.load_all(path, dtype)
  check_talks(model, path)
  if tokenizer is None:
    raise UserError(
      f"no tokenizer.json or tokenizer.model in {path}, so it cannot be talked "
      "to; jaxlm.load reads the model alone"
    )
  said = beside.said(tokenizer)
  return Pretrained(
    model, params, tokenizer, said.template, said.ends, said.start
  )


def check_talks(model: Any, path: str | Path) -> None:
  """Raises UserError for what has been trained to do something else."""
  if not isinstance(model, Decoder):
    raise UserError(
      f"{path} holds a {type(model).__name__}, which does not write text; "
      "jaxlm.load reads it"
    )
