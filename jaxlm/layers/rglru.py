"""A gated linear recurrence: RG-LRU, in the block that Griffin puts it in.

A state that enters its own future linearly can be computed for all positions
at once: training is an associative scan, decoding one step. The cache is the
state and the last inputs of the convolution; what empties it, and what passes
it by, is as in `recurrent.py`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.at import At
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.linear import dot
from jaxlm.layers.mlp import Activation, gelu_tanh
from jaxlm.layers.param import ZEROS, FanIn, Init, Normal, Param
from jaxlm.layers.recurrent import choose, marks, place, state_param

Array = jax.Array
Cache = dict[str, Array]


@dataclass(frozen=True)
class DecayInit:
  """Λ such that exp(-softplus(Λ)) is uniform in area between two radii.

  What the published code of Griffin draws (recurrentgemma, `rnn_param_init`);
  a recurrence that starts with slow decays remembers from the first step.
  """

  low: float = 0.9
  high: float = 0.999

  def __call__(self, key: Array, param: Param, dtype: Any) -> Array:
    """An array of the parameter's shape."""
    low, high = self.low**2, self.high**2
    square = jax.random.uniform(key, param.shape, minval=low, maxval=high)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(square))).astype(dtype)


@dataclass(frozen=True)
class RGLRU:
  """The recurrent block of Griffin and Hawk (arXiv:2402.19427, section 2.4).

      u = conv(x W_x),  r = sigmoid(u W_r),  i = sigmoid(u W_i)
      log a = -power r softplus(Λ)
      h' = a h + sqrt(1 - a^2) (i u)
      y = (h act(x W_gate)) W_o

  The convolution runs over the last `kernel` tokens, each feature alone; the
  gates' matrices are block-diagonal. The first token of a document enters
  unscaled (sqrt(1 - a^2) counts as 1), as in the published code.

  Attributes:
    dim: width of the residual stream.
    width: of the recurrence; None means `dim`.
    blocks: into how many the gates' matrices fall apart.
    kernel: tokens the convolution sees.
    act: of the branch that gates the output.
    power: c of the paper.
    init, out_init: initializers of the projections in and out.
  """

  dim: int
  width: int | None = None
  blocks: int = 1
  kernel: int = 4
  act: Activation = gelu_tanh
  power: float = 8.0
  init: Init = FanIn()
  out_init: Init = FanIn()

  @property
  def features(self) -> int:
    """Width of the recurrence."""
    return self.width or self.dim

  def params(self) -> dict[str, Param]:
    """Projections `x`, `gate`, `o`, the convolution, two gates, `decay`."""
    d, inner = self.features, self.features // self.blocks
    vector = Param((d,), ("mlp",), 0, ZEROS)
    wide = Param((self.dim, d), ("embed", "mlp"), 1, self.init)
    square = Param(
      (self.blocks, inner, inner), ("blocks", None, None), 1, FanIn()
    )
    start = Normal(self.kernel**-0.5)
    return {
      "x": wide,
      "x_bias": vector,
      "gate": wide,
      "gate_bias": vector,
      "conv": Param((self.kernel, d), (None, "mlp"), 0, start),
      "conv_bias": vector,
      "input_gate": square,
      "input_gate_bias": vector,
      "decay_gate": square,
      "decay_gate_bias": vector,
      "decay": Param((d,), ("mlp",), 0, DecayInit(), jnp.float32),
      "o": Param((d, self.dim), ("mlp", "embed"), 1, self.out_init),
      "o_bias": Param((self.dim,), ("embed",), 0, ZEROS),
    }

  def cache(
    self, batch: int, length: int, kind: Any = None
  ) -> dict[str, Param]:
    """The state `h` [batch, width], the last inputs of the convolution."""
    del length, kind
    shape = (batch, self.kernel - 1, self.features)
    return {
      "h": state_param(batch, self.features),
      "conv": Param(shape, ("batch", None, "mlp"), 0, ZEROS, jnp.float32),
    }

  def flops(self, seq: int) -> int:
    """Operations of a token in the convolution and the recurrence."""
    del seq
    return (2 * self.kernel + 12) * self.features

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    at: At | None = None,
    cache: Cache | None = None,
    compute: Compute = DEFAULT,
  ) -> tuple[Array, Cache]:
    """Runs over `x` [batch, seq, dim]; see `RNN`."""
    at = At() if at is None else at
    live, start = marks(at, x.shape[1])
    if at.aligned:
      cache = None if cache is None else {}
    wide = jnp.float32

    def project(name: str) -> Array:
      y = dot(x, p[name], "btd,df->btf", dtype=wide)
      return y + p[name + "_bias"].astype(wide)[None, None]

    u, tail = self._conv(p, project("x"), live, start, cache, compute)
    if start is None:
      start = jnp.arange(x.shape[1])[None] == 0
    log_a, u = self._gated(p, u, start, x.dtype, compute)
    if live is not None:
      log_a, u = choose(live, (log_a, u), 0.0)
    h = _linear_scan(jnp.where(start[..., None], -jnp.inf, log_a), u, cache)
    y = (h * self.act(project("gate"))).astype(x.dtype)
    spec = compute.spec(("batch", "seq", "embed"), x.shape)
    y = dot(y, p["o"], "btf,fd->btd", spec, wide)
    y = y + p["o_bias"].astype(wide)[None, None]
    return y, {} if cache is None else {"h": h[:, -1], "conv": tail}

  def _conv(
    self, p, u: Array, live, start, cache: Cache | None, compute: Compute
  ) -> tuple[Array, Array]:
    """The convolution over time, and what the next call needs of `u`.

    No document sees the one before it. Padding counts as zero; with a cache it
    is moved to the front first, so that it parts no two tokens.
    """
    (b, t, d), n = u.shape, self.kernel - 1
    u = u if live is None else choose(live, u, 0.0)
    before = jnp.zeros((b, n, d), u.dtype)
    before = place(before, ("batch", None, "mlp"), compute)
    if cache:
      before = cache["conv"]
    line, number, order = jnp.concatenate([before, u], axis=1), None, None
    if start is not None:
      number = jnp.cumsum(start, axis=1, dtype=jnp.int32)  # of the document
      number = jnp.pad(number, ((0, 0), (n, 0)))
    if cache and live is not None:
      read = jnp.pad(live, ((0, 0), (n, 0)), constant_values=True)
      order = jnp.argsort(read, axis=1, stable=True)
      line, number = _pick(line, order), _pick(number, order)
    out = self._weigh(p, line, number)
    if order is not None:
      back = jnp.argsort(order, axis=1)[:, n:] - n
      out = _pick(out, jnp.maximum(back, 0))
    tail = line[:, t:]
    if number is not None:
      tail = choose(number[:, t:] == number[:, -1:], tail, 0.0)
    return out, tail

  def _weigh(self, p, line: Array, number: Array | None) -> Array:
    """Sums over the lags of a `line` [batch, kernel - 1 + seq, width]."""
    n, w = self.kernel - 1, p["conv"].astype(jnp.float32)
    t = line.shape[1] - n
    out = jnp.zeros_like(line[:, n:])
    for j in range(self.kernel):
      part = line[:, j : j + t]
      if number is not None:
        part = choose(number[:, j : j + t] == number[:, n:], part, 0.0)
      out = out + part * w[j][None, None]
    return out + p["conv_bias"].astype(jnp.float32)[None, None]

  def _gated(
    self, p, u: Array, start: Array, dtype: Any, compute: Compute
  ) -> tuple[Array, Array]:
    """The logarithm of the decay, and the input as it enters the state."""
    axes = ("batch", "length", "mlp")
    whole = place(u.astype(dtype), ("batch", "length", None), compute)
    parts = whole.reshape(*u.shape[:2], self.blocks, -1)

    def sigmoid(name: str) -> Array:
      y = jnp.einsum(
        "btki,kij->btkj",
        parts,
        p[name].astype(dtype),
        preferred_element_type=jnp.float32,
      ).reshape(u.shape)
      y = place(y, axes, compute)
      bias = p[name + "_bias"].astype(jnp.float32)
      return jax.nn.sigmoid(y + bias[None, None])

    rate = jax.nn.softplus(p["decay"].astype(jnp.float32))
    log_a = -self.power * sigmoid("decay_gate") * rate[None, None]
    # Above zero, so that the root has a derivative where the decay is one.
    share = jnp.sqrt(jnp.maximum(-jnp.expm1(2.0 * log_a), 1e-12))
    share = jnp.where(start[..., None], 1.0, share)
    return log_a, share * sigmoid("input_gate") * u


def _linear_scan(log_a: Array, u: Array, cache: Cache | None) -> Array:
  """All states h[t] = exp(log_a[t]) h[t-1] + u[t], [batch, seq, width]."""
  a = jnp.exp(log_a)

  def join(first: tuple, then: tuple) -> tuple:
    return first[0] * then[0], then[0] * first[1] + then[1]

  if u.shape[1] > 1:
    a, u = jax.lax.associative_scan(join, (a, u), axis=1)
  return a * cache["h"][:, None] + u if cache else u


def _pick(x: Array, order: Array) -> Array:
  """Tokens `[batch, seq, ...]` in the order [batch, seq]."""
  order = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, order, axis=1)
