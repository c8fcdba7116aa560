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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.generate.automaton import Constraint, Course
from jaxlm.generate.loop import Given, Method, State, begin, extend, make_room
from jaxlm.generate.new import New, no_tokens
from jaxlm.generate.prompts import Prompts, check
from jaxlm.generate.samplers import Greedy, Sampler
from jaxlm.generate.step import UNROLLED
from jaxlm.layers.cache import FULL
from jaxlm.layers.compute import Compute
from jaxlm.layers.kernels import row
from jaxlm.layers.param import map_params
from jaxlm.models.decoder import Decoder, layers_apart

Array = jax.Array
Tree = Any

GREEDY = Greedy()
LEG = 512  # places for new tokens of a text without an end


def generate(
  model: Decoder,
  params: Tree,
  tokens: Any,
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
  key: Array | None = None,
  *,
  lengths: Any = None,
  eot: int | Sequence[int] | None = None,
  slide: bool = False,
  samples: int = 1,
  constraint: Constraint | None = None,
  cache: Any = FULL,
  prefill_chunk: int | None = None,
  side: str = "left",
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
    key: randomness, one key or one per row `[batch * samples]`; None means
      key 0, so that the same call gives the same tokens.
    lengths: where prompts differ in length, how many of the last tokens of
      each row are its prompt, `[batch]`; what stands before is not read.
      `prompts.pad_left` makes both.
    eot: a row ends with this token, or any of these, and is filled up with the
      first of them.
    slide: where a text outgrows the positions of the model, read the last
      half of them again and go on from there; else that is an error.
    samples: continuations of each prompt, in neighbouring rows of the result;
      the prompt is read once for all of them.
    constraint: what the new tokens have to spell, as `constraints.compile`
      makes it; its tokenizer says what ends them, unless `eot` does.
    cache: how keys and values are remembered: `Full()`, `Ring`, `Quantised`
      or `Paged` (docs/caches.md). With a ring the text may go on for ever.
    prefill_chunk: read prompts so many tokens at a time, which bounds memory
      and changes nothing else.
    side: where prompts that differ in length are padded, 'left' or 'right';
      those of the result are always on the left.
    compute: how to run; with `unroll` the layers are written out.

  Returns:
    Tokens `[batch * samples, seq + max_new_tokens]`, int32: prompts and
    continuations.

  Raises:
    UserError: for an empty prompt, tokens outside the vocabulary, logits that
      are NaN, more tokens than the model has positions for, or a constraint
      that cannot be satisfied with so many.
  """
  method = Method(model, sampler, compute, None, cache, prefill_chunk)
  prompts = check(
    model,
    tokens,
    max_new_tokens,
    key,
    lengths,
    eot,
    slide,
    samples,
    constraint,
    side,
    cache.endless,
  )
  found = _all(method, params, prompts, max_new_tokens)
  text = np.repeat(prompts.tokens, samples, axis=0)
  return jnp.asarray(np.concatenate([text, found.tokens], axis=1))


def scored(
  model: Decoder,
  params: Tree,
  tokens: Any,
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
  key: Array | None = None,
  *,
  top: int = 0,
  lengths: Any = None,
  eot: int | Sequence[int] | None = None,
  slide: bool = False,
  samples: int = 1,
  constraint: Constraint | None = None,
  cache: Any = FULL,
  prefill_chunk: int | None = None,
  side: str = "left",
  compute: Compute = UNROLLED,
) -> "New":
  """The new tokens of `generate`, with log-probabilities.

  They are those of the model, before the sampler's filters. Arguments are
  those of `generate`, and `top`: how many of the likeliest tokens are told
  beside each chosen one.
  """
  method = Method(model, sampler, compute, top, cache, prefill_chunk)
  prompts = check(
    model,
    tokens,
    max_new_tokens,
    key,
    lengths,
    eot,
    slide,
    samples,
    constraint,
    side,
    cache.endless,
  )
  return _all(method, params, prompts, max_new_tokens)


def stream(
  model: Decoder,
  params: Tree,
  tokens: Any,
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
  key: Array | None = None,
  *,
  lengths: Any = None,
  eot: int | Sequence[int] | None = None,
  slide: bool = False,
  samples: int = 1,
  constraint: Constraint | None = None,
  cache: Any = FULL,
  prefill_chunk: int | None = None,
  side: str = "left",
  compute: Compute = UNROLLED,
  pace: float = 0.02,
) -> Iterator[np.ndarray]:
  """Yields the new tokens of `generate` as they come, int32 `[rows]` each.

  It ends early once every row has ended with `eot`. Arguments are those of
  `generate`, and `pace`: a fast model makes several tokens at a time, but
  none waits longer than about so many seconds for the others; 0 means one by
  one.
  """
  method = Method(model, sampler, compute, None, cache, prefill_chunk)
  prompts = check(
    model,
    tokens,
    max_new_tokens,
    key,
    lengths,
    eot,
    slide,
    samples,
    constraint,
    side,
    cache.endless,
  )
  blocks = _blocks(method, params, prompts, max_new_tokens, pace)
  return (token for block in blocks for token in block.tokens.T)


def ready(model: Decoder, params: Tree, compute: Compute = UNROLLED) -> Tree:
  """Parameters as decoding reads them: cast, and with their layers apart.

  Each step reads every weight once, so what can be done to them beforehand is
  done here. Those that are ready already come back as they are.
  """
  if isinstance(params["layers"]["0"], tuple):
    return params
  if not compute.unroll:
    return _ready(model, params, compute)
  wanted = (("layers",), ("embed", "tokens"), ("head",))
  return row.ready(_ready(model, params, compute), wanted)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _ready(model: Decoder, params: Tree, compute: Compute) -> Tree:
  dtype = compute.jnp_dtype
  params = map_params(
    lambda p, x: x.astype(p.compute or dtype), model.params(), params
  )
  if not compute.unroll:
    return params
  return params | {"layers": layers_apart(model, params["layers"])}


# --- Around it --------------------------------------------------------------


def _all(method: Method, params: Tree, prompts: Prompts, n: int) -> New:
  """`n` new tokens of each row; where all have ended, the rest is filled."""
  rows = len(prompts.rows.ended)
  blocks = [*_blocks(method, params, prompts, n, pace=None)]
  made = sum(block.tokens.shape[1] for block in blocks)
  rest = jax.eval_shape(
    lambda: no_tokens(rows, n - made, prompts.rows.eot[0], method.top)
  )
  fill = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), rest)
  fill = fill.replace(tokens=fill.tokens + prompts.rows.eot[0])
  return jax.tree.map(lambda *x: np.concatenate(x, axis=1), *blocks, fill)


def _blocks(
  method: Method, params: Tree, prompts: Prompts, n: int, pace: float | None
) -> Iterator[New]:
  """New tokens, some at a time; one window of positions after another.

  A block takes about `pace` seconds, or with None a whole window.
  """
  if method.kind.endless:
    yield from _endless(method, params, prompts, n, pace)
    return
  most = method.model.max_positions
  half = max(most // 2, 1)
  params = ready(method.model, params, method.compute)
  text, lengths, rows, made = prompts.tokens, prompts.lengths, prompts.rows, 0
  course = prompts.course
  samples = len(rows.ended) // len(text)
  seq, length = _sizes(most, half, int(lengths.max()), n)
  while made < n:
    if lengths.max() > most:  # slide: forget all but half of a window
      lengths = np.minimum(lengths, half)
    longest = int(lengths.max())
    room = min(n - made, most + 1 - longest)
    tokens = np.zeros((len(text), seq), np.int32)
    tokens[:, seq - longest :] = text[:, text.shape[1] - longest :]
    given = Given(params, course.now())
    state = begin(method, length, samples, given, tokens, lengths, rows)
    if samples > 1:  # from here on every sample has a text of its own
      text, lengths = (np.repeat(x, samples, axis=0) for x in (text, lengths))
      samples = 1
    blocks = _window(method, given, course, state, room, pace)
    for state, block in blocks:
      yield block
      text = np.concatenate([text, block.tokens], axis=1)[:, -most:]
      made += block.tokens.shape[1]
      # NumPy's, like the first ones: arrays that live on a device are another
      # kind of argument, for which the program would be compiled again.
      ended, place = (np.array(x) for x in (state.rows.ended, state.rows.place))
      rows = rows.replace(made=np.int32(made), ended=ended, place=place)
    if rows.ended.all():
      return
    lengths = lengths + room


def _endless(
  method: Method, params: Tree, prompts: Prompts, n: int, pace: float | None
) -> Iterator[New]:
  """The same from a ring: one state, which makes room for itself."""
  seq, lengths = rounded(prompts.tokens.shape[1]), prompts.lengths
  length = min(rounded(n), LEG)
  leg = length if n <= length else length // 2
  samples, made = len(prompts.rows.ended) // len(lengths), 0
  pad = seq - prompts.tokens.shape[1]
  tokens = np.pad(prompts.tokens, ((0, 0), (pad, 0)))
  params = ready(method.model, params, method.compute)
  given = Given(params, prompts.course.now())
  if n == 0:
    return
  state = begin(method, length, samples, given, tokens, lengths, prompts.rows)
  while True:
    room = min(n - made, leg)
    blocks = _window(method, given, prompts.course, state, room, pace)
    for now, block in blocks:
      state, made = now, made + block.tokens.shape[1]
      yield block
    if made >= n or np.all(state.rows.ended):
      return
    state = make_room(state, leg)


def _sizes(most: int, half: int, longest: int, n: int) -> tuple[int, int]:
  """Tokens read at once, and of a cache that `n` more fit in.

  Windows of a text that slides are all of one size, so that the second need
  not be compiled.
  """
  if longest + n - 1 > most:
    return min(rounded(max(min(longest, most), half)), most), most
  return min(rounded(longest), most), min(rounded(longest + n - 1), most)


def _window(
  method: Method,
  given: Given,
  course: Course,
  state: State,
  room: int,
  pace: float | None,
) -> Iterator[tuple[State, New]]:
  """The state again and again, and new tokens, up to `room` in all.

  The size of a block follows from the time the last one took, unless the host
  has to look at every token. The first token is the one that reading the
  prompt has made.
  """
  done, size = 0, room if pace is None else 1
  while done < room:
    began = time.perf_counter()
    until = min(done + (course.stride or size), room)
    given = given.replace(constraint=course.now())
    state = extend(method, given, state, np.int32(until))
    # Copies: the buffers themselves are given to the next call.
    filled = int(state.filled)
    new = state.new.between(done, filled)
    check_scores(state)
    course.read(new.tokens)
    took, done = time.perf_counter() - began, filled
    if pace is not None:
      size = size * 2 if 2 * took < pace else max(1, size // 2)
    ended = np.all(state.rows.ended)
    yield state, new
    if ended:
      return


def check_scores(state: State) -> None:
  """Raises where the model gave no numbers to choose by."""
  broken = np.flatnonzero(np.array(state.broken))
  if len(broken):
    raise UserError(
      f"the logits of row {broken[0]} are NaN: the parameters are damaged or "
      "have diverged in training; load an earlier checkpoint"
    )


def rounded(n: int) -> int:
  """`n` or a little more: four sizes per octave, so that few are compiled.

  >>> [rounded(n) for n in (1, 17, 64, 65, 129, 1000)]
  [16, 32, 64, 80, 160, 1024]
  """
  step = max(16, 1 << max(n.bit_length() - 3, 0))
  return -(-n // step) * step
