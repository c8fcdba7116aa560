"""Decoding: read the prompt once, then one token at a time from a cache.

`generate` makes all tokens in one compiled loop, `stream` hands them over as
they come; both run the forward pass of training, and the same step. Shapes are
rounded up to a few sizes per octave and all else is data, so that new lengths
seldom compile anything.

Randomness: token number i of row b is drawn with `fold_in(keys[b], i)`. What
a row says depends neither on its neighbours nor on how it was called.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.generate.prompts import Prompts, Rows, check
from jaxlm.generate.samplers import Greedy, Sampler
from jaxlm.layers.attend import At
from jaxlm.layers.cache import empty
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import map_params
from jaxlm.models.decoder import Decoder, hidden, layers_apart, logits

Array = jax.Array
Tree = Any

UNROLLED = Compute(unroll=True)
GREEDY = Greedy()


def generate(
  model: Decoder,
  params: Tree,
  tokens: Any,
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
  key: Array | None = None,
  *,
  lengths: Any = None,
  eot: int | None = None,
  slide: bool = False,
  compute: Compute = UNROLLED,
) -> Array:
  """Continues sequences of tokens.

  Args:
    model: what to run.
    params: its arrays; a caller who comes again and again saves work by
      passing `ready(model, params)`.
    tokens: prompts `[batch, seq]`, integers.
    max_new_tokens: how many to add to each.
    sampler: chooses a token from the logits.
    key: randomness, one key or one per row `[batch]`; None means key 0, so
      that the same call gives the same tokens.
    lengths: where prompts differ in length, how many of the last tokens of
      each row are its prompt, `[batch]`; what stands before is not read.
      `prompts.pad_left` makes both.
    eot: a row ends with this token, and is filled up with it.
    slide: where a text outgrows the positions of the model, read the last
      half of them again and go on from there; else that is an error.
    compute: how to run; with `unroll` the layers are written out.

  Returns:
    Tokens `[batch, seq + max_new_tokens]`, int32: prompts and continuations.

  Raises:
    UserError: for an empty prompt, tokens outside the vocabulary, or more
      tokens than the model has positions for.
  """
  method = Method(model, sampler, compute)
  prompts = check(model, tokens, max_new_tokens, key, lengths, eot, slide)
  out = np.full(
    (len(prompts.tokens), max_new_tokens), prompts.rows.eot, np.int32
  )
  made = 0
  for block in _blocks(method, params, prompts, max_new_tokens, pace=None):
    out[:, made : made + block.shape[1]] = block
    made += block.shape[1]
  return jnp.asarray(np.concatenate([prompts.tokens, out], axis=1))


def stream(
  model: Decoder,
  params: Tree,
  tokens: Any,
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
  key: Array | None = None,
  *,
  lengths: Any = None,
  eot: int | None = None,
  slide: bool = False,
  compute: Compute = UNROLLED,
  pace: float = 0.02,
) -> Iterator[np.ndarray]:
  """Yields the new tokens of `generate` as they come, int32 `[batch]` each.

  It ends early once every row has ended with `eot`. Arguments are those of
  `generate`, and `pace`: a fast model makes several tokens at a time, but
  none waits longer than about so many seconds for the others; 0 means one by
  one.
  """
  method = Method(model, sampler, compute)
  prompts = check(model, tokens, max_new_tokens, key, lengths, eot, slide)
  blocks = _blocks(method, params, prompts, max_new_tokens, pace)
  return (token for block in blocks for token in block.T)


def ready(model: Decoder, params: Tree, compute: Compute = UNROLLED) -> Tree:
  """Parameters as decoding reads them: cast, and with their layers apart.

  Each step reads every weight once, so what can be done to them beforehand is
  done here. Those that are ready already come back as they are.
  """
  if isinstance(params["layers"]["0"], tuple):
    return params
  return _ready(model, params, compute)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _ready(model: Decoder, params: Tree, compute: Compute) -> Tree:
  dtype = compute.jnp_dtype
  params = map_params(
    lambda p, x: x.astype(p.compute or dtype), model.params(), params
  )
  if not compute.unroll:
    return params
  return params | {"layers": layers_apart(model, params["layers"])}


# --- The compiled part ------------------------------------------------------


@dataclass(frozen=True)
class Method:
  """What is compiled: a model, how tokens are chosen, how it is run."""

  model: Decoder
  sampler: Sampler
  compute: Compute


@struct.dataclass
class State:
  """What decoding knows between two tokens.

  Attributes:
    rows: keys and ends.
    cache: what the layers remember of all tokens but the last.
    last: the last token of each row, int32 [batch].
    position: where it stands, int32 [batch].
    out: new tokens since the prompt was read, int32 [batch, room].
    filled: how many of `out` there are, int32.
  """

  rows: Rows
  cache: Tree
  last: Array
  position: Array
  out: Array
  filled: Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
  method: Method,
  length: int,
  params: Tree,
  tokens: Array,
  lengths: Array,
  rows: Rows,
) -> State:
  """Reads prompts `[batch, seq]` into a cache of `length`; one new token."""
  batch, seq = tokens.shape
  cache = empty(method.model.cache(batch, length), method.compute.jnp_dtype)
  if method.compute.unroll:
    cache = layers_apart(method.model, cache)
  state = State(
    rows=rows,
    cache=cache,
    last=tokens[:, -1],
    position=lengths - 1,
    out=jnp.broadcast_to(rows.eot, (batch, length)),
    filled=jnp.int32(0),
  )
  # Padding stands at negative positions: it is never written and never seen.
  positions = jnp.arange(seq, dtype=jnp.int32)[None] + lengths[:, None] - seq
  return _advance(method, params, state, tokens, positions)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(method: Method, params: Tree, state: State, until: Array) -> State:
  """Adds tokens until `until` of them are new, or all rows have ended."""

  def go_on(state: State) -> Array:
    return (state.filled < until) & ~jnp.all(state.rows.ended)

  def step(state: State) -> State:
    tokens, positions = state.last[:, None], state.position[:, None]
    return _advance(method, params, state, tokens, positions)

  return jax.lax.while_loop(go_on, step, state)


def _advance(
  method: Method, params: Tree, state: State, tokens: Array, positions: Array
) -> State:
  """Reads tokens `[batch, seq]` and chooses the next one of each row."""
  model, compute, rows = method.model, method.compute, state.rows
  at = At(positions=positions)
  x, cache = hidden(model, params, tokens, at, state.cache, compute)
  scores = logits(model, params, x[:, -1:], compute)[:, 0]

  def choose(row: Array, key: Array) -> Array:
    return method.sampler(row[None], jax.random.fold_in(key, rows.made))[0]

  new = jax.vmap(choose)(scores, rows.keys)
  new = jnp.where(rows.ended, rows.eot, new)
  return State(
    rows=rows.replace(made=rows.made + 1, ended=rows.ended | (new == rows.eot)),
    cache=cache,
    last=new,
    position=state.position + 1,
    out=jax.lax.dynamic_update_slice_in_dim(
      state.out, new[:, None], state.filled, axis=1
    ),
    filled=state.filled + 1,
  )


# --- Around it --------------------------------------------------------------


def _blocks(
  method: Method, params: Tree, prompts: Prompts, n: int, pace: float | None
) -> Iterator[np.ndarray]:
  """New tokens, int32 `[batch, some]`; one window of positions after another.

  A block takes about `pace` seconds, or with None a whole window.
  """
  most = method.model.max_positions
  half = max(most // 2, 1)
  params = ready(method.model, params, method.compute)
  text, lengths, rows, made = prompts.tokens, prompts.lengths, prompts.rows, 0
  seq, length = _sizes(most, half, int(lengths.max()), n)
  while made < n:
    if lengths.max() > most:  # slide: forget all but half of a window
      lengths = np.minimum(lengths, half)
    longest = int(lengths.max())
    room = min(n - made, most + 1 - longest)
    tokens = np.zeros((len(text), seq), np.int32)
    tokens[:, seq - longest :] = text[:, text.shape[1] - longest :]
    state = _begin(method, length, params, tokens, lengths, rows)
    for ended, block in _window(method, params, state, room, pace):
      yield block
      text = np.concatenate([text, block], axis=1)[:, -most:]
      made += block.shape[1]
      # NumPy's, like the first ones: arrays that live on a device are another
      # kind of argument, for which the program would be compiled again.
      rows = rows.replace(made=np.int32(made), ended=ended)
    if rows.ended.all():
      return
    lengths = lengths + room


def _sizes(most: int, half: int, longest: int, n: int) -> tuple[int, int]:
  """Tokens read at once, and of a cache that `n` more fit in.

  Windows of a text that slides are all of one size, so that the second need
  not be compiled.
  """
  if longest + n - 1 > most:
    return min(rounded(max(min(longest, most), half)), most), most
  return min(rounded(longest), most), min(rounded(longest + n - 1), most)


def _window(
  method: Method, params: Tree, state: State, room: int, pace: float | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Which rows have ended, `[batch]`, and new tokens, up to `room` in all.

  The size of a block follows from the time the last one took. The first token
  is the one that reading the prompt has made.
  """
  done, size = 0, room if pace is None else 1
  while done < room:
    began = time.perf_counter()
    until = min(done + size, room)
    state = _extend(method, params, state, np.int32(until))
    # Copies: the buffers themselves are given to the next call.
    filled, ended = int(state.filled), np.array(state.rows.ended)
    new = np.array(state.out)[:, done:filled]
    took, done = time.perf_counter() - began, filled
    if pace is not None:
      size = size * 2 if 2 * took < pace else max(1, size // 2)
    yield ended, new
    if ended.all():
      return


def rounded(n: int) -> int:
  """`n` or a little more: four sizes per octave, so that few are compiled.

  >>> [rounded(n) for n in (1, 17, 64, 65, 129, 1000)]
  [16, 32, 64, 80, 160, 1024]
  """
  step = max(16, 1 << max(n.bit_length() - 3, 0))
  return -(-n // step) * step
