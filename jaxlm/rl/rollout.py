"""Rollouts: what a policy said, and how likely it and others find that.

`sample` is one compiled program: prompts are read once for all their samples,
then tokens come from a cache until every row has ended. `logprobs` is the
forward pass of training over the same tokens. Both see the same distribution:
what the sampler does to the logits (temperature, top-k, top-p), the trainer
does, too, and the set of tokens the sampler chose from is kept for it
(arXiv:2512.02556, "keep sampling mask"). The two therefore agree to rounding,
which `guards` checks in every rollout.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxlm.errors import UserError
from jaxlm.generate import samplers
from jaxlm.generate.filters import Temperature
from jaxlm.generate.new import put
from jaxlm.generate.samplers import Sample
from jaxlm.generate.step import UNROLLED, read
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import gather, map_params, move
from jaxlm.layers.recurrent import place as moved
from jaxlm.losses import cross_entropy
from jaxlm.models.decoder import Decoder, hidden, layers_apart, logits
from jaxlm.models.heads import ScalarHead
from jaxlm.rl import place
from jaxlm.rl.losses import entropy

Array = jax.Array
Tree = Any
AHEAD = 2**22  # numbers of noise that are drawn before the loop, not within


# --- Who acts, and how ------------------------------------------------------


@dataclass(frozen=True)
class Actor:
  """A policy and, where there is one, its critic.

  Attributes:
    model: the policy.
    value: the critic's head, on hidden states; None for no critic.
    critic: a decoder of the critic's own; None means it reads the policy's.
  """

  model: Decoder
  value: ScalarHead | None = None
  critic: Decoder | None = None

  def params(self) -> dict[str, Any]:
    """Those of the model, and `value` and `critic` beside them."""
    tree = self.model.params()
    if self.value is not None:
      tree["value"] = self.value.params()
    if self.critic is not None:
      tree["critic"] = self.critic.params()
      tree["critic"].pop("head", None)  # it does not talk
    return tree


@dataclass(frozen=True)
class Draw:
  """How responses are drawn.

  Attributes:
    new: the most tokens of a response.
    samples: responses to each prompt.
    eos: the token that ends one; None: only length does.
    temperature, top_k, top_p: as in generation; 0 and 1.0 keep all tokens.
    gathered: where devices share the weights, each gathers them once for all
      tokens, and has to have room for them; False: layer by layer for each.
  """

  new: int
  samples: int = 1
  eos: int | None = None
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  gathered: bool = True

  def __post_init__(self):
    if self.new < 1 or self.samples < 1:
      raise UserError(
        f"{self.samples} responses of {self.new} tokens; use 1 or more of both"
      )
    if self.temperature <= 0:
      raise UserError(
        f"temperature={self.temperature}: a policy that always says the "
        "likeliest explores nothing; use a number above 0"
      )
    _ = self.sampler  # says what else makes no sense

  @property
  def sampler(self) -> Sample:
    """The same for `jaxlm.generate`."""
    top_p = None if self.top_p == 1.0 else self.top_p
    return Sample(self.temperature, self.top_k or None, top_p)

  @property
  def cuts(self) -> bool:
    """Whether some tokens are ruled out."""
    return any(not isinstance(f, Temperature) for f in self.sampler.filters)


@struct.dataclass
class Rollout:
  """Responses, and what is known of them. Rows of a group are neighbours.

  Attributes:
    tokens: prompt and response, padded on the right, int32 [rows, seq].
    starts: where each response begins, int32 [rows].
    mask: which of its tokens are there, bool [rows, new]; the end is one.
    logp_old: of its tokens, when they were sampled, float32 [rows, new].
    group: the prompt it belongs to, int32 [rows].
    kept: which tokens could be chosen, bool [rows, new, vocab]; None: all.
    logp_ref: of its tokens, under the reference, float32 [rows, new].
    values: what the critic expected before each token, float32 [rows, new].
    rewards: of each response, float32 [rows].
  """

  tokens: Array
  starts: Array
  mask: Array
  logp_old: Array
  group: Array
  kept: Array | None = None
  logp_ref: Array | None = None
  values: Array | None = None
  rewards: Array | None = None


@struct.dataclass
class Scores:
  """What a model says of a rollout's tokens, each float32 [rows, new]."""

  logp: Array
  entropy: Array
  values: Array | None = None


# --- Sampling ---------------------------------------------------------------


