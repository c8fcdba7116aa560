"""What is published beside a tokenizer: small files that travel with it.

Special tokens, the chat template and the defaults of generation are files of
the hub which only few programs need, but every copy of a model should have.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxlm.data.chat import ChatTemplate, turn_ends
from jaxlm.data.tokenizer import TEMPLATE, Tokenizer
from jaxlm.data.tokenizers import ByteBPE
from jaxlm.errors import UserError

CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"

Files = dict[str, bytes]


@dataclass(frozen=True)
class Said:
  """What the files beside a tokenizer say.

  Attributes:
    template: how a conversation is written, or None.
    bos: id of the token that begins a text, or None.
    ends: ids of the tokens that end a text or a turn, the usual one first.
    start: ids of the tokens that plain text begins with.
  """

  template: ChatTemplate | None
  bos: int | None
  ends: tuple[int, ...]
  start: tuple[int, ...]


def said(tokenizer: Tokenizer) -> Said:
  """What is known of a tokenizer's begins and ends.

  Raises:
    UserError: if one of its files is not JSON.
  """
  files = tokenizer.beside
  config, generation = _json(files, CONFIG), _json(files, GENERATION)
  ends = generation.get("eos_token_id")
  ends = list(ends) if isinstance(ends, list) else [ends]
  bos, eos = _text(config.get("bos_token")), _text(config.get("eos_token"))
  ends += [tokenizer.specials.get(eos), tokenizer.eot, *turn_ends(tokenizer)]
  start = tokenizer.start
  if config.get("add_bos_token") and not start:
    start = (tokenizer.specials.get(bos),)
  source = config.get("chat_template")
  if isinstance(source, list):  # several, by name
    source = {x["name"]: x["template"] for x in source}.get("default")
  if TEMPLATE in files:
    source = files[TEMPLATE].decode("utf-8")
  return Said(
    template=ChatTemplate(source, bos, eos) if source else None,
    bos=tokenizer.specials.get(bos),
    ends=tuple(dict.fromkeys(i for i in ends if i is not None)),
    start=tuple(i for i in start if i is not None),
  )


def with_config(tokenizer: Tokenizer, config: Mapping[str, Any]) -> Tokenizer:
  """A tokenizer that knows the end which only config.json names."""
  end = config.get("eos_token_id")
  if end is not None and GENERATION not in tokenizer.beside:
    more = {GENERATION: _text_of({"eos_token_id": end})}
    tokenizer.beside = dict(tokenizer.beside) | more
  return tokenizer


def made(tokenizer: Tokenizer) -> Files:
  """Those files of a tokenizer that was made here, as far as they say more."""
  names = {i: name for name, i in tokenizer.specials.items()}
  if tokenizer.eot is None:
    return {}
  files = {GENERATION: _text_of({"eos_token_id": tokenizer.eot})}
  if isinstance(tokenizer, ByteBPE):
    files[CONFIG] = _text_of(
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names[tokenizer.eot],
      }
    )
  return files


def of_gguf(found: Any) -> Files:
  """Those files by what a GGUF file (`gguf.Gguf`) says."""
  names = {i: name for name, i in found.tokenizer.specials.items()}
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": bool(found.add_bos),
    "bos_token": names.get(found.bos),
    "eos_token": names.get(found.ends[0]) if found.ends else None,
  }
  known = {k: v for k, v in config.items() if v is not None}
  files = {CONFIG: _text_of(known)}
  if found.ends:
    files[GENERATION] = _text_of({"eos_token_id": list(found.ends)})
  if found.template is not None:
    files[TEMPLATE] = found.template.source.encode("utf-8")
  return files


def _text(token: Any) -> str:
  """The text of a token: a string, or a dict that describes it."""
  return (token.get("content") if isinstance(token, dict) else token) or ""


def _text_of(value: Any) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode("utf-8")


def _json(files: Files, name: str) -> dict[str, Any]:
  """A JSON file, {} if it is not there."""
  try:
    return json.loads(files.get(name, b"{}"))
  except ValueError as error:
    raise UserError(f"{name} is not JSON: {error}") from error
