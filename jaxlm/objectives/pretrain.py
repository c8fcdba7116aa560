"""Pretraining: the next token of plain text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import data
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder
from jaxlm.objectives.likelihood import next_token
from jaxlm.objectives.objective import Objective


def pretrain(chunk: int = 0, z_loss: float = 0.0) -> Objective:
  """Every token of plain text given those before it.

  Args:
    chunk: positions whose logits are held at a time; 0 holds them all.
    z_loss: weight of mean(log Z ^ 2); see `next_token`.
  """
  return Objective(Text(), NextToken(chunk, z_loss))


@dataclass(frozen=True)
class Text:
  """Documents as a stream of tokens, cut into rows; see `jaxlm.data`."""

  sequences = 1

  def read(self, **arguments: Any) -> data.Dataset:
    """As `jaxlm.data.prepare`."""
    return data.prepare(**arguments)

  def batches(
    self, corpus: data.Dataset, config: FrozenConfigDict, rows: np.ndarray
  ) -> data.Batches:
    """Windows as `config.data.windows` says."""
    return data.batches(
      corpus.train,
      config.seq_len,
      config.batch_size,
      config.seed,
      config.data.windows,
      corpus.weights,
      rows=rows,
    )

  def held_out(
    self,
    corpus: data.Dataset,
    config: FrozenConfigDict,
    size: int,
    rows: np.ndarray,
  ) -> Sequence[dict[str, np.ndarray]]:
    """Every target of the validation text once."""
    packed = config.data.windows == "packed"
    return corpus.val and data.windows(
      corpus.val, config.seq_len, size, packed, rows=rows
    )


@dataclass(frozen=True)
class NextToken:
  """The loss `next_token`, with its options."""

  chunk: int = 0
  z_loss: float = 0.0

  def __call__(
    self,
    model: Decoder,
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    compute: Compute,
    frozen: Any = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `next_token`."""
    return next_token(
      model, params, batch, key, compute, self.z_loss, self.chunk
    )
