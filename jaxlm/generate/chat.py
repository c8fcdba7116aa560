"""Conversations with a model: a template around a `Writer`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxlm import keys
from jaxlm.data.chat import ChatTemplate, encode
from jaxlm.errors import UserError
from jaxlm.generate.text import Writer

COMMANDS = {
  "/help": "shows this",
  "/reset": "forgets all turns; the system prompt stays",
  "/system": "TEXT: another system prompt, without a TEXT none",
  "/undo": "forgets the last turn and its answer",
  "/save": "FILE: writes the conversation, as --prompts reads it",
}


@dataclass
class Chat:
  """A conversation, which grows with every turn.

  Attributes:
    writer: what answers; its `ends` end a turn.
    template: how a conversation is written.
    messages: what has been said, dicts of "role" and "content".
  """

  writer: Writer
  template: ChatTemplate
  messages: list[dict[str, str]] = field(default_factory=list)

  def reply(self, text: str) -> Iterator[str]:
    """The answer to what a user says, in pieces as they are made.

    A turn that was broken off counts as far as it came; one that could not be
    begun (`UserError`) is forgotten.
    """
    turn = {"role": "user", "content": text}
    ids = self._read([*self.messages, turn])
    following = self.writer.following(ids, len(self.messages))
    self.messages.append(turn)
    said: list[str] = []
    try:
      for piece in following:
        said.append(piece)
        yield piece
    finally:
      answer = "".join(said).strip()
      self.messages.append({"role": "assistant", "content": answer})

  def _read(self, messages: list[dict[str, str]]) -> np.ndarray:
    """Tokens of a conversation that leave room for an answer.

    With `truncate` the oldest turns are not read (but kept, for /save).

    Raises:
      UserError: if it is longer than the context, saying by how much.
    """
    writer = self.writer
    most = writer.model.max_positions
    room = max(most + 1 - writer.n, most // 2)
    ids = encode(self.template, writer.tokenizer, messages)
    limit = most if writer.method.streams else most + 1 - writer.n
    if len(ids) <= limit or writer.long == "slide":
      return ids
    if writer.method.cache.endless:
      return ids
    if writer.long == "truncate":
      while len(ids) > room and (shorter := _without_oldest(messages)):
        messages = shorter
        ids = encode(self.template, writer.tokenizer, messages)
      return ids
    raise UserError(
      f"the context is full: with this turn the conversation has {len(ids):,} "
      f"tokens, {len(ids) - limit:,} more than the {limit:,} there is room "
      "for; /reset begins anew, /undo takes a turn back, and of the flags "
      "--truncate leaves the oldest turns out and --slide lets the window slide"
    )

  # --- Commands -------------------------------------------------------------

  def command(self, line: str) -> str | None:
    """Obeys a line such as "/reset"; None if the line is no command.

    Raises:
      UserError: for a command that there is not, or that cannot be obeyed.
    """
    name, _, rest = line.strip().partition(" ")
    if not name.startswith("/"):
      return None
    if name not in COMMANDS:
      near = keys.nearest(name, COMMANDS) or "."
      raise UserError(f"unknown command {name}{near} /help shows all")
    if rest and name in ("/help", "/reset", "/undo"):
      raise UserError(f"{name} stands alone; leave {rest!r} out")
    return getattr(self, f"_{name[1:]}")(rest.strip())

  def system(self, text: str) -> None:
    """Changes what the model is told before all else; nothing if empty."""
    rest = [m for m in self.messages if m["role"] != "system"]
    first = [{"role": "system", "content": text}] if text else []
    self.messages[:] = first + rest

  def _help(self, _: str) -> str:
    return "\n".join(f"{name} {what}" for name, what in COMMANDS.items())

  def _reset(self, _: str) -> str:
    self.messages[:] = [m for m in self.messages if m["role"] == "system"]
    return "a new conversation"

  def _system(self, text: str) -> str:
    self.system(text)
    return "a new system prompt" if text else "no system prompt"

  def _undo(self, _: str) -> str:
    asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
    if not asked:
      raise UserError("there is no turn to undo")
    del self.messages[asked[-1] :]
    return "the last turn is forgotten"

  def _save(self, name: str) -> str:
    if not name:
      raise UserError("say where, as in /save talk.jsonl")
    line = json.dumps({"messages": self.messages}, ensure_ascii=False)
    try:
      Path(name).write_text(line + "\n", encoding="utf-8")
    except OSError as error:
      raise UserError(f"cannot write {name}: {error.strerror}") from error
    return f"{len(self.messages)} messages in {name}"


def _without_oldest(messages: list[dict[str, str]]) -> list[dict[str, str]]:
  """The conversation from its second question on; nothing if there is none."""
  first = [m for m in messages if m["role"] == "system"]
  asked = [i for i, m in enumerate(messages) if m["role"] == "user"]
  return first + messages[asked[1] :] if len(asked) > 1 else []
