"""Questions: prompts as tokens, with what is needed to judge the answers.

Those of step n are a function of (seed, n), so a continued run asks what it
would have asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generate.prompts import pad_left
from jaxlm.rl.rollout import Rollout
from jaxlm.tasks import Example

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Questions:
  """Prompts of one length of array, whatever is asked in a step.

  Attributes:
    examples: what is asked, and what is known of the answers.
    tokens: prompts, padded on the left, int32 [questions, seq].
    lengths: how many tokens each has, int32 [questions].
    skipped: how many were left out because they are too long.
  """

  examples: tuple[Example, ...]
  tokens: np.ndarray
  lengths: np.ndarray
  skipped: int = 0

  def __len__(self) -> int:
    return len(self.examples)

  def at(self, which: np.ndarray) -> "Questions":
    """Those of these numbers."""
    examples = tuple(self.examples[i] for i in which)
    return Questions(examples, self.tokens[which], self.lengths[which])

  def of_step(
    self, n: int, seed: int, step: int, again: int = 0
  ) -> "Questions":
    """`n` of them; `again` counts further draws within a step.

    None comes twice in a step's draw, unless there are fewer than `n`.
    """
    rng = np.random.default_rng((seed, step, again))
    return self.at(rng.choice(len(self), n, replace=n > len(self)))


def encoded(
  examples: Sequence[Example], encode: Encode, room: int
) -> Questions:
  """Questions of at most `room` tokens; longer ones are left out, and counted.

  Args:
    examples: what is asked.
    encode: from a prompt to tokens.
    room: what the context leaves for a prompt beside the response.

  Raises:
    UserError: if none fits, or a prompt has no token.
  """
  ids = [np.asarray(encode(e.prompt), np.int32) for e in examples]
  fits = [i for i, x in enumerate(ids) if len(x) <= room]
  if not fits:
    longest = min(map(len, ids), default=0)
    raise UserError(
      f"no prompt fits: the shortest of {len(ids)} has {longest} tokens, and "
      f"the context leaves {room} beside the response; raise seq_len, or "
      "allow fewer new tokens"
    )
  if any(len(ids[i]) == 0 for i in fits):
    raise UserError("a prompt has no tokens; there must be something to answer")
  tokens, lengths = pad_left([ids[i] for i in fits])
  chosen = tuple(examples[i] for i in fits)
  return Questions(chosen, tokens, lengths, len(ids) - len(fits))


def end_of(tokenizer: Tokenizer) -> int:
  """The token that ends a response.

  Raises:
    UserError: if there is none, so that no response could ever end.
  """
  if tokenizer.eot is None:
    raise UserError(
      "this tokenizer has no end of text, so a response could not end; train "
      "the model with one that has <|endoftext|> or </s> among its specials"
    )
  return tokenizer.eot


def texts(rollout: Rollout, tokenizer: Tokenizer, eos: int) -> list[str]:
  """The responses of a rollout, without what ended them."""
  tokens, starts = np.asarray(rollout.tokens), np.asarray(rollout.starts)
  ends = starts + np.asarray(rollout.mask).sum(1)
  found = []
  for row, start, end in zip(tokens, starts, ends, strict=True):
    said = row[start:end]
    # Embeddings may be padded beyond what the tokenizer knows.
    said = said[(said != eos) & (said < tokenizer.vocab_size)]
    found.append(tokenizer.decode(said))
  return found


def ended(rollout: Rollout, eos: int) -> np.ndarray:
  """Which responses came to their end, bool [rows]."""
  tokens, starts = np.asarray(rollout.tokens), np.asarray(rollout.starts)
  last = starts + np.asarray(rollout.mask).sum(1) - 1
  return tokens[np.arange(len(tokens)), last] == eos
