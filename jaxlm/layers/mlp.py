"""Feed-forward layers: two projections with a nonlinearity, or a gated pair.

Every one is called as `ffn(p, x, compute, key)` and returns its output and a
report: what it has to say about this batch besides, a dict of arrays. These
two have nothing to say and no use for randomness; a mixture of experts reports
its load, and its router may be noisy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.linear import dot
from jaxlm.layers.norm import Norm
from jaxlm.layers.param import ZEROS, FanIn, Init, Param, count, flops

Array = jax.Array
Report = dict[str, Array]


def gelu(x: Array) -> Array:
  """X * Phi(x) with the exact normal distribution (arXiv:1606.08415)."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
  """GELU by the tanh formula of its paper, as GPT-2 has it."""
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
  return 0.5 * x * (1.0 + jnp.tanh(inner))


def silu(x: Array) -> Array:
  """X * sigmoid(x) (arXiv:1702.03118)."""
  return x * jax.nn.sigmoid(x)


def relu(x: Array) -> Array:
  """max(x, 0), with derivative 0 at 0 (jnp.maximum has a half there)."""
  return jax.nn.relu(x)


def relu2(x: Array) -> Array:
  """max(x, 0)^2 (Primer, arXiv:2109.08668)."""
  return jnp.square(jnp.maximum(x, 0))


def linear(x: Array) -> Array:
  """The identity: no nonlinearity."""
  return x


@dataclass(frozen=True)
class ClippedSiLU:
  """X * sigmoid(slope x) with x at most `limit`: the gate of gpt-oss.

  A slope of 1.702 makes it the quick GELU (arXiv:1606.08415, section 2).
  """

  limit: float = 7.0
  slope: float = 1.702

  def __call__(self, x: Array) -> Array:
    """Element by element."""
    x = jnp.minimum(x, self.limit)
    return x * jax.nn.sigmoid(self.slope * x)


@dataclass(frozen=True)
class ClippedShift:
  """X between -limit and limit, plus `shift`: what gpt-oss gates."""

  limit: float = 7.0
  shift: float = 1.0

  def __call__(self, x: Array) -> Array:
    """Element by element."""
    return jnp.clip(x, -self.limit, self.limit) + self.shift


Activation = Callable[[Array], Array]


def _out(m: "MLP | GLU", p: dict, y: Array, compute: Compute) -> Array:
  """The projection back to the residual stream, row-parallel under a mesh."""
  if m.hidden_norm is not None:
    y = m.hidden_norm(p["hidden_norm"], y)
  shape = (*y.shape[:-1], m.dim)
  spec = compute.spec(("batch", "seq", "embed"), shape)
  out = dot(y, p["down"], "btf,fd->btd", spec, jnp.float32)
  return out + p["down_bias"].astype(out.dtype)[None, None] if m.bias else out


@dataclass(frozen=True)
class MLP:
  """y = act(x W_up + b) W_down + b.

  Attributes:
    dim: width of the residual stream.
    hidden: width between the projections.
    act: the nonlinearity, a module-level function.
    bias: biases on both projections.
    init, out_init: initializers of the two projections.
    hidden_norm: before the second projection (BitNet), or None.
  """

  dim: int
  hidden: int
  act: Activation = gelu_tanh
  bias: bool = False
  init: Init = FanIn()
  out_init: Init = FanIn()
  hidden_norm: Norm | None = None

  def params(self) -> dict[str, Param]:
    """`up` [dim, hidden], `down` [hidden, dim], and their biases."""
    tree = {
      "up": Param((self.dim, self.hidden), ("embed", "mlp"), 1, self.init),
      "down": Param(
        (self.hidden, self.dim), ("mlp", "embed"), 1, self.out_init
      ),
    }
    if self.bias:
      tree["up_bias"] = Param((self.hidden,), ("mlp",), 0, ZEROS)
      tree["down_bias"] = Param((self.dim,), ("embed",), 0, ZEROS)
    if self.hidden_norm is not None:
      tree["hidden_norm"] = self.hidden_norm.params()
    return tree

  def active(self) -> int:
    """Number of parameters that work on one token: all of them."""
    return count(self.params())

  def flops(self) -> int:
    """Operations of one token's forward pass through the matmuls."""
    return flops(self.params())

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    compute: Compute = DEFAULT,
    key: Array | None = None,
  ) -> tuple[Array, Report]:
    """Maps `x` [batch, seq, dim] to the same shape; an empty report."""
    del key
    y = dot(x, p["up"], "btd,df->btf", dtype=jnp.float32)
    if self.bias:
      y = y + p["up_bias"].astype(y.dtype)[None, None]
    return _out(self, p, self.act(y).astype(x.dtype), compute), {}


@dataclass(frozen=True)
class GLU:
  """y = (act(x W_gate) * up_act(x W_up)) W_down (arXiv:2002.05202).

  With SiLU this is SwiGLU, with GELU GeGLU; `up_act` is usually the identity.
  Other attributes as in `MLP`.
  """

  dim: int
  hidden: int
  act: Activation = silu
  bias: bool = False
  init: Init = FanIn()
  out_init: Init = FanIn()
  hidden_norm: Norm | None = None
  up_act: Activation = linear

  def params(self) -> dict[str, Param]:
    """`gate` and `up` [dim, hidden], `down` [hidden, dim], and biases."""
    tree = MLP.params(self)
    tree["gate"] = tree["up"]
    if self.bias:
      tree["gate_bias"] = tree["up_bias"]
    return tree

  def active(self) -> int:
    """Number of parameters that work on one token: all of them."""
    return count(self.params())

  def flops(self) -> int:
    """Operations of one token's forward pass through the matmuls."""
    return flops(self.params())

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    compute: Compute = DEFAULT,
    key: Array | None = None,
  ) -> tuple[Array, Report]:
    """Maps `x` [batch, seq, dim] to the same shape; an empty report."""
    del key
    gate, up = (
      dot(x, p[name], "btd,df->btf", dtype=jnp.float32)
      for name in ("gate", "up")
    )
    if self.bias:
      gate = gate + p["gate_bias"].astype(gate.dtype)[None, None]
      up = up + p["up_bias"].astype(up.dtype)[None, None]
    y = (self.act(gate) * self.up_act(up)).astype(x.dtype)
    return _out(self, p, y, compute), {}
