"""Samplers: from the logits of the next token to a token.

A sampler is a frozen value with one method, `(logits [batch, vocab], key) ->
tokens [batch]`. `Sample` draws from the softmax of its filters applied in
order; a filter is a frozen value too, `(logits) -> logits`, and rules a token
out by -inf. The sets that filters keep are those of the `LogitsWarper` of the
same name in Hugging Face transformers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError

Array = jax.Array
Filter = Callable[[Array], Array]  # [batch, vocab] -> [batch, vocab], float32


# --- Filters ----------------------------------------------------------------


@dataclass(frozen=True)
class Temperature:
  """softmax(logits / T): below 1 sharper, above 1 flatter than learned."""

  value: float

  def __post_init__(self):
    if not 0 < self.value < math.inf:
      raise UserError(
        f"temperature={self.value} is not a positive number; for the likeliest "
        "token every time use Greedy()"
      )

  def __call__(self, logits: Array) -> Array:
    """Scaled logits."""
    return logits / self.value


@dataclass(frozen=True)
class TopK:
  """Keeps the `k` likeliest tokens, and those as likely as the last of them.

  Fan et al., arXiv:1805.04833, section 5.1.
  """

  k: int

  def __post_init__(self):
    if not isinstance(self.k, int) or self.k < 1:
      raise UserError(
        f"top_k={self.k} keeps no token; use a whole number from 1, or None"
      )

  def __call__(self, logits: Array) -> Array:
    """Logits, -inf where ruled out."""
    k = min(self.k, logits.shape[-1])
    last = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < last, -jnp.inf, logits)


@dataclass(frozen=True)
class TopP:
  """Keeps the smallest set of likeliest tokens whose mass is at least `p`.

  The nucleus of Holtzman et al., arXiv:1904.09751, section 3.1. At least one
  token stays. Of equally likely ones at the border those of higher id stay;
  transformers leaves that to its sort.
  """

  p: float

  def __post_init__(self):
    if not 0 <= self.p <= 1:
      raise UserError(
        f"top_p={self.p} is no probability; use a number from 0 to 1, or None"
      )

  def __call__(self, logits: Array) -> Array:
    """Logits, -inf where ruled out."""
    rising = jnp.sort(logits, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1)
    n_out = jnp.sum(below <= 1.0 - self.p, axis=-1, keepdims=True)
    n_out = jnp.minimum(n_out, logits.shape[-1] - 1)
    border = jnp.take_along_axis(rising, n_out, axis=-1)  # the least one kept
    # Some tokens equal to the border may be among the n_out: the first ones.
    tied = logits == border
    spare = n_out - jnp.sum(logits < border, axis=-1, keepdims=True)
    out = (logits < border) | (tied & (jnp.cumsum(tied, axis=-1) <= spare))
    return jnp.where(out, -jnp.inf, logits)


# --- Samplers ---------------------------------------------------------------


@dataclass(frozen=True)
class Greedy:
  """The likeliest token, the first of equals."""

  def __call__(self, logits: Array, key: Array) -> Array:
    """Tokens int32 [batch]; `key` is not used."""
    del key
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


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

  def __call__(self, logits: Array, key: Array) -> Array:
    """Tokens int32 [batch], rows independent of one another."""
    for keep in self.filters:
      logits = keep(logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


Sampler = Callable[[Array, Array], Array]


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
