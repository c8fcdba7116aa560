"""What keeps a run from harm: skipped spikes, bounded logits, even experts.

All are optax transformations with extra arguments, so a step passes what it
has measured (`tx.update(..., grad_norm=..., max_logits=..., load=...)`) and the
guards stay pure functions of their state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.errors import UserError
from jaxlm.layers.param import Param, Tree, path_name, paths

Array = jax.Array
Transform = optax.GradientTransformationExtraArgs


# --- Spikes -----------------------------------------------------------------


class SpikeState(NamedTuple):
  """The last measurements, how many there were, and how many were skipped."""

  inner: Any
  recent: Array  # [window], float32, NaN where nothing has been seen yet
  count: Array
  skipped: Array


def skip_spikes(
  tx: optax.GradientTransformation,
  factor: float,
  window: int = 64,
  watch: str = "grad_norm",
) -> Transform:
  """Leaves out steps whose gradient is `factor` times the usual, or infinite.

  The usual is the median of the last `window` measurements. A spike enters
  that memory as `factor` times the median, no more, so one spike moves
  nothing, yet a lasting rise is accepted after about `window / 2` steps. Until
  `window` steps have been seen, only what is not finite is skipped. A skipped
  step changes neither parameters nor the optimizer's state.

  Args:
    tx: the optimizer to guard.
    factor: how many times the median is a spike; more than one.
    window: how many measurements to remember.
    watch: the extra argument that is measured: 'grad_norm', or 'value', the
      loss.

  Returns:
    A transformation whose `update` takes that extra argument.

  Raises:
    UserError: for a factor of one or less, or an empty window.
  """
  if factor <= 1 or window < 1:
    raise UserError(
      f"spikes of {factor} times the median of {window} steps cannot be told"
      " from the rest: use a factor above 1 and a window of at least 1"
    )
  tx = optax.with_extra_args_support(tx)

  def init(params: Tree) -> SpikeState:
    recent = jnp.full((window,), jnp.nan, jnp.float32)
    return SpikeState(tx.init(params), recent, jnp.int32(0), jnp.int32(0))

  def update(grads, state, params=None, **extra):
    if watch not in extra:
      raise ValueError(f"skip_spikes needs update(..., {watch}=...)")
    seen = jnp.asarray(extra[watch], jnp.float32)
    limit = factor * jnp.nanmedian(state.recent)
    limit = jnp.where(state.count >= window, limit, jnp.inf)
    good = jnp.isfinite(seen) & (seen <= limit)

    updates, inner = tx.update(grads, state.inner, params, **extra)
    updates = jax.tree.map(lambda u: jnp.where(good, u, 0), updates)
    inner = jax.tree.map(lambda a, b: jnp.where(good, a, b), inner, state.inner)

    slot = state.count % window
    kept = jnp.where(jnp.isfinite(seen), jnp.minimum(seen, limit), limit)
    known = jnp.isfinite(kept)
    recent = state.recent.at[slot].set(
      jnp.where(known, kept, state.recent[slot])
    )
    return updates, SpikeState(
      inner,
      recent,
      state.count + known.astype(jnp.int32),
      state.skipped + (~good).astype(jnp.int32),
    )

  return optax.GradientTransformationExtraArgs(init, update)


# --- Attention logits -------------------------------------------------------


def qk_clip(tree: Tree, tau: float, alpha: float = 0.5) -> Transform:
  """Shrinks the query and key weights of heads whose logits exceed `tau`.

  MuonClip's second half (Kimi K2, arXiv:2507.20534, section 2.1). With γ =
  min(1, tau / max logit) of a head, its key weights are multiplied by γ¹⁻ᵅ and
  its query weights by γᵅ, so the next forward pass stays near `tau`. Where
  query heads share a key head, the key's γ is the smallest of its group, and
  each query takes what is missing: heads below `tau` keep their logits. In
  latent attention the key that turns is one for all heads and stays, so the
  part of a query that meets it is multiplied by γ.

  Chain it last: it acts on the parameters as they will be after the update.

  Args:
    tree: nested dicts of `Param`; attention is found as a dict with `q` [...,
      embed, heads, head_dim] and `k` [..., embed, kv_heads, head_dim], or,
      where it is latent, with `k_up` [..., latent, heads, nope] and `q` or
      `q_up` [..., embed or latent, heads, nope + rope].
    tau: the largest logit allowed; Kimi K2 took 100.
    alpha: the query's share of the shrinking.

  Returns:
    A transformation whose `update` takes `max_logits`: for each path of an
    attention ('layers/0/0/mixer') the largest logits before the softmax in the
    last forward pass, [..., heads].

  Raises:
    UserError: where queries and keys are normalised, which undoes any scaling.
  """
  modules = dict(_attentions(tree, ""))
  for path, module in modules.items():
    if "q_norm" in module or "k_norm" in module:
      raise UserError(
        f"qk_clip scales query and key weights, but {path!r} normalises queries"
        " and keys, so nothing would change: set qk_clip to 0"
      )

  def update(updates, state, params=None, *, max_logits=None, **extra):
    del extra
    if params is None or max_logits is None:
      raise ValueError("qk_clip needs update(..., params, max_logits=...)")
    factors = {}
    for path, module in modules.items():
      peak = max_logits[path].astype(jnp.float32)
      factors |= _factors(path, module, peak, tau, alpha)

    def one(path: tuple[Any, ...], u: Array, p: Array) -> Array:
      name = "/".join(str(k.key) for k in path)
      if name not in factors:
        return u
      f = factors[name].astype(u.dtype)
      return f * (p.astype(u.dtype) + u) - p.astype(u.dtype)

    return jax.tree_util.tree_map_with_path(one, updates, params), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def _attentions(tree: Tree, path: str) -> list[tuple[str, dict[str, Any]]]:
  """Every dict that has queries and keys, by its path."""
  if not isinstance(tree, dict):
    return []
  plain = isinstance(tree.get("q"), Param) and isinstance(tree.get("k"), Param)
  if plain or isinstance(tree.get("k_up"), Param):
    return [(path, tree)]
  prefix = path + "/" if path else ""
  return [
    found for k, v in tree.items() for found in _attentions(v, f"{prefix}{k}")
  ]


def _factors(
  path: str, module: dict[str, Any], peak: Array, tau: float, alpha: float
) -> dict[str, Array]:
  """What each array of an attention is multiplied by, shaped to broadcast.

  `peak` is [..., heads].
  """
  gamma = jnp.minimum(1.0, tau / jnp.maximum(peak, 1e-6))
  if "k_up" in module:
    return _latent_factors(path, module, gamma, alpha)
  groups = module["k"].shape[module["k"].axes.index("kv_heads")]
  shared = gamma.reshape(*gamma.shape[:-1], groups, -1).min(-1)
  key = shared ** (1 - alpha)
  query = gamma / jnp.repeat(key, gamma.shape[-1] // groups, axis=-1)
  factors = {}
  for name, heads, f in (("q", "heads", query), ("k", "kv_heads", key)):
    for leaf in (name, name + "_bias"):
      if leaf in module:
        p = module[leaf]
        at = p.axes.index(heads)
        between = range(p.n_stacked, at)
        f_ = jnp.expand_dims(f, (*between, *range(at + 1, len(p.axes))))
        factors[f"{path}/{leaf}".lstrip("/")] = f_
  return factors


def _latent_factors(
  path: str, module: dict[str, Any], gamma: Array, alpha: float
) -> dict[str, Array]:
  """As `_factors`, of latent attention; `gamma` is [..., heads]."""
  name = "q" if "q" in module else "q_up"
  q, k = module[name], module["k_up"]
  still = jnp.arange(q.shape[-1]) < k.shape[-1]
  powers = jnp.where(still, alpha, 1.0).reshape((1,) * gamma.ndim + (-1,))
  both = {
    name: gamma[..., None] ** powers,
    "k_up": gamma[..., None] ** (1 - alpha),
  }
  return {
    f"{path}/{leaf}".lstrip("/"): jnp.expand_dims(f, q.n_stacked)
    for leaf, f in both.items()
  }


# --- Experts ----------------------------------------------------------------


def balance_experts(tree: Tree, rate: float) -> Transform:
  """Moves the routers' correction biases against the load: no loss needed.

  After each step b_i += rate * sign(mean load - load_i) (arXiv:2408.15664), so
  an expert that had more than its share is chosen less. This is all that moves
  them: whatever gradient, decay or rule made of their update is left out.

  Args:
    tree: nested dicts of `Param`; a router is found as a dict `router` with a
      `correction` [..., experts].
    rate: the length of a move; DeepSeek-V3 took 0.001.

  Returns:
    A transformation whose `update` takes `load`: for each path of a mixture
    ('layers/0/0/ffn') the shares of the assignments in the last forward pass,
    [..., experts].
  """
  ending = "/router/correction"
  biases = [name for name in paths(tree) if name.endswith(ending)]

  def update(updates, state, params=None, *, load=None, **extra):
    del params, extra
    if biases and load is None:
      raise ValueError("balance_experts needs update(..., load=...)")

    def one(path: tuple[Any, ...], u: Array) -> Array:
      name = path_name(path)
      if name not in biases:
        return u
      share = load[name.removesuffix(ending)]
      gap = share.mean(-1, keepdims=True) - share
      return rate * jnp.sign(gap).astype(u.dtype)

    return jax.tree_util.tree_map_with_path(one, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
