"""Filters: what is done to the logits of the next token before one is drawn.

A filter is a frozen value, `(logits [batch, vocab] float32, seen) -> logits`,
and rules a token out by -inf. `Seen` is the text so far; most filters do not
look at it. The sets that filters keep are those of the `LogitsWarper` or
`LogitsProcessor` of the same name in Hugging Face transformers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.errors import UserError

Array = jax.Array


@struct.dataclass
class Seen:
  """The text that a token is chosen for.

  Attributes:
    tokens: prompt and new tokens in their order, int32 [batch, room]; -1 in
      front of shorter prompts, anything from `end` on.
    start: where the new ones begin, int32.
    end: how many places are taken, int32.
  """

  tokens: Array
  start: Array
  end: Array

  def counts(self, vocab: int, new: bool) -> Array:
    """How often each token has come, int32 [batch, vocab]; all or new ones."""
    batch, room = self.tokens.shape
    place = jnp.arange(room, dtype=jnp.int32)[None]
    known = (self.tokens >= 0) & (place < self.end)
    known = known & (place >= self.start) if new else known
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    where = jnp.where(known, self.tokens, vocab)
    zeros = jnp.zeros((batch, vocab), jnp.int32)
    return zeros.at[rows, where].add(1, mode="drop")

  def last(self, n: int) -> Array:
    """The last `n` tokens, [batch, n]; what is not there yet is -1."""
    room = self.tokens.shape[1]
    place = self.end - n + jnp.arange(n, dtype=jnp.int32)
    found = self.tokens[:, jnp.clip(place, 0, room - 1)]
    return jnp.where(place[None] >= 0, found, -1)


Filter = Callable[[Array, Seen | None], Array]


def _number(name: str, value: float, low: float, high: float, hint: str):
  """Raises UserError unless low < value < high."""
  if not low < value < high:
    raise UserError(f"{name}={value} makes no sense; {hint}")


def _keep(keep: Array, logits: Array) -> Array:
  """Logits where `keep`, else -inf."""
  return jnp.where(keep, logits, -jnp.inf)


# --- Shape of the distribution ----------------------------------------------


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

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
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

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, -inf where ruled out."""
    k = min(self.k, logits.shape[-1])
    last = jax.lax.top_k(logits, k)[0][:, -1:]
    return _keep(logits >= last, logits)


