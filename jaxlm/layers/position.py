"""Positions: how a model knows where a token stands.

Rotary embeddings turn queries and keys, ALiBi biases their products, learned
and sinusoidal tables are added to the embeddings; None is NoPE.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.layers.param import Normal, Param

Array = jax.Array


@dataclass(frozen=True)
class Linear:
  """Position interpolation: frequencies over `factor` (arXiv:2306.15595)."""

  factor: float

  def scale(self, freq: Array, theta: float, dim: int) -> Array:
    """Scaled frequencies [dim / 2]."""
    del theta, dim
    return freq / self.factor


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

  def scale(self, freq: Array, theta: float, dim: int) -> Array:
    """Scaled frequencies [dim / 2]."""
    del theta, dim
    turns = self.original * freq / (2 * math.pi)  # in the original context
    keep = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
    return freq * (keep + (1.0 - keep) / self.factor)


Scaling = Linear | Llama3


@dataclass(frozen=True)
class Rope:
  """Rotary position embedding (RoFormer, arXiv:2104.09864).

  Each pair of features (x1, x2) of a query or key at position m turns by the
  angle m * theta^(-2i/d): products then depend on relative positions alone.

  Attributes:
    theta: base of the frequencies.
    scaling: how frequencies stretch beyond the trained context, or None.
    fraction: share of the head's features that turn; the rest pass through.
    interleaved: pairs are neighbours (GPT-J, Llama's own files) instead of
      halves (GPT-NeoX, Hugging Face).
  """

  theta: float = 10000.0
  scaling: Scaling | None = None
  fraction: float = 1.0
  interleaved: bool = False

  def frequencies(self, dim: int) -> Array:
    """Angle per position of each pair, float32 [dim / 2]."""
    powers = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    freq = 1.0 / (self.theta**powers)
    return self.scaling.scale(freq, self.theta, dim) if self.scaling else freq

  def __call__(self, x: Array, positions: Array) -> Array:
    """Turns `x` [batch, seq, heads, head_dim] by `positions` [batch?, seq].

    Angles and products are float32; the result has the dtype of `x`.
    """
    dim = int(x.shape[-1] * self.fraction)
    angles = _angles(positions, self.frequencies(dim))[..., None, :]
    angles = angles.reshape((1,) * (x.ndim - angles.ndim) + angles.shape)
    turned = _rotate(
      x[..., :dim].astype(jnp.float32),
      jnp.cos(angles),
      jnp.sin(angles),
      self.interleaved,
    ).astype(x.dtype)
    if dim == x.shape[-1]:
      return turned
    return jnp.concatenate([turned, x[..., dim:]], axis=-1)


def _angles(positions: Array, freq: Array) -> Array:
  """Every position times every frequency, float32 [..., dim / 2]."""
  return jnp.multiply.outer(positions.astype(jnp.float32), freq)


def _rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
  """(x1 cos - x2 sin, x2 cos + x1 sin) for the pairs of either layout."""
  if interleaved:
    x1, x2 = x[..., ::2], x[..., 1::2]
    pairs = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    return jnp.stack(pairs, axis=-1).reshape(x.shape)
  x1, x2 = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


@dataclass(frozen=True)
class Alibi:
  """Attention with linear biases (arXiv:2108.12409).

  Head n of N (a power of two) adds -2^(-8n/N) * distance to its scores. For
  other N the slopes of the next lower power of two come first, then every
  other slope of the next higher one (section 3 and the authors' code).
  """

  def slopes(self, heads: int) -> Array:
    """One positive slope per head, float32 [heads]."""
    low = 2 ** math.floor(math.log2(heads))
    powers = [8.0 * (i + 1) / low for i in range(low)]
    powers += [4.0 * (2 * i + 1) / low for i in range(heads - low)]
    return jnp.exp2(-jnp.asarray(powers, jnp.float32))


@dataclass(frozen=True)
class Learned:
  """A trained vector for each of `length` positions (GPT-2)."""

  length: int
  init: Normal = Normal(0.02)

  def params(self, dim: int) -> dict[str, Param]:
    """`table` [length, dim]."""
    return {
      "table": Param((self.length, dim), ("positions", "embed"), 1, self.init)
    }

  def __call__(
    self,
    p: dict[str, Array],
    positions: Array,
    dim: int,
    out_sharding: PartitionSpec | None = None,
  ) -> Array:
    """Vectors [..., dim] for integer `positions` [...]."""
    del dim
    return p["table"].at[positions].get(out_sharding=out_sharding)


@dataclass(frozen=True)
class Sinusoidal:
  """Fixed sines and cosines (Vaswani et al., arXiv:1706.03762, section 3.5)."""

  def params(self, dim: int) -> dict[str, Param]:
    """Nothing to learn."""
    del dim
    return {}

  def __call__(
    self,
    p: dict[str, Array] | None,
    positions: Array,
    dim: int,
    out_sharding: PartitionSpec | None = None,
  ) -> Array:
    """Vectors [..., dim]: sin at even features, cos at odd ones."""
    del p, out_sharding  # they follow the positions
    freq = Rope(10000.0).frequencies(dim)
    angles = _angles(positions, freq)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*angles.shape[:-1], -1)[..., :dim]
