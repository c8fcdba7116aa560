"""Prompts: what the decoding loop starts from, padded, checked, with keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.errors import UserError
from jaxlm.generate.automaton import Constraint, Course, ends_of, follow
from jaxlm.layers.position import Learned
from jaxlm.models.decoder import Decoder

Array = jax.Array


@struct.dataclass
class Rows:
  """What the rows of a batch are, apart from their tokens.

  Attributes:
    keys: randomness of each row, [rows].
    made: number of new tokens so far, int32.
    ended: rows that have ended, bool [rows].
    eot: the tokens that end a row, int32 [some]; -1 for none.
    place: the state of each row in a constraint, int32 [rows].
  """

  keys: Array
  made: Array
  ended: Array
  eot: Array
  place: Array


@dataclass(frozen=True)
class Prompts:
  """Checked input of a decoding loop.

  Attributes:
    tokens: prompts, padded on the left, int32 [batch, seq].
    lengths: how many tokens of each row are its prompt, int32 [batch].
    rows: keys and ends; several in a row for each prompt where it is to be
      continued more than once.
    course: what they have to follow, perhaps nothing.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  rows: Rows
  course: Course


def pad_left(
  prompts: Sequence[Sequence[int]], pad: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of unequal lengths as `tokens` and `lengths` for `generate`.

  >>> tokens, lengths = pad_left([[1, 2, 3], [4]])
  >>> tokens.tolist(), lengths.tolist()
  ([[1, 2, 3], [0, 0, 4]], [3, 1])
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.full((len(prompts), max(lengths, default=0)), pad, np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[len(row) - len(prompt) :] = prompt
  return tokens, lengths


def pad_right(
  prompts: Sequence[Sequence[int]], pad: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """The same with the padding behind, for `generate(..., side="right")`.

  >>> tokens, lengths = pad_right([[1, 2, 3], [4]])
  >>> tokens.tolist(), lengths.tolist()
  ([[1, 2, 3], [4, 0, 0]], [3, 1])
  """
  tokens, lengths = pad_left(prompts, pad)
  return _turned(tokens, lengths), lengths


def _turned(tokens: np.ndarray, by: np.ndarray) -> np.ndarray:
  """Rows `[batch, seq]`, each turned to the right by so many places."""
  places = np.arange(tokens.shape[1])[None] - by[:, None]
  return np.take_along_axis(tokens, places % max(tokens.shape[1], 1), axis=1)


def row_keys(key: Array | None, batch: int) -> Array:
  """A key for each row, `[batch]`; one key per row stays as it is.

  Raises:
    UserError: if there are keys for another number of rows.
  """
  key = jax.random.key(0) if key is None else key
  if key.ndim == 0:
    rows = jnp.arange(batch, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  if key.shape != (batch,):
    raise UserError(
      f"keys of shape {key.shape} do not fit {batch} prompts; pass one key, or "
      "one for each prompt"
    )
  return key


def check(
  model: Decoder,
  tokens: Any,
  n: int,
  key: Array | None,
  lengths: Any,
  eot: int | Sequence[int] | None,
  slide: bool,
  samples: int = 1,
  constraint: Constraint | None = None,
  side: str = "left",
  endless: bool = False,
) -> Prompts:
  """What the caller of `generate` gave, if it makes sense.

  Args are those of `generate`, and `endless`: whether the cache is one for
  texts without an end.

  Raises:
    UserError: as `generate`.
  """
  tokens = _checked_tokens(model, tokens)
  lengths = _checked_lengths(lengths, *tokens.shape)
  if side not in ("left", "right"):
    raise UserError(f"side={side!r}; prompts are padded on the left or right")
  if side == "right":
    tokens = _turned(tokens, tokens.shape[1] - lengths)
  if n < 0:
    raise UserError(f"max_new_tokens={n} is negative; use 0 or more")
  if samples < 1:
    raise UserError(f"samples={samples} of each prompt; use 1 or more")
  if not endless or isinstance(model.positions, Learned):
    _check_room(model, int(lengths.max()), n, slide)
  eot = ends_of(constraint, eot)
  ends = [-1] if eot is None else np.atleast_1d(np.asarray(eot))
  rows = Rows(
    keys=row_keys(key, len(tokens) * samples),
    made=np.int32(0),
    ended=np.zeros(len(tokens) * samples, bool),
    eot=np.array(ends, np.int32),
    place=np.zeros(len(tokens) * samples, np.int32),
  )
  course = follow(constraint, model.vocab, rows.eot, n, len(rows.ended))
  return Prompts(tokens, lengths, rows, course)


def _checked_tokens(model: Decoder, tokens: Any) -> np.ndarray:
  """Prompts as int32 `[batch, seq]`."""
  try:
    tokens = np.asarray(tokens)
  except ValueError:  # rows of unequal lengths
    tokens = np.zeros(0)
  if tokens.ndim != 2 or (tokens.dtype.kind not in "iu" and tokens.size):
    raise UserError(
      "tokens must be integers [batch, seq], one row per prompt; for prompts "
      "of unequal lengths use jaxlm.generate.prompts.pad_left"
    )
  if 0 in tokens.shape:
    raise UserError(
      "the prompt is empty; give at least one token, for example "
      "the tokenizer's end-of-text token, which documents follow"
    )
  low, high = int(tokens.min()), int(tokens.max())
  if low < 0 or high >= model.vocab:
    raise UserError(
      f"token {low if low < 0 else high} is outside the vocabulary of "
      f"{model.vocab} tokens; encode the prompt with the tokenizer this model "
      "was trained with"
    )
  return tokens.astype(np.int32)


def _checked_lengths(lengths: Any, batch: int, seq: int) -> np.ndarray:
  """How many tokens of each row are its prompt, int32 `[batch]`."""
  if lengths is None:
    return np.full(batch, seq, np.int32)
  lengths = np.asarray(lengths)
  if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > seq:
    raise UserError(
      f"lengths={lengths.tolist()} do not fit prompts of shape "
      f"[{batch}, {seq}]; give one number from 1 to {seq} for each row"
    )
  return lengths.astype(np.int32)


def _check_room(model: Decoder, longest: int, n: int, slide: bool) -> None:
  """Raises where the model's positions would not suffice."""
  # The last new token is never read, and so needs none.
  most, needed = model.max_positions, longest + n - 1
  if slide or n == 0 or needed <= most:
    return
  kind = "learned" if isinstance(model.positions, Learned) else "been made for"
  raise UserError(
    f"{longest} tokens of prompt and {n} new ones need {needed} positions, and "
    f"this model has {kind} {most}; ask for at most "
    f"{max(most + 1 - longest, 0)} new tokens, or pass slide=True to go on "
    "from the last half of them"
  )
