"""Supervised fine-tuning: the responses of conversations, and nothing else.

The loss is that of the next token over the tokens that the assistant wrote, the
one that ends a response included. What came before is read and not learned.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import data, keys
from jaxlm.data.examples import (
  Examples,
  ExampleWindows,
  example_batches,
  join,
  lay,
)
from jaxlm.data.orders import ORDERS, Competence, Order
from jaxlm.data.tokenizer import Tokenizer, utf8
from jaxlm.errors import UserError
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder
from jaxlm.objectives.likelihood import next_token
from jaxlm.objectives.objective import Objective
from jaxlm.objectives.talks import talks
from jaxlm.objectives.writing import Encoded, writing


def sft(
  seq_len: int,
  chunk: int = 0,
  template: str = "",
  order: str = "random",
  competence: float = 0.5,
  packed: bool = True,
  examples: int = 5000,
) -> Objective:
  """The responses of conversations, given what came before each.

  Args:
    seq_len: tokens in a row; `config.seq_len`.
    chunk: positions whose logits are held at a time; `config.loss_chunk`.
    template: how a conversation is written: a name of `TEMPLATES`, a file, or
      '', the model's own (without one: 'bare').
    order: 'random', 'short_to_long' or 'competence'.
    competence: share of the run after which that has seen every example.
    packed: several examples in a row, where they fit.
    examples: how many are made of a generated task.
  """
  if order not in ORDERS:
    hint = keys.nearest(order, ORDERS) or f"; use {', '.join(ORDERS)}"
    raise UserError(f"no order {order!r} of examples{hint}")
  kind = ORDERS[order]
  made = kind(until=competence) if kind is Competence else kind()
  return Objective(
    Conversations(template, made, packed, examples, seq_len), Responses(chunk)
  )


@dataclass(frozen=True)
class Corpus:
  """Encoded conversations; see `objective.Corpus`."""

  tokenizer: Tokenizer
  train: Examples
  val: Examples
  counts: dict[str, int | float]
  skipped: tuple[tuple[str, int], ...]

  def describe(self) -> str:
    """How many there are, and what was left out."""
    c = self.counts
    text = (
      f"{len(self.train):,} training and {len(self.val):,} validation "
      f"examples; {c['train_tokens']:,} training tokens of {c['vocab']:,} "
      f"kinds, {c['learned']:,} of them learned"
    )
    if not self.skipped:
      return text
    told = ", ".join(f"{n:,} with {reason}" for reason, n in self.skipped)
    return f"{text}; left out: {told}"


@dataclass(frozen=True)
class Conversations:
  """Conversations from files or a task, encoded by a template.

  Attributes:
    template: as for `sft`.
    order: which come when.
    packed: as for `sft`.
    examples: as for `sft`.
    seq_len: of a row; what is longer is left out.
  """

  template: str
  order: Order
  packed: bool
  examples: int
  seq_len: int

  sequences = 1

  def read(
    self,
    path: Any,
    tokenizer: str | Tokenizer,
    vocab: int,
    val_fraction: float,
    text_key: str = "text",
    weights: Sequence[float] | None = None,
  ) -> Corpus:
    """Reads, encodes, and leaves out what cannot be learned.

    Raises:
      UserError: if nothing is left, or as `talks` and `segments`.
    """
    if weights:
      raise UserError(
        "data.weights mixes plain text; give conversations as one path"
      )
    found, held, skipped = talks(path, self.examples, val_fraction)
    made = writing(self.template, [*found, *held], tokenizer, vocab)
    count = Counter(skipped)
    train, val = (
      join(_fitting(made.encode(part), self.seq_len, count))
      for part in (found, held)
    )
    if not len(train):
      told = ", ".join(f"{n:,} with {reason}" for reason, n in count.items())
      raise UserError(f"no example is left to train on: {told}")
    text = sum(len(utf8(m["content"])) for t in found for m in t)
    counts = {
      "vocab": made.tokenizer.vocab_size,
      "train_tokens": len(train.ids),
      "val_tokens": len(val.ids),
      "learned": int(train.trained.sum()),
      "bytes_per_token": text / max(len(train.ids), 1),
    }
    skipped = tuple(count.items())
    return Corpus(made.tokenizer, train, val, counts, skipped)

  def batches(
    self, corpus: Corpus, config: FrozenConfigDict, rows: np.ndarray
  ) -> data.Batches:
    """In the order that was chosen."""
    laid = lay(corpus.train, config.seq_len, self.packed, self.order.graded)
    return example_batches(
      laid, self.order, config.batch_size, config.seed, config.steps, rows
    )

  def held_out(
    self, corpus: Corpus, config: FrozenConfigDict, size: int, rows: np.ndarray
  ) -> Sequence[dict[str, np.ndarray]]:
    """Every example once."""
    if not len(corpus.val):
      return ()
    return ExampleWindows(lay(corpus.val, config.seq_len), size, rows)


def _fitting(
  encoded: Sequence[Encoded], seq_len: int, skipped: Counter
) -> list[Encoded]:
  """Those that fit a row; counts the others."""
  kept = []
  for ids, trained in encoded:
    if not trained[1 : seq_len + 1].any():
      skipped[f"a prompt that fills seq_len={seq_len}"] += 1
    elif len(ids) > seq_len + 1:
      skipped[f"more than seq_len={seq_len} tokens"] += 1
    else:
      kept.append((ids, trained))
  return kept


# --- The loss ---------------------------------------------------------------


@dataclass(frozen=True)
class Responses:
  """The loss `next_token` over what is learned.

  In evaluation also `exact`: of how many examples every learned token is the
  likeliest one, given those before it. That is how often greedy decoding writes
  the response to the letter.
  """

  chunk: int = 0

  def __call__(
    self,
    model: Decoder,
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    compute: Compute,
    frozen: Any = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `next_token`."""
    exact = key is None and not self.chunk
    return next_token(
      model, params, batch, key, compute, chunk=self.chunk, exact=exact
    )