@struct.dataclass
class _State:
  """Between two tokens: the cache, where rows stand, what has been said."""

  i: Array
  x: Array
  cache: Tree
  position: Array
  ended: Array
  tokens: Array
  mask: Array
  logp: Array
  kept: Array | None


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def sample(
  model: Decoder,
  draw: Draw,
  params: Tree,
  prompts: Array,
  lengths: Array,
  keys: Array,
  compute: Compute = UNROLLED,
) -> Rollout:
  """Responses to prompts, by one program.

  Token i of a row is drawn with `fold_in(keys[row], i)`, as in generation, so
  that a response depends on nothing but its prompt and its key. On a mesh each
  device reads its share of the prompts and writes its share of the responses.

  Args:
    model: the policy.
    draw: how.
    params: its arrays; further entries (a critic's) are not looked at.
    prompts: int32 `[prompts, seq]`, padded on the left.
    lengths: how many of the last tokens of each are its prompt, `[prompts]`.
    keys: one for each response, `[prompts * samples]`.
    compute: how to run.
  """
  n, seq = prompts.shape
  params = _cast(model, params, draw, compute)
  x, cache = read(model, params, prompts, lengths, seq + draw.new - 1, compute)

  def each(leaf: Array, axis: int = 0) -> Array:
    return _each(leaf, draw.samples, axis, compute)

  behind = 0 if compute.unroll else 1  # in a cache: behind the layers
  cache = jax.tree.map(lambda leaf: each(leaf, behind), cache)
  group = each(_rows(jnp.arange(n, dtype=jnp.int32), compute))
  x, prompts, starts = each(x[:, -1:]), each(prompts), each(lengths)
  state = _first(model, draw, x, cache, starts, compute)

  noise = None
  if len(keys) * draw.new * model.vocab <= AHEAD:
    noise = jax.vmap(lambda i: _noise(keys, i, model.vocab), out_axes=1)(
      jnp.arange(draw.new, dtype=jnp.int32)
    )

  def choose(state: _State) -> _State:
    if noise is None:
      here = _noise(keys, state.i, model.vocab)
    else:
      here = noise[:, state.i]
    return _choose(model, draw, params, here, state, compute)

  def advance(state: _State) -> _State:
    last = jax.lax.dynamic_slice_in_dim(state.tokens, state.i - 1, 1, 1)
    at = At(positions=state.position[:, None])
    x, cache = hidden(model, params, last, at, state.cache, compute)
    position = state.position + 1
    return choose(state.replace(x=x, cache=cache, position=position))

  def go_on(state: _State) -> Array:
    return (state.i < draw.new) & ~jnp.all(state.ended)

  state = jax.lax.while_loop(go_on, advance, choose(state))
  return Rollout(
    tokens=_joined(prompts, starts, state.tokens, state.mask),
    starts=starts,
    mask=state.mask,
    logp_old=state.logp,
    group=group,
    kept=state.kept,
  )


def _cast(model: Decoder, params: Tree, draw: Draw, compute: Compute) -> Tree:
  """Parameters of the policy as decoding reads them."""
  tree = model.params()
  params = map_params(
    lambda p, x: x.astype(p.compute or compute.jnp_dtype),
    tree,
    {name: params[name] for name in tree},
  )
  if draw.gathered and compute.rules is not None:
    with jax.named_scope("gathered"):
      params = move(params, tree, compute.rules.computed_spec)
  if not compute.unroll:
    return params
  return params | {"layers": layers_apart(model, params["layers"])}


def _rows(x: Array, compute: Compute) -> Array:
  """`x` [rows, ...] where the rules want a batch."""
  return moved(x, ("batch", *(None,) * (x.ndim - 1)), compute)


def _each(x: Array, n: int, axis: int, compute: Compute) -> Array:
  """Each row, along `axis`, `n` times in neighbouring rows."""
  rows = compute.spec(("batch",), (x.shape[axis] * n,))
  if rows is None:
    return jnp.repeat(x, n, axis)
  spec = [*jax.typeof(x).sharding.spec]
  spec[axis] = rows[0]
  return jnp.repeat(x, n, axis, out_sharding=PartitionSpec(*spec))


def _first(
  model: Decoder,
  draw: Draw,
  x: Array,
  cache: Tree,
  lengths: Array,
  compute: Compute,
) -> _State:
  """Nothing said yet."""
  kept = None

  def all_rows(value: Any, dtype: Any, *shape: int) -> Array:
    return _rows(jnp.full((len(x), *shape), value, dtype), compute)

  if draw.cuts:
    kept = all_rows(True, bool, draw.new, model.vocab)
  return _State(
    i=jnp.int32(0),
    x=x,
    cache=cache,
    position=lengths,
    ended=all_rows(False, bool),
    tokens=all_rows(0, jnp.int32, draw.new),
    mask=all_rows(False, bool, draw.new),
    logp=all_rows(0, jnp.float32, draw.new),
    kept=kept,
  )


