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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.errors import UserError
from jaxlm.generate.samplers import Greedy, Sampler
from jaxlm.layers.attend import At
from jaxlm.layers.cache import empty
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import map_params
from jaxlm.layers.position import Learned
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
      `pad_left` makes both.
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
  job = _job(method, tokens, max_new_tokens, key, lengths, eot, slide)
  out = np.full((len(job.tokens), max_new_tokens), job.rows.eot, np.int32)
  made = 0
  for block in _blocks(method, params, job, max_new_tokens, pace=None):
    out[:, made : made + block.shape[1]] = block
    made += block.shape[1]
  return jnp.asarray(np.concatenate([job.tokens, out], axis=1))


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
  job = _job(method, tokens, max_new_tokens, key, lengths, eot, slide)
  blocks = _blocks(method, params, job, max_new_tokens, pace)
  return (token for block in blocks for token in block.T)


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
class Rows:
  """What the rows of a batch are, apart from their tokens.

  Attributes:
    keys: randomness of each row, [batch].
    made: number of new tokens so far, int32.
    ended: rows that have ended, bool [batch].
    eot: the token that ends a row; -1 for none, int32.
  """

  keys: Array
  made: Array
  ended: Array
  eot: Array


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


@dataclass(frozen=True)
class _Job:
  """Checked input: prompts [batch, seq], their lengths [batch], their rows."""

  tokens: np.ndarray
  lengths: np.ndarray
  rows: Rows


def _blocks(
  method: Method, params: Tree, job: _Job, n: int, pace: float | None
) -> Iterator[np.ndarray]:
  """New tokens, int32 `[batch, some]`; one window of positions after another.

  A block takes about `pace` seconds, or with None a whole window.
  """
  most = method.model.max_positions
  half = max(most // 2, 1)
  params = ready(method.model, params, method.compute)
  text, lengths, rows, made = job.tokens, job.lengths, job.rows, 0
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
      text = np.concatenate([text, block], axis=1)
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


def _job(
  method: Method,
  tokens: Any,
  n: int,
  key: Array | None,
  lengths: Any,
  eot: int | None,
  slide: bool,
) -> _Job:
  """Checks what the caller gave.

  Raises:
    UserError: as `generate`.
  """
  tokens = _checked_tokens(method.model, tokens)
  lengths = _checked_lengths(lengths, *tokens.shape)
  if n < 0:
    raise UserError(f"max_new_tokens={n} is negative; use 0 or more")
  _check_room(method.model, int(lengths.max()), n, slide)
  rows = Rows(
    keys=row_keys(key, len(tokens)),
    made=np.int32(0),
    ended=np.zeros(len(tokens), bool),
    eot=np.int32(-1 if eot is None else eot),
  )
  return _Job(tokens, lengths, rows)


def _checked_tokens(model: Decoder, tokens: Any) -> np.ndarray:
  """Prompts as int32 `[batch, seq]`."""
  try:
    tokens = np.asarray(tokens)
  except ValueError:  # rows of unequal lengths
    tokens = np.zeros(0)
  if tokens.ndim != 2 or (tokens.dtype.kind not in "iu" and tokens.size):
    raise UserError(
      "tokens must be integers [batch, seq], one row per prompt; for prompts "
      "of unequal lengths use jaxlm.generate.decode.pad_left"
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
