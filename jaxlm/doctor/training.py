"""Checks of how a model is trained: batch, loss, gradients, optimizer."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.doctor.subject import TOKENS, Finding, Subject
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import map_params, paths
from jaxlm.state import create

STEPS = 100  # of overfitting one batch
DELICATE = {"exp", "log", "log1p", "rsqrt", "logistic", "cumsum", "erf", "pow"}


def labels(s: Subject) -> Finding:
  """Every target is the token that follows its input."""
  inputs, targets = (
    np.asarray(s.batch["inputs"]),
    np.asarray(s.batch["targets"]),
  )
  seen = np.asarray(s.batch.get("mask", np.ones_like(targets)))[:, :-1] > 0
  right = (targets[:, :-1] == inputs[:, 1:])[seen]
  return Finding(
    bool(right.all()),
    f"{right.mean():.1%} of the targets are the next input",
    "the targets are shifted by none, or by two",
  )


def vocabulary(s: Subject) -> Finding:
  """Every token of the batch has a row in the embedding."""
  low = min(int(np.min(s.batch[k])) for k in ("inputs", "targets"))
  high = max(int(np.max(s.batch[k])) for k in ("inputs", "targets"))
  return Finding(
    low >= 0 and high < s.model.vocab,
    f"tokens {low} to {high}, vocabulary {s.model.vocab}",
    "the text was encoded with another tokenizer",
  )


def initial_loss(s: Subject) -> Finding:
  """Before training every token is about as likely: loss = ln(vocabulary)."""
  loss, want = float(s.losses(s.initial, s.batch)[0]), math.log(s.model.vocab)
  return Finding(
    abs(loss - want) < 1.0,
    f"{loss:.3f}, and ln({s.model.vocab}) = {want:.3f}",
    "higher: the head or the embedding starts too large; lower: the model "
    "sees what it should predict",
  )


def loss_by_hand(s: Subject) -> Finding:
  """The loss is the mean of -log softmax(logits)[target], in float64."""
  y = s.logits(s.lively, jnp.asarray(s.batch["inputs"]))
  y = np.asarray(y, np.float64)
  y = y - y.max(-1, keepdims=True)
  y = y - np.log(np.exp(y).sum(-1, keepdims=True))
  targets = np.asarray(s.batch["targets"])
  mask = np.asarray(s.batch.get("mask", np.ones_like(targets)), np.float64)
  nll = -np.take_along_axis(y, targets[..., None], -1)[..., 0]
  want = float((nll * mask).sum() / mask.sum())
  got = float(s.losses(s.lively, s.batch)[1]["loss"])
  return Finding(
    abs(got - want) < 1e-4 * max(want, 1.0),
    f"{got:.4f}, by hand {want:.4f}",
    "look for a second softmax, a second shift, a sum in place of the mean, "
    "and targets that should not count",
  )


def batch_size(s: Subject) -> Finding:
  """The same rows twice give the same loss."""
  twice = {k: np.concatenate([v, v]) for k, v in s.batch.items()}
  once, both = (float(s.losses(s.lively, b)[0]) for b in (s.batch, twice))
  return Finding(
    abs(once - both) < 1e-4 * max(abs(once), 1.0),
    f"{once:.4f}, and {both:.4f} for the batch twice over",
    "the loss is a sum, so its gradient grows with the batch",
  )


def gradients(s: Subject) -> Finding:
  """Every parameter gets a gradient, finite and not zero."""
  norm = jax.jit(lambda t: jax.tree.map(lambda g: jnp.sqrt(jnp.sum(g**2)), t))
  sizes = {k: float(g) for k, g in paths(norm(s.gradients)).items()}
  wrong = [k for k, v in sizes.items() if not (math.isfinite(v) and v > 0)]
  return Finding(
    not wrong,
    f"norms {min(sizes.values()):.2g} to {max(sizes.values()):.2g}",
    f"none reaches {', '.join(wrong[:3])}: it is not used, or lies behind a "
    "stop_gradient or a zero",
  )


def gradient_flow(s: Subject) -> Finding:
  """Gradients of first and last blocks are of similar size."""
  each = [
    math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(p)))
    for _, _, p in s.layers(s.gradients)
  ]
  ratio = max(each) / max(min(each), 1e-30)
  return Finding(
    ratio < 100,
    f"from {each[0]:.2g} (first block) to {each[-1]:.2g} (last)",
    "they vanish or explode: look at the residual connections and the norms",
  )


def _step(s: Subject, params, batch, accumulate: int = 1, steps: int = 1):
  """The state after some steps on one batch, and the metrics."""
  rows = len(batch["inputs"])
  batch = jax.tree.map(
    lambda x: jnp.broadcast_to(jnp.asarray(x), (steps, *x.shape)).reshape(
      steps, accumulate, rows // accumulate, *x.shape[1:]
    ),
    batch,
  )
  step = s.make_step(s.loss, s.optimizer, accumulate=accumulate, steps=steps)
  return step(create(jax.tree.map(jnp.copy, params), s.optimizer), batch)


def all_move(s: Subject) -> Finding:
  """A step changes every parameter."""
  state, _ = _step(s, s.lively, s.batch)
  old, new = (
    jax.tree.map(np.asarray, paths(x)) for x in (s.lively, state.params)
  )
  still = [k for k in old if np.array_equal(old[k], new[k])]
  return Finding(
    not still,
    f"{len(old) - len(still)} of {len(old)} arrays changed",
    f"{', '.join(still[:3])}: frozen, or its learning rate is zero at the "
    "first step",
  )


def accumulation(s: Subject) -> Finding:
  """Two half batches are one whole batch."""
  half = len(s.batch["inputs"]) // 2 * 2
  batch = {k: v[:half] for k, v in s.batch.items()}
  norms = [
    float(_step(s, s.lively, batch, n)[1]["grad_norm"][0]) for n in (1, 2)
  ]
  return Finding(
    abs(norms[0] - norms[1]) < 1e-3 * norms[0],
    f"gradient norm {norms[0]:.4g} whole, {norms[1]:.4g} in two parts",
    "parts are added without dividing, or joined without their weights",
  )


def weight_decay(s: Subject) -> Finding:
  """Scales and biases are not pulled to zero."""
  tx, tree = s.optimizer, s.model.params()
  zeros = jax.tree.map(jnp.zeros_like, s.lively)
  extra = {"value": jnp.float32(1), "grad_norm": jnp.float32(0)}

  @jax.jit
  def pull(params):
    with jax.numpy_dtype_promotion("standard"):
      updates, _ = tx.update(zeros, tx.init(params), params, **extra)
    return jax.tree.map(lambda u: jnp.any(u != 0), updates)

  pulled = {k: bool(v) for k, v in paths(pull(s.lively)).items()}
  matrix = paths(map_params(lambda p: p.is_matrix, tree))
  wrong = [k for k in pulled if pulled[k] and not matrix[k]]
  return Finding(
    not wrong,
    f"{sum(pulled.values())} of {len(pulled)} arrays decay",
    f"{', '.join(wrong[:3])}: give the optimizer a mask (param.decay_mask)",
  )


def precision(s: Subject) -> Finding:
  """In bfloat16, what is delicate still runs in float32.

  That is: parameters, the loss, the sums of matrix products, exponentials,
  logarithms and roots.
  """
  compute = Compute(dtype="bfloat16")
  batch = jax.tree.map(jnp.asarray, s.shorter(TOKENS))

  def loss(params):
    return s.objective(s.model, params, batch, None, compute)[0]

  half = [k for k, x in paths(s.initial).items() if x.dtype != jnp.float32]
  wrong = [f"parameter {k}" for k in half]
  found = jax.make_jaxpr(loss)(s.lively)
  if found.out_avals[0].dtype != jnp.float32:
    wrong.append("the loss")
  for eqn in _equations(found.jaxpr):
    low = any(
      getattr(v.aval, "dtype", None) in (jnp.bfloat16, jnp.float16)
      for v in (
        eqn.outvars if eqn.primitive.name == "dot_general" else eqn.invars
      )
    )
    if low and eqn.primitive.name in DELICATE | {"dot_general"}:
      wrong.append(eqn.primitive.name)
  return Finding(
    not wrong,
    f"{len(wrong)} delicate places in 16 bits",
    f"{', '.join(dict.fromkeys(wrong[:9]))}: cast to float32 before, and "
    "sum matrix products by preferred_element_type",
  )


def _equations(jaxpr):
  """All equations, those of inner programs as well."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(
      list(eqn.params.values()),
      is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _equations(inner)


def overfit(s: Subject) -> Finding:
  """A model can learn one batch by heart."""
  rows = {k: v[:2] for k, v in s.shorter(16).items()}
  _, metrics = _step(s, s.initial, rows, steps=STEPS)
  first, last = float(metrics["loss"][0]), float(metrics["loss"][-1])
  return Finding(
    last < 0.3 * first,
    f"{first:.3f} before and {last:.3f} after {STEPS} steps on two rows",
    "the update has the wrong sign or size, or the loss does not fit the "
    "model; try a smaller and a larger learning rate",
  )
