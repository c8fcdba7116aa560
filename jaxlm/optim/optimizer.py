"""One optimizer from its name, its numbers and the parameters' declarations.

`make` chains, in this order:

  clip by global norm → coupled decay → the rule → decoupled decay
  → learning rate multiplier → learning rate → QK clip → balance of experts

and returns one optax transformation. Rules come from optax, Muon from
`muon.py`. Under 'muon', hidden matrices are Muon's, and AdamW has the rest:
embeddings, the head, norms, biases; the split is read from `Param`.

Decay touches matrices only (`decay_mask`). The textbook rules (sgd, momentum,
nesterov, rmsprop, adagrad, adam) add it to the gradient, as torch does; adamw,
lion and muon apply it beside the rule, times the learning rate.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxlm.errors import UserError
from jaxlm.layers.param import Tree, decay_mask, map_params
from jaxlm.optim.guards import balance_experts, qk_clip
from jaxlm.optim.muon import Muon, scale_by_muon
from jaxlm.optim.schedules import Schedule
from jaxlm.optim.tables import Table, lookup

Transform = optax.GradientTransformationExtraArgs


@dataclass(frozen=True)
class Optimizer:
  """What to optimize with; see `make`.

  Attributes:
    name: a key of `RULES`.
    weight_decay: λ; 0 for none.
    clip_norm: largest global norm of a gradient; 0 for any.
    momentum: of momentum and nesterov; Muon has its own.
    b1: decay of the mean of gradients (adam, adamw, lion).
    b2: decay of the mean of their squares (adam, adamw, rmsprop), or of
      lion's momentum.
    eps: what keeps a division finite.
    muon: Muon's numbers.
    lr_table: multipliers of the learning rate by parameter path.
    decay_table: multipliers of `weight_decay` by path, in place of 1 for
      matrices and 0 for the rest.
    freeze_table: True by path for what must not change.
    qk_clip: largest attention logit, see `guards.qk_clip`; 0 for any. With it,
      `update` needs the extra argument `max_logits`.
    balance: how far the correction biases of routers move in a step, see
      `guards.balance_experts`. With it, `update` of a model that has them
      needs the extra argument `load`.
  """

  name: str = "adamw"
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  momentum: float = 0.9
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  muon: Muon = Muon()
  lr_table: Table = ()
  decay_table: Table = ()
  freeze_table: Table = ()
  qk_clip: float = 0.0
  balance: float = 0.0

  def __post_init__(self):
    if self.name not in RULES:
      near = difflib.get_close_matches(self.name, RULES, 1)
      hint = f"did you mean {near[0]!r}? " if near else ""
      known = ", ".join(RULES)
      raise UserError(f"unknown optimizer {self.name!r}; {hint}known: {known}")
    for key in ("weight_decay", "clip_norm", "eps", "qk_clip", "balance"):
      if getattr(self, key) < 0:
        raise UserError(f"the optimizer's {key} must not be negative")
    for key in ("momentum", "b1", "b2"):
      if not 0 <= getattr(self, key) < 1:
        raise UserError(f"the optimizer's {key} must be in [0, 1)")


# --- Rules: (numbers, parameters) -> update before the learning rate ---------

Rule = Callable[[Optimizer, Tree], optax.GradientTransformation]


def _adam(o: Optimizer, tree: Tree) -> optax.GradientTransformation:
  del tree
  return optax.scale_by_adam(o.b1, o.b2, o.eps)


def _muon(o: Optimizer, tree: Tree) -> optax.GradientTransformation:
  labels = map_params(lambda p: "muon" if p.is_hidden else "adam", tree)
  rules = {"muon": scale_by_muon(tree, o.muon), "adam": _adam(o, tree)}
  return optax.partition(rules, labels)


RULES: dict[str, Rule] = {
  "sgd": lambda o, _: optax.identity(),
  "momentum": lambda o, _: optax.trace(o.momentum),
  "nesterov": lambda o, _: optax.trace(o.momentum, nesterov=True),
  "rmsprop": lambda o, _: optax.scale_by_rms(o.b2, o.eps, eps_in_sqrt=False),
  "adagrad": lambda o, _: optax.scale_by_rss(0.0, o.eps**2),  # in the root
  "adam": _adam,
  "adamw": _adam,
  "lion": lambda o, _: optax.scale_by_lion(o.b1, o.b2),
  "muon": _muon,
}
DECOUPLED = ("adamw", "lion", "muon")


# --- The whole --------------------------------------------------------------


def make(
  tree: Tree, lr: Schedule | float, optimizer: Optimizer = Optimizer()
) -> Transform:
  """The transformation from gradients to updates of the parameters `tree`.

  Args:
    tree: nested dicts of `Param`, as a model's `params()` gives it.
    lr: learning rate, fixed or a function of the step.
    optimizer: the rule and its numbers.

  Returns:
    An optax transformation. `init(params)` and `update(grads, state, params)`
    take arrays in the shape of `tree`. Frozen parameters have no state, do not
    count in the gradient's norm, and get an update of exactly zero.

  Raises:
    UserError: for a table that misses a parameter or names none.
  """
  chain = []
  if optimizer.clip_norm:
    chain.append(optax.clip_by_global_norm(optimizer.clip_norm))
  decay = _decay(tree, optimizer)
  rule = RULES[optimizer.name](optimizer, tree)
  decoupled = optimizer.name in DECOUPLED
  chain += [rule, decay] if decoupled else [decay, rule]
  chain += [_scale(tree, optimizer), optax.scale_by_learning_rate(lr)]
  if optimizer.qk_clip:
    chain.append(qk_clip(tree, optimizer.qk_clip))
  if optimizer.balance:
    chain.append(balance_experts(tree, optimizer.balance))
  return _permissive(_freeze(optax.chain(*chain), tree, optimizer))


def _decay(tree: Tree, o: Optimizer) -> optax.GradientTransformation:
  """Adds λ w to the updates, times what table or mask say."""
  if o.decay_table:
    factors = lookup(o.decay_table, tree, "decay_table")
  else:
    factors = jax.tree.map(float, decay_mask(tree))
  if not o.weight_decay:
    return optax.identity()

  def add(updates: Tree, params: Tree) -> Tree:
    if params is None:
      raise ValueError("weight decay needs the parameters: pass `params`")
    return jax.tree.map(
      lambda u, p, f: u + f * o.weight_decay * p.astype(u.dtype) if f else u,
      updates,
      params,
      _like(factors, updates),
    )

  return optax.stateless(add)


def _scale(tree: Tree, o: Optimizer) -> optax.GradientTransformation:
  """Multiplies each update by its path's factor, and Muon's by their ratio."""
  factors = map_params(lambda _: 1.0, tree)
  if o.lr_table:
    factors = lookup(o.lr_table, tree, "lr_table")
  if o.name == "muon":
    ratio = o.muon.lr_ratio
    factors = map_params(
      lambda p, f: ratio * f if p.is_hidden else f, tree, factors
    )

  def scale(updates: Tree, params: Tree) -> Tree:
    del params
    return jax.tree.map(
      lambda u, f: u if f == 1 else f * u, updates, _like(factors, updates)
    )

  return optax.stateless(scale)


def _freeze(
  tx: optax.GradientTransformation, tree: Tree, o: Optimizer
) -> optax.GradientTransformation:
  """Keeps `tx` from what the table freezes."""
  if not o.freeze_table:
    return tx
  frozen = lookup(o.freeze_table, tree, "freeze_table")
  labels = jax.tree.map(lambda f: "frozen" if f else "trained", frozen)
  rules = {"trained": tx, "frozen": optax.set_to_zero()}
  return optax.partition(rules, labels)


def _like(factors: Tree, updates: Tree) -> Tree:
  """`factors` without the leaves that a partition has taken from `updates`."""
  return jax.tree.map(
    lambda u, f: u if _is_gone(u) else f, updates, factors, is_leaf=_is_gone
  )


def _is_gone(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def _permissive(tx: optax.GradientTransformation) -> Transform:
  """Runs `tx` under standard dtype promotion: optax mixes ints and floats."""
  tx = optax.with_extra_args_support(tx)

  def init(params: Tree) -> Tree:
    with jax.numpy_dtype_promotion("standard"):
      return tx.init(params)

  def update(grads, state, params=None, **extra):
    with jax.numpy_dtype_promotion("standard"):
      return tx.update(grads, state, params, **extra)

  return optax.GradientTransformationExtraArgs(init, update)
