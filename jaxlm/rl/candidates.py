"""Candidates: several responses to each prompt, to choose among."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.rl.questions import Questions, encoded, end_of, texts
from jaxlm.rl.rollout import Draw, sample
from jaxlm.tasks import Example

Tree = Any


@dataclass(frozen=True, eq=False)
class Candidates:
  """What a model said to each of some prompts.

  Attributes:
    examples: what was asked; prompts that were too long are not here.
    texts: the responses to each, all as many.
    skipped: how many prompts were too long.
  """

  examples: tuple[Example, ...]
  texts: tuple[tuple[str, ...], ...]
  skipped: int = 0

  def judged(self, judge: Any) -> np.ndarray:
    """What a reward (`jaxlm.rl.rewards`) says of each, [prompts, samples]."""
    flat = [text for row in self.texts for text in row]
    whose = [
      e for e, r in zip(self.examples, self.texts, strict=True) for _ in r
    ]
    return np.array(judge(whose, flat)).reshape(len(self.texts), -1)

  def with_gold(self) -> "Candidates":
    """With the answer that is known to be right as the last of each."""
    pairs = zip(self.examples, self.texts, strict=True)
    return replace(self, texts=tuple((*r, e.response) for e, r in pairs))


def candidates(
  model: Decoder,
  params: Tree,
  tokenizer: Tokenizer,
  asked: Sequence[Example],
  n: int,
  new: int | None = None,
  temperature: float = 1.0,
  seed: int = 0,
  rows: int = 512,
) -> Candidates:
  """Samples `n` responses to each prompt.

  Args:
    model: what responds.
    params: its arrays.
    tokenizer: between text and tokens; it must have an end of text.
    asked: what is asked; prompts are given as they are.
    n: responses to each.
    new: the most tokens of one; None: twice the longest gold response and 8.
    temperature: of the sampling, above 0.
    seed: a response depends on it, on its prompt and on its number.
    rows: responses made at a time, about.

  Raises:
    UserError: if the model does not talk, no prompt fits, or no response could
      end.
  """
  if not isinstance(model, Decoder):
    raise UserError("this is no model that could answer prompts")
  golds = tokenizer.encode_many([e.response for e in asked])
  new = new or min(2 * max(map(len, golds)) + 8, model.max_positions // 2)
  eos = end_of(tokenizer)
  found = encoded(asked, tokenizer.encode, model.max_positions - new)
  draw = Draw(new, n, eos, temperature)
  each, said = max(1, rows // n), []
  for i in range(0, len(found), each):
    said += _some(model, params, tokenizer, found, i, each, draw, seed)
  told = tuple(tuple(said[i : i + n]) for i in range(0, len(said), n))
  return Candidates(found.examples, told[: len(found)], found.skipped)


def _some(
  model: Decoder,
  params: Tree,
  tokenizer: Tokenizer,
  found: Questions,
  first: int,
  each: int,
  draw: Draw,
  seed: int,
) -> list[str]:
  """Responses to `each` prompts from `first` on; the last ones come again."""
  which = np.minimum(np.arange(first, first + each), len(found) - 1)
  part, numbers = found.at(which), np.repeat(which, draw.samples)
  numbers = numbers * draw.samples + np.tile(np.arange(draw.samples), each)
  key = jax.random.key(seed)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
  rollout = sample(model, draw, params, part.tokens, part.lengths, keys)
  return texts(rollout, tokenizer, draw.eos)