@dataclass(frozen=True)
class TopP:
  """Keeps the smallest set of likeliest tokens whose mass is at least `p`.

  The nucleus of Holtzman et al., arXiv:1904.09751, section 3.1. At least one
  token stays. Of equally likely ones at the border those of higher id stay;
  transformers leaves that to its sort.

  Attributes:
    p: the mass.
    by: how the border is found: 'bisect' halves the range of the logits, 32
      sums over the vocabulary; 'sort' is the definition, and slower.
  """

  p: float
  by: str = "bisect"

  def __post_init__(self):
    if not 0 <= self.p <= 1:
      raise UserError(
        f"top_p={self.p} is no probability; use a number from 0 to 1, or None"
      )
    if self.by not in ("bisect", "sort"):
      raise UserError(f"top_p by {self.by!r}; use 'bisect' or 'sort'")

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, -inf where ruled out."""
    if self.by == "sort":
      border, spare = self._by_sort(logits)
    else:
      border, spare = self._by_bisection(logits)
    # Some tokens equal to the border are out as well: the first ones.
    tied = logits == border
    out = (logits < border) | (tied & (jnp.cumsum(tied, axis=-1) <= spare))
    return _keep(~out, logits)

  def _by_sort(self, logits: Array) -> tuple[Array, Array]:
    """The least logit that stays [batch, 1], how many equal to it do not."""
    rising = jnp.sort(logits, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1)
    n_out = jnp.sum(below <= 1.0 - self.p, axis=-1, keepdims=True)
    n_out = jnp.minimum(n_out, logits.shape[-1] - 1)
    border = jnp.take_along_axis(rising, n_out, axis=-1)
    return border, n_out - jnp.sum(logits < border, axis=-1, keepdims=True)

  def _by_bisection(self, logits: Array) -> tuple[Array, Array]:
    """The same: the largest logit below which at most 1 - p lies."""
    probs = jax.nn.softmax(logits, axis=-1)
    out = 1.0 - self.p

    def below(border: Array) -> Array:
      return jnp.sum(
        jnp.where(logits < border, probs, 0.0), axis=-1, keepdims=True
      )

    border = _largest(lambda x: below(x) <= out, logits)
    tied = logits == border
    each = jnp.max(jnp.where(tied, probs, 0.0), axis=-1, keepdims=True)
    room = jnp.maximum(out - below(border), 0.0)
    spare = jnp.floor(room / jnp.maximum(each, 1e-38)).astype(jnp.int32)
    most = jnp.sum(tied, axis=-1, keepdims=True, dtype=jnp.int32)
    return border, jnp.minimum(spare, most - 1)


def _largest(holds: Callable[[Array], Array], logits: Array) -> Array:
  """The largest logit of each row, [batch, 1], for which `holds` is true.

  `holds` is true up to some number and false from there on, and true for the
  smallest logit. Floats are ordered like integers once the bits of negative
  ones are turned round, so 32 halvings of those end at the very float.
  """

  def to_int(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)

  def to_float(i: Array) -> Array:
    bits = jnp.where(i < 0, jnp.int32(-(2**31)) - i, i)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  logits = logits.astype(jnp.float32)
  low = to_int(jnp.min(logits, axis=-1, keepdims=True))
  high = to_int(jnp.max(logits, axis=-1, keepdims=True))

  def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = ends
    middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up
    good = holds(to_float(middle))
    return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

  low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
  # Down to a logit that exists: the largest one that is not above.
  found = jnp.where(logits <= to_float(low), logits, -jnp.inf)
  return jnp.max(found, axis=-1, keepdims=True)


@dataclass(frozen=True)
class MinP:
  """Keeps what is at least `p` times as likely as the likeliest token.

  Nguyen et al., arXiv:2407.01082, section 3.
  """

  p: float

  def __post_init__(self):
    _number("min_p", self.p, -1e-9, 1 + 1e-9, "use a number from 0 to 1")

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, -inf where ruled out."""
    probs = jax.nn.softmax(logits, axis=-1)
    top = jnp.max(probs, axis=-1, keepdims=True)
    return _keep(probs >= self.p * top, logits)


@dataclass(frozen=True)
class Typical:
  """Keeps the tokens of mass `p` whose surprise is nearest the expected one.

  Locally typical sampling (Meister et al., arXiv:2202.00666, section 4).
  """

  p: float

  def __post_init__(self):
    _number("typical_p", self.p, 0, 1, "use a number between 0 and 1")

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, -inf where ruled out."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    entropy = _entropy(log_p)
    away = jnp.abs(-log_p - entropy)
    order = jnp.argsort(away, axis=-1)
    mass = jnp.cumsum(
      jnp.take_along_axis(jnp.exp(log_p), order, axis=-1), axis=-1
    )
    last = jnp.sum(mass < self.p, axis=-1, keepdims=True)
    last = jnp.minimum(last, logits.shape[-1] - 1)
    border = jnp.take_along_axis(
      away, jnp.take_along_axis(order, last, axis=-1), axis=-1
    )
    return _keep(away <= border, logits)


@dataclass(frozen=True)
class Eta:
  """Keeps what is likelier than min(ε, sqrt(ε) exp(-entropy)).

  Eta sampling (Hewitt et al., arXiv:2210.15191, section 3.2). The likeliest
  token always stays.
  """

  epsilon: float

  def __post_init__(self):
    _number("eta", self.epsilon, 0, 1, "use a number between 0 and 1")

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, -inf where ruled out."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    eta = math.sqrt(self.epsilon) * jnp.exp(-_entropy(log_p))
    eta = jnp.minimum(self.epsilon, eta)
    top = jnp.max(logits, axis=-1, keepdims=True)
    return _keep((jnp.exp(log_p) >= eta) | (logits >= top), logits)


@dataclass(frozen=True)
class Epsilon:
  """Keeps what is at least `epsilon` likely, and always the likeliest token.

  Hewitt et al., arXiv:2210.15191, section 3.1.
  """

  epsilon: float

  def __post_init__(self):
    _number("epsilon", self.epsilon, 0, 1, "use a number between 0 and 1")

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, -inf where ruled out."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    likely = jax.nn.softmax(logits, axis=-1) >= self.epsilon
    return _keep(likely | (logits >= top), logits)