def _choose(
  model: Decoder,
  draw: Draw,
  params: Tree,
  noise: Array,
  state: _State,
  compute: Compute,
) -> _State:
  """Draws the next token of each row that has not ended.

  The largest of logits and Gumbel noise [rows, vocab] is a draw from their
  softmax: `jax.random.categorical`, in two parts.
  """
  y = logits(model, params, state.x, compute)[:, 0]
  y = samplers.apply(draw.sampler.filters, y)
  token = samplers.largest(y + noise)
  logp = -cross_entropy(y, token)[0]
  here = ~state.ended
  ended = state.ended | ((token == draw.eos) if draw.eos is not None else False)
  kept = state.kept
  if kept is not None:
    kept = put(kept, jnp.isfinite(y) | state.ended[:, None], state.i)
  return state.replace(
    i=state.i + 1,
    ended=ended,
    tokens=put(state.tokens, jnp.where(here, token, 0), state.i),
    mask=put(state.mask, here, state.i),
    logp=put(state.logp, jnp.where(here, logp, 0.0), state.i),
    kept=kept,
  )


def _noise(keys: Array, i: Array, vocab: int) -> Array:
  """What token i of each row is drawn with, `[rows, vocab]`."""
  each = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
  return jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(each)


def _joined(prompts: Array, lengths: Array, new: Array, mask: Array) -> Array:
  """Prompt and response without a gap, zeros behind: int32 [rows, seq]."""
  seq = prompts.shape[1]
  rows = jnp.concatenate([prompts, new], axis=1)
  place = jnp.arange(rows.shape[1], dtype=jnp.int32)[None]
  turned = (place + seq - lengths[:, None]) % rows.shape[1]
  ends = lengths + jnp.sum(mask, axis=1, dtype=jnp.int32)
  rows = jnp.take_along_axis(rows, turned, axis=1)
  return jnp.where(place < ends[:, None], rows, 0)


# --- Scoring ----------------------------------------------------------------


def logprobs(
  actor: Actor,
  params: Tree,
  rollout: Rollout,
  draw: Draw,
  compute: Compute = UNROLLED,
) -> Scores:
  """What an actor says of responses: the only function that runs a model.

  Args:
    actor: the policy with or without a critic, or a reference.
    params: its arrays.
    rollout: responses; `tokens`, `starts`, `mask` and `kept` are read.
    draw: how they were drawn.
    compute: how to run.

  Returns:
    log p of each token and the entropy of its distribution, as it is sampled
    from; the critic's values, if there is one. Outside the mask they are
    finite and mean nothing.
  """
  n, starts = rollout.mask.shape[1], rollout.starts
  tokens = rollout.tokens
  x, _ = hidden(actor.model, params, tokens[:, :-1], None, None, compute)
  x = windows(x, starts - 1, n)
  y = logits(actor.model, params, x, compute) / draw.temperature
  if rollout.kept is not None:
    y = jnp.where(rollout.kept, y, -jnp.inf)
  said = jnp.where(rollout.mask, windows(tokens, starts, n), jnp.argmax(y, -1))
  values = None
  if actor.critic is not None:
    x, _ = hidden(
      actor.critic, params["critic"], tokens[:, :-1], None, None, compute
    )
    x = windows(x, starts - 1, n)
  if actor.value is not None:
    head = actor.value.params()
    p = gather(params["value"], head, compute.rules, compute.jnp_dtype)
    values = actor.value(p, x)
  return Scores(-cross_entropy(y, said)[0], entropy(y), values)


_scored = jax.jit(logprobs, static_argnums=(0, 3, 4))


def scored(
  actor: Actor,
  params: Tree,
  rollout: Rollout,
  draw: Draw,
  compute: Compute = UNROLLED,
) -> Scores:
  """`logprobs`, compiled; of a rollout on the host or on the devices."""
  rollout = place.rows(rollout, compute.rules)
  return _scored(actor, params, rollout, draw, compute)


def windows(x: Array, starts: Array, n: int) -> Array:
  """`n` places of each row `[rows, seq, ...]` from `starts` [rows] on."""
  return jax.vmap(
    lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, n, axis=0)
  )(x, starts)
