"""Recurrent mixers: what a token knows of the past is a state of fixed size.

`RNN` runs a cell (`Elman`, `LSTM` or `GRU`) over time; its cache is its state.
The state empties where a document starts (position 0, or another segment than
the token before), and a token at a negative position (padding) leaves it as it
was. A recurrence that is linear in its state is in `rglru.py`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlm.layers.at import At
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.linear import dot
from jaxlm.layers.mlp import Activation
from jaxlm.layers.param import ZEROS, FanIn, Init, Param

Array = jax.Array
Cache = dict[str, Array]


def tanh(x: Array) -> Array:
  """The hyperbolic tangent."""
  return jnp.tanh(x)


# --- Cells ------------------------------------------------------------------


@dataclass(frozen=True)
class Elman:
  """h' = act(x + h W) (Elman 1990)."""

  act: Activation = tanh
  gates: ClassVar[int] = 1
  states: ClassVar[tuple[str, ...]] = ("h",)

  def __call__(self, x: Array, r: Array, state: Cache) -> Cache:
    """One step; see `LSTM`."""
    del state
    return {"h": self.act(x + r)[:, 0]}


@dataclass(frozen=True)
class LSTM:
  """Long short-term memory (Hochreiter & Schmidhuber 1997, Gers et al. 2000).

  i, f, o = sigmoid(...), g = tanh(...); c' = f c + i g; h' = o tanh(c').
  Gates lie in the order i, f, g, o, as torch has them.
  """

  gates: ClassVar[int] = 4
  states: ClassVar[tuple[str, ...]] = ("h", "c")

  def __call__(self, x: Array, r: Array, state: Cache) -> Cache:
    """One step.

    Args:
      x: what the input says to each gate, float32 `[batch, gates, hidden]`.
      r: what the state says to each gate, alike.
      state: `[batch, hidden]` each, float32.

    Returns:
      The next state.
    """
    i, f, g, o = jnp.unstack(x + r, axis=1)
    i, f, o = (jax.nn.sigmoid(gate) for gate in (i, f, o))
    c = f * state["c"] + i * jnp.tanh(g)
    return {"h": o * jnp.tanh(c), "c": c}


@dataclass(frozen=True)
class GRU:
  """Gated recurrent unit (arXiv:1406.1078), reset after the matmul.

  r, z = sigmoid(...); n = tanh(x_n + r (h W_n + b_n)); h' = (1 - z) n + z h.
  Gates lie in the order r, z, n. The paper resets the state before its matmul;
  torch and cuDNN do it after, which needs one matmul a step instead of two.
  """

  gates: ClassVar[int] = 3
  states: ClassVar[tuple[str, ...]] = ("h",)

  def __call__(self, x: Array, r: Array, state: Cache) -> Cache:
    """One step; see `LSTM`."""
    reset, z = jnp.unstack(jax.nn.sigmoid(x[:, :2] + r[:, :2]), axis=1)
    n = jnp.tanh(x[:, 2] + reset * r[:, 2])
    return {"h": (1.0 - z) * n + z * state["h"]}


Cell = Elman | LSTM | GRU


@dataclass(frozen=True)
class GateBias:
  """Zeros, but `value` at one gate: an LSTM that starts by remembering.

  A forget gate at 1 is the advice of Jozefowicz et al. 2015, section 2.2.
  """

  gate: int
  value: float = 1.0

  def __call__(self, key: Array, param: Param, dtype: Any) -> Array:
    """An array `[..., gates, hidden]`."""
    del key
    return jnp.zeros(param.shape, dtype).at[..., self.gate, :].set(self.value)


# --- The mixer around a cell ------------------------------------------------


