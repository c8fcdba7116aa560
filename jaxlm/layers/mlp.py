"""Feed-forward layers: two projections with a nonlinearity, or a gated pair."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.linear import dot
from jaxlm.layers.param import ZEROS, FanIn, Init, Param

Array = jax.Array


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


Activation = Callable[[Array], Array]


def _out(p, y: Array, dim: int, bias: bool, compute: Compute) -> Array:
  """The projection back to the residual stream, row-parallel under a mesh."""
  shape = (*y.shape[:-1], dim)
  spec = compute.spec(("batch", "seq", "embed"), shape)
  out = dot(y, p["down"], "btf,fd->btd", spec, jnp.float32)
  return out + p["down_bias"].astype(out.dtype)[None, None] if bias else out


@dataclass(frozen=True)
class MLP:
  """y = act(x W_up + b) W_down + b.

  Attributes:
    dim: width of the residual stream.
    hidden: width between the projections.
    act: the nonlinearity, a module-level function.
    bias: biases on both projections.
    init, out_init: initializers of the two projections.
  """

  dim: int
  hidden: int
  act: Activation = gelu_tanh
  bias: bool = False
  init: Init = FanIn()
  out_init: Init = FanIn()

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
    return tree

  def __call__(
    self, p: dict[str, Any], x: Array, compute: Compute = DEFAULT
  ) -> Array:
    """Maps `x` [batch, seq, dim] to the same shape."""
    y = dot(x, p["up"], "btd,df->btf", dtype=jnp.float32)
    if self.bias:
      y = y + p["up_bias"].astype(y.dtype)[None, None]
    y = self.act(y).astype(x.dtype)
    return _out(p, y, self.dim, self.bias, compute)


@dataclass(frozen=True)
class GLU:
  """y = (act(x W_gate) * (x W_up)) W_down (arXiv:2002.05202).

  With SiLU this is SwiGLU, with GELU GeGLU. Attributes as in `MLP`.
  """

  dim: int
  hidden: int
  act: Activation = silu
  bias: bool = False
  init: Init = FanIn()
  out_init: Init = FanIn()

  def params(self) -> dict[str, Param]:
    """`gate` and `up` [dim, hidden], `down` [hidden, dim], and biases."""
    tree = MLP.params(self)
    tree["gate"] = tree["up"]
    if self.bias:
      tree["gate_bias"] = tree["up_bias"]
    return tree

  def __call__(
    self, p: dict[str, Any], x: Array, compute: Compute = DEFAULT
  ) -> Array:
    """Maps `x` [batch, seq, dim] to the same shape."""
    gate, up = (
      dot(x, p[name], "btd,df->btf", dtype=jnp.float32)
      for name in ("gate", "up")
    )
    if self.bias:
      gate = gate + p["gate_bias"].astype(gate.dtype)[None, None]
      up = up + p["up_bias"].astype(up.dtype)[None, None]
    y = (self.act(gate) * up).astype(x.dtype)
    return _out(p, y, self.dim, self.bias, compute)


FFN = MLP | GLU
