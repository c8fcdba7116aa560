"""Reward models from preferences: one number for a text, higher for better.

    config.objective.name = "reward"

Batches are those of `jaxlm.objectives.preference`, of two sides. The model of
the config becomes the trunk (its own head is left out), and a head that makes
one number is put on it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import preference_losses as losses
from jaxlm.errors import UserError
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import init
from jaxlm.losses import weighted_mean
from jaxlm.models.decoder import Decoder
from jaxlm.models.reward import Last, Mean, RewardModel, encoder
from jaxlm.objectives.objective import Objective
from jaxlm.objectives.pairs import Pairs

Array = jax.Array
Tree = Any

KINDS = ("decoder", "encoder")


@dataclass(frozen=True)
class Scored:
  """A trunk and a head are trained, to score.

  Attributes:
    kind: 'decoder' (causal, last token) or 'encoder' (both ways, mean).
  """

  kind: str = "decoder"

  needs_base = False
  fresh = ("head",)
  partial = False

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(
        f"config.objective.kind={self.kind!r}; it can be {' or '.join(KINDS)}"
      )

  def model(self, model: Decoder) -> RewardModel:
    """The reward model around a decoder."""
    if self.kind == "encoder":
      return RewardModel.on(encoder(model), Mean())
    return RewardModel.on(model, Last())

  def params(self, model: Decoder) -> Tree:
    """Those of the reward model."""
    return self.model(model).params()

  def around(self, base: Tree) -> Tree:
    """The loaded arrays, as a trunk."""
    return {"trunk": {k: x for k, x in base.items() if k != "head"}}

  def start(self, model: Decoder, key: Array, base: Tree | None) -> Tree:
    """A new head, and the trunk as loaded; or made new."""
    made = init(self.params(model), key)
    return made if base is None else made | self.around(base)

  def frozen(self, model: Decoder, base: Tree | None) -> Tree:
    """Nothing."""
    return None

  def policy(self, params: Tree, frozen: Tree) -> None:
    """It does not talk."""
    return

  def whole(self, params: Tree, base: Tree | None) -> Tree:
    """They are whole."""
    return params


@dataclass(frozen=True)
class Compare:
  """How much better the better one scores: a loss, and how often it does.

  Attributes:
    scored: what scores.
    loss: 'bradley_terry' or 'hinge'.
    margin: m of either.
    smoothing: e of `bradley_terry`.
    centre: weight of (r_w + r_l)^2, which keeps rewards around zero
      (arXiv:2312.09244, section 2).
  """

  scored: Scored = Scored()
  loss: str = "bradley_terry"
  margin: float = 0.0
  smoothing: float = 0.0
  centre: float = 0.0

  def __post_init__(self):
    if self.loss not in ("bradley_terry", "hinge"):
      raise UserError(
        f"config.objective.loss={self.loss!r}; it can be bradley_terry or hinge"
      )

  def __call__(
    self,
    model: Decoder,
    params: Tree,
    batch: dict[str, Array],
    key: Array | None,
    compute: Compute,
    frozen: Tree = None,
  ) -> tuple[Array, dict[str, Array]]:
    """The mean over pairs.

    Returns:
      The loss, and `weight`, the number of pairs; `accuracy`, how often the
      chosen side scores higher; `margin`, by how much; `reward` and `spread`,
      mean and standard deviation of all scores.
    """
    tokens, text = batch["tokens"], batch["text"]
    rows, sides, seq = tokens.shape
    scores = self.scored.model(model)(
      params,
      tokens.reshape(rows * sides, seq),
      text.reshape(rows * sides, seq),
      key,
      compute,
    ).reshape(rows, sides)
    good, bad = scores[:, 0], scores[:, 1]
    real = jnp.any(text[:, 0], axis=1)
    loss, weight = weighted_mean(self._each(good, bad), real)
    mean, _ = weighted_mean((good + bad) / 2, real)
    square, _ = weighted_mean((good**2 + bad**2) / 2, real)
    right = (good > bad).astype(jnp.float32)
    metrics = {
      "loss": loss,
      "weight": weight,
      "accuracy": weighted_mean(right, real)[0],
      "margin": weighted_mean(good - bad, real)[0],
      "reward": mean,
      "spread": jnp.sqrt(jnp.maximum(square - mean**2, 0.0)),
    }
    if self.centre:
      loss = loss + self.centre * weighted_mean((good + bad) ** 2, real)[0]
    return loss, metrics

  def _each(self, good: Array, bad: Array) -> Array:
    """The loss of each pair."""
    if self.loss == "hinge":
      return losses.hinge(good, bad, self.margin or 1.0)
    return losses.bradley_terry(good, bad, self.margin, self.smoothing)


def reward(
  seq_len: int,
  kind: str = "decoder",
  loss: str = "bradley_terry",
  margin: float = 0.0,
  smoothing: float = 0.0,
  centre: float = 0.0,
  template: str = "",
  examples: int = 5000,
  noise: float = 0.0,
) -> Objective:
  """A model that says which of two responses is the better one, by how much.

  Args:
    seq_len: tokens of a prompt and a response; `config.seq_len`.
    kind: 'decoder' (its last token) or 'encoder' (all see all; their mean).
    loss: 'bradley_terry' or 'hinge'.
    margin: by how much the better one should score higher.
    smoothing: the share of labels believed to be wrong.
    centre: weight of what keeps scores around zero.
    template: how a conversation is written; as for `sft`.
    examples: how many pairs are made of a generated task.
    noise: the share of pairs whose label is turned, to see what it does.
  """
  scored = Scored(kind)
  return Objective(
    Pairs(seq_len, template, examples, noise),
    Compare(scored, loss, margin, smoothing, centre),
    scored,
  )
