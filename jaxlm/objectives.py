"""Objectives: (model, params, batch, key) -> loss, metrics.

Each is what `jaxlm.train` minimises. `metrics['weight']` is the number of
targets the loss is a mean over; `make_step` and the evaluator use it to join
batches exactly.
"""

from typing import Any

import jax

from jaxlm.layers.attend import At
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.losses import chunked_cross_entropy, cross_entropy, weighted_mean
from jaxlm.models.decoder import Decoder, head, hidden, logits

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]


def next_token(
  model: Decoder,
  params: Any,
  batch: Batch,
  key: Array | None = None,
  compute: Compute = DEFAULT,
  z_loss: float = 0.0,
  chunk: int = 0,
) -> tuple[Array, Metrics]:
  """Mean negative log likelihood of each token given those before it.

  Args:
    model: the decoder.
    params: its arrays.
    batch: `inputs` and `targets`, int `[batch, seq]`; where rows are packed
      or padded also `segments`, `positions` (int) and `mask` (which targets
      count), all `[batch, seq]`.
    key: for dropout; None in evaluation.
    compute: how to run.
    z_loss: weight of mean(log Z ^ 2), which keeps logits from drifting (PaLM,
      arXiv:2204.02311, section 5).
    chunk: positions whose logits are held at a time; 0 holds them all.

  Returns:
    The loss, and `loss` (without the z term), `weight`; where `compute.watch`
    also `max_logits`: by the path of each attention, `[layers, heads]`.
  """
  at = At(batch.get("positions"), batch.get("segments"), None, key)
  x, seen = hidden(model, params, batch["inputs"], at, None, compute)
  targets = batch["targets"]
  if chunk:
    w = head(model, params, compute)
    nll, log_z = chunked_cross_entropy(x, w, targets, chunk, model.softcap)
  else:
    nll, log_z = cross_entropy(logits(model, params, x, compute), targets)
  loss, weight = weighted_mean(nll, batch.get("mask"))
  metrics = {"loss": loss, "weight": weight}
  if compute.watch:
    metrics["max_logits"] = {
      f"layers/{i}/{j}/mixer": mixer["max_logits"]
      for i, pattern in seen.items()
      for j, mixer in pattern.items()
    }
  if z_loss:
    drift, _ = weighted_mean(log_z**2, batch.get("mask"))
    loss = loss + z_loss * drift
  return loss, metrics
