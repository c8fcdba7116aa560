"""Drafts: what proposes tokens that a target model then judges.

A draft is a frozen value. `DraftModel` is a smaller language model, `Lookup`
copies what followed the same words earlier in the text, `Medusa` asks extra
heads on the target's own hidden state. Each says which tokens it proposes, and
with which probabilities it has drawn them: the judge (`judge.verify`)
needs to know no more, so the text is the target's whatever the draft is.

To add one, write a value with the four methods of `Lookup`. `may_be_silent`
says that at times it proposes nothing: then a step reads one token, no more.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.generate.judge import PROPOSE, Text, distribution, draw
from jaxlm.generate.samplers import Greedy, Sample
from jaxlm.generate.step import forget, read
from jaxlm.layers.at import At
from jaxlm.layers.cache import FULL
from jaxlm.layers.compute import Compute
from jaxlm.layers.mask import Causal, Mask
from jaxlm.layers.param import Param
from jaxlm.models.decoder import Decoder, hidden, logits
from jaxlm.models.medusa import Heads

Array = jax.Array
Tree = Any


@dataclass(frozen=True)
class Method:
  """What is compiled.

  Attributes:
    model: the target, which judges.
    draft: what proposes.
    gamma: tokens proposed at a time.
    sampler: how tokens are chosen; its filters hold for draft and target.
    compute: how to run.
  """

  model: Decoder
  draft: Any
  gamma: int
  sampler: Greedy | Sample
  compute: Compute


# --- Caches that can be taken back ------------------------------------------


@dataclass(frozen=True)
class Spare:
  """A full cache; where a mask reaches less far, with `n` slots to spare.

  A ring of just its window would lose, for tokens that are then rejected, keys
  that the next ones still see.
  """

  n: int
  endless: bool = False

  def declare(self, token: Any, batch: int, length: int, mask: Mask) -> Any:
    """As `layers.cache.Full.declare`."""
    slots = min(length, (mask.reach or length) + self.n)
    return FULL.declare(token, batch, slots, Causal())


def check_cache(model: Decoder, who: str) -> None:
  """Raises UserError if a layer cannot take back what it has read."""
  for pattern, _ in model.layers:
    for block in pattern:
      if "positions" not in block.cache(1, 1):
        raise UserError(
          f"{who} has recurrent layers ({type(block.mixer).__name__}): their "
          "state cannot take rejected tokens back, as speculation needs it; "
          "use plain generate"
        )


# --- Drafts -----------------------------------------------------------------


@dataclass(frozen=True)
class DraftModel:
  """A smaller language model over the same tokens, with a cache of its own."""

  model: Decoder
  may_be_silent: ClassVar[bool] = False

  def check(self, target: Decoder, params: Tree, gamma: int, most: int) -> None:
    """Raises UserError unless it fits `target` and `most` positions."""
    if params is None:
      raise UserError("a draft model needs its parameters: pass draft_params")
    if self.model.vocab != target.vocab:
      raise UserError(
        f"the draft knows {self.model.vocab} tokens and the target "
        f"{target.vocab}; both have to share one tokenizer"
      )
    if most > self.model.max_positions:
      raise UserError(
        f"prompt and new tokens need {most} positions, and the draft has been "
        f"made for {self.model.max_positions}; ask for fewer new tokens, or "
        "use another draft"
      )
    check_cache(self.model, "the draft")

  def begin(
    self,
    how: Method,
    params: Tree,
    x: Array,
    tokens: Array,
    lengths: Array,
    length: int,
  ) -> Tree:
    """Reads the prompts; the state is a cache."""
    kind = Spare(how.gamma)
    return read(self.model, params, tokens, lengths, length, how.compute, kind)[
      1
    ]

  def propose(
    self, how: Method, params: Tree, state: Tree, text: Text
  ) -> tuple[Array, Array, Tree]:
    """Draws `gamma` tokens one after another.

    The last two tokens are read first: when all proposals were accepted, the
    draft has not yet read the last of them. Read twice, it says the same.
    """
    state = forget(state, text.position - 1, how.compute)
    token, q, text, state = self._next(how, params, state, text, 0, 2)

    def more(carry: tuple, i: Array) -> tuple:
      token, q, text, state = self._next(how, params, *carry, i, 1)
      return (state, text), (token, q)

    steps = jnp.arange(1, how.gamma, dtype=jnp.int32)
    (state, _), (tokens, qs) = jax.lax.scan(more, (state, text), steps)
    tokens = jnp.concatenate([token[None], tokens]).T
    qs = jnp.moveaxis(jnp.concatenate([q[None], qs]), 0, 1)
    return tokens, qs, state

  def _next(
    self,
    how: Method,
    params: Tree,
    state: Tree,
    text: Text,
    after: Array | int,
    n: int,
  ) -> tuple[Array, Array, Text, Tree]:
    """Reads the `n` tokens before place `end + after`, proposes one for it."""
    tokens, positions = text.window(after - n, n)
    at = At(positions=positions)
    x, state = hidden(self.model, params, tokens, at, state, how.compute)
    scores = logits(self.model, params, x[:, -1:], how.compute)[:, 0]
    q = distribution(how.sampler, scores, text, after)
    token = draw(how.sampler, q, text.draws(after, PROPOSE))
    return token, q, text.put(token[:, None], after), state

  def settle(self, state: Tree, x: Array) -> Tree:
    """Nothing to learn: what was rejected is forgotten at the next proposal."""
    del x
    return state


@dataclass(frozen=True)
class Lookup:
  """What followed the last words when they came before (prompt lookup).

  The place where most of the last tokens stood before, up to `n`, the latest
  of equals; fewer than `min_n` propose nothing. What comes behind it is
  proposed; where that runs into the end of the text, it begins anew, as in a
  text that repeats itself. After https://github.com/apoorvumang/prompt-lookup-
  decoding.
  """

  n: int = 3
  min_n: int = 1
  may_be_silent: ClassVar[bool] = True

  def __post_init__(self):
    if not 1 <= self.min_n <= self.n:
      raise UserError(
        f"a lookup of n={self.n} and min_n={self.min_n} tokens; use whole "
        "numbers with 1 <= min_n <= n"
      )

  def check(self, target: Decoder, params: Tree, gamma: int, most: int) -> None:
    """Raises UserError for parameters, which it has not."""
    del target, gamma, most
    if params is not None:
      raise UserError("a lookup has no parameters; leave draft_params out")

  def begin(
    self,
    how: Method,
    params: Tree,
    x: Array,
    tokens: Array,
    lengths: Array,
    length: int,
  ) -> Tree:
    """No state: the text is all there is."""
    del how, params, x, tokens, lengths, length
    return ()

  def propose(
    self, how: Method, params: Tree, state: Tree, text: Text
  ) -> tuple[Array, Array, Tree]:
    """Tokens [rows, gamma], all their probability on them or none at all."""
    del params
    place, found = jax.vmap(self._find)(text.tokens, text.end)
    i = jnp.arange(how.gamma, dtype=jnp.int32)[None]
    period = (text.end - 1 - place)[:, None]
    where = place[:, None] + 1 + i % jnp.maximum(period, 1)
    tokens = jnp.take_along_axis(text.tokens, where, axis=1)
    sure = jax.nn.one_hot(tokens, how.model.vocab, dtype=jnp.float32)
    return tokens, sure * found.astype(jnp.float32)[:, None, None], state

  def _find(self, tokens: Array, end: Array) -> tuple[Array, Array]:
    """Where the last tokens of `[room]` stood before; whether they did."""
    place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    going = (place < end - 1) & (tokens >= 0)
    length = jnp.zeros_like(place)
    for i in range(self.n):
      last = tokens[jnp.maximum(end - 1 - i, 0)]
      going = going & (jnp.roll(tokens, i) == last) & (place >= i) & (last >= 0)
      length = length + going.astype(jnp.int32)
    best = jnp.argmax(length * tokens.shape[0] + place)
    return best.astype(jnp.int32), length[best] >= self.min_n

  def settle(self, state: Tree, x: Array) -> Tree:
    """Nothing to learn."""
    del x
    return state


@dataclass(frozen=True)
class Medusa:
  """Extra heads on the target's hidden state (arXiv:2401.10774, section 2.1).

  Head i guesses the token i places behind the next one, all at once and from
  the state that chose the last token; so they see neither it nor each other's
  guesses. A chain, not the paper's tree of candidates; and accepted exactly,
  not by the paper's typical acceptance, which changes the distribution.
  """

  heads: Heads
  may_be_silent: ClassVar[bool] = False

  def check(self, target: Decoder, params: Tree, gamma: int, most: int) -> None:
    """Raises UserError unless there are heads enough, made for `target`."""
    del most
    if params is None:
      raise UserError("heads need their parameters: pass draft_params")
    if (self.heads.dim, self.heads.vocab) != (target.dim, target.vocab):
      raise UserError(
        f"heads for states of {self.heads.dim} and {self.heads.vocab} tokens "
        f"on a target of {target.dim} and {target.vocab}; train heads for it"
      )
    if gamma > self.heads.n:
      raise UserError(
        f"gamma={gamma} tokens from {self.heads.n} heads; each proposes one, "
        f"so use gamma={self.heads.n} or less"
      )

  def begin(
    self,
    how: Method,
    params: Tree,
    x: Array,
    tokens: Array,
    lengths: Array,
    length: int,
  ) -> Tree:
    """The state that the next token is chosen from, [rows, dim]."""
    del how, params, tokens, lengths, length
    return x

  def propose(
    self, how: Method, params: Tree, state: Tree, text: Text
  ) -> tuple[Array, Array, Tree]:
    """A token from each of the first `gamma` heads."""
    scores = self.heads(params, state[:, None], how.model.softcap)[:, 0]
    tokens, qs = [], []
    for i in range(how.gamma):
      q = distribution(how.sampler, scores[:, i], text, i)
      token = draw(how.sampler, q, text.draws(i, PROPOSE))
      text = text.put(token[:, None], i)
      tokens.append(token)
      qs.append(q)
    return jnp.stack(tokens, axis=1), jnp.stack(qs, axis=1), state

  def settle(self, state: Tree, x: Array) -> Tree:
    """The state that chose the token which is now the last, [rows, dim]."""
    del state
    return x


Draft = DraftModel | Lookup | Medusa


def ready_heads(params: Tree, heads: Heads, compute: Compute) -> Tree:
  """Parameters of heads in the dtype they are computed in."""
  dtype = compute.jnp_dtype
  return jax.tree.map(
    lambda p, x: x.astype(p.compute or dtype),
    heads.params(),
    params,
    is_leaf=lambda x: isinstance(x, Param),
  )