@dataclass(frozen=True)
class RNN:
  """A cell run over time, `lax.scan` in training as in decoding.

  Attributes:
    dim: width of the residual stream.
    cell: `Elman()`, `LSTM()` or `GRU()`.
    hidden: width of the state; None means `dim`, and the state is the output;
      else a matrix `o` leads back.
    bias: a vector for the input and one for the state, as torch has it.
    init, state_init, out_init: initializers of the matrices.
  """

  dim: int
  cell: Cell = LSTM()
  hidden: int | None = None
  bias: bool = True
  init: Init = FanIn()
  state_init: Init = FanIn()
  out_init: Init = FanIn()

  @property
  def width(self) -> int:
    """Features of the state."""
    return self.hidden or self.dim

  def params(self) -> dict[str, Param]:
    """`x` [dim, gates, hidden], `h` [hidden, gates, hidden], biases, `o`."""
    gates = (self.cell.gates, self.width)
    # The state is whole when it is multiplied, so its axis is not 'mlp'.
    axes = ("embed", None, "mlp")
    tree = {
      "x": Param((self.dim, *gates), axes, 1, self.init),
      "h": Param((self.width, *gates), axes, 1, self.state_init),
    }
    if self.bias:
      start = GateBias(1) if isinstance(self.cell, LSTM) else ZEROS
      tree["x_bias"] = Param(gates, axes[1:], 0, start)
      tree["h_bias"] = Param(gates, axes[1:], 0, ZEROS)
    if self.hidden is not None:
      shape = (self.width, self.dim)
      tree["o"] = Param(shape, ("mlp", "embed"), 1, self.out_init)
    return tree

  def cache(
    self, batch: int, length: int, kind: Any = None
  ) -> dict[str, Param]:
    """The state, float32 [batch, hidden]; of any length and kind the same."""
    del length, kind
    return {name: state_param(batch, self.width) for name in self.cell.states}

  def flops(self, seq: int) -> int:
    """Operations of a token that are no parameter's: about six a gate."""
    del seq
    return 6 * self.cell.gates * self.width

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    at: At | None = None,
    cache: Cache | None = None,
    compute: Compute = DEFAULT,
  ) -> tuple[Array, Cache]:
    """Runs over `x` [batch, seq, dim], from the state in `cache` if there.

    Returns:
      float32 `[batch, seq, dim]`, and the last state, `{}` without a cache.
    """
    at = At() if at is None else at
    live, start = marks(at, x.shape[1])
    inner = dot(x, p["x"], "btd,dgh->btgh", dtype=jnp.float32)
    if self.bias:
      both = (p[k].astype(jnp.float32) for k in ("x_bias", "h_bias"))
      x_bias, h_bias = (b[None] for b in both)
      inner = inner + x_bias[None]
    state = self._begin(x.shape[0], at, cache, compute)

    def step(state: Cache, now: tuple) -> tuple[Cache, Array]:
      inner, live, start = now
      old = state if start is None else choose(~start, state, 0.0)
      h = place(old["h"].astype(x.dtype), ("batch", None), compute)
      r = dot(h, p["h"], "bh,hgk->bgk", dtype=jnp.float32)
      new = self.cell(inner, r + h_bias if self.bias else r, old)
      new = new if live is None else choose(live, new, state)
      return new, new["h"]

    now = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (inner, live, start))
    state, y = jax.lax.scan(step, state, now)
    y = self._out(p, jnp.moveaxis(y, 0, 1), x, compute)
    return y, {} if cache is None else state

  def _begin(self, batch: int, at: At, cache: Cache | None, compute) -> Cache:
    """The state before the first token; a row without positions starts anew."""
    if cache is not None and not at.aligned:
      return cache
    zeros = jnp.zeros((batch, self.width), jnp.float32)
    return dict.fromkeys(
      self.cell.states, place(zeros, ("batch", "mlp"), compute)
    )

  def _out(self, p, h: Array, x: Array, compute: Compute) -> Array:
    """From states [batch, seq, hidden] to the residual stream."""
    axes = ("batch", "seq", "embed")
    if self.hidden is None:
      return place(h, axes, compute)
    spec = compute.spec(axes, x.shape)
    return dot(h.astype(x.dtype), p["o"], "bth,hd->btd", spec, jnp.float32)


# --- What recurrences share --------------------------------------------------


def marks(at: At, seq: int) -> tuple[Array | None, Array | None]:
  """Which tokens are no padding, and which start a document.

  Both bool [batch, seq]. None means all of them, and only the first of a row:
  what is known of plain rows when the program is traced.
  """
  if at.aligned:
    return None, None
  if at.positions is None:
    live, start = None, (jnp.arange(seq) == 0)[None]
  else:
    live, start = at.positions >= 0, at.positions == 0
  if at.segments is not None:
    other = at.segments[:, 1:] != at.segments[:, :-1]
    start = start | jnp.pad(other, ((0, 0), (1, 0)))
  return live, start if live is None else start & live


def place(x: Array, axes: tuple, compute: Compute) -> Array:
  """Moves an activation to where the rules want these axes."""
  spec = compute.spec(axes, x.shape)
  return x if spec is None else jax.sharding.reshard(x, spec)


def state_param(batch: int, width: int) -> Param:
  """Declares one state vector a row."""
  return Param((batch, width), ("batch", "mlp"), 0, ZEROS, jnp.float32)


def choose(where: Array, new: Any, old: Any) -> Any:
  """`new` where `where`, else `old` (a like tree, or one number)."""

  def one(a: Array, b: Any) -> Array:
    return jnp.where(where[..., None], a, b)

  if isinstance(old, float):
    return jax.tree.map(lambda a: one(a, old), new)
  return jax.tree.map(one, new, old)