def _entropy(log_p: Array) -> Array:
  """Of each row in nats, [batch, 1]; what is ruled out adds nothing."""
  p = jnp.exp(log_p)
  return -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1, keepdims=True)


# --- What the text so far forbids or disfavours -----------------------------


@dataclass(frozen=True)
class Repetition:
  """Divides positive logits of tokens that have come by θ, multiplies others.

  The penalty of CTRL (arXiv:1909.05858, section 4.1); the prompt counts.
  """

  penalty: float

  def __post_init__(self):
    _number(
      "repetition_penalty", self.penalty, 0, math.inf, "above 1 it hinders"
    )

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, changed where a token has come."""
    come = seen.counts(logits.shape[-1], new=False) > 0
    less = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
    return jnp.where(come, less, logits)


@dataclass(frozen=True)
class Presence:
  """Subtracts `penalty` from every new token's logit once it has come."""

  penalty: float

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits; the prompt does not count (as in the OpenAI API)."""
    counts = seen.counts(logits.shape[-1], new=True)
    return logits - self.penalty * (counts > 0).astype(logits.dtype)


@dataclass(frozen=True)
class Frequency:
  """Subtracts `penalty` for every time that a token has come."""

  penalty: float

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits; the prompt does not count (as in the OpenAI API)."""
    counts = seen.counts(logits.shape[-1], new=True)
    return logits - self.penalty * counts.astype(logits.dtype)


@dataclass(frozen=True)
class NoRepeat:
  """No `n` tokens come twice in the same order (Paulus et al., 1705.04304)."""

  n: int

  def __post_init__(self):
    if not isinstance(self.n, int) or self.n < 1:
      raise UserError(f"no_repeat_ngram={self.n}; use a whole number from 1")

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, -inf for what would complete an n-gram of the text."""
    before = self.n - 1
    batch, room = seen.tokens.shape
    last, vocab = seen.last(before), logits.shape[-1]
    place = jnp.arange(room, dtype=jnp.int32)  # where an n-gram would end
    same = (place >= before) & (place < seen.end)
    same = jnp.broadcast_to(same[None], (batch, room))
    for i in range(before):
      earlier = jnp.roll(seen.tokens, before - i, axis=1)
      same = same & (earlier == last[:, i : i + 1]) & (earlier >= 0)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    known = same & (seen.tokens >= 0)
    ends = jnp.where(known, seen.tokens, vocab)
    banned = jnp.zeros(logits.shape, bool).at[rows, ends].set(True, mode="drop")
    return _keep(~banned, logits)


@dataclass(frozen=True)
class Bias:
  """Adds to the logits of some tokens: ((token, number), ...)."""

  biases: tuple[tuple[int, float], ...]

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Shifted logits; -inf as a number bans a token."""
    tokens = jnp.array([t for t, _ in self.biases], jnp.int32)
    values = jnp.array([v for _, v in self.biases], logits.dtype)
    return logits.at[:, tokens].add(values[None], mode="drop")


@dataclass(frozen=True)
class Banned:
  """Rules out sequences of tokens: the last one, where the others stand."""

  words: tuple[tuple[int, ...], ...]

  def __post_init__(self):
    if any(len(word) == 0 for word in self.words):
      raise UserError("a banned word is empty; leave it out")

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, -inf for tokens that would complete a word."""
    for *before, last in self.words:
      here = jnp.ones((logits.shape[0], 1), bool)
      if before:
        wanted = jnp.array(before, jnp.int32)[None]
        here = jnp.all(seen.last(len(before)) == wanted, -1, keepdims=True)
      token = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None] == last
      logits = _keep(~(here & token), logits)
    return logits


@dataclass(frozen=True)
class AtLeast:
  """Rules out the tokens that end a text before `n` new ones have come."""

  n: int
  ends: tuple[int, ...]

  def __call__(self, logits: Array, seen: Seen | None = None) -> Array:
    """Logits, -inf for an end that would come too early."""
    early = seen.end - seen.start < self.n
    token = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    is_end = jnp.isin(token, jnp.array(self.ends, jnp.int32))[None]
    return _keep(~(early & is_end), logits)
