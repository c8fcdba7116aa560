"""Medusa: heads that guess further ahead from the same hidden state.

Head k of a trunk whose last hidden state is h makes the logits

    W2_k' (SiLU(W1_k' h) + h),      k = 1 .. n

for the token k places behind the one that the trunk's own head predicts (Cai
et al., arXiv:2401.10774, section 2.1.1). W1 starts at zero and W2 as the
trunk's head, so that an untrained head says what the trunk says.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.layers.compute import DEFAULT
from jaxlm.layers.linear import dot
from jaxlm.layers.norm import soft_cap
from jaxlm.layers.param import ZEROS, FanIn, Param
from jaxlm.models.decoder import Decoder, head

Array = jax.Array
Tree = Any


@dataclass(frozen=True)
class Heads:
  """`n` heads on hidden states of width `dim`, over `vocab` tokens."""

  n: int
  dim: int
  vocab: int

  def __post_init__(self):
    if self.n < 1:
      raise UserError(f"{self.n} heads guess nothing; use 1 or more")

  @classmethod
  def on(cls, model: Decoder, n: int) -> "Heads":
    """Heads that fit a model."""
    return cls(n, model.dim, model.vocab)

  def params(self) -> dict[str, Param]:
    """`block` [n, dim, dim] and `out` [n, dim, vocab]."""
    return {
      "block": Param(
        (self.n, self.dim, self.dim), (None, "embed", None), 1, ZEROS
      ),
      "out": Param(
        (self.n, self.dim, self.vocab), (None, "embed", "vocab"), 1, FanIn()
      ),
    }

  def start(self, model: Decoder, params: Tree) -> Tree:
    """Parameters before training, from those of the trunk; float32."""
    w = head(model, params, DEFAULT).astype(jnp.float32)
    return {
      "block": jnp.zeros((self.n, self.dim, self.dim), jnp.float32),
      "out": jnp.broadcast_to(w[None], (self.n, self.dim, self.vocab)),
    }

  def __call__(self, p: Tree, x: Array, softcap: float | None = None) -> Array:
    """Logits float32 `[batch, seq, n, vocab]` of hidden states [.., dim].

    Args:
      p: parameters, as `params` declares them.
      x: `[batch, seq, dim]`.
      softcap: that of the trunk.
    """
    h = [
      x
      + jax.nn.silu(
        dot(x, p["block"][k], "btd,de->bte", dtype=jnp.float32)
      ).astype(x.dtype)
      for k in range(self.n)
    ]
    y = [
      dot(h[k], p["out"][k], "btd,dv->btv", dtype=jnp.float32)
      for k in range(self.n)
    ]
    y = jnp.stack(y, axis=2)
    return y if softcap is None else soft_cap(y, softcap)
