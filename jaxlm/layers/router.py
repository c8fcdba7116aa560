"""Routers: which experts work on which token, and with what weight.

A router is a frozen value. It owns the matrix that scores the experts, and
answers a `Route`, a flat list of assignments (token, expert, weight): whatever
dispatches tokens to experts reads that list and knows no router. What keeps
the load even is declared here as well: losses by their coefficients, or a bias
that the optimizer's `balance_experts` moves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.errors import UserError
from jaxlm.layers.linear import dot
from jaxlm.layers.param import ZEROS, FanIn, Init, Param

Array = jax.Array


@struct.dataclass
class Route:
  """Assignments, each a token, an expert and a weight: all flat `[n]`.

  `tokens` counts through the rows of a batch; an expert may meet a token once.
  """

  tokens: Array
  experts: Array
  weights: Array


# --- Scores -----------------------------------------------------------------


def softmax(logits: Array) -> Array:
  """Experts compete: exp(x_i) / sum_j exp(x_j)."""
  return jax.nn.softmax(logits, axis=-1)


def sigmoid(logits: Array) -> Array:
  """Each expert on its own: 1 / (1 + exp(-x_i))."""
  return jax.nn.sigmoid(logits)


Score = Callable[[Array], Array]


@dataclass(frozen=True)
class Groups:
  """Only experts of the best groups may be chosen (arXiv:2405.04434, 2.1.2).

  On a cluster a group is a device, and a token then travels to few devices.

  Attributes:
    count: how many groups of equally many experts, in order.
    keep: how many groups a token may choose from.
    best: a group's score is the sum of its so many best experts: 1 in
      DeepSeek-V2, 2 in DeepSeek-V3 (arXiv:2412.19437).
  """

  count: int
  keep: int
  best: int = 1

  def __post_init__(self):
    if not 1 <= self.keep <= self.count or self.best < 1:
      raise UserError(
        f"{self.keep} of {self.count} groups of experts, by the best "
        f"{self.best}: keep at least one group and at most all"
      )

  def among(self, scores: Array) -> Array:
    """`scores` [..., experts] with -inf outside the best groups."""
    grouped = scores.reshape(*scores.shape[:-1], self.count, -1)
    tops, _ = jax.lax.top_k(grouped, min(self.best, grouped.shape[-1]))
    _, chosen = jax.lax.top_k(tops.sum(-1), self.keep)
    kept = jax.nn.one_hot(chosen, self.count, dtype=bool).any(-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


# --- Losses -----------------------------------------------------------------


def switch_loss(load: Array, prob: Array) -> Array:
  """E sum_i f_i P_i, eq. 4 of the Switch Transformer (arXiv:2101.03961).

  One when all experts are used alike, up to E when one has everything. The
  gradient comes through P alone. Published code of top-k models counts each of
  a token's k experts fully and so has k times this.

  Args:
    load: f, the share of assignments of each expert, `[experts]`.
    prob: P, the mean probability of each expert, `[experts]`.
  """
  return load.shape[-1] * jnp.sum(jax.lax.stop_gradient(load) * prob)


def z_term(logits: Array) -> Array:
  """(log sum_i exp x_i)^2 of each token, `[...]` (arXiv:2202.08906, eq. 5)."""
  return jnp.square(jax.nn.logsumexp(logits, axis=-1))


# --- Routers ----------------------------------------------------------------


def _check_top_k(top_k: int, experts: int) -> None:
  if not 1 <= top_k <= experts:
    raise UserError(
      f"top_k={top_k} of {experts} experts: choose at least one, at most all"
    )


def _share(experts: Array, n: int) -> Array:
  """What share of the assignments each of `n` experts got, float32."""
  counts = jnp.bincount(experts.reshape(-1), length=n)
  return counts.astype(jnp.float32) / max(experts.size, 1)


@dataclass(frozen=True)
class TopK:
  """Each token takes the `top_k` experts it scores best.

  With s = score(x W + b), expert i of the chosen works with weight

      w_i = scale * s_i,   or   scale * s_i / sum_{j chosen} s_j

  if `normalise`. A normalised softmax is the softmax of the chosen logits, so
  "top-k, then softmax" (gpt-oss) and "softmax, then top-k, then normalise"
  (Mixtral) are one value.

  Attributes:
    score: `softmax` or `sigmoid`.
    normalise: the weights of a token's experts sum to `scale`.
    scale: what weights are multiplied by (`routed_scaling_factor`).
    groups: limits the choice to the best groups, or None.
    bias: b, learned by gradient.
    correction: a bias added to the scores for the choice alone and not to the
      weights; no gradient reaches it, `balance_experts` moves it
      (arXiv:2408.15664).
    noise: logits get normal noise times softplus(x W_noise) while training
      (arXiv:1701.06538, eq. 4).
    balance: coefficient of the Switch loss.
    z_loss: coefficient of the router's z-loss.
    init: of W; W_noise starts at zero, noise of deviation log 2.
  """

  score: Score = softmax
  normalise: bool = True
  scale: float = 1.0
  groups: Groups | None = None
  bias: bool = False
  correction: bool = False
  noise: bool = False
  balance: float = 0.0
  z_loss: float = 0.0
  init: Init = FanIn()

  def check(self, experts: int, top_k: int) -> None:
    """Raises UserError where so many experts cannot be chosen."""
    _check_top_k(top_k, experts)
    if self.groups is None:
      return
    count, keep = self.groups.count, self.groups.keep
    if experts % count:
      raise UserError(f"{experts} experts do not divide into {count} groups")
    if top_k > keep * (experts // count):
      raise UserError(
        f"top_k={top_k} experts do not fit into {keep} groups of "
        f"{experts // count}"
      )

  def params(self, dim: int, experts: int) -> dict[str, Param]:
    """`w` [dim, experts] and what else the fields ask for; all float32."""
    shape, axes = (dim, experts), ("embed", "experts")
    tree = {"w": Param(shape, axes, 1, self.init, jnp.float32)}
    if self.bias:
      tree["bias"] = Param((experts,), ("experts",), 0, ZEROS, jnp.float32)
    if self.correction:
      tree["correction"] = Param(
        (experts,), ("experts",), 0, ZEROS, jnp.float32
      )
    if self.noise:
      tree["noise"] = Param(shape, axes, 1, ZEROS, jnp.float32)
    return tree

  def logits(
    self, p: dict[str, Any], x: Array, noise: Array | None = None
  ) -> Array:
    """Float32 `[batch, seq, experts]` of `x` [batch, seq, dim].

    `noise` is standard normal of the result's shape, or None for none.
    """
    x = x.astype(jnp.float32)
    y = dot(x, p["w"], "btd,de->bte")
    if self.bias:
      y = y + p["bias"].astype(y.dtype)[None, None]
    if self.noise and noise is not None:
      y = y + noise * jax.nn.softplus(dot(x, p["noise"], "btd,de->bte"))
    return y

  def choose(
    self, logits: Array, top_k: int, correction: Array | None = None
  ) -> tuple[Array, Array]:
    """Weights and experts, `[..., top_k]` each, best first.

    Args:
      logits: float32 `[..., experts]`.
      top_k: how many experts a token gets.
      correction: `[experts]`, added to the scores for the choice, or None.
    """
    scores = self.score(logits)
    judged = jax.lax.stop_gradient(scores)
    if correction is not None:
      moved = jax.lax.stop_gradient(correction).astype(judged.dtype)
      judged = judged + moved.reshape(
        (1,) * (judged.ndim - 1) + correction.shape
      )
    if self.groups is not None:
      judged = self.groups.among(judged)
    _, experts = jax.lax.top_k(judged, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if self.normalise:
      weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return self.scale * weights, experts

  def __call__(
    self, p: dict[str, Any], x: Array, top_k: int, noise: Array | None = None
  ) -> tuple[Route, dict[str, Array]]:
    """The route of `x` [batch, seq, dim], and means that `report` reads.

    First choices come before second ones: where experts are full
    (`Capacity`), those are the last to be dropped.
    """
    logits = self.logits(p, x, noise)
    n = logits.shape[-1]
    logits = logits.reshape(-1, n)
    weights, experts = self.choose(logits, top_k, p.get("correction"))
    tokens = jnp.arange(len(logits), dtype=jnp.int32)
    route = Route(
      jnp.tile(tokens, top_k), experts.T.reshape(-1), weights.T.reshape(-1)
    )
    scores = self.score(logits)
    prob = scores / scores.sum(-1, keepdims=True)
    means = {
      "load": _share(experts, n),
      "prob": prob.mean(0),
      "z": z_term(logits).mean(),
    }
    return route, means

  def report(self, means: dict[str, Array]) -> dict[str, Array]:
    """`aux`, the losses times their coefficients, and `load` [experts]."""
    aux = self.balance * switch_loss(means["load"], means["prob"])
    return {"aux": aux + self.z_loss * means["z"], "load": means["load"]}


@dataclass(frozen=True)
class ExpertChoice:
  """Each expert takes the tokens of a row it scores best (arXiv:2202.09368).

  The load is even by construction; a token may get many experts or none. With
  `top_k` experts a token on average, each of E experts takes seq * top_k / E
  tokens of every row, by their softmax over experts, and works with that
  weight. The choice looks at all tokens of the row, later ones too: right for
  encoders, and a leak of the future in a language model.

  Attributes:
    z_loss: coefficient of the router's z-loss.
    init: of the matrix.
  """

  z_loss: float = 0.0
  init: Init = FanIn()
  noise = False

  def check(self, experts: int, top_k: int) -> None:
    """Raises UserError for more experts a token than there are."""
    _check_top_k(top_k, experts)

  def params(self, dim: int, experts: int) -> dict[str, Param]:
    """`w` [dim, experts], float32."""
    return TopK(init=self.init).params(dim, experts)

  def __call__(
    self, p: dict[str, Any], x: Array, top_k: int, noise: Array | None = None
  ) -> tuple[Route, dict[str, Array]]:
    """As of `TopK`; `noise` is not used."""
    del noise
    batch, seq, _ = x.shape
    logits = dot(x.astype(jnp.float32), p["w"], "btd,de->bte")
    n = logits.shape[-1]
    most = min(seq, math.ceil(seq * top_k / n))
    scores = softmax(logits).swapaxes(1, 2)  # [batch, experts, seq]
    weights, places = jax.lax.top_k(scores, most)
    first = seq * jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    numbers = jnp.arange(n, dtype=jnp.int32)[None, :, None]
    experts = jnp.broadcast_to(numbers, places.shape)
    route = Route(
      (first + places).reshape(-1), experts.reshape(-1), weights.reshape(-1)
    )
    return route, {"load": _share(experts, n), "z": z_term(logits).mean()}

  def report(self, means: dict[str, Array]) -> dict[str, Array]:
    """`aux`, the z-loss times its coefficient, and `load` [experts]."""
    return {"aux": self.z_loss * means["z"], "load": means["load"]}


Router = TopK | ExpertChoice
