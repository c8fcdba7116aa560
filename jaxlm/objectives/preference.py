"""Preferences: a policy learns which of two responses is the better one.

    config.objective.name = "dpo"        # or ipo, kto, orpo, simpo

A batch has pairs: `tokens` [rows, sides, seq], int, text first and padding
behind; `mask`, which of the tokens are the response, and `text`, which are not
padding, both bool. Side 0 is the chosen one and side 1 the rejected; for KTO
side 2 is the same prompt with the answer to another.

What the sides are worth follows from the log-likelihood of each whole response
under the policy and, for most, under a frozen reference: the model that the run
began with, which is run in the same step, so that it is never stale.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm import preference_losses as losses
from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute
from jaxlm.losses import cross_entropy, head_cross_entropy, weighted_mean
from jaxlm.models.decoder import Decoder, head, hidden, logits
from jaxlm.objectives.objective import Objective, Whole
from jaxlm.objectives.pairs import Pairs

Array = jax.Array
Tree = Any
Batch = dict[str, Array]

# --- Likelihoods ------------------------------------------------------------


@struct.dataclass
class Sides:
  """Responses as their policy sees them; all float32 `[pairs, sides]`.

  Attributes:
    logp: log-likelihood of each response, summed over its tokens.
    n: how many tokens that is, the end of text included.
    ref: the same under the reference; None where there is none.
  """

  logp: Array
  n: Array
  ref: Array | None = None

  @property
  def ratio(self) -> Array:
    """The sum of log(pi / ref)."""
    return self.logp - self.ref

  @property
  def mean(self) -> Array:
    """Log-likelihood per token."""
    return self.logp / jnp.maximum(self.n, 1.0)


def likelihoods(
  model: Decoder,
  params: Tree,
  batch: Batch,
  key: Array | None,
  compute: Compute,
  chunk: int = 0,
) -> Sides:
  """Log-likelihoods of the responses of a batch; `ref` is None.

  Args:
    model: the policy.
    params: its arrays.
    batch: see above.
    key: for dropout; None means none.
    compute: how to run.
    chunk: positions whose logits are held at a time; 0 holds them all.
  """
  rows, sides, seq = batch["tokens"].shape
  tokens = batch["tokens"].reshape(rows * sides, seq)
  mask = batch["mask"].reshape(rows * sides, seq)
  # The last position predicts nothing; shapes stay whole for it.
  targets, mask = jnp.roll(tokens, -1, axis=1), jnp.roll(mask, -1, axis=1)
  mask = mask & (jnp.arange(seq, dtype=jnp.int32) < seq - 1)[None]
  x, _ = hidden(model, params, tokens, At(key=key), None, compute)
  if chunk:
    w = head(model, params, compute)
    nll, _ = head_cross_entropy(x, w, targets, chunk, model.softcap, compute)
  else:
    nll, _ = cross_entropy(logits(model, params, x, compute), targets)
  logp = -jnp.sum(jnp.where(mask, nll, 0.0), axis=1)
  n = jnp.sum(mask, axis=1).astype(jnp.float32)
  return Sides(logp.reshape(rows, sides), n.reshape(rows, sides))


# --- What the sides are worth -----------------------------------------------


class Form(Protocol):
  """From sides to the loss of each pair, and rewards as the policy sees them.

  Attributes:
    reference: whether it asks for `Sides.ref`.
    sides: how many there are.
  """

  reference: bool
  sides: int

  def __call__(self, s: Sides, real: Array) -> tuple[Array, Array]:
    """Losses `[pairs]`, rewards `[pairs, 2]`; `real` [pairs], which are any."""


@dataclass(frozen=True)
class DPO:
  """`preference_losses.dpo` of log(pi / ref).

  `likelihood` is the weight of the chosen response's own, per token: without it
  that may fall, and does where sides differ in a token or two (Smaug,
  arXiv:2402.13228; the sum is that of arXiv:2404.19733, equation 1).
  """

  beta: float = 0.1
  smoothing: float = 0.0
  likelihood: float = 0.0

  reference, sides = True, 2

  def __call__(self, s: Sides, real: Array) -> tuple[Array, Array]:
    """As `Form`."""
    good, bad = s.ratio[:, 0], s.ratio[:, 1]
    loss = losses.dpo(good, bad, self.beta, self.smoothing)
    return loss - self.likelihood * s.mean[:, 0], self.beta * s.ratio


@dataclass(frozen=True)
class IPO:
  """`preference_losses.ipo` of log(pi / ref) per token."""

  beta: float = 0.1

  reference, sides = True, 2

  def __call__(self, s: Sides, real: Array) -> tuple[Array, Array]:
    """As `Form`."""
    ratio = s.ratio / jnp.maximum(s.n, 1.0)
    return losses.ipo(ratio[:, 0], ratio[:, 1], self.beta), self.beta * ratio


@dataclass(frozen=True)
class KTO:
  """`preference_losses.kto`: the chosen side is desirable, the other is not.

  The baseline is a mean over the batch, or over each part of it where
  gradients are accumulated.
  """

  beta: float = 0.1
  desirable: float = 1.0
  undesirable: float = 1.0

  reference, sides = True, 3

  def __call__(self, s: Sides, real: Array) -> tuple[Array, Array]:
    """As `Form`; the loss of a pair is the mean of its two sides."""
    z = losses.kl_baseline(s.ratio[:, 2], real)
    weights = (self.desirable, self.undesirable)
    good = jnp.ones(len(s.ratio), bool)
    both = losses.kto(s.ratio[:, 0], good, z, self.beta, weights) + losses.kto(
      s.ratio[:, 1], ~good, z, self.beta, weights
    )
    return both / 2, self.beta * s.ratio[:, :2]


@dataclass(frozen=True)
class ORPO:
  """The likelihood of the chosen response, and `preference_losses.orpo`."""

  beta: float = 0.1

  reference, sides = False, 2

  def __call__(self, s: Sides, real: Array) -> tuple[Array, Array]:
    """As `Form`; the likelihood is per token, as the odds are."""
    good, bad = s.mean[:, 0], s.mean[:, 1]
    return losses.orpo(good, bad, self.beta) - good, self.beta * s.mean


@dataclass(frozen=True)
class SimPO:
  """`preference_losses.simpo` of log-likelihoods per token."""

  beta: float = 2.0
  gamma: float = 1.0

  reference, sides = False, 2

  def __call__(self, s: Sides, real: Array) -> tuple[Array, Array]:
    """As `Form`."""
    loss = losses.simpo(s.mean[:, 0], s.mean[:, 1], self.beta, self.gamma)
    return loss, self.beta * s.mean


# --- The objective ----------------------------------------------------------


@dataclass(frozen=True)
class Preference:
  """The loss of a batch of pairs.

  Attributes:
    form: what the sides are worth.
    chunk: positions whose logits are held at a time; 0 holds them all.
  """

  form: Form
  chunk: int = 0

  def __call__(
    self,
    model: Decoder,
    params: Tree,
    batch: Batch,
    key: Array | None,
    compute: Compute,
    frozen: Tree = None,
  ) -> tuple[Array, dict[str, Array]]:
    """The mean over pairs; `frozen` has the reference's parameters.

    Returns:
      The loss, and `weight`, the number of pairs; `accuracy`, how often the
      chosen side has the higher reward; `margin`, by how much; and `chosen` and
      `rejected`, log-likelihoods per token: where both fall, the policy
      unlearns what it is shown.
    """
    sides = likelihoods(model, params, batch, key, compute, self.chunk)
    if self.form.reference:
      ref = likelihoods(model, frozen, batch, None, compute, self.chunk)
      sides = sides.replace(ref=jax.lax.stop_gradient(ref.logp))
    real = sides.n[:, 0] > 0
    each, rewards = self.form(sides, real)
    loss, weight = weighted_mean(each, real)
    gap = rewards[:, 0] - rewards[:, 1]
    told = {
      "accuracy": (gap > 0).astype(jnp.float32),
      "margin": gap,
      "chosen": sides.mean[:, 0],
      "rejected": sides.mean[:, 1],
    }
    means = {name: weighted_mean(x, real)[0] for name, x in told.items()}
    return loss, {"loss": loss, "weight": weight} | means


@dataclass(frozen=True)
class Referenced(Whole):
  """All parameters are trained, beside the model that they began as."""

  needs_base = True

  def start(self, model: Decoder, key: Array, base: Tree | None) -> Tree:
    """A copy of the loaded model: its own arrays are the reference."""
    if base is None:
      raise UserError(
        "preferences are learned against the model one starts from; name it "
        "with --config.model.path"
      )
    return jax.tree.map(jnp.copy, base)

  def frozen(self, model: Decoder, base: Tree | None) -> Tree:
    """The reference."""
    return base


# --- By name ----------------------------------------------------------------


def dpo(
  seq_len: int,
  chunk: int = 0,
  beta: float = 0.1,
  smoothing: float = 0.0,
  likelihood: float = 0.0,
  template: str = "",
  examples: int = 5000,
  noise: float = 0.0,
) -> Objective:
  """Direct preference optimisation (arXiv:2305.18290).

  Args:
    seq_len: tokens of a prompt and a response; `config.seq_len`.
    chunk: positions whose logits are held at a time; `config.loss_chunk`.
    beta: how dearly the policy pays for leaving the reference.
    smoothing: the share of labels believed to be wrong.
    likelihood: weight of the chosen response's own, per token.
    template: how a conversation is written; as for `sft`.
    examples: how many pairs are made of a generated task.
    noise: the share of pairs whose label is turned, to see what it does.
  """
  data = Pairs(seq_len, template, examples, noise)
  return _preference(DPO(beta, smoothing, likelihood), data, chunk)


def ipo(
  seq_len: int,
  chunk: int = 0,
  beta: float = 0.1,
  template: str = "",
  examples: int = 5000,
  noise: float = 0.0,
) -> Objective:
  """Identity preference optimisation (arXiv:2310.12036).

  Args:
    seq_len: as for `dpo`.
    chunk: as for `dpo`.
    beta: tau in the paper; the goal is a gap of 1 / (2 beta) per token.
    template: as for `dpo`.
    examples: as for `dpo`.
    noise: as for `dpo`.
  """
  return _preference(
    IPO(beta), Pairs(seq_len, template, examples, noise), chunk
  )


def kto(
  seq_len: int,
  chunk: int = 0,
  beta: float = 0.1,
  desirable: float = 1.0,
  undesirable: float = 1.0,
  template: str = "",
  examples: int = 5000,
  noise: float = 0.0,
) -> Objective:
  """Kahneman-Tversky optimisation (arXiv:2402.01306).

  Args:
    seq_len: as for `dpo`.
    chunk: as for `dpo`.
    beta: how dearly the policy pays for leaving the reference.
    desirable: weight of the chosen responses.
    undesirable: weight of the rejected ones.
    template: as for `dpo`.
    examples: as for `dpo`.
    noise: as for `dpo`.
  """
  data = Pairs(seq_len, template, examples, noise, sides=3)
  return _preference(KTO(beta, desirable, undesirable), data, chunk)


def orpo(
  seq_len: int,
  chunk: int = 0,
  beta: float = 0.1,
  template: str = "",
  examples: int = 5000,
  noise: float = 0.0,
) -> Objective:
  """Fine-tuning and a preference in one, without a reference (2403.07691).

  Args:
    seq_len: as for `dpo`.
    chunk: as for `dpo`.
    beta: weight of the odds ratio.
    template: as for `dpo`.
    examples: as for `dpo`.
    noise: as for `dpo`.
  """
  return _preference(
    ORPO(beta), Pairs(seq_len, template, examples, noise), chunk
  )


def simpo(
  seq_len: int,
  chunk: int = 0,
  beta: float = 2.0,
  gamma: float = 1.0,
  template: str = "",
  examples: int = 5000,
  noise: float = 0.0,
) -> Objective:
  """Preferences by likelihood per token, without a reference (2405.14734).

  Args:
    seq_len: as for `dpo`.
    chunk: as for `dpo`.
    beta: scale of the likelihoods.
    gamma: the margin that a pair should reach.
    template: as for `dpo`.
    examples: as for `dpo`.
    noise: as for `dpo`.
  """
  data = Pairs(seq_len, template, examples, noise)
  return _preference(SimPO(beta, gamma), data, chunk)


def _preference(form: Form, data: Pairs, chunk: int) -> Objective:
  trained = Referenced() if form.reference else Whole()
  return Objective(data, Preference(form, chunk), trained)
