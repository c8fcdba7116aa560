"""Positions: how a model knows where a token stands.

Rotary embeddings turn queries and keys, ALiBi biases their products, learned
and sinusoidal tables are added to the embeddings; None is NoPE. How rotary
frequencies stretch beyond the trained context is a value too, `Scaling`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm.errors import UserError
from jaxlm.layers.compute import active_mesh
from jaxlm.layers.param import Normal, Param
from jaxlm.layers.scaling import (
  NTK,
  Dynamic,
  Linear,
  Llama3,
  LongRope,
  Scaling,
  Yarn,
  frequencies,
  softmax_factor,
)

__all__ = [
  "NTK",
  "Alibi",
  "Dynamic",
  "Learned",
  "Linear",
  "Llama3",
  "LongRope",
  "Rope",
  "Scaling",
  "Sinusoidal",
  "Yarn",
  "softmax_factor",
]

Array = jax.Array


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
    reverse: pairs turn the other way. What a model can learn is the same, but
      weights learned one way are wrong the other.
  """

  theta: float = 10000.0
  scaling: Scaling | None = None
  fraction: float = 1.0
  interleaved: bool = False
  reverse: bool = False

  def turned(self, head_dim: int) -> int:
    """How many of a head's features turn: the first `head_dim * fraction`.

    Raises:
      UserError: if that is no positive even number.
    """
    dim = int(head_dim * self.fraction)
    if not 0 < dim <= head_dim or dim % 2:
      raise UserError(
        f"fraction {self.fraction} of heads of {head_dim} features is {dim} "
        "that turn, and they turn in pairs; choose head_dim and fraction so "
        f"that their product is even, from 2 to {head_dim}"
      )
    return dim

  def frequencies(self, dim: int, positions: Array | None = None) -> Array:
    """Angle per position of each pair of `dim` features that turn.

    Returns:
      float32 [dim / 2]; or [batch?, 1, dim / 2] for `positions` [batch?, seq]
      where the scaling depends on the longest position of a row. Without
      positions, the frequencies within the trained context.
    """
    freq = frequencies(self.theta, dim)
    if self.scaling is not None:
      freq = self.scaling.scale(freq, self.theta, positions)
    return jnp.asarray(freq, jnp.float32)

  def __call__(self, x: Array, positions: Array) -> Array:
    """Turns `x` [batch, seq, heads, head_dim] by `positions` [batch?, seq].

    What turns is also multiplied by the scaling's `magnitude`. Angles and
    products are float32; the result has the dtype of `x`.
    """
    dim = self.turned(x.shape[-1])
    angles = _angles(positions, self.frequencies(dim, positions))[..., None, :]
    angles = angles.reshape((1,) * (x.ndim - angles.ndim) + angles.shape)
    size = 1.0 if self.scaling is None else self.scaling.magnitude
    turned = _rotate(
      x[..., :dim].astype(jnp.float32),
      size * jnp.cos(angles),
      (-size if self.reverse else size) * jnp.sin(angles),
      self.interleaved,
    ).astype(x.dtype)
    if dim == x.shape[-1]:
      return turned
    return jnp.concatenate([turned, x[..., dim:]], axis=-1)


def _angles(positions: Array, freq: Array) -> Array:
  """Every position times every frequency, float32 [..., dim / 2]."""
  ones = (1,) * (positions.ndim + 1 - freq.ndim)
  return positions.astype(jnp.float32)[..., None] * freq.reshape(
    ones + freq.shape
  )


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
    return jnp.asarray(np.exp2(-np.array(powers)), jnp.float32)


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
    """Vectors [..., dim] for integer `positions` [...].

    Raises:
      UserError: for a position beyond the table, where positions are known
        (outside jit). Negative ones are those of padding, whose vectors
        nobody reads.
    """
    del dim
    self._check(positions)
    return p["table"].at[positions].get(out_sharding=out_sharding)

  def _check(self, positions: Array) -> None:
    """Rejects known positions the table lacks; jit would clip them."""
    if isinstance(positions, jax.core.Tracer) or active_mesh() is not None:
      return
    known = np.asarray(positions)  # jnp would trace this in a jit of others
    last = np.max(known, initial=-1)
    if last >= self.length:
      raise UserError(
        f"position {last} is beyond the {self.length} positions this model "
        f"has learned (0 to {self.length - 1}); shorten the text"
      )


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
    freq = jnp.asarray(frequencies(10000.0, dim), jnp.float32)
    angles = _angles(positions, freq)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*angles.shape[:-1], -1)[..., :dim]
