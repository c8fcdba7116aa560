"""Reward models: one number for a text.

A trunk reads the text, a pool makes one hidden state of it, a head one number:

    model = RewardModel.on(decoder)                        # its last token
    model = RewardModel.on(encoder(decoder), Mean())       # all see all
    params = init(model.params(), key)
    scores = model(params, tokens, mask)                   # [batch]

A decoder's last token has seen everything (arXiv:2203.02155, section 3.5). An
encoder's tokens see both ways, and their mean is its word.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.mask import Full
from jaxlm.layers.param import FanIn, count
from jaxlm.models.decoder import Block, Decoder, hidden
from jaxlm.models.encdec import padded
from jaxlm.models.heads import ScalarHead

Array = jax.Array
Tree = Any

# --- Pools ------------------------------------------------------------------


@dataclass(frozen=True)
class Last:
  """The last token of the text."""

  def weights(self, mask: Array) -> Array:
    """How much each token counts, float32 [batch, seq]; `mask` is the text."""
    places = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    last = jnp.max(jnp.where(mask, places, -1), axis=1, keepdims=True)
    return (places == last).astype(jnp.float32)


@dataclass(frozen=True)
class Mean:
  """All tokens of the text alike."""

  def weights(self, mask: Array) -> Array:
    """How much each token counts, float32 [batch, seq]; `mask` is the text."""
    there = mask.astype(jnp.float32)
    return there / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1.0)


Pool = Last | Mean

# --- The model --------------------------------------------------------------


@dataclass(frozen=True)
class RewardModel:
  """A trunk, what becomes of its hidden states, and a head on that.

  Attributes:
    trunk: reads the text; its own head is not used and not there.
    head: makes the number.
    pool: which hidden states it reads.
  """

  trunk: Decoder
  head: ScalarHead
  pool: Pool = Last()

  @classmethod
  def on(cls, trunk: Decoder, pool: Pool = Last()) -> "RewardModel":
    """A reward model around a trunk; scores start with a variance about one.

    Not with zeros: where the last layers start so, too, no gradient would ever
    reach either. No bias: only differences of rewards are learned.
    """
    return cls(trunk, ScalarHead(trunk.dim, False, FanIn()), pool)

  @property
  def vocab(self) -> int:
    """Number of tokens it reads."""
    return self.trunk.vocab

  @property
  def max_positions(self) -> int:
    """The longest text it is meant for."""
    return self.trunk.max_positions

  def params(self) -> dict[str, Any]:
    """`trunk`, without a head of its own, and `head`."""
    trunk = self.trunk.params()
    trunk.pop("head", None)
    return {"trunk": trunk, "head": self.head.params()}

  def n_params(self) -> int:
    """Number of parameters."""
    return count(self.params())

  def __call__(
    self,
    params: Tree,
    tokens: Array,
    mask: Array | None = None,
    key: Array | None = None,
    compute: Compute = DEFAULT,
  ) -> Array:
    """The reward of each text.

    Args:
      params: its arrays.
      tokens: integers `[batch, seq]`.
      mask: which of them are text, bool of the same shape; the rest is padding
        on whichever side, and its tokens do not matter. None: all.
      key: for dropout; None in evaluation.
      compute: how to run.

    Returns:
      float32 `[batch]`; of a row without text 0 and the head's bias.
    """
    at = At() if mask is None else padded(mask)
    x, _ = hidden(
      self.trunk, params["trunk"], tokens, at.replace(key=key), None, compute
    )
    there = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    weights = self.pool.weights(there).astype(jnp.float32)
    x = jnp.where(there[..., None], x.astype(jnp.float32), 0.0)
    pooled = jnp.sum(x * weights[..., None], axis=1)
    return self.head(params["head"], pooled)


def encoder(model: Decoder) -> Decoder:
  """The same layers, seeing both ways: masks become `Full()`.

  Raises:
    UserError: if a mixer has no mask, as recurrent ones.
  """

  def both_ways(block: Block) -> Block:
    if not hasattr(block.mixer, "mask"):
      raise UserError(
        f"a {type(block.mixer).__name__} reads from left to right and cannot "
        "be an encoder; use it with the pool Last()"
      )
    return replace(block, mixer=replace(block.mixer, mask=Full()))

  layers = tuple(
    (tuple(both_ways(b) for b in pattern), n) for pattern, n in model.layers
  )
  return replace(model, layers=layers)
