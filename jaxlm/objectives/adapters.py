"""Adapters under any objective: the base is looked at, and they are trained.

    config.lora.rank = 8                 # and whatever else `LoRA` takes

`adapted` is a function from Objective to Objective. State, optimizer and
checkpoint hold the adapters alone (and what is new beside them, as the head of
a reward model); the base is read from `config.model.path` at every start.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from jaxlm.errors import UserError
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder
from jaxlm.models.lora import LoRA
from jaxlm.objectives.objective import Loss, Objective, Trained

Array = jax.Array
Tree = Any


def adapted(objective: Objective, lora: LoRA) -> Objective:
  """The same objective, minimised in adapters."""
  trained = Adapters(lora, objective.trained)
  return dataclasses.replace(
    objective, loss=Through(objective.loss, trained), trained=trained
  )


@dataclass(frozen=True)
class Adapters:
  """Adapters, and what is new.

  Attributes:
    lora: which adapters.
    inner: what would be trained without them.
  """

  lora: LoRA
  inner: Trained

  needs_base, partial = True, True
  fresh = ()

  def params(self, model: Decoder) -> Tree:
    """`adapters`; and, by name, the parts that no base has."""
    tree = self.inner.params(model)
    new = {name: tree[name] for name in self.inner.fresh}
    return {"adapters": self.lora.declare(tree)} | new

  def around(self, base: Tree) -> Tree:
    """Nothing of it is trained."""
    return {}

  def start(self, model: Decoder, key: Array, base: Tree | None) -> Tree:
    """Adapters that say nothing yet."""
    if base is None:
      raise UserError(
        "adapters need a model to adapt; name it with --config.model.path"
      )
    whole = self.inner.start(model, key, base)
    new = {name: whole[name] for name in self.inner.fresh}
    tree = self.inner.params(model)
    return {"adapters": self.lora.start(key, tree, whole)} | new

  def frozen(self, model: Decoder, base: Tree | None) -> Tree:
    """The base as it is to be adapted, and what the objective looks at."""
    return {
      "base": self.inner.around(base),
      "inner": self.inner.frozen(model, base),
    }

  def through(self, params: Tree, base: Tree) -> Tree:
    """What the objective within takes for its parameters; differentiable.

    Args:
      params: as `params` declares them.
      base: as `around` of what is within gives it.
    """
    new = {name: x for name, x in params.items() if name != "adapters"}
    return self.lora.apply(base, params["adapters"]) | new

  def policy(self, params: Tree, frozen: Tree) -> Tree | None:
    """The adapted model, if it talks."""
    whole = self.through(params, frozen["base"])
    return self.inner.policy(whole, frozen["inner"])

  def model(self, model: Decoder) -> Any:
    """As without adapters."""
    return self.inner.model(model)

  def whole(self, params: Tree, base: Tree | None) -> Tree:
    """Merged."""
    whole = jax.jit(self.through)(params, self.inner.around(base))
    return self.inner.whole(whole, base)


@dataclass(frozen=True)
class Through:
  """A loss that sees the base through adapters."""

  inner: Loss
  trained: Adapters

  def __call__(
    self,
    model: Decoder,
    params: Tree,
    batch: dict[str, Array],
    key: Array | None,
    compute: Compute,
    frozen: Tree = None,
  ) -> tuple[Array, dict[str, Array]]:
    """As the loss within."""
    whole = self.trained.through(params, frozen["base"])
    return self.inner(model, whole, batch, key, compute, frozen["inner"])
