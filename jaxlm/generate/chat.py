"""Conversations with a model: a template around a `Writer`."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxlm.data.chat import ChatTemplate, encode
from jaxlm.generate.text import Writer


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
    tokenizer = self.writer.tokenizer
    ids = encode(self.template, tokenizer, [*self.messages, turn])
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
