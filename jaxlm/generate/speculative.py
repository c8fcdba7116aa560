"""Speculative decoding: a cheap draft proposes, the model judges many at once.

    tokens, stats = speculate(model, params, tokens, 100, Lookup(), gamma=4)

A step reads every weight, whether for one token or for five. So a draft
proposes γ tokens x_1 .. x_γ, drawn from q_1 .. q_γ; the target reads them all
in one step, which gives the distributions p_1 .. p_{γ+1} it would have drawn
from; and each proposal in turn is accepted with probability

    min(1, p_i(x_i) / q_i(x_i)).

In the place of the first that is not, a token is drawn from what is left,
max(0, p_i - q_i) / sum(max(0, p_i - q_i)); if all are accepted, one more from
p_{γ+1}. Either way each token has the target's own distribution (Leviathan et
al., arXiv:2211.17192, appendix A; Chen et al., arXiv:2302.01318), and a greedy
text is the plain greedy text. Filters are applied to both p and q, and the
proof does not mind.

Rows accept different numbers of tokens and so stand at different positions;
the whole loop is compiled. What row b draws for token i follows from its key
and i alone.
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
from jaxlm.generate.automaton import (
  Automaton,
  keep_open,
  moved,
  open_tokens,
)
from jaxlm.generate.decode import ready, rounded
from jaxlm.generate.drafts import (
  Draft,
  DraftModel,
  Medusa,
  Method,
  Spare,
  check_cache,
  ready_heads,
)
from jaxlm.generate.judge import (
  ACCEPT,
  CHOOSE,
  Text,
  distribution,
  draw,
  verify,
)
from jaxlm.generate.prompts import Prompts, check
from jaxlm.generate.samplers import Greedy, Sample, largest
from jaxlm.generate.step import UNROLLED, forget, prefill
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder, hidden, logits

Array = jax.Array
Tree = Any


@dataclass(frozen=True)
class Stats:
  """What speculation has cost and saved.

  Attributes:
    target_calls: steps of the target, after it has read the prompts.
    calls: in how many of them each row still took part, [rows].
    proposed: tokens that the draft proposed within the room, [rows].
    accepted: those of them that the target accepted, [rows].
    rejected: those it rejected; behind one nothing is judged, [rows].
    made: new tokens, up to the end of each row, [rows].
  """

  target_calls: int
  calls: np.ndarray
  proposed: np.ndarray
  accepted: np.ndarray
  rejected: np.ndarray
  made: np.ndarray

  @property
  def tokens_per_call(self) -> float:
    """Tokens that a row gains by a step of the target; plainly it is 1.

    The first token comes from reading the prompt, and does not count. Where
    each proposal is accepted with probability a, independently, the mean is
    (1 - a^(γ+1)) / (1 - a) (arXiv:2211.17192, equation 1).
    """
    gained = int(np.maximum(self.made - 1, 0).sum())
    return gained / max(int(self.calls.sum()), 1)

  @property
  def acceptance(self) -> float:
    """Share of the proposals judged that were accepted."""
    accepted, rejected = int(self.accepted.sum()), int(self.rejected.sum())
    return accepted / max(accepted + rejected, 1)


@struct.dataclass
class State:
  """What the loop knows between two steps of the target.

  Attributes:
    text: the rows.
    cache: what the target remembers, of all tokens but the last.
    draft: what the draft remembers.
    ended: rows that have ended, bool [rows].
    place: where each row stands in a constraint, int32 [rows].
    broken: whether a row's logits were NaN, bool [rows].
    counts: calls, proposed, accepted, rejected, int32 [4, rows].
    calls: steps of the target, int32.
  """

  text: Text
  cache: Tree
  draft: Tree
  ended: Array
  place: Array
  broken: Array
  counts: Array
  calls: Array


@struct.dataclass
class Given:
  """What no step changes: both sets of parameters, ends, a constraint."""

  params: Tree
  draft_params: Tree
  eot: Array
  constraint: Automaton | None


def speculate(
  model: Decoder,
  params: Tree,
  tokens: Any,
  max_new_tokens: int,
  draft: Draft,
  draft_params: Tree | None = None,
  sampler: Greedy | Sample = Greedy(),
  key: Array | None = None,
  *,
  gamma: int = 4,
  lengths: Any = None,
  eot: int | Sequence[int] | None = None,
  constraint: Automaton | None = None,
  compute: Compute = UNROLLED,
) -> tuple[Array, Stats]:
  """Continues sequences of tokens as `generate` does, in fewer steps.

  Greedy, the tokens are those of `generate` (as long as no two logits are so
  near that the order of a sum decides); sampled, they have the same
  distribution, though other draws.

  Args:
    model: the target, which decides.
    params: its arrays.
    tokens: prompts `[batch, seq]`, integers.
    max_new_tokens: how many to add to each.
    draft: what proposes: `DraftModel(model)`, `Lookup()` or `Medusa(heads)`.
    draft_params: its arrays; None for a lookup.
    sampler: `Greedy` or `Sample`.
    key: randomness, one key or one per row, as for `generate`.
    gamma: tokens proposed at a time.
    lengths: of prompts that are padded on the left, as for `generate`.
    eot: a row ends with this token, or any of these, and is filled up with the
      first of them.
    constraint: what the new tokens have to spell, as a table. What breaks it
      is rejected, so the text is valid whatever the draft proposes.
    compute: how to run.

  Returns:
    Tokens `[batch, seq + max_new_tokens]`, int32, and figures.

  Raises:
    UserError: as `generate`; for a draft that does not fit the target, for
      gamma below 1, a sampler whose probabilities are not known, and for
      layers whose state cannot be taken back.
  """
  prompts = check(
    model,
    tokens,
    max_new_tokens,
    key,
    lengths,
    eot,
    slide=False,
    constraint=constraint,
  )
  how = Method(model, draft, gamma, sampler, compute)
  needed = int(prompts.lengths.max()) + max(max_new_tokens, 1) - 1
  _check(how, draft_params, needed, prompts)
  if max_new_tokens == 0:
    zeros = np.zeros(len(prompts.tokens), np.int32)
    return jnp.asarray(prompts.tokens), Stats(0, *[zeros] * 5)
  given = Given(
    ready(model, params, compute),
    _ready(draft, draft_params, compute),
    prompts.rows.eot,
    prompts.course.now(),
  )
  return _run(how, given, prompts, max_new_tokens)


def _check(
  how: Method, draft_params: Tree, needed: int, prompts: Prompts
) -> None:
  """Raises UserError for what does not go together."""
  if not isinstance(how.gamma, int) or how.gamma < 1:
    raise UserError(
      f"gamma={how.gamma} tokens proposed at a time; use a whole number from 1"
    )
  if not isinstance(how.sampler, Greedy | Sample):
    raise UserError(
      f"the sampler {how.sampler!r} does not tell its probabilities, which "
      "speculation needs; use Greedy or Sample with filters"
    )
  if prompts.course.stride is not None:
    raise UserError(
      "this constraint is followed on the host, one token at a time, and "
      "speculation makes several; compile it as a table, or use plain generate"
    )
  check_cache(how.model, "the target")
  how.draft.check(how.model, draft_params, how.gamma, needed)


def _ready(draft: Draft, params: Tree, compute: Compute) -> Tree:
  """A draft's parameters as the loop reads them."""
  if isinstance(draft, DraftModel):
    return ready(draft.model, params, compute)
  if isinstance(draft, Medusa):
    return ready_heads(params, draft.heads, compute)
  return params


