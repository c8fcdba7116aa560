"""How rotary frequencies stretch, so that a model reads on past its training.

Each rule is a frozen value with two answers: `scale`, what the frequencies
become, and `magnitude`, what the cosines and sines are multiplied by (and so
every product of a query and a key by its square). What is known before a
program runs is computed in float64 here, once, while it is traced.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError

Array = jax.Array


def frequencies(theta: float, dim: int) -> np.ndarray:
  """theta^(-2i/dim) for each pair i of `dim` features, float64 [dim / 2]."""
  return theta ** -(np.arange(0, dim, 2) / dim)


@dataclass(frozen=True)
class Linear:
  """Position interpolation: frequencies over `factor` (arXiv:2306.15595)."""

  factor: float
  magnitude: ClassVar[float] = 1.0

  def scale(
    self, freq: np.ndarray, theta: float, positions: Array | None
  ) -> np.ndarray:
    """Scaled frequencies [dim / 2]."""
    del theta, positions
    return freq / self.factor


@dataclass(frozen=True)
class NTK:
  """A larger base: slow waves stretch, fast ones hardly ("NTK-aware").

  theta' = theta * factor^(d / (d-2)), which is to say that the fastest pair
  is kept, the slowest divided by `factor`, and those between by powers of it
  in even steps (arXiv:2309.00071, section 3.1).
  """

  factor: float
  magnitude: ClassVar[float] = 1.0

  def scale(
    self, freq: np.ndarray, theta: float, positions: Array | None
  ) -> np.ndarray:
    """Scaled frequencies [dim / 2]."""
    del theta, positions
    return freq * self.factor ** -_steps(len(freq))


@dataclass(frozen=True)
class Dynamic:
  """NTK by as much as the row at hand needs (arXiv:2309.00071, section 3.3).

  A row of L tokens is read with NTK(factor * L / original - (factor - 1)), one
  no longer than `original` as in training. L is the row's largest position
  plus one, so it differs between rows, and grows while a text is generated:
  keys in a cache keep the frequencies of the moment they were written.
  `fixed` gives a rule that does not move.
  """

  factor: float
  original: int
  magnitude: ClassVar[float] = 1.0

  def scale(
    self, freq: np.ndarray, theta: float, positions: Array | None
  ) -> np.ndarray | Array:
    """Scaled frequencies [batch?, 1, dim / 2] for `positions` [batch?, seq].

    Without positions [dim / 2], those of training.
    """
    del theta
    if positions is None:
      return freq
    beyond = jnp.maximum(_longest(positions) / self.original, 1.0) - 1.0
    steps = _wide(_steps(len(freq)), positions)
    return _wide(freq, positions) * (1.0 + self.factor * beyond) ** -steps

  def fixed(self, length: int) -> NTK:
    """The rule of rows of `length` tokens, for rows of any length."""
    return NTK(1.0 + self.factor * (max(length / self.original, 1.0) - 1.0))


@dataclass(frozen=True)
class Llama3:
  """Long waves over `factor`, short ones kept, a ramp between (Llama 3.1).

  The formula is that of the reference implementation published with the
  weights (llama-models, `apply_scaling`).
  """

  factor: float = 8.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192
  magnitude: ClassVar[float] = 1.0

  def scale(
    self, freq: np.ndarray, theta: float, positions: Array | None
  ) -> np.ndarray:
    """Scaled frequencies [dim / 2]."""
    del theta, positions
    turns = self.original * freq / (2 * math.pi)  # in the original context
    ramp = max(self.high - self.low, 1e-9)  # Llama 4: no ramp but a step
    keep = np.clip((turns - self.low) / ramp, 0.0, 1.0)
    return freq * (keep + (1.0 - keep) / self.factor)


@dataclass(frozen=True)
class Yarn:
  """YaRN (arXiv:2309.00071): "NTK by parts", and a colder softmax.

  Pairs that turn more than `beta_fast` times in the original context are kept,
  those that turn less than `beta_slow` times are divided by `factor`, with a
  ramp over the pairs between (section 3.2). Queries and keys grow by
  0.1 ln(factor) + 1, so that attention stays as sharp over more keys (3.4).

  Attributes:
    factor: the new context over the original one.
    original: the context the model was trained with.
    beta_fast, beta_slow: turns where the ramp begins and ends.
    attention_factor: the magnitude, where it is not to follow from `factor`.
    mscale, mscale_all_dim: DeepSeek's weights of the logarithm. Where both are
      given, the magnitude is the quotient of (0.1 weight ln(factor) + 1);
      see also `softmax_factor`.
    truncate: the ramp begins and ends at whole pairs (gpt-oss: it does not).
  """

  factor: float
  original: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  @property
  def magnitude(self) -> float:
    """What cosines and sines are multiplied by."""
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      above = _growth(self.factor, self.mscale)
      return above / _growth(self.factor, self.mscale_all_dim)
    return _growth(self.factor, 1.0)

  def scale(
    self, freq: np.ndarray, theta: float, positions: Array | None
  ) -> np.ndarray:
    """Scaled frequencies [dim / 2]."""
    del positions
    low, high = self._ramp(2 * len(freq), theta)
    # The small number stands for a ramp of no length, as others have it.
    ramp = (np.arange(len(freq)) - low) / ((high - low) or 0.001)
    ramp = np.clip(ramp, 0.0, 1.0)
    return freq * (1.0 - ramp) + freq / self.factor * ramp

  def _ramp(self, dim: int, theta: float) -> tuple[float, float]:
    """The pairs where the ramp begins and ends, as real numbers.

    Pair i turns original * theta^(-2i/dim) / 2π times; solved for i.
    """

    def pair(turns: float) -> float:
      waves = self.original / (2 * math.pi * turns)
      return dim * math.log(waves) / (2 * math.log(theta))

    low, high = pair(self.beta_fast), pair(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


@dataclass(frozen=True)
class LongRope:
  """LongRoPE (arXiv:2402.13753, Phi-3): a searched divisor for every pair.

  Rows longer than `original` are read with the divisors `long`, others with
  `short`. The length is the row's largest position plus one: where a text
  grows past `original`, keys in a cache were turned by `short` and new ones
  are turned by `long`. `fixed` gives a rule that does not move.

  Attributes:
    short, long: divisors of the frequencies, one per pair.
    original: the context the model was trained with.
    factor: the new context over the original one; the magnitude is
      sqrt(1 + ln(factor) / ln(original)), for short rows too.
    attention_factor: the magnitude, where it is not to follow from `factor`.
  """

  short: tuple[float, ...]
  long: tuple[float, ...]
  original: int
  factor: float = 1.0
  attention_factor: float | None = None

  @property
  def magnitude(self) -> float:
    """What cosines and sines are multiplied by."""
    if self.attention_factor is not None:
      return self.attention_factor
    more = math.log(max(self.factor, 1.0)) / math.log(self.original)
    return math.sqrt(1.0 + more)

  def scale(
    self, freq: np.ndarray, theta: float, positions: Array | None
  ) -> np.ndarray | Array:
    """Scaled frequencies [batch?, 1, dim / 2] for `positions` [batch?, seq].

    Without positions [dim / 2], those of short rows.

    Raises:
      UserError: if there is not one divisor for every pair.
    """
    del theta
    if not len(self.short) == len(self.long) == len(freq):
      raise UserError(
        f"LongRope has {len(self.short)} short and {len(self.long)} long "
        f"divisors for heads that turn {len(freq)} pairs of features; give "
        "one for each pair"
      )
    short, long = freq / np.array(self.short), freq / np.array(self.long)
    if positions is None:
      return short
    far = _longest(positions) > self.original
    return jnp.where(far, _wide(long, positions), _wide(short, positions))

  def fixed(self, length: int) -> "LongRope":
    """The rule of rows of `length` tokens, for rows of any length."""
    if length > self.original:
      return replace(self, short=self.long)
    return replace(self, long=self.short)


Scaling = Linear | NTK | Dynamic | Llama3 | Yarn | LongRope


def softmax_factor(scaling: Scaling | None) -> float:
  """What DeepSeek's YaRN multiplies the scale of the softmax by.

  (0.1 mscale_all_dim ln(factor) + 1)^2 where `mscale_all_dim` is given, else
  1 (DeepSeek-V3, arXiv:2412.19437, and its published inference code). Families
  of that kind set `scale = width**-0.5 * softmax_factor(scaling)`.
  """
  if not isinstance(scaling, Yarn) or not scaling.mscale_all_dim:
    return 1.0
  return _growth(scaling.factor, scaling.mscale_all_dim) ** 2


def _growth(factor: float, weight: float) -> float:
  """0.1 weight ln(factor) + 1, and 1 where nothing is stretched."""
  return 0.1 * weight * math.log(max(factor, 1.0)) + 1.0


def _steps(pairs: int) -> np.ndarray:
  """From 0 at the fastest pair to 1 at the slowest, float64 [pairs]."""
  return np.arange(pairs) / max(pairs - 1, 1)


def _longest(positions: Array) -> Array:
  """Tokens in each row of `positions` [batch?, seq], float32 [batch?, 1, 1]."""
  last = jnp.max(positions, axis=-1, keepdims=True)
  return (last + 1).astype(jnp.float32)[..., None]


def _wide(x: np.ndarray, positions: Array) -> Array:
  """`x` [n] as float32 with the rank of [*positions.shape, n]."""
  return jnp.asarray(x, jnp.float32)[(None,) * positions.ndim]
