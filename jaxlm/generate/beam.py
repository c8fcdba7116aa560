"""Beam search: several continuations at once, the best of all extensions kept.

`beam_search` finds what transformers' `generate(num_beams=k)` finds: the same
length penalty, the same three rules of when to stop. With `groups` it is
diverse beam search (Vijayakumar et al., arXiv:1610.02424): groups of beams
that avoid each other's tokens.
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
from jaxlm.generate.filters import Filter, Seen
from jaxlm.generate.prompts import check
from jaxlm.generate.samplers import apply
from jaxlm.generate.step import UNROLLED, prefill, step, take
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder, logits

Array = jax.Array
Tree = Any

FAR = -1e9  # added to scores to put candidates behind all others


def best(scores: Array, k: int) -> tuple[Array, Array, Array]:
  """The `k` best extensions of several candidates: every search's core.

  Args:
    scores: of each candidate and token, `[..., candidates, vocab]`.
    k: how many are kept.

  Returns:
    Scores, candidates and tokens, `[..., k]` each, best first.
  """
  vocab = scores.shape[-1]
  flat = scores.reshape(*scores.shape[:-2], -1)
  top, which = jax.lax.top_k(flat, min(k, flat.shape[-1]))
  return top, which // vocab, which % vocab


@dataclass(frozen=True)
class Beam:
  """How beams are searched.

  Attributes:
    beams: continuations kept of each prompt.
    length_penalty: a finished text scores log p / length ** penalty; above 0
      longer texts gain, at 0 the likeliest wins.
    early_stopping: True stops once `beams` texts have ended; False when no
      running one is likely to beat them; 'never' when none can.
    groups: sets of beams that do not look at each other's scores.
    diversity: what a token loses for each beam of an earlier group that takes
      it in the same place (the Hamming term of arXiv:1610.02424, section 4).
    filters: applied to the log-probabilities.
  """

  beams: int = 4
  length_penalty: float = 1.0
  early_stopping: bool | str = False
  groups: int = 1
  diversity: float = 0.5
  filters: tuple[Filter, ...] = ()

  def __post_init__(self):
    if self.beams < 1 or self.groups < 1 or self.beams % self.groups:
      raise UserError(
        f"{self.beams} beams do not divide into {self.groups} groups; use a "
        "multiple"
      )
    if self.early_stopping not in (True, False, "never"):
      raise UserError(
        f"early_stopping={self.early_stopping!r}; use True, False or 'never'"
      )


@struct.dataclass
class Texts:
  """Continuations `[sets, beams, room]` and their scores `[sets, beams]`.

  A set is what competes: the beams of one prompt, or of one of its groups.
  """

  tokens: Array
  scores: Array

  def pick(self, which: Array, scores: Array) -> "Texts":
    """Those beams, `[sets, k]`, with new scores."""
    return Texts(
      jnp.take_along_axis(self.tokens, which[..., None], axis=1), scores
    )


@struct.dataclass
class State:
  """What a search knows between two steps.

  Attributes:
    running: texts that go on.
    done: the best texts that have ended.
    ended: which places of `done` are taken, bool [sets, beams].
    open: whether a running text may still improve on them, bool [sets].
    stuck: whether all candidates of the last step had to end.
    hidden: last hidden states of the running texts, [rows, 1, dim].
    cache: of the running texts.
    made: how many tokens there are, int32.
  """

  running: Texts
  done: Texts
  ended: Array
  open: Array
  stuck: Array
  hidden: Array
  cache: Tree
  made: Array


@dataclass(frozen=True)
class Found:
  """The texts that a search has found, best first.

  Attributes:
    tokens: new tokens int32 [batch, beams, max_new_tokens]; behind its end a
      text is filled up with the first end token.
    scores: log p / length ** penalty, float32 [batch, beams].
  """

  tokens: np.ndarray
  scores: np.ndarray


def beam_search(
  model: Decoder,
  params: Tree,
  tokens: Any,
  max_new_tokens: int,
  beam: Beam = Beam(),
  *,
  lengths: Any = None,
  eot: int | Sequence[int] | None = None,
  compute: Compute = UNROLLED,
) -> Found:
  """The best continuations by beam search.

  Arguments are those of `decode.generate`, and `beam`.

  Raises:
    UserError: as `decode.generate`; or if nothing is asked for.
  """
  if max_new_tokens < 1:
    raise UserError("a search needs max_new_tokens of at least 1")
  prompts = check(
    model, tokens, max_new_tokens, None, lengths, eot, slide=False
  )
  seq = prompts.tokens.shape[1]
  room = rounded(max_new_tokens)
  state = _search(
    (model, beam, compute),
    (min(rounded(seq + room), model.max_positions), room),
    ready(model, params, compute),
    prompts.tokens,
    prompts.lengths,
    prompts.rows.eot,
    np.int32(max_new_tokens),
  )
  return _found(state, beam, prompts.rows.eot[0], max_new_tokens)


def _found(state: State, beam: Beam, eot: int, n: int) -> Found:
  """The texts of all groups of a prompt together, best first."""
  done = jax.device_get(state.done)
  batch = len(done.scores) // beam.groups
  scores = done.scores.reshape(batch, beam.beams)
  tokens = done.tokens.reshape(batch, beam.beams, -1)[:, :, :n]
  order = np.argsort(-scores, axis=1, kind="stable")
  tokens = np.take_along_axis(tokens, order[..., None], axis=1)
  tokens = np.where(tokens < 0, max(int(eot), 0), tokens)
  return Found(tokens, np.take_along_axis(scores, order, axis=1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(
  what: tuple[Decoder, Beam, Compute],
  sizes: tuple[int, int],
  params: Tree,
  tokens: Array,
  lengths: Array,
  eot: Array,
  limit: Array,
) -> State:
  """Prefill, then steps until no set can improve."""
  model, beam, compute = what
  length, room = sizes
  batch, seq = tokens.shape
  x, cache = prefill(model, params, tokens, lengths, length, compute)
  who = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), beam.beams)
  state = _start(beam, batch, room)
  state = state.replace(hidden=x[who], cache=take(cache, who, compute))
  here = jnp.arange(seq, dtype=jnp.int32)[None] >= seq - lengths[:, None]
  prompt = jnp.where(here, tokens, -1)[who]

  def advance(state: State) -> State:
    scores = _log_probs(what, params, state, prompt)
    state, rows = _extend(beam, state, scores, eot, limit)
    last = jax.lax.dynamic_index_in_dim(
      state.running.tokens, state.made - 1, axis=2, keepdims=False
    )
    x, cache = step(
      model,
      params,
      last.reshape(-1, 1),
      lengths[who] + state.made - 1,
      take(state.cache, rows, compute),
      compute,
    )
    return state.replace(hidden=x, cache=cache)

  def go_on(state: State) -> Array:
    waiting = ~jnp.all(state.ended) | (beam.early_stopping is not True)
    return jnp.any(state.open) & waiting & ~state.stuck

  return jax.lax.while_loop(go_on, advance, state)


def _start(beam: Beam, batch: int, room: int) -> State:
  """Nothing found; only the first beam of a set counts, all being equal."""
  sets, k = batch * beam.groups, beam.beams // beam.groups
  nothing = jnp.full((sets, k, room), -1, jnp.int32)
  first = jnp.where(jnp.arange(k) == 0, 0.0, FAR).astype(jnp.float32)
  return State(
    running=Texts(nothing, jnp.broadcast_to(first, (sets, k))),
    done=Texts(nothing, jnp.full((sets, k), FAR, jnp.float32)),
    ended=jnp.zeros((sets, k), bool),
    open=jnp.ones(sets, bool),
    stuck=jnp.bool_(False),
    hidden=None,
    cache=None,
    made=jnp.int32(0),
  )


def _log_probs(what: tuple, params: Tree, state: State, prompt: Array) -> Array:
  """Filtered log-probabilities of the next token `[sets, beams, vocab]`."""
  model, beam, compute = what
  y = logits(model, params, state.hidden, compute)[:, 0]
  y = jax.nn.log_softmax(y, axis=-1)
  texts = state.running.tokens
  if beam.filters:
    new = texts.reshape(len(prompt), -1)
    seq = jnp.int32(prompt.shape[1])
    text = jnp.concatenate([prompt, new], axis=1)
    y = apply(beam.filters, y, Seen(text, seq, seq + state.made))
  return y.reshape(*texts.shape[:2], -1)


def _extend(
  beam: Beam, state: State, scores: Array, eot: Array, limit: Array
) -> tuple[State, Array]:
  """Every running text by one token; also the rows the new ones come from."""
  sets, k = state.running.scores.shape
  # Enough for k that go on, should all the others end.
  n = max(2, 1 + eot.shape[0]) * k
  scores = scores + state.running.scores[..., None]
  top, which, token = _candidates(beam, scores, n)
  texts = state.running.pick(which, top)
  texts = texts.replace(tokens=texts.tokens.at[:, :, state.made].set(token))
  made = state.made + 1
  stops = jnp.any(token[..., None] == eot[None, None], axis=-1)
  stops = stops | (made >= limit)

  going, order = jax.lax.top_k(top + jnp.where(stops, FAR, 0.0), k)
  running = texts.pick(order, going)
  state = _finish(beam, state, texts, stops, made)
  state = state.replace(running=running, made=made, stuck=jnp.all(stops))
  source = jnp.take_along_axis(which, order, axis=1)
  rows = jnp.arange(sets, dtype=jnp.int32)[:, None] * k + source
  return state.replace(open=_may_improve(beam, state, limit)), rows.reshape(-1)


def _candidates(
  beam: Beam, scores: Array, n: int
) -> tuple[Array, Array, Array]:
  """`best` of each set; later groups pay for the tokens of earlier ones."""
  if beam.groups == 1:
    return best(scores, n)
  groups = scores.reshape(-1, beam.groups, *scores.shape[1:])
  taken = jnp.zeros((groups.shape[0], scores.shape[-1]), jnp.float32)
  rows = jnp.arange(groups.shape[0])[:, None]
  found = []
  for group in range(beam.groups):
    here = groups[:, group] - beam.diversity * taken[:, None]
    found.append(best(here, n))
    chosen = found[-1][2][:, : scores.shape[1]]
    taken = taken.at[rows, chosen].add(1.0)
  return tuple(
    jnp.stack(x, axis=1).reshape(-1, n) for x in zip(*found, strict=True)
  )


def _finish(
  beam: Beam, state: State, texts: Texts, stops: Array, made: Array
) -> State:
  """Takes in the texts that have just ended, if they are good enough.

  Only the first k candidates may end: those behind them are there so that
  enough are left to go on.
  """
  k = state.ended.shape[1]
  ends = stops & (jnp.arange(stops.shape[1]) < k)[None]
  length = made.astype(jnp.float32) ** beam.length_penalty
  allowed = ends & state.open[:, None]
  if beam.early_stopping is True:
    allowed = allowed & ~jnp.all(state.ended, axis=1, keepdims=True)
  scores = texts.scores / length + jnp.where(allowed, 0.0, FAR)
  every = jnp.concatenate([state.done.scores, scores], axis=1)
  both = Texts(
    jnp.concatenate([state.done.tokens, texts.tokens], axis=1), every
  )
  top, which = jax.lax.top_k(every, k)
  ended = jnp.concatenate([state.ended, ends], axis=1)
  return state.replace(
    done=both.pick(which, top),
    ended=jnp.take_along_axis(ended, which, axis=1),
  )


def _may_improve(beam: Beam, state: State, limit: Array) -> Array:
  """Whether the best running text could still enter, bool [sets]."""
  longest = beam.early_stopping == "never" and beam.length_penalty > 0.0
  length = (limit if longest else state.made).astype(jnp.float32)
  hope = state.running.scores[:, :1] / length**beam.length_penalty
  worst = jnp.min(state.done.scores, axis=1, keepdims=True)
  worst = jnp.where(state.ended, worst, FAR)
  return state.open & jnp.any(hope > worst, axis=1)
