"""New tokens as a loop fills them in, and how likely the model found them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array


@struct.dataclass
class New:
  """New tokens, and how likely the model found them.

  Attributes:
    tokens: int32 [rows, some].
    logprobs: of those tokens, float32 [rows, some]; None unless asked for.
    top_tokens: the likeliest tokens in their place, int32 [rows, some, top].
    top_logprobs: of those, float32 [rows, some, top].
  """

  tokens: Any
  logprobs: Any = None
  top_tokens: Any = None
  top_logprobs: Any = None

  def between(self, start: int, end: int) -> "New":
    """Copies of those from `start` up to `end`."""
    return jax.tree.map(lambda x: np.array(x)[:, start:end], self)


def no_tokens(rows: int, room: int, eot: Array, top: int | None) -> New:
  """Places for `room` new tokens of each row, filled with `eot`."""
  tokens = jnp.broadcast_to(eot, (rows, room))
  if top is None:
    return New(tokens)
  many = (rows, room, top)
  return New(
    tokens,
    jnp.zeros((rows, room), jnp.float32),
    jnp.zeros(many, jnp.int32),
    jnp.zeros(many, jnp.float32),
  )


def put(table: Array, column: Array, place: Array) -> Array:
  """`table` [rows, room, ...] with `column` [rows, ...] at `place`."""
  return jax.lax.dynamic_update_slice_in_dim(
    table, column[:, None], place, axis=1
  )


def noted(
  new: New, scores: Array, token: Array, place: Array, top: int | None
) -> New:
  """The new tokens with one more at `place`, and what is to be told of it.

  Args:
    new: those so far.
    scores: the model's logits, `[rows, vocab]`.
    token: the chosen tokens, `[rows]`.
    place: how many there are so far.
    top: how many log-probabilities beside the chosen one's; None: none at all.
  """
  new = new.replace(tokens=put(new.tokens, token, place))
  if top is None:
    return new
  log_p = jax.nn.log_softmax(scores, axis=-1)
  own = jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]
  best, which = jax.lax.top_k(log_p, top)
  return new.replace(
    logprobs=put(new.logprobs, own, place),
    top_tokens=put(new.top_tokens, which, place),
    top_logprobs=put(new.top_logprobs, best, place),
  )
