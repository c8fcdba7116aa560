"""Multi-head, grouped-query and multi-query attention as one frozen value."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.layers import cache as kv
from jaxlm.layers.at import At
from jaxlm.layers.attend import Moved, attend, largest_logits
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.in_place import attend_pages, in_place
from jaxlm.layers.linear import dot
from jaxlm.layers.mask import Causal, Mask
from jaxlm.layers.norm import Norm
from jaxlm.layers.param import ZEROS, FanIn, Init, Param
from jaxlm.layers.position import Alibi, Rope
from jaxlm.layers.relative import RelativeBias

Array = jax.Array


@dataclass(frozen=True)
class Temperature:
  """Queries grow with their position: 1 + slope * log(1 + floor((m+1) / n)).

  Llama 4 sharpens the layers without positions so, that they still find their
  key among many (inference-time tuning, after arXiv:2501.19399).

  Attributes:
    slope: what the logarithm is multiplied by.
    every: the number n of positions after which it first grows.
  """

  slope: float = 0.1
  every: int = 8192

  def __call__(self, q: Array, positions: Array) -> Array:
    """Scales queries [batch, seq, heads, head_dim] at `positions` [.., seq]."""
    steps = jnp.floor((positions.astype(jnp.float32) + 1.0) / self.every)
    factor = 1.0 + self.slope * jnp.log1p(steps)
    factor = factor.reshape((1,) * (2 - factor.ndim) + factor.shape)
    return q * factor[..., None, None].astype(q.dtype)


@dataclass(frozen=True)
class Attention:
  """softmax(Q K' / sqrt(d)) V with projections (arXiv:1706.03762, 3.2).

  Attributes:
    dim: width of the residual stream.
    heads: number of query heads.
    kv_heads: number of key and value heads; fewer than `heads` is GQA, one is
      MQA; None means as many as queries.
    head_dim: width of a head; None means `dim / heads`.
    mask: who sees whom.
    position: `Rope`, `Alibi`, `RelativeBias`, or None (positions live
      elsewhere, or nowhere).
    qk_norm: normalises each head's queries and keys before the rotation
      (Qwen 3, arXiv:2302.05442), after it where `norm_after_rope`; over all
      heads at once where `norm_heads` is 'all' (OLMo 2).
    bias: biases on q, k and v; `out_bias` on the output.
    scale: of the products; None means `head_dim ** -0.5`.
    softcap: bounds the scores (Gemma 2).
    sinks: a learned logit per head that only joins the softmax's denominator
      (gpt-oss).
    temperature: of the queries by position, or None.
    out_norm: over all heads, before the output projection (BitNet).
    init, out_init: initializers of the input and output projections.
    q_init: that of the queries, where it is another (T5).
  """

  dim: int
  heads: int
  kv_heads: int | None = None
  head_dim: int | None = None
  mask: Mask = Causal()
  position: Rope | Alibi | RelativeBias | None = None
  qk_norm: Norm | None = None
  norm_after_rope: bool = False
  norm_heads: str = "each"
  bias: bool = False
  out_bias: bool = False
  scale: float | None = None
  softcap: float | None = None
  sinks: bool = False
  temperature: Temperature | None = None
  out_norm: Norm | None = None
  init: Init = FanIn()
  out_init: Init = FanIn()
  q_init: Init | None = None

  def __post_init__(self):
    # What None stands for is filled in, so that equal layers are `==`.
    if self.kv_heads is None:
      object.__setattr__(self, "kv_heads", self.heads)
    if self.head_dim is None and self.dim % self.heads == 0:
      object.__setattr__(self, "head_dim", self.dim // self.heads)
    if self.head_dim is not None and self.heads % self.kv_heads:
      raise UserError(
        f"heads={self.heads} does not divide into kv_heads={self.kv_heads} "
        "groups; change one of them"
      )

  @property
  def width(self) -> int:
    """Features per head."""
    return self.head_dim or self.dim // self.heads

  @property
  def groups(self) -> int:
    """Number of key and value heads."""
    return self.kv_heads or self.heads

  def params(self) -> dict[str, Any]:
    """`q`, `k`, `v` [dim, heads, head_dim] and `o` [heads, head_dim, dim]."""
    tree: dict[str, Any] = {}
    for name, n, axis, init in (
      ("q", self.heads, "heads", self.q_init or self.init),
      ("k", self.groups, "kv_heads", self.init),
      ("v", self.groups, "kv_heads", self.init),
    ):
      shape = (n, self.width)
      tree[name] = Param(
        (self.dim, *shape), ("embed", axis, "head_dim"), 1, init
      )
      if self.bias:
        tree[name + "_bias"] = Param(shape, (axis, "head_dim"), 0, ZEROS)
    tree["o"] = Param(
      (self.heads, self.width, self.dim),
      ("heads", "head_dim", "embed"),
      2,
      self.out_init,
    )
    if self.out_bias:
      tree["o_bias"] = Param((self.dim,), ("embed",), 0, ZEROS)
    if self.qk_norm is not None:
      tree["q_norm"] = self._norm(self.heads).params()
      tree["k_norm"] = self._norm(self.groups).params()
    if self.sinks:
      tree["sinks"] = Param((self.heads,), ("heads",), 0, ZEROS, jnp.float32)
    if self.out_norm is not None:
      tree["out_norm"] = self.out_norm.params()
    return tree

  def _norm(self, heads: int) -> Norm:
    """The norm of queries or keys: of each head, or of all at once."""
    if self.norm_heads == "each":
      return self.qk_norm
    return replace(self.qk_norm, dim=heads * self.width)

  def cache(
    self, batch: int, length: int, kind: Any = kv.FULL
  ) -> dict[str, Any]:
    """Keys and values of `length` positions, or as `kind` keeps them."""
    token = kv.heads(self.groups, self.width, self.width, self.mask)
    return kv.declare(kind, token, batch, length, self.mask, self.position)

  def flops(self, seq: int) -> int:
    """Operations of one token's score and value products at context `seq`.

    The mean over a causal row: a query sees half of the context, or its reach.
    """
    seen = (seq + 1) / 2 if self.mask.causal else seq
    seen = min(seen, self.mask.reach or seen)
    return int(2 * 2 * self.heads * self.width * seen)

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    at: At | None = None,
    cache: dict[str, Array] | None = None,
    compute: Compute = DEFAULT,
  ) -> tuple[Array, dict[str, Array] | None]:
    """Attends within `x`, and to what `cache` holds.

    Args:
      p: parameters, already in the compute dtype.
      x: `[batch, seq, dim]`.
      at: where the tokens stand; required fields are implied when None.
      cache: from `empty(self.cache(...))`, or None outside generation.
      compute: how to run.

    Returns:
      `[batch, seq, dim]`, and the cache with these tokens added; without a
      cache a report: `max_logits` [heads] where `compute.watch`, or empty.
    """
    at = At() if at is None else at
    q, k, v = self._project(p, x, at)
    if cache is None:
      y, out = self.weigh(p, q, k, v, at, at, compute), {}
      if compute.watch:
        top = largest_logits(q, k, self.mask, at, self.scale)
        out = {"max_logits": top}
    else:
      y, out = self._attend_cached(p, x, (q, k, v), at, cache, compute)
    return self.output(p, y, x.shape, compute), out

  def output(
    self, p: dict[str, Any], y: Array, shape: tuple, compute: Compute
  ) -> Array:
    """Heads `[batch, seq, heads, head_dim]` back to the residual stream."""
    if self.out_norm is not None:
      flat = self.out_norm(p["out_norm"], y.reshape(*y.shape[:2], -1))
      y = flat.reshape(y.shape)
    out = dot(
      y,
      p["o"],
      "btnh,nhd->btd",
      compute.spec(("batch", "seq", "embed"), shape),
      jnp.float32,
    )
    if self.out_bias:
      out = out + p["o_bias"].astype(jnp.float32)[None, None]
    return out

  def _project(
    self, p: dict[str, Any], x: Array, at: At
  ) -> tuple[Array, Array, Array]:
    """Queries, keys and values of the same tokens."""
    return self.queries(p, x, at), *self.keys(p, x, at)

  def queries(
    self, p: dict[str, Any], x: Array, at: At, near: Array | None = None
  ) -> Array:
    """Queries `[batch, seq, heads, head_dim]` of `x` [batch, seq, dim].

    They are turned by `near` [batch, seq] instead of their positions, if given.
    """
    turned = at if near is None else at.replace(positions=near)
    q = self._turned(p, "q", x, turned)
    if self.temperature is not None:
      q = self.temperature(q, _where(x, at))
    return q.astype(x.dtype)

  def keys(self, p: dict[str, Any], x: Array, at: At) -> tuple[Array, Array]:
    """Keys and values `[batch, seq, kv_heads, head_dim]` of `x`."""
    k, v = self._turned(p, "k", x, at), self._linear(p, "v", x)
    return k.astype(x.dtype), v.astype(x.dtype)

  def _linear(self, p: dict[str, Any], name: str, x: Array) -> Array:
    """One of the three projections, float32: a CPU is slow in bfloat16."""
    y = dot(x, p[name], "btd,dnh->btnh", dtype=jnp.float32)
    if self.bias:
      y = y + p[name + "_bias"].astype(y.dtype)[None, None]
    return y

  def _turned(self, p: dict[str, Any], name: str, x: Array, at: At) -> Array:
    """Queries or keys, normalised and turned."""
    y = self._linear(p, name, x)
    if not self.norm_after_rope:
      y = self._normalise(p, name, y)
    if isinstance(self.position, Rope):
      y = self.position(y, _where(x, at))
    return self._normalise(p, name, y) if self.norm_after_rope else y

  def _normalise(self, p: dict[str, Any], name: str, x: Array) -> Array:
    """`qk_norm` of queries or keys `[batch, seq, heads, head_dim]`."""
    if self.qk_norm is None:
      return x
    norm, p = self._norm(x.shape[2]), p[name + "_norm"]
    if self.norm_heads == "each":
      return norm(p, x)
    return norm(p, x.reshape(*x.shape[:2], -1)).reshape(x.shape)

  def weigh(
    self, p, q, k, v, at: At, keys: At, compute: Compute, mask=None, moved=None
  ) -> Array:
    """`attend` with this layer's options: heads, not yet projected."""
    return attend(
      q,
      k,
      v,
      mask or self.mask,
      at,
      keys,
      scale=self.scale,
      softcap=self.softcap,
      sinks=p["sinks"].astype(jnp.float32) if self.sinks else None,
      alibi=self.position if isinstance(self.position, Alibi) else None,
      bias=self._bias(q, k, at, keys, compute),
      moved=moved,
      compute=compute,
    )

  def _bias(self, q, k, at: At, keys: At, compute: Compute) -> Array | None:
    """What relative positions add to the scores."""
    if not isinstance(self.position, RelativeBias):
      return None
    where = [
      _where(x, place)[None] if place.positions is None else place.positions
      for x, place in ((q, at), (k, keys))
    ]
    return self.position(at.table, *where, compute)

  def _attend_cached(self, p, x, heads, at: At, cache, compute: Compute):
    """Attends to the cache and the new tokens; returns output and cache."""
    (q, k, v), kind = heads, kv.kind_of(cache)
    where = jnp.broadcast_to(_where(q, at), q.shape[:2])
    at, new = at.replace(positions=where), {"k": k, "v": v}
    if "blocks" in cache:
      none = jnp.full_like(where, -1)
      new["blocks"] = none if at.blocks is None else at.blocks
    seen, cache = kv.extend(cache, new, where, self.mask, compute)
    if in_place(cache, q, compute) and not isinstance(
      self.position, RelativeBias
    ):  # what was read is then not read after all
      return self._follow(p, q, cache, where, compute), cache
    # A single query is multiplied with keys as they are kept.
    wide = kv.number(compute) if q.shape[1] == 1 else q.dtype
    q, k, v = (y.astype(wide) for y in (q, seen["k"], seen["v"]))
    keys = At(positions=seen["positions"], blocks=seen.get("blocks"))
    near, moved = kind.near(where), None
    if near is not None and isinstance(self.position, Rope | Alibi):
      first = self.queries(p, x, at, near).astype(wide)
      moved = Moved(first, near, kv.window_of(kind).sinks)
    mask = kind.sees(self.mask)
    y = self.weigh(p, q, k, v, at, keys, compute, mask, moved)
    return y.astype(x.dtype), cache

  def _follow(self, p, q, cache, where, compute: Compute) -> Array:
    """One query per row, to the pages of the cache where they lie."""
    alibi = isinstance(self.position, Alibi)
    return attend_pages(
      q[:, 0],
      cache,
      where[:, 0],
      self.mask,
      scale=self.width**-0.5 if self.scale is None else self.scale,
      softcap=self.softcap,
      sinks=p["sinks"].astype(jnp.float32) if self.sinks else None,
      slopes=self.position.slopes(self.heads) if alibi else None,
      compute=compute,
    )[:, None]


def _where(x: Array, at: At) -> Array:
  """Positions of the tokens `x` [batch, seq, ...]."""
  return jnp.arange(x.shape[1]) if at.positions is None else at.positions
