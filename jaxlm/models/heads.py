"""Heads on hidden states that say one number: a value, or a reward.

`ScalarHead` is a linear layer with one output. At every position it is the
critic of PPO; on what `jaxlm.models.reward` pools of a text it is a reward.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.layers.linear import dot
from jaxlm.layers.param import ZEROS, Init, Param

Array = jax.Array


@dataclass(frozen=True)
class ScalarHead:
  """One number for each hidden state of width `dim`: w'x + b.

  Attributes:
    dim: width of what it reads.
    bias: whether b is there. A reward needs none: only differences of rewards
      are learned.
    init: of w. Zeros say 0 of everything before training, so that neither a
      critic nor a reward starts with an opinion; `FanIn()` is the start with
      standard deviation dim^-1/2 that reward models often have
      (arXiv:2403.17031, detail 11).
  """

  dim: int
  bias: bool = True
  init: Init = ZEROS

  def __post_init__(self):
    if self.dim < 1:
      raise UserError(f"a head cannot read hidden states of width {self.dim}")

  def params(self) -> dict[str, Param]:
    """`w` [dim] and, where there is one, `b` []; used in float32."""
    tree = {"w": Param((self.dim,), ("embed",), 1, self.init, jnp.float32)}
    if self.bias:
      tree["b"] = Param((), (), 0, ZEROS, jnp.float32)
    return tree

  def __call__(self, p: dict[str, Array], x: Array) -> Array:
    """Maps hidden states `[..., dim]` to float32 `[...]`."""
    lead = "abcefgh"[: x.ndim - 1]
    x = x.astype(jnp.float32)
    y = dot(x, p["w"], f"{lead}d,d->{lead}", dtype=jnp.float32)
    return y + p["b"].astype(jnp.float32) if self.bias else y
