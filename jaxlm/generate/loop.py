"""The compiled part of decoding: a state, its first token, and the next ones.

`begin` reads prompts and chooses one token, `extend` adds more in one loop on
the device, and `make_room` lets the same state go on where its places for new
tokens are used up.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.errors import UserError
from jaxlm.generate.automaton import insist, keep_open, moved, open_tokens
from jaxlm.generate.filters import Seen
from jaxlm.generate.new import New, no_tokens, noted, put
from jaxlm.generate.prompts import Rows
from jaxlm.generate.samplers import Sampler
from jaxlm.generate.step import prefill, step, take
from jaxlm.layers.cache import FULL, window_of
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder, logits

Array = jax.Array
Tree = Any

# The whole vectors of a CPU that has them, where LLVM prefers halves of them:
# one row alone is then 8 % faster. Other compilers pass over it.
WHOLE_VECTORS = {"xla_cpu_prefer_vector_width": 512}


@dataclass(frozen=True)
class Method:
  """What is compiled: a model, how tokens are chosen, how it is run.

  Attributes:
    model: what is run.
    sampler: how tokens are chosen.
    compute: how it is run.
    top: how many log-probabilities are kept beside the chosen token's; None
      keeps none at all.
    kind: how the cache remembers.
    chunk: how much of a prompt is read at a time; None means all of it, or
      with a ring as much as that holds.
  """

  model: Decoder
  sampler: Sampler
  compute: Compute
  top: int | None = None
  kind: Any = FULL
  chunk: int | None = None

  def __post_init__(self):
    if self.chunk is None and self.kind.endless:
      object.__setattr__(self, "chunk", window_of(self.kind).size)
    if self.chunk is not None and self.chunk < 1:
      raise UserError(f"prefill_chunk={self.chunk}; use 1 or more")


@struct.dataclass
class Given:
  """What every step reads and none changes: parameters and a constraint."""

  params: Tree
  constraint: Any


@struct.dataclass
class State:
  """What decoding knows between two tokens.

  Attributes:
    rows: keys and ends.
    cache: what the layers remember of all tokens but the last.
    position: where the last token stands, int32 [rows].
    seen: the text so far, with room for what is to come.
    new: the new tokens and their log-probabilities, as many as fit.
    filled: how many of `new` there are, int32.
    broken: whether a row's logits were NaN, bool [rows].
  """

  rows: Rows
  cache: Tree
  position: Array
  seen: Seen
  new: New
  filled: Array
  broken: Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin(
  method: Method,
  length: int,
  samples: int,
  given: Given,
  tokens: Array,
  lengths: Array,
  rows: Rows,
) -> State:
  """Reads prompts `[batch, seq]` into a cache of `length`; one new token."""
  batch = len(tokens)
  x, cache = prefill(
    method.model,
    given.params,
    tokens,
    lengths,
    length,
    method.compute,
    method.kind,
    method.chunk,
  )
  if samples > 1:
    who = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), samples)
    cache = take(cache, who, method.compute)
    x, tokens, lengths = x[who], tokens[who], lengths[who]
  return first(method, length, given, (x, cache), tokens, lengths, rows)


def first(
  method: Method,
  room: int,
  given: Given,
  read: tuple[Array, Tree],
  tokens: Array,
  lengths: Array,
  rows: Rows,
) -> State:
  """One new token, of prompts that have been read, and places for `room`.

  `read` is what `prefill` returns, the prompts are `[rows, seq]`.
  """
  x, cache = read
  n, seq = tokens.shape
  here = jnp.arange(seq, dtype=jnp.int32)[None] >= seq - lengths[:, None]
  empty = jnp.full((n, room), -1, jnp.int32)
  text = jnp.concatenate([jnp.where(here, tokens, -1), empty], axis=1)
  state = State(
    rows=rows,
    cache=cache,
    position=lengths - 1,
    seen=Seen(text, jnp.maximum(seq - rows.made, 0), jnp.int32(seq)),
    new=no_tokens(n, room, rows.eot[0], method.top),
    filled=jnp.int32(0),
    broken=jnp.zeros(n, bool),
  )
  return _choose(method, given, state, x)


@functools.partial(
  jax.jit, static_argnums=0, donate_argnums=2, compiler_options=WHOLE_VECTORS
)
def extend(method: Method, given: Given, state: State, until: Array) -> State:
  """Adds tokens until `until` of them are new, or all rows have ended."""

  def go_on(state: State) -> Array:
    return (state.filled < until) & ~jnp.all(state.rows.ended)

  def advance(state: State) -> State:
    last = jax.lax.dynamic_slice_in_dim(
      state.seen.tokens, state.seen.end - 1, 1, axis=1
    )
    return _advance(method, given, state, last)

  return jax.lax.while_loop(go_on, advance, state)


def _advance(
  method: Method, given: Given, state: State, tokens: Array
) -> State:
  """Reads the last token of each row, `[rows, 1]`, and chooses the next."""
  x, cache = step(
    method.model,
    given.params,
    tokens,
    state.position,
    state.cache,
    method.compute,
  )
  return _choose(method, given, state.replace(cache=cache), x)


def _choose(method: Method, given: Given, state: State, x: Array) -> State:
  """Chooses the next token of each row from hidden states `[rows, 1, dim]`."""
  rows, seen = state.rows, state.seen
  scores = logits(method.model, given.params, x, method.compute)[:, 0]
  open_ = open_tokens(given.constraint, rows.place, rows.made, scores.shape[1])

  def choose(row: Array, key: Array, tokens: Array) -> Array:
    one = seen.replace(tokens=tokens[None])
    return method.sampler(row[None], jax.random.fold_in(key, rows.made), one)[0]

  kept = keep_open(scores, open_)
  token = jax.vmap(choose)(kept, rows.keys, seen.tokens)
  token = insist(token, open_, scores)
  token = jnp.where(rows.ended, rows.eot[0], token)
  ended = rows.ended | jnp.any(token[:, None] == rows.eot[None], axis=1)
  place = moved(given.constraint, rows.place, token)
  return state.replace(
    rows=rows.replace(made=rows.made + 1, ended=ended, place=place),
    position=state.position + 1,
    seen=seen.replace(
      tokens=put(seen.tokens, token, seen.end), end=seen.end + 1
    ),
    new=noted(state.new, scores, token, state.filled, method.top),
    filled=state.filled + 1,
    broken=state.broken | jnp.isnan(jnp.max(scores, axis=-1)),
  )


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def make_room(state: State, leg: int) -> State:
  """The same state with places for `leg` more tokens; old ones are dropped."""
  seen = state.seen
  by = jnp.maximum(seen.end + leg - seen.tokens.shape[1], 0)
  seen = Seen(
    jnp.roll(seen.tokens, -by, axis=1),
    jnp.maximum(seen.start - by, 0),
    seen.end - by,
  )
  return state.replace(seen=seen, filled=jnp.int32(0))
