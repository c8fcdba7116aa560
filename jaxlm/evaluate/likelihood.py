"""How likely a model finds a text: sums of log-probabilities, exactly.

A text longer than the context is read in windows: every token is predicted
once, and the last window reaches back as far as it can, so that no token has
less before it than it must.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.layers.compute import Compute
from jaxlm.losses import cross_entropy
from jaxlm.models.decoder import Decoder, hidden, logits

Tree = Any
Pair = tuple[Sequence[int], Sequence[int]]

# Lengths are rounded up to multiples of this, so that few programs are
# compiled; logits of so many positions are held at a time.
_STEP = 32


@dataclass(frozen=True)
class Likelihood:
  """What a model thinks of tokens that follow others.

  Attributes:
    logprob: the sum of their log-probabilities, in nats.
    greedy: whether each is the likeliest at its place.
    tokens: how many there are.
  """

  logprob: float
  greedy: bool
  tokens: int


@dataclass(frozen=True, eq=False)
class Judge:
  """A model that judges texts.

  Attributes:
    model, params: what judges.
    tokenizer: between text and tokens.
    start: tokens that every text begins with.
    compute: how the model is run.
    size: rows of a batch.
  """

  model: Decoder
  params: Tree
  tokenizer: Tokenizer
  start: tuple[int, ...] = ()
  compute: Compute = Compute()
  size: int = 16

  def following(self, pairs: Sequence[Pair]) -> list[Likelihood]:
    """How likely the second of each pair of tokens follows the first.

    Rows of like lengths are judged together; of a pair that is longer than
    the context, the beginning is left out.

    Raises:
      UserError: if the first of a pair is empty, or the second alone is longer
        than the context.
    """
    most = self.model.max_positions
    rows = [self._row(before, after, most) for before, after in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    found: dict[int, Likelihood] = {}
    for first in range(0, len(order), self.size):
      batch = order[first : first + self.size]
      told = self._judge([rows[i] for i in batch], most)
      found |= dict(zip(batch, told, strict=True))
    return [found[i] for i in range(len(rows))]

  def _row(
    self, before: Sequence[int], after: Sequence[int], most: int
  ) -> tuple[np.ndarray, int]:
    """Tokens of a row, and how many of the last are judged."""
    if not len(before):
      raise UserError("tokens that follow nothing have no probability")
    if len(after) > most:
      raise UserError(
        f"{len(after):,} tokens to judge at once are more than the context of "
        f"{most:,}"
      )
    ids = np.array([*before, *after], np.int32)
    # The last token is not read, only predicted.
    return ids[max(len(ids) - most - 1, 0) :], len(after)

  def _judge(
    self, rows: Sequence[tuple[np.ndarray, int]], most: int
  ) -> list[Likelihood]:
    longest = max(len(ids) for ids, _ in rows) - 1
    width = min(-(-max(longest, 1) // _STEP) * _STEP, most)
    # Always as many rows: another number would be compiled anew.
    tokens = np.zeros((self.size, width + 1), np.int32)
    judged = np.zeros((self.size, width), bool)
    for i, (ids, n) in enumerate(rows):
      tokens[i, : len(ids)] = ids
      judged[i, len(ids) - 1 - n : len(ids) - 1] = True
    loss, best = _losses(self.model, self.compute, self.params, tokens)
    loss = np.where(judged, np.asarray(loss, np.float64), 0.0)
    right = (np.asarray(best) == tokens[:, 1:]) | ~judged
    return [
      Likelihood(-float(loss[i].sum()), bool(right[i].all()), n)
      for i, (_, n) in enumerate(rows)
    ]

  def text(self, text: str) -> Likelihood:
    """How likely a whole text is, whatever its length."""
    return self.texts([text])[0]

  def texts(self, texts: Sequence[str]) -> list[Likelihood]:
    """The same of several texts, each on its own."""
    encoded = self.tokenizer.encode_many(list(texts))
    prefix = self.prefix()
    most = self.model.max_positions
    pairs = [windows([*prefix, *ids], len(prefix), most) for ids in encoded]
    flat = iter(self.following([pair for some in pairs for pair in some]))
    return [_together([next(flat) for _ in some]) for some in pairs]

  def prefix(self) -> list[int]:
    """What stands before the first token of a text, so that it can be judged.

    Raises:
      UserError: if the tokenizer has no token that could.
    """
    eot = self.tokenizer.eot
    if not self.start and eot is None:
      raise UserError(
        "this tokenizer has neither a beginning nor an end of text, so nothing "
        "stands before a text and its first token has no probability"
      )
    return [*self.start] if self.start else [eot]


def windows(ids: Sequence[int], given: int, most: int) -> list[Pair]:
  """Cuts tokens into pairs of what is read and what is judged.

  >>> [(list(a), list(b)) for a, b in windows(range(7), 1, 4)]
  [([0], [1, 2, 3, 4]), ([2, 3, 4], [5, 6])]

  Args:
    ids: tokens; more than `given`, or there is nothing to judge.
    given: how many of the first are not judged.
    most: positions of the model. A pair has one token more, since its last is
      not read.
  """
  found, at = [], given
  while at < len(ids):
    n = min(most + 1 - given if at == given else most, len(ids) - at)
    start = max(at + n - most - 1, 0)
    found.append((ids[start:at], ids[at : at + n]))
    at += n
  return found


def perplexity(found: Likelihood, text: str) -> dict[str, float]:
  """What is said of a text's likelihood, in the usual units.

  Returns:
    `loss` in nats per token, `perplexity` = e^loss, `bits_per_byte`, which
    compares models of different tokenizers, `tokens` and `bytes`.

  Raises:
    UserError: for an empty text.
  """
  size = len(text.encode())
  if not size or not found.tokens:
    raise UserError("the text is empty, and has no perplexity")
  loss = -found.logprob / found.tokens
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "bits_per_byte": -found.logprob / math.log(2) / size,
    "tokens": found.tokens,
    "bytes": size,
  }


def _together(parts: Sequence[Likelihood]) -> Likelihood:
  return Likelihood(
    sum(part.logprob for part in parts),
    all(part.greedy for part in parts),
    sum(part.tokens for part in parts),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(
  model: Decoder, compute: Compute, params: Tree, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Loss of every token after the first, and the likeliest instead of it.

  Logits are made for a few positions at a time, and never all of them.
  """
  x, _ = hidden(model, params, tokens[:, :-1], compute=compute)
  parts = [_parted(y) for y in (x, tokens[:, 1:])]

  def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    h, targets = part
    y = logits(model, params, h, compute)
    return cross_entropy(y, targets)[0], jnp.argmax(y, axis=-1)

  seq = x.shape[1]
  found = jax.lax.map(one, tuple(parts))
  loss, best = (jnp.moveaxis(y, 0, 1) for y in found)
  rows = len(tokens)
  return loss.reshape(rows, -1)[:, :seq], best.reshape(rows, -1)[:, :seq]


def _parted(x: jax.Array) -> jax.Array:
  """[rows, seq, ...] to [parts, rows, some, ...], padded at the end."""
  n = -(-x.shape[1] // _STEP)
  x = jnp.pad(
    x, ((0, 0), (0, n * _STEP - x.shape[1]), *[(0, 0)] * (x.ndim - 2))
  )
  return jnp.moveaxis(x.reshape(len(x), n, _STEP, *x.shape[2:]), 1, 0)