def _run(
  how: Method, given: Given, prompts: Prompts, n: int
) -> tuple[Array, Stats]:
  """Both compiled parts, and what they have found."""
  longest = int(prompts.lengths.max())
  most = how.model.max_positions
  seq = min(rounded(longest), most)
  length = min(rounded(longest + n - 1), most)
  tokens = np.zeros((len(prompts.tokens), seq), np.int32)
  tokens[:, seq - longest :] = prompts.tokens[:, -longest:]
  state = _begin(
    how, length, given, tokens, prompts.lengths, prompts.rows.keys, np.int32(n)
  )
  state = _go_on(how, given, state)
  text, counts = jax.device_get((state.text.replace(keys=None), state.counts))
  if state.broken.any():
    row = int(np.argmax(state.broken))
    raise UserError(
      f"row {row} came to logits that are NaN: the parameters are damaged, or "
      "have diverged in training; load an earlier checkpoint"
    )
  new, made = text.tokens[:, seq : seq + n], text.end - seq
  new = np.where(np.arange(n) < made[:, None], new, given.eot[0])
  found = np.concatenate([prompts.tokens, new], axis=1)
  return jnp.asarray(found), Stats(int(state.calls), *counts, made)


# --- The compiled part ------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
  how: Method,
  length: int,
  given: Given,
  tokens: Array,
  lengths: Array,
  keys: Array,
  n: Array,
) -> State:
  """Reads prompts `[rows, seq]` and chooses the first new token."""
  rows, seq = tokens.shape
  x, cache = prefill(
    how.model,
    given.params,
    tokens,
    lengths,
    length,
    how.compute,
    Spare(how.gamma),
  )
  draft = how.draft.begin(
    how, given.draft_params, x[:, 0], tokens, lengths, length
  )
  here = jnp.arange(seq, dtype=jnp.int32)[None] >= seq - lengths[:, None]
  room = jnp.full((rows, length + how.gamma), -1, jnp.int32)
  text = Text(
    tokens=jnp.concatenate([jnp.where(here, tokens, -1), room], axis=1),
    end=jnp.full(rows, seq, jnp.int32),
    start=jnp.int32(seq),
    stop=jnp.int32(seq) + n,
    pad=seq - lengths,
    keys=keys,
  )
  none = jnp.zeros(rows, jnp.int32)
  state = State(
    text=text,
    cache=cache,
    draft=draft,
    ended=jnp.zeros(rows, bool),
    place=none,
    broken=jnp.zeros(rows, bool),
    counts=jnp.zeros((4, rows), jnp.int32),
    calls=jnp.int32(0),
  )
  p, state = _judge(how, given, state, x, none[None], jnp.ones((rows, 1), bool))
  token = draw(how.sampler, p[:, 0], text.draws(0, CHOOSE))
  state = state.replace(text=text.put(token[:, None]))
  return _move(how, given, state, none, none, token)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _go_on(how: Method, given: Given, state: State) -> State:
  """Steps of the target until all rows have ended."""
  return jax.lax.while_loop(
    lambda state: ~jnp.all(state.ended),
    lambda state: _round(how, given, state),
    state,
  )


