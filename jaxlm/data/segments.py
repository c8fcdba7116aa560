"""Conversations in segments: what is read, what is learned, where they meet.

A model learns the responses of a conversation and only reads the rest, so the
place where a response begins has to be known in tokens. Encoding the whole and
encoding the prompt does not tell: merges may cross the border. Here every
segment is encoded alone, as it will be when the model answers, and the border
is exact whatever the tokenizer merges:

    template = ChatTemplate(ALPACA, eos="<|endoftext|>")
    talk = [{"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"}]
    for segment in segments(template, talk, tokenizer):
      print(segment)

A template is rendered once for each sequence of roles, with a private character
in the place of every message. So nothing that a message says can become a
special token, and each example costs one rendering, which proves that the
pieces put together are the text that the template gives.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.data.chat import ChatTemplate, Message
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError

_FIRST = 0xF0000  # of the private characters that stand for messages


@dataclass(frozen=True)
class Segment:
  """A stretch of a conversation that is encoded alone.

  Attributes:
    text: what it says; of a special token the name.
    special: whether it is a special token.
    trained: whether it is learned, or only read.
  """

  text: str
  special: bool = False
  trained: bool = False


def segments(
  template: ChatTemplate, messages: Sequence[Message], tokenizer: Tokenizer
) -> list[Segment]:
  """A conversation up to the end of its last response.

  A response begins where the prompt for it ends, as `ChatTemplate.render` gives
  that, and ends with the special token that the template writes behind it; if
  there is none behind the last response, the end-of-text token is put there.

  Args:
    template: how a conversation is written.
    messages: dicts of "role" and "content"; those of the assistant are learned.
    tokenizer: has the special tokens.

  Raises:
    UserError: for a conversation that the template refuses or changes, without
      a response, or a tokenizer without an end-of-text token where it is
      needed.
  """
  contents = [_content(message) for message in messages]
  frame = _frame(
    template,
    tuple(message["role"] for message in messages),
    tuple(tokenizer.specials),
  )
  text = template.render(messages, add_generation_prompt=False)
  whole = "".join(piece for piece, _, _ in frame.pieces)
  if _filled(whole, contents) != text:
    contents = [content.strip() for content in contents]
    if _filled(whole, contents) != text:
      raise UserError(
        "the chat template changes what messages say, so what is to be learned "
        "is unclear; choose another template"
      )
  made = [
    Segment(_filled(piece, contents), special, trained)
    for piece, special, trained in frame.pieces[: frame.used]
    if piece
  ]
  return made if frame.ended else [*made, _end(tokenizer)]


def encode_segments(
  talks: Sequence[Sequence[Segment]], tokenizer: Tokenizer
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Token ids int32 [n] of every conversation, and which are learned, bool [n].

  Raises:
    UserError: for text that the tokenizer cannot express.
  """
  texts = [s.text for talk in talks for s in talk if not s.special]
  encoded = iter(tokenizer.encode_many(texts))
  return [_joined(talk, encoded, tokenizer) for talk in talks]


def _joined(talk, encoded, tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """One conversation, its texts taken from an iterator."""
  parts = [
    np.array([tokenizer.specials[s.text]], np.int32)
    if s.special
    else next(encoded)
    for s in talk
  ]
  trained = [
    np.full(len(p), s.trained) for p, s in zip(parts, talk, strict=True)
  ]
  return np.concatenate(parts), np.concatenate(trained)


def end_name(tokenizer: Tokenizer) -> str:
  """The name of the end-of-text token.

  Raises:
    UserError: if there is none.
  """
  names = {i: name for name, i in tokenizer.specials.items()}
  if tokenizer.eot is None:
    raise UserError(
      "the tokenizer has no end-of-text token, so a model could not learn "
      "where a response ends; use a tokenizer that has one"
    )
  return names[tokenizer.eot]


def _end(tokenizer: Tokenizer) -> Segment:
  return Segment(end_name(tokenizer), special=True, trained=True)


def _content(message: Message) -> str:
  content = message.get("content")
  if not isinstance(content, str):
    raise UserError(f"the content of a message is {content!r} and not a text")
  return content


# --- Frames -----------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
  """A rendered template with private characters for the messages.

  Attributes:
    pieces: (text, whether it is a special token, whether it is learned).
    used: how many of them lead up to the end of the last response.
    ended: whether a special token stands there.
  """

  pieces: tuple[tuple[str, bool, bool], ...]
  used: int
  ended: bool


def _filled(text: str, contents: Sequence[str]) -> str:
  """Text with the messages in their places."""
  names = {_FIRST + i: content for i, content in enumerate(contents)}
  return text.translate(names)


@functools.lru_cache(maxsize=256)
def _frame(
  template: ChatTemplate, roles: tuple[str, ...], names: tuple[str, ...]
) -> _Frame:
  """What the template writes around messages of these roles."""
  marks = [chr(_FIRST + i) for i in range(len(roles))]
  talk = [
    {"role": role, "content": mark}
    for role, mark in zip(roles, marks, strict=True)
  ]
  text = template.render(talk, add_generation_prompt=False)
  if any(text.count(mark) != 1 for mark in marks):
    raise UserError(
      "the chat template does not write every message once, so what is to be "
      "learned is unclear; choose another template"
    )
  special = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
  special = re.compile(f"({special})" if special else "((?!))")
  pieces, at, ended = [], 0, True
  for i in (i for i, role in enumerate(roles) if role == "assistant"):
    prompt = template.render(talk[:i]) if i else ""
    mark = text.index(marks[i])
    begin = len(prompt) if text.startswith(prompt) else mark
    end = re.compile(rf"\s*{special.pattern}").match(text, mark + 1)
    ended = end is not None
    stop = end.end() if end else mark + 1
    pieces += _pieces(special, text[at:begin], False)
    pieces += _pieces(special, text[begin:stop], True)
    at = stop
  used = len(pieces)
  if not used:
    raise UserError("the conversation has no response of the assistant")
  pieces += _pieces(special, text[at:], False)
  return _Frame(tuple(pieces), used, ended)


def _pieces(special: re.Pattern, text: str, trained: bool):
  """Text with its special tokens apart."""
  for i, piece in enumerate(special.split(text)):
    yield piece, i % 2 == 1, trained
