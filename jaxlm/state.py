"""The training state and the step: all that a run is, between two batches."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

Array = jax.Array
Tree = Any
LOGITS = "max_logits"  # what QK clip watches; joined by maximum
LOAD = "load"  # of experts, what `balance_experts` evens; joined by mean
LossFn = Callable[[Tree, Tree, Array], tuple[Array, dict[str, Array]]]


@struct.dataclass
class LossScale:
  """Dynamic loss scaling for float16 (arXiv:1710.03740, section 3.2).

  The loss is multiplied by `value` so that small gradients do not vanish. An
  overflow halves it and skips the step; `PATIENCE` good steps double it.
  """

  value: Array
  good: Array

  PATIENCE = 200

  @classmethod
  def create(cls, value: float = 2.0**15) -> "LossScale":
    """A fresh scale."""
    return cls(jnp.float32(value), jnp.int32(0))

  def update(self, finite: Array) -> "LossScale":
    """The scale after a step whose gradients were finite or not."""
    good = jnp.where(finite, self.good + 1, 0)
    grow = good >= self.PATIENCE
    value = jnp.where(finite, self.value, jnp.maximum(self.value / 2, 1.0))
    value = jnp.where(grow, jnp.minimum(value * 2, 2.0**24), value)
    return LossScale(value, jnp.where(grow, 0, good))


@struct.dataclass
class TrainState:
  """Arrays only. Randomness is a function of the step, so none is stored.

  Attributes:
    step: how many steps are done, int32.
    params: the parameters, float32.
    opt_state: the optimizer's.
    ema: exponential moving average of the parameters, or None.
    scale: loss scaling, or None where not float16.
  """

  step: Array
  params: Tree
  opt_state: Tree
  ema: Tree | None = None
  scale: LossScale | None = None


def create(
  params: Tree,
  tx: optax.GradientTransformation,
  ema: bool = False,
  float16: bool = False,
) -> TrainState:
  """The state before the first step, around freshly made parameters."""
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=tx.init(params),
    ema=jax.tree.map(jnp.copy, params) if ema else None,
    scale=LossScale.create() if float16 else None,
  )


def make_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  seed: int = 0,
  accumulate: int = 1,
  steps: int = 1,
  ema_decay: float = 0.0,
  sums: Callable[[Tree], Tree] | None = None,
  jit: bool = True,
) -> Callable[[TrainState, Tree], tuple[TrainState, dict[str, Array]]]:
  """One compiled, donated call that trains `steps` steps.

  Args:
    loss_fn: `(params, batch, key, *given) -> (loss, metrics)`;
      `metrics['weight']` says over how many targets the loss is a mean.
    tx: the optimizer, clipping included.
    seed: randomness of step n is `fold_in(key(seed), n)`.
    accumulate: microbatches a step. Their gradients are joined by weight, so
      that k microbatches equal one big batch even where masks differ.
    steps: steps a call. Small models gain: fewer trips from Python.
    ema_decay: of the averaged parameters; 0 for none.
    sums: moves gradients to where those of microbatches are summed (ZeRO-2);
      None sums them where the parameters lie.
    jit: False returns the plain function, for reading and testing.

  Returns:
    `step(state, batch, *given) -> (state, metrics)`. Leaves of `batch` are
    `[steps, accumulate, rows, ...]`; what is `given` (trees that are looked at
    and not trained) goes to the loss as it is. Metrics are `[steps]`: those of
    the loss, `grad_norm` before clipping, and in float16 `loss_scale`.
  """
  tx = optax.with_extra_args_support(tx)

  def call(state: TrainState, batch: Tree, *given) -> tuple[TrainState, dict]:
    chex.assert_tree_shape_prefix(batch, (steps, accumulate))

    def loss(params: Tree, part: Tree, key: Array) -> tuple[Array, dict]:
      return loss_fn(params, part, key, *given)

    def one(state: TrainState, batch: Tree) -> tuple[TrainState, dict]:
      key = jax.random.fold_in(jax.random.key(seed), state.step)
      grads, metrics = _gradients(loss, state, batch, key, accumulate, sums)
      metrics["grad_norm"] = optax.tree.norm(grads)
      return _apply(tx, state, grads, metrics, ema_decay)

    if steps > 1:
      return jax.lax.scan(one, state, batch)
    state, metrics = one(state, jax.tree.map(lambda x: x[0], batch))
    return state, jax.tree.map(lambda x: x[None], metrics)

  return jax.jit(call, donate_argnums=0) if jit else call


def _gradients(
  loss_fn: LossFn,
  state: TrainState,
  batch: Tree,
  key: Array,
  accumulate: int,
  sums: Callable[[Tree], Tree] | None = None,
) -> tuple[Tree, dict[str, Array]]:
  """Gradients of the mean loss over all microbatches, and joined metrics."""
  scale = jnp.float32(1.0) if state.scale is None else state.scale.value

  def scaled(params: Tree, part: Tree, key: Array):
    loss, metrics = loss_fn(params, part, key)
    return loss * scale, metrics

  grad_fn = jax.grad(scaled, has_aux=True)

  def micro(i: Array, part: Tree) -> tuple[Tree, dict]:
    return grad_fn(state.params, part, jax.random.fold_in(key, i))

  if accumulate == 1:
    part = jax.tree.map(lambda x: x[0], batch)
    grads, metrics = micro(jnp.int32(0), part)
    metrics = dict(metrics)
  else:
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    zeros = sums(zeros) if sums else zeros
    grads, metrics = _accumulate(micro, batch, accumulate, zeros)
  if state.scale is not None:
    grads = jax.tree.map(lambda g: g / scale, grads)
    metrics["loss_scale"] = scale
  return grads, metrics


def _accumulate(
  micro: Callable, batch: Tree, n: int, zeros: Tree
) -> tuple[Tree, dict[str, Any]]:
  """Weighted mean of gradients and metrics over `n` microbatches.

  Gradients are summed where `zeros` lie.
  """

  def add(total: Tree, part: tuple) -> tuple[Tree, dict]:
    grads, metrics = micro(*part)
    weight = metrics["weight"]
    total = jax.tree.map(lambda t, g: t + g * weight, total, grads)
    return total, dict(metrics)

  numbers = jnp.arange(n, dtype=jnp.int32)
  grads, parts = jax.lax.scan(add, zeros, (numbers, batch))

  weights = parts.pop("weight")
  total = jnp.maximum(jnp.sum(weights), 1.0)
  grads = jax.tree.map(lambda g: g / total, grads)
  tops = {name: parts.pop(name) for name in [LOGITS] if name in parts}

  def mean(x: Array) -> Array:
    w = weights.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.sum(x * w, axis=0) / total

  metrics = jax.tree.map(mean, parts)
  metrics |= jax.tree.map(lambda x: jnp.max(x, axis=0), tops)
  return grads, metrics | {"weight": jnp.sum(weights)}


@jax.named_scope("optimizer")
def _apply(
  tx: optax.GradientTransformationExtraArgs,
  state: TrainState,
  grads: Tree,
  metrics: dict[str, Array],
  ema_decay: float,
) -> tuple[TrainState, dict[str, Array]]:
  """The optimizer's update; in float16 only if all gradients are finite."""
  extra = {"value": metrics["loss"], "grad_norm": metrics["grad_norm"]}
  if LOGITS in metrics:
    extra[LOGITS] = metrics.pop(LOGITS)
    tops = [jnp.max(x) for x in extra[LOGITS].values()]
    metrics["max_logit"] = functools.reduce(jnp.maximum, tops)
  if LOAD in metrics:
    extra[LOAD] = metrics.pop(LOAD)

  def update(state: TrainState) -> TrainState:
    # optax relies on implicit dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = tx.update(
        grads, state.opt_state, state.params, **extra
      )
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = _average(ema, params, state.step, ema_decay)
    return state.replace(params=params, opt_state=opt_state, ema=ema)

  if state.scale is None:
    state = update(state)
  else:
    finite = jnp.isfinite(metrics["grad_norm"])
    scale = state.scale.update(finite)
    state = jax.lax.cond(finite, update, lambda s: s, state)
    state = state.replace(scale=scale)
  return state.replace(step=state.step + 1), metrics


def _average(ema: Tree, params: Tree, step: Array, decay: float) -> Tree:
  """The mean, ema += (1 - d) (params - ema), d = min(decay, (1+n) / (10+n)).

  The growing d, n steps into the run, lets the mean forget where it started
  (as in TensorFlow's ExponentialMovingAverage, `num_updates`).
  """
  n = step.astype(jnp.float32)
  d = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
  return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)