def _round(how: Method, given: Given, state: State) -> State:
  """Some tokens are proposed, read, judged; each row keeps one or more."""
  text = state.text
  tokens, q, draft = how.draft.propose(
    how, given.draft_params, state.draft, text
  )
  state = state.replace(text=text.put(tokens), draft=draft)
  places = _places(given.constraint, state.place, tokens)
  whole = functools.partial(_look, how, given, places, how.gamma)
  if how.draft.may_be_silent:
    alone = functools.partial(_look, how, given, places, 0)
    heard = jnp.any((q > 0) & ~state.ended[:, None, None])
    x, p, state = jax.lax.cond(heard, whole, alone, state)
  else:
    x, p, state = whole(state)
  accepted, left = verify(p, q, tokens, _uniform(how, text))
  token = draw(how.sampler, left, text.draws(accepted, CHOOSE))
  rows = jnp.arange(len(tokens), dtype=jnp.int32)
  state = state.replace(
    text=state.text.put(token[:, None], accepted),
    draft=how.draft.settle(draft, x[rows, accepted]),
    counts=state.counts + _counted(state, tokens, q, accepted),
    calls=state.calls + 1,
  )
  return _move(how, given, state, accepted, places[accepted, rows], token)


def _look(
  how: Method, given: Given, places: Array, n: int, state: State
) -> tuple[Array, Array, State]:
  """The target reads the last token of each row and `n` proposals behind it.

  Returns:
    Hidden states `[rows, gamma + 1, dim]` and probabilities `[rows, gamma + 1,
    vocab]`, zero for what was not read; and the state.
  """
  read, positions = state.text.window(-1, n + 1)
  x, cache = hidden(
    how.model,
    given.params,
    read,
    At(positions=positions),
    forget(state.cache, state.text.position, how.compute),
    how.compute,
  )
  state = state.replace(cache=cache)
  p, state = _judge(how, given, state, x, places[: n + 1], positions >= 0)
  rest = ((0, 0), (0, how.gamma - n), (0, 0))
  return jnp.pad(x, rest), jnp.pad(p, rest), state


