"""Samplers: from the logits of the next token to a token.

A sampler is a frozen value with one method, `(logits [batch, vocab], key,
seen) -> tokens [batch]`. `Sample` draws from the softmax of its filters
(`jaxlm.generate.filters`), applied in order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.generate.filters import Filter, Seen, Temperature, TopK, TopP

Array = jax.Array


@dataclass(frozen=True)
class Greedy:
  """The likeliest token, the first of equals, after filters in their order."""

  filters: tuple[Filter, ...] = ()

  def __call__(
    self, logits: Array, key: Array, seen: Seen | None = None
  ) -> Array:
    """Tokens int32 [batch]; `key` is not used."""
    del key
    logits = apply(self.filters, logits, seen)
    return largest(logits)


@dataclass(frozen=True, init=False)
class Sample:
  """A draw from softmax(filters(logits)).

  >>> Sample(temperature=0.8, top_k=40)
  Sample(filters=(Temperature(value=0.8), TopK(k=40)))

  Attributes:
    filters: applied in this order.
  """

  filters: tuple[Filter, ...] = ()

  def __init__(
    self,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    filters: tuple[Filter, ...] = (),
  ):
    """Temperature, top-k and top-p in this order, then further filters.

    Raises:
      UserError: for a value that makes no sense.
    """
    usual = () if temperature == 1.0 else (Temperature(temperature),)
    usual += () if top_k is None else (TopK(top_k),)
    usual += () if top_p is None else (TopP(top_p),)
    object.__setattr__(self, "filters", usual + tuple(filters))

  def __call__(
    self, logits: Array, key: Array, seen: Seen | None = None
  ) -> Array:
    """Tokens int32 [batch], rows independent of one another."""
    logits = apply(self.filters, logits, seen)
    return drawn(logits, key)


Sampler = Callable[[Array, Array, Seen | None], Array]


def apply(
  filters: tuple[Filter, ...], logits: Array, seen: Seen | None = None
) -> Array:
  """The logits [batch, vocab] that are left by filters in their order."""
  for keep in filters:
    logits = keep(logits, seen)
  return logits


def drawn(logits: Array, key: Array) -> Array:
  """A draw from softmax(logits `[..., n]`): `jax.random.categorical`'s own.

  The largest of logits and Gumbel noise, here without `argmax`.
  """
  return largest(logits + jax.random.gumbel(key, logits.shape, logits.dtype))


def largest(x: Array) -> Array:
  """Which of the last axis `[..., n]` is largest, the first of equals.

  As `argmax`, which XLA's CPU compiler makes 5 to 10 times slower; of a row
  with NaN it is the last.
  """
  top = jnp.max(x, axis=-1, keepdims=True)
  place = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  return jnp.min(jnp.where(x == top, place, x.shape[-1] - 1), axis=-1)


def make_sampler(
  temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Sampler:
  """The sampler of the three usual numbers, where each has a neutral value.

  Args:
    temperature: 0 is greedy, 1 as learned.
    top_k: 0 keeps all tokens.
    top_p: 1 keeps all tokens.

  Raises:
    UserError: for a value that makes no sense.
  """
  sampler = Sample(
    temperature or 1.0, top_k or None, None if top_p == 1.0 else top_p
  )
  return sampler if temperature else Greedy()
