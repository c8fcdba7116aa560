"""How conversations become tokens: a template, and a tokenizer to go with it.

A tokenizer is given, or it is made from the conversations with the special
tokens that the template names. Either way the run keeps the template beside it
and the tokens that end a turn, so that a model is asked as it was trained.
"""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm import keys
from jaxlm.data.chat import TEMPLATES, ChatTemplate
from jaxlm.data.dataset import tokenizer_for
from jaxlm.data.segments import encode_segments, segments
from jaxlm.data.tokenizer import EOT, TEMPLATE, Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop import beside
from jaxlm.objectives.talks import Talk

Encoded = tuple[np.ndarray, np.ndarray]  # ids [n], which are learned [n]

_TOKEN = re.compile(r"<\|\w+\|>")  # what a template means as a special token


@dataclass(frozen=True, eq=False)
class Writing:
  """How conversations become tokens.

  Attributes:
    template: how one is written.
    tokenizer: with the template beside it, so that the run can be talked to.
    start: tokens that every conversation begins with.
  """

  template: ChatTemplate
  tokenizer: Tokenizer
  start: tuple[int, ...] = ()

  def encode(self, part: Sequence[Talk]) -> list[Encoded]:
    """Token ids of conversations, and which of them are learned."""
    made = [segments(self.template, talk, self.tokenizer) for talk in part]
    start, read = np.int32(self.start), np.zeros(len(self.start), bool)
    return [
      (np.concatenate([start, ids]), np.concatenate([read, trained]))
      for ids, trained in encode_segments(made, self.tokenizer)
    ]


def writing(
  name: str, found: Sequence[Talk], tokenizer: str | Tokenizer, vocab: int
) -> Writing:
  """A template, and the tokenizer that is given or made to go with it.

  Args:
    name: of the template, as for `sft`.
    found: all conversations: a tokenizer that is made is made from these.
    tokenizer: as for `jaxlm.data.prepare`.
    vocab: tokens it may have, where it is trained.

  Raises:
    UserError: for a template that there is not, or that the tokenizer has not
      the special tokens for.
  """
  source = _source(name)
  names = tuple(dict.fromkeys(_TOKEN.findall(source or "")))
  texts = [] if isinstance(tokenizer, Tokenizer) else _texts(source, found)
  made = tokenizer_for(texts, tokenizer, vocab, (EOT, *names))
  missing = [name for name in names if name not in made.specials]
  if missing:
    raise UserError(
      f"the template {name} needs the special tokens {', '.join(missing)}, "
      "which this tokenizer has not; alpaca, plain and bare need none"
    )
  said = beside.said(made)
  own, ids = said.template, {i: n for n, i in made.specials.items()}
  source = source or (own.source if own else TEMPLATES["bare"])
  bos = own.bos if own else ids.get(said.bos, "")
  eos = own.eos if own and own.eos else ids.get(made.eot, "")
  start = said.start if source == TEMPLATES["bare"] else ()
  template = ChatTemplate(source, bos, eos)
  end = segments(template, found[0], made)[-1].text
  ends = list(dict.fromkeys([made.specials[end], *said.ends]))
  return Writing(template, _with_files(made, template, ends), start)


def _source(name: str) -> str | None:
  """The text of a template; None for the model's own."""
  if not name or name in TEMPLATES:
    return TEMPLATES.get(name)
  try:
    return Path(name).expanduser().read_text(encoding="utf-8")
  except OSError as error:
    hint = (
      keys.nearest(name, TEMPLATES) or f"; there are {', '.join(TEMPLATES)}"
    )
    raise UserError(f"no template {name!r}, nor such a file{hint}") from error


def _texts(source: str | None, found: Sequence[Talk]) -> list[str]:
  """What a tokenizer is made from: all that is said, and no special token."""
  template = ChatTemplate(source or TEMPLATES["bare"])
  return [
    _TOKEN.sub("", template.render(talk, add_generation_prompt=False))
    for talk in found
  ]


def _with_files(
  tokenizer: Tokenizer, template: ChatTemplate, ends: Sequence[int]
) -> Tokenizer:
  """The same tokenizer with what those need who talk to the run."""
  files = {beside.CONFIG: _json({"eos_token": template.eos})}
  files |= tokenizer.beside
  files[TEMPLATE] = template.source.encode("utf-8")
  said = json.loads(files.get(beside.GENERATION, b"{}"))
  files[beside.GENERATION] = _json(said | {"eos_token_id": list(ends)})
  made = copy.copy(tokenizer)
  made.beside = files
  return made


def _json(value: dict) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode("utf-8")