def _places(constraint: Automaton | None, place: Array, tokens: Array) -> Array:
  """Where rows stand before each proposal and behind the last, [some, rows]."""

  def after(place: Array, token: Array) -> tuple[Array, Array]:
    return moved(constraint, place, token), place

  last, before = jax.lax.scan(after, place, tokens.T)
  return jnp.concatenate([before, last[None]])


def _judge(
  how: Method, given: Given, state: State, x: Array, places: Array, real: Array
) -> tuple[Array, State]:
  """The target's probabilities for the next tokens, `[rows, some, vocab]`.

  Args:
    how: what is compiled.
    given: parameters and constraint.
    state: its text has the proposals behind its end.
    x: hidden states, `[rows, some, dim]`.
    places: where rows stand in the constraint, int32 `[some, rows]`.
    real: which of the states are of a token that was read, `[rows, some]`.
  """
  text, constraint = state.text, given.constraint
  scores = logits(how.model, given.params, x, how.compute)

  def one(scores: Array, place: Array, i: Array) -> Array:
    made = (text.end + i - text.start)[:, None]
    open_ = open_tokens(constraint, place, made, scores.shape[1])
    scores = keep_open(scores, open_)
    p = distribution(how.sampler, scores, text, i)
    if open_ is None:
      return p
    # Filters may forbid all that is open; the constraint is the stronger.
    fine = jnp.sum(jnp.where(open_, p, 0.0), axis=1, keepdims=True) > 0
    best = jax.nn.one_hot(largest(scores), p.shape[1], dtype=p.dtype)
    return jnp.where(fine, p, best)

  some = jnp.arange(x.shape[1], dtype=jnp.int32)
  p = jax.vmap(one, (1, 0, 0), 1)(scores, places, some)
  broken = jnp.any(jnp.isnan(jnp.max(scores, axis=-1)) & real, axis=1)
  return p, state.replace(broken=state.broken | (broken & ~state.ended))


def _uniform(how: Method, text: Text) -> Array:
  """What decides on each proposal, `[rows, gamma]`; greedy needs no chance."""
  if isinstance(how.sampler, Greedy):
    return jnp.zeros((len(text.end), how.gamma), jnp.float32)

  def one(i: Array) -> Array:
    return jax.vmap(jax.random.uniform)(text.draws(i, ACCEPT))

  return jax.vmap(one)(jnp.arange(how.gamma, dtype=jnp.int32)).T


def _counted(state: State, tokens: Array, q: Array, accepted: Array) -> Array:
  """What a step adds to `State.counts`; proposals beyond the room are none."""
  own = jnp.take_along_axis(q, tokens[..., None], axis=2)[..., 0]
  room = state.text.stop - state.text.end
  proposed = jnp.minimum(jnp.sum(own > 0, axis=1, dtype=jnp.int32), room)
  accepted = jnp.minimum(accepted, room)
  one = jnp.ones_like(accepted)
  rejected = (accepted < proposed).astype(jnp.int32)
  new = jnp.stack([one, proposed, accepted, rejected])
  return jnp.where(state.ended[None], 0, new)


def _move(
  how: Method,
  given: Given,
  state: State,
  accepted: Array,
  place: Array,
  token: Array,
) -> State:
  """Takes in what stands behind the end of each row, up to its own end.

  Args:
    how: what is compiled.
    given: the tokens that end a row, and a constraint.
    state: its text has the new tokens behind its end.
    accepted: how many of them come before the last, [rows].
    place: where rows stand in the constraint, before the last, [rows].
    token: the last, [rows].
  """
  text, i = state.text, jnp.arange(how.gamma + 1, dtype=jnp.int32)[None]
  new = jnp.take_along_axis(text.tokens, text.end[:, None] + i, axis=1)
  ends = jnp.any(new[..., None] == given.eot[None, None], axis=-1)
  ends = ends & (i <= accepted[:, None])
  ended = jnp.any(ends, axis=1)
  count = jnp.where(ended, jnp.argmax(ends, axis=1), accepted) + 1
  count = jnp.minimum(count, text.stop - text.end).astype(jnp.int32)
  end = text.end + jnp.where(state.ended, 0, count)
  return state.replace(
    text=text.replace(end=end),
    ended=state.ended | ended | (end >= text.stop),
    place=moved(given.constraint, place, token),
  )
