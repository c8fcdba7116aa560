"""The judge of speculative decoding: texts, probabilities, what is accepted.

`verify` is all the mathematics there is; what it needs are the probabilities
that proposals were drawn with, and those the target would have drawn with.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.generate.filters import Seen
from jaxlm.generate.samplers import Greedy, Sample, apply, drawn, largest

Array = jax.Array

# What a key draws for a token: a proposal, whether it is accepted, or the
# token that the target chooses itself.
PROPOSE, ACCEPT, CHOOSE = 0, 1, 2


def verify(p: Array, q: Array, tokens: Array, u: Array) -> tuple[Array, Array]:
  """How many proposals are accepted, and what the next token is drawn from.

  Args:
    p: the target's probabilities, `[rows, gamma + 1, vocab]`.
    q: those that the proposals were drawn from, `[rows, gamma, vocab]`; all
      zero where nothing is proposed.
    tokens: the proposals, int32 `[rows, gamma]`.
    u: uniform on [0, 1), `[rows, gamma]`.

  Returns:
    How many are accepted `[rows]`, and probabilities `[rows, vocab]`.
  """
  own = jnp.take_along_axis(q, tokens[..., None], axis=2)[..., 0]
  wanted = jnp.take_along_axis(p[:, :-1], tokens[..., None], axis=2)[..., 0]
  good = (own > 0) & (u * own < wanted)
  accepted = jnp.sum(jnp.cumprod(good.astype(jnp.int32), axis=1), axis=1)
  # Behind the last proposal nothing is proposed: there all of p is left.
  q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
  here = accepted[:, None, None]
  p = jnp.take_along_axis(p, here, axis=1)[:, 0]
  left = jnp.maximum(p - jnp.take_along_axis(q, here, axis=1)[:, 0], 0.0)
  total = jnp.sum(left, axis=-1, keepdims=True)
  # Nothing is left only where p = q but for rounding.
  return accepted, jnp.where(total > 0, left / jnp.maximum(total, 1e-30), p)


@struct.dataclass
class Text:
  """The rows of a batch while they grow, each at its own pace.

  Attributes:
    tokens: prompt and new tokens, int32 [rows, room]; -1 in front of shorter
      prompts, anything from `end` on.
    end: how many places are taken, int32 [rows].
    start: where new tokens begin, int32.
    stop: where they end, int32.
    pad: places in front of each prompt, int32 [rows].
    keys: randomness of each row, [rows].
  """

  tokens: Array
  end: Array
  start: Array
  stop: Array
  pad: Array
  keys: Array

  @property
  def position(self) -> Array:
    """Where the last token of each row stands, [rows]."""
    return self.end - 1 - self.pad

  def window(self, after: Array | int, n: int) -> tuple[Array, Array]:
    """`n` tokens from place `end + after` on, and their positions [rows, n].

    Those that no further token could follow have no position: they are not
    written, and nobody sees them.
    """
    place = self.end[:, None] + after + jnp.arange(n, dtype=jnp.int32)[None]
    found = jnp.take_along_axis(self.tokens, place, axis=1, mode="clip")
    there = (place < self.stop - 1) & (found >= 0)
    position = jnp.where(there, place - self.pad[:, None], -1)
    return jnp.maximum(found, 0), position

  def put(self, tokens: Array, after: Array | int = 0) -> "Text":
    """With `tokens` [rows, n] from place `end + after` on."""
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    place = place + (self.end + after)[:, None]
    rows = jnp.arange(len(place), dtype=jnp.int32)[:, None]
    return replace(
      self, tokens=self.tokens.at[rows, place].set(tokens, mode="drop")
    )

  def draws(self, after: Array | int, purpose: int) -> Array:
    """A key for the token at `end + after` of each row, [rows].

    It depends on the row's own key and the number of the token alone. A token
    may be proposed again and again, until it is reached; what was drawn for
    it before has then decided nothing.
    """
    number = self.end + after - self.start

    def one(key: Array, number: Array) -> Array:
      return jax.random.fold_in(jax.random.fold_in(key, number), purpose)

    return jax.vmap(one)(self.keys, number)


def distribution(
  sampler: Greedy | Sample, scores: Array, text: Text, after: Array | int
) -> Array:
  """With which probabilities a sampler chooses the token at `end + after`.

  Args:
    sampler: `Greedy` puts all on the likeliest.
    scores: logits float32 [rows, vocab].
    text: the rows, proposals before that token included.
    after: how far behind the end it will stand.

  Returns:
    Probabilities float32 [rows, vocab].
  """

  def one(row: Array, tokens: Array, end: Array) -> Array:
    seen = Seen(tokens[None], text.start, end + after)
    return apply(sampler.filters, row[None], seen)[0]

  if sampler.filters:
    scores = jax.vmap(one)(scores, text.tokens, text.end)
  if isinstance(sampler, Greedy):
    best = largest(scores)
    return jax.nn.one_hot(best, scores.shape[-1], dtype=jnp.float32)
  return jax.nn.softmax(scores, axis=-1)


def draw(sampler: Greedy | Sample, p: Array, keys: Array) -> Array:
  """Tokens int32 [rows] with probabilities `p` [rows, vocab]."""
  if isinstance(sampler, Greedy):
    return largest(p)
  return jax.vmap(drawn)(jnp.log(p), keys)
