"""Contrastive search: likely tokens that do not say the same thing again.

Su et al., arXiv:2202.06417, section 4: of the k likeliest tokens v the one of

    (1 - α) p(v) - α max_j cos(h_v, h_j)

is taken, where h are last hidden states and j runs over the text so far.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.errors import UserError
from jaxlm.generate.decode import ready, rounded
from jaxlm.generate.prompts import check
from jaxlm.generate.step import UNROLLED, read, step, take
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder, logits

Array = jax.Array
Tree = Any


@dataclass(frozen=True)
class Contrastive:
  """How contrastive search weighs.

  Attributes:
    k: candidates in each place.
    alpha: weight of the penalty; 0 is greedy.
  """

  k: int = 4
  alpha: float = 0.6

  def __post_init__(self):
    if self.k < 1 or not 0 <= self.alpha <= 1:
      raise UserError(
        f"k={self.k}, alpha={self.alpha}: k is at least 1 and alpha a share"
      )


@struct.dataclass
class State:
  """What the search knows between two tokens.

  Attributes:
    said: unit vectors of the hidden states so far, [batch, room, dim]; zero
      where there are none.
    scores: logits of the next token, [batch, vocab].
    cache: of the text so far.
    tokens: new tokens, int32 [batch, new].
    ended: rows that have ended, bool [batch].
    made: how many new tokens there are.
  """

  said: Array
  scores: Array
  cache: Tree
  tokens: Array
  ended: Array
  made: Array


def contrastive(
  model: Decoder,
  params: Tree,
  tokens: Any,
  max_new_tokens: int,
  how: Contrastive = Contrastive(),
  *,
  lengths: Any = None,
  eot: int | Sequence[int] | None = None,
  compute: Compute = UNROLLED,
) -> np.ndarray:
  """New tokens by contrastive search, int32 `[batch, max_new_tokens]`.

  Each token costs a forward pass of `k` rows per prompt. Arguments are those
  of `decode.generate`, and `how`.

  Raises:
    UserError: as `decode.generate`.
  """
  prompts = check(
    model, tokens, max_new_tokens, None, lengths, eot, slide=False
  )
  room = rounded(max_new_tokens)
  seq = prompts.tokens.shape[1]
  found = _search(
    (model, how, compute),
    (min(rounded(seq + room), model.max_positions), room),
    ready(model, params, compute),
    prompts.tokens,
    prompts.lengths,
    prompts.rows.eot,
    np.int32(max_new_tokens),
  )
  return np.asarray(found)[:, :max_new_tokens]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(
  what: tuple[Decoder, Contrastive, Compute],
  sizes: tuple[int, int],
  params: Tree,
  tokens: Array,
  lengths: Array,
  eot: Array,
  limit: Array,
) -> Array:
  """Prefill, then one token after another, `[batch, room]`."""
  model, _, compute = what
  length, room = sizes
  batch, seq = tokens.shape
  x, cache = read(model, params, tokens, lengths, length, compute)
  real = jnp.arange(seq, dtype=jnp.int32)[None] >= seq - lengths[:, None]
  said = jnp.where(real[..., None], _unit(x), 0.0)
  state = State(
    said=jnp.pad(said, ((0, 0), (0, room), (0, 0))),
    scores=logits(model, params, x[:, -1:], compute)[:, 0],
    cache=cache,
    tokens=jnp.broadcast_to(eot[0], (batch, room)),
    ended=jnp.zeros(batch, bool),
    made=jnp.int32(0),
  )

  def go_on(state: State) -> Array:
    return (state.made < limit) & ~jnp.all(state.ended)

  def advance(state: State) -> State:
    here = lengths + state.made
    return _extend(what, params, state, here, seq + state.made, eot)

  return jax.lax.while_loop(go_on, advance, state).tokens


def _extend(
  what: tuple[Decoder, Contrastive, Compute],
  params: Tree,
  state: State,
  position: Array,
  place: Array,
  eot: Array,
) -> State:
  """Reads every candidate, and keeps the best of each row."""
  model, how, compute = what
  batch = len(position)
  probs, tokens = jax.lax.top_k(jax.nn.softmax(state.scores), how.k)
  rows = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), how.k)
  x, cache = step(
    model,
    params,
    tokens.reshape(-1, 1).astype(jnp.int32),
    position[rows],
    take(state.cache, rows, compute),
    compute,
  )
  unit = _unit(x).reshape(batch, how.k, -1)
  alike = jnp.einsum("bkd,btd->bkt", unit, state.said)
  value = (1 - how.alpha) * probs - how.alpha * jnp.max(alike, axis=-1)
  best = jnp.argmax(value, axis=-1).astype(jnp.int32)
  one = jnp.arange(batch, dtype=jnp.int32) * how.k + best
  token = jnp.take_along_axis(tokens, best[:, None], axis=1)
  token = jnp.where(state.ended[:, None], eot[0], token)
  kept = jnp.take_along_axis(unit, best[:, None, None], axis=1)
  return State(
    said=jax.lax.dynamic_update_slice_in_dim(state.said, kept, place, 1),
    scores=logits(model, params, x[one], compute)[:, 0],
    cache=take(cache, one, compute),
    tokens=jax.lax.dynamic_update_slice_in_dim(
      state.tokens, token, state.made, 1
    ),
    ended=state.ended | jnp.any(token == eot[None], axis=1),
    made=state.made + 1,
  )


def _unit(x: Array) -> Array:
  """Vectors of length 1, float32."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
