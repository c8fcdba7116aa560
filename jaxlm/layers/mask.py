"""Masks are values: who may look at whom, as a function of positions.

Each mask answers `allows(q, k)` for broadcastable integer positions, and
carries its `reach`: how many positions a query sees, itself included (None
for all of them). Reference attention, block skipping, kernels and the length
of a cache all read the same object.
"""

from dataclasses import dataclass

import jax

Array = jax.Array


@dataclass(frozen=True)
class Causal:
  """A token sees itself and all before it."""

  causal: bool = True
  reach: int | None = None

  def allows(self, q: Array, k: Array) -> Array:
    """True where key position `k` is visible from query position `q`."""
    return k <= q


@dataclass(frozen=True)
class Full:
  """Every token sees every token (encoders)."""

  causal: bool = False
  reach: int | None = None

  def allows(self, q: Array, k: Array) -> Array:
    """Always true, in the broadcast shape of `q` and `k`."""
    return (q == q) & (k == k)


@dataclass(frozen=True)
class Sliding:
  """A token sees the last `window` tokens, itself included (arXiv:2004.05150).

  The first `sinks` positions stay visible for ever (arXiv:2309.17453).
  """

  window: int
  sinks: int = 0
  causal: bool = True

  @property
  def reach(self) -> int | None:
    """The window; with sinks every position may matter."""
    return None if self.sinks else self.window

  def allows(self, q: Array, k: Array) -> Array:
    """True where `k` is in the window that ends at `q`, or is a sink."""
    near = k > q - self.window
    return (k <= q) & (near | (k < self.sinks) if self.sinks else near)


@dataclass(frozen=True)
class Chunked:
  """A token sees those before it in its own chunk of `size` (Llama 4)."""

  size: int
  causal: bool = True

  @property
  def reach(self) -> int:
    """A chunk."""
    return self.size

  def allows(self, q: Array, k: Array) -> Array:
    """True where `k` is not after `q` and lies in the same chunk."""
    return (k <= q) & (k >= q - q % self.size)


@dataclass(frozen=True)
class PrefixLM:
  """Causal, but tokens of one bidirectional block see each other.

  The blocks come with the input (`At.blocks`), so that images and prefixes
  of any length need no new mask.
  """

  causal: bool = False
  reach: int | None = None

  def allows(self, q: Array, k: Array) -> Array:
    """The causal part; `attend` adds what the block ids allow."""
    return k <= q


Mask = Causal | Full | Sliding | Chunked | PrefixLM
