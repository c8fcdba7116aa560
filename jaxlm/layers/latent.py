"""Multi-head latent attention: all heads read one small vector per token.

Keys and values are products of a latent (arXiv:2405.04434, section 2.1), and
generation has to remember nothing else. The up-projections are matrices, so
they may be multiplied where it is cheapest, and the same layer has two forms:
`expanded` makes keys and values for every head, `absorbed` moves the products
to the queries and the outputs, and the latents are then the one key and value
head of all queries. Both end in the same `attend`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.layers import cache as kv
from jaxlm.layers.at import At
from jaxlm.layers.attend import Moved, attend, largest_logits
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.linear import dot
from jaxlm.layers.mask import Causal, Mask
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import FanIn, Init, Param
from jaxlm.layers.position import Rope
from jaxlm.layers.recurrent import place

Array = jax.Array


@dataclass(frozen=True)
class LatentAttention:
  """Attention whose keys and values come from a shared latent (MLA).

  With c = norm(x W_down) and r = rope(x W_rope), one of each per token, head n
  has the key [c W_k^n, r] and the value c W_v^n: the part of a key that turns
  is shared by all heads and is no function of the latent, since a rotation
  between them would keep W_k from moving to the queries.

  Attributes:
    dim: width of the residual stream.
    heads: number of heads.
    rank: width of the latent.
    q_rank: width of the latent of queries, or None: they come from `x`.
    nope_dim: features of a query or key that do not turn.
    rope_dim: features that do.
    value_dim: features of a value.
    mask: who sees whom.
    position: how they turn.
    eps: of the norms of the latents.
    scale: of the products; None means `(nope_dim + rope_dim) ** -0.5`.
    init, out_init: initializers of the input and output projections.
  """

  dim: int
  heads: int
  rank: int
  q_rank: int | None = None
  nope_dim: int = 128
  rope_dim: int = 64
  value_dim: int = 128
  mask: Mask = Causal()
  position: Rope = Rope(interleaved=True)
  eps: float = 1e-6
  scale: float | None = None
  init: Init = FanIn()
  out_init: Init = FanIn()

  def __post_init__(self):
    sizes = (self.heads, self.rank, self.nope_dim, self.rope_dim)
    sizes += (self.value_dim, 1 if self.q_rank is None else self.q_rank)
    if min(sizes) < 1:
      raise UserError(
        f"latent attention of {self.heads} heads with rank={self.rank}, "
        f"q_rank={self.q_rank}, nope_dim={self.nope_dim}, rope_dim="
        f"{self.rope_dim}, value_dim={self.value_dim}: each has to be at least "
        "1 (q_rank=None leaves queries uncompressed)"
      )
    self.position.turned(self.rope_dim)

  @property
  def width(self) -> int:
    """Features of a query or key of one head."""
    return self.nope_dim + self.rope_dim

  @property
  def groups(self) -> int:
    """Number of key and value heads, while they are expanded."""
    return self.heads

  @property
  def norm(self) -> RMSNorm:
    """That of the latents of keys and values."""
    return RMSNorm(self.rank, self.eps, axis="latent")

  @property
  def q_norm(self) -> RMSNorm | None:
    """That of the latents of queries."""
    if self.q_rank is None:
      return None
    return RMSNorm(self.q_rank, self.eps, axis="latent")

  def params(self) -> dict[str, Any]:
    """Projections down and up again, with norms between.

    `q` [dim, heads, nope + rope], or `q_down` [dim, q_rank] and `q_up` [q_rank,
    heads, nope + rope]; `down` [dim, rank], `rope` [dim, rope], `k_up` [rank,
    heads, nope], `v_up` [rank, heads, value]; `o` [heads, value, dim].
    """
    if self.q_rank is None:
      queries = {"q": self._up(self.dim, self.width, "embed")}
    else:
      queries = {
        "q_down": self._matrix(self.dim, self.q_rank),
        "q_down_norm": self.q_norm.params(),
        "q_up": self._up(self.q_rank, self.width),
      }
    return queries | {
      "down": self._matrix(self.dim, self.rank),
      "rope": self._matrix(self.dim, self.rope_dim, "head_dim"),
      "down_norm": self.norm.params(),
      "k_up": self._up(self.rank, self.nope_dim),
      "v_up": self._up(self.rank, self.value_dim),
      "o": Param(
        (self.heads, self.value_dim, self.dim),
        ("heads", "head_dim", "embed"),
        2,
        self.out_init,
      ),
    }

  def _matrix(self, n_in: int, n_out: int, axis: str = "latent") -> Param:
    """A projection of the residual stream that all heads share."""
    return Param((n_in, n_out), ("embed", axis), 1, self.init)

  def _up(self, n_in: int, width: int, axis: str = "latent") -> Param:
    """A projection to every head."""
    shape = (n_in, self.heads, width)
    return Param(shape, (axis, "heads", "head_dim"), 1, self.init)

  def cache(
    self, batch: int, length: int, kind: Any = kv.FULL
  ) -> dict[str, Any]:
    """Latents and turned keys of `length` positions, or as `kind` says."""
    token = kv.latent(self.rank + self.rope_dim)
    return kv.declare(kind, token, batch, length, self.mask, self.position)

  def flops(self, seq: int) -> int:
    """Operations of one token's score and value products at context `seq`.

    Those of the expanded form, which trains; the mean over a causal row.
    """
    seen = (seq + 1) / 2 if self.mask.causal else seq
    seen = min(seen, self.mask.reach or seen)
    return int(2 * self.heads * (self.width + self.value_dim) * seen)

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    at: At | None = None,
    cache: dict[str, Array] | None = None,
    compute: Compute = DEFAULT,
  ) -> tuple[Array, dict[str, Array]]:
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
    where = jnp.arange(x.shape[1]) if at.positions is None else at.positions
    q, latents = self.queries(p, x, where), self.latents(p, x, where)
    if cache is None:
      y, out = self.expanded(p, q, latents, at, compute)
    else:
      y, out = self._attend_cached(p, x, q, latents, where, cache, compute)
    spec = compute.spec(("batch", "seq", "embed"), x.shape)
    return dot(y, p["o"], "btnh,nhd->btd", spec, jnp.float32), out

  def _attend_cached(self, p, x, q, latents, where, cache, compute: Compute):
    """Attends to the cache and the new tokens; returns output and cache."""
    where, kind = jnp.broadcast_to(where, x.shape[:2]), kv.kind_of(cache)
    new = {"latent": latents}
    seen, cache = kv.extend(cache, new, where, self.mask, compute)
    near, moved = kind.near(where), None
    if near is not None:
      first = self._inward(p, self.queries(p, x, near))
      moved = Moved(first, near, kv.window_of(kind).sinks)
    at, keys = At(positions=where), At(positions=seen["positions"])
    latents, mask = seen["latent"].astype(q.dtype), kind.sees(self.mask)
    return self.absorbed(p, q, latents, at, keys, compute, mask, moved), cache

  def queries(self, p: dict[str, Any], x: Array, where: Array) -> Array:
    """Queries `[batch, seq, heads, nope + rope]` of `x`, at `where`."""
    if self.q_rank is None:
      q = dot(x, p["q"], "btd,dnh->btnh", dtype=jnp.float32)
    else:
      c = dot(x, p["q_down"], "btd,dr->btr", dtype=jnp.float32)
      c = self.q_norm(p["q_down_norm"], c).astype(x.dtype)
      q = dot(c, p["q_up"], "btr,rnh->btnh", dtype=jnp.float32)
    still, turned = jnp.split(q, [self.nope_dim], axis=-1)
    turned = self.position(turned, where)
    return jnp.concatenate([still, turned], axis=-1).astype(x.dtype)

  def latents(self, p: dict[str, Any], x: Array, where: Array) -> Array:
    """What is remembered of `x`: [c, r], `[batch, seq, rank + rope]`."""
    c = dot(x, p["down"], "btd,dr->btr", dtype=jnp.float32)
    r = dot(x, p["rope"], "btd,dh->bth", dtype=jnp.float32)
    r = self.position(r[:, :, None], where)[:, :, 0]
    c = self.norm(p["down_norm"], c)
    return jnp.concatenate([c, r], axis=-1).astype(x.dtype)

  def expanded(
    self, p: dict[str, Any], q: Array, latents: Array, at: At, compute: Compute
  ) -> tuple[Array, dict[str, Array]]:
    """Makes keys and values of every head: the form that trains.

    Args:
      p: parameters.
      q: as `queries` makes them.
      latents: as `latents` makes them, of the same tokens.
      at: where the tokens stand.
      compute: how to run.

    Returns:
      `[batch, seq, heads, value]`, and a report as of `__call__`.
    """
    c, r = jnp.split(latents, [self.rank], axis=-1)
    k = dot(c, p["k_up"], "btr,rnh->btnh")
    v = dot(c, p["v_up"], "btr,rnh->btnh")
    r = jnp.broadcast_to(r[:, :, None], (*k.shape[:3], self.rope_dim))
    r = place(r, ("batch", "length", "heads", None), compute)
    k = jnp.concatenate([k, r], axis=-1)
    y = attend(q, k, v, self.mask, at, scale=self._scale, compute=compute)
    if not compute.watch:
      return y, {}
    return y, {"max_logits": largest_logits(q, k, self.mask, at, self._scale)}

  def absorbed(
    self,
    p: dict[str, Any],
    q: Array,
    latents: Array,
    at: At,
    keys: At,
    compute: Compute,
    mask: Mask | None = None,
    moved: Moved | None = None,
  ) -> Array:
    """Multi-query attention over latents: the form that generates.

    q' (c W_k) = (q W_k')' c, and a weighted sum of c W_v is the same sum of c,
    times W_v. A step reads rank + rope numbers per token and no more.

    Args:
      p: parameters.
      q: as `queries` makes them.
      latents: `[batch, keys, rank + rope]`.
      at: where the queries stand.
      keys: where the latents stand.
      compute: how to run.
      mask: another than the layer's own, or None.
      moved: as in `attend`; its queries are absorbed already.

    Returns:
      `[batch, seq, heads, value]`.
    """
    y = attend(
      self._inward(p, q),
      latents[:, :, None],
      latents[:, :, None, : self.rank],
      mask or self.mask,
      at,
      keys,
      scale=self._scale,
      moved=moved,
      compute=compute,
    )
    return _per_head("btnr,rnh->btnh", y, p["v_up"])

  def _inward(self, p: dict[str, Any], q: Array) -> Array:
    """Queries as they meet latents, `[batch, seq, heads, rank + rope]`."""
    still, turned = jnp.split(q, [self.nope_dim], axis=-1)
    inner = _per_head("btnh,rnh->btnr", still, p["k_up"])
    return jnp.concatenate([inner, turned], axis=-1)

  @property
  def _scale(self) -> float:
    return self.width**-0.5 if self.scale is None else self.scale


def _per_head(spec: str, x: Array, w: Array) -> Array:
  """Each head times its own matrix, summed in float32, in the dtype of `x`."""
  y = jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=jnp.float32)
  return y.astype(x.dtype)
