"""Objectives: (model, params, batch, key) -> loss, metrics.

Each is what `jaxlm.train` minimises. `metrics['weight']` is the number of
targets the loss is a mean over; `make_step` and the evaluator use it to join
batches exactly.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.at import At
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.losses import cross_entropy, head_cross_entropy, weighted_mean
from jaxlm.models.decoder import Decoder, head, hidden, logits
from jaxlm.models.encdec import EncoderDecoder, decode, encode, padded
from jaxlm.models.medusa import Heads

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
  exact: bool = False,
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
    exact: also report `exact`, which needs all the logits (no chunk).

  Returns:
    The loss, and `loss` (without what is added to it), `weight`; where asked
    for `exact`: the share of segments (without those, of rows) of which every
    target that counts is the likeliest token, and how many there are; where
    `compute.watch` also `max_logits`: by the path of each attention, `[layers,
    heads]`. With mixtures of experts also `aux`, what their routers add to the
    loss; `load`: by the path of each mixture, `[layers, experts]`, shares of
    the assignments; and `load_cv`, their coefficient of variation.
  """
  at = At(batch.get("positions"), batch.get("segments"), None, key)
  x, seen = hidden(model, params, batch["inputs"], at, None, compute)
  targets = batch["targets"]
  if chunk:
    w = head(model, params, compute)
    with jax.named_scope("loss"):
      nll, log_z = head_cross_entropy(
        x, w, targets, chunk, model.softcap, compute
      )
  else:
    y = logits(model, params, x, compute)
    with jax.named_scope("loss"):
      nll, log_z = cross_entropy(y, targets)
  loss, weight = weighted_mean(nll, batch.get("mask"))
  metrics = {"loss": loss, "weight": weight}
  if exact:
    metrics["exact"] = _exact(jnp.argmax(y, axis=-1) == targets, batch)
  if compute.watch:
    metrics["max_logits"] = _reported(seen, "max_logits", "mixer")
  if load := _reported(seen, "load", "ffn"):
    aux = sum(x.sum() for x in _reported(seen, "aux", "ffn").values())
    metrics |= {"load": load, "load_cv": _variation(load), "aux": aux}
    loss = loss + aux
  if z_loss:
    drift, _ = weighted_mean(log_z**2, batch.get("mask"))
    loss = loss + z_loss * drift
  return loss, metrics


def seq2seq(
  model: EncoderDecoder,
  params: Any,
  batch: Batch,
  key: Array | None = None,
  compute: Compute = DEFAULT,
  start: int = 0,
) -> tuple[Array, Metrics]:
  """Mean negative log likelihood of the targets given the whole input.

  Args:
    model: the encoder-decoder.
    params: its arrays.
    batch: `inputs` [batch, keys] and `targets` [batch, seq], int; where rows
      differ in length also `inputs_mask` and `mask`, of the same shapes: what
      is text, and which targets count.
    key: for dropout; None in evaluation.
    compute: how to run.
    start: the token that stands before the first target.

  Returns:
    The loss, and `loss` and `weight`.
  """
  keys = (None, None) if key is None else jax.random.split(key)
  sources, targets = At(), batch["targets"]
  if "inputs_mask" in batch:
    sources = padded(batch["inputs_mask"])
  context = encode(
    model, params, batch["inputs"], sources.replace(key=keys[0]), compute
  )
  read = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=start)
  y = decode(
    model, params, read, context, sources, At(key=keys[1]), compute=compute
  )
  loss, weight = weighted_mean(cross_entropy(y, targets)[0], batch.get("mask"))
  return loss, {"loss": loss, "weight": weight}


def tokens_ahead(
  model: Decoder,
  heads: Heads,
  params: Any,
  batch: Batch,
  key: Array | None = None,
  compute: Compute = DEFAULT,
  decay: float = 0.8,
) -> tuple[Array, Metrics]:
  """What heads say of tokens further ahead; the trunk is not trained.

  The sum over heads k = 1 .. n of decay^k times the mean negative log
  likelihood of the token k places behind the next one (Medusa-1,
  arXiv:2401.10774, equation 1 in section 2.2.1).

  Args:
    model: the trunk.
    heads: what is trained, on its last hidden state.
    params: `trunk` and `heads`. No gradient reaches the trunk; freeze it, so
      that no weight decay does.
    batch: as for `next_token`.
    key: not used: the trunk runs as in generation.
    compute: how to run.
    decay: weight of a head over that of the one before it.

  Returns:
    The loss, and `loss`, `weight` and `right`: how often the first choice of
    each head is the token, [n].
  """
  del key
  at = At(batch.get("positions"), batch.get("segments"))
  x, _ = hidden(model, params["trunk"], batch["inputs"], at, None, compute)
  scores = heads(params["heads"], jax.lax.stop_gradient(x), model.softcap)
  loss, right = jnp.float32(0.0), []
  for k in range(1, heads.n + 1):
    targets, mask = _ahead(batch, k)
    nll, _ = cross_entropy(scores[:, :, k - 1], targets)
    loss = loss + decay**k * weighted_mean(nll, mask)[0]
    hit = jnp.argmax(scores[:, :, k - 1], axis=-1) == targets
    right.append(weighted_mean(hit.astype(jnp.float32), mask)[0])
  weight = jnp.sum(_ahead(batch, 1)[1]).astype(jnp.float32)
  return loss, {"loss": loss, "weight": weight, "right": jnp.stack(right)}


def _exact(right: Array, batch: Batch) -> tuple[Array, Array]:
  """The share of segments whose every target is right, and their number."""
  ones = jnp.ones_like(batch["targets"])
  counts = batch.get("mask", ones) > 0
  segments = batch.get("segments", ones)
  same = segments[:, :, None] == segments[:, None, :]
  wrong = jnp.any(same & (counts & ~right)[:, None, :], axis=-1)
  earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)[None]
  again = jnp.any(same & counts[:, None, :] & earlier, axis=-1)
  # Each segment speaks once, where its first target stands.
  return weighted_mean(1.0 - wrong.astype(jnp.float32), counts & ~again)


def _ahead(batch: Batch, k: int) -> tuple[Array, Array]:
  """Targets `k` places further on, and which there are, bool [batch, seq]."""
  targets = batch["targets"]
  there = jnp.arange(targets.shape[1], dtype=jnp.int32) < targets.shape[1] - k
  mask = jnp.broadcast_to(there[None], targets.shape)
  if "mask" in batch:
    mask = mask & (jnp.roll(batch["mask"], -k, axis=1) > 0)
  if "segments" in batch:
    same = jnp.roll(batch["segments"], -k, axis=1) == batch["segments"]
    mask = mask & same
  return jnp.roll(targets, -k, axis=1), mask


def _reported(seen: Any, name: str, part: str) -> dict[str, Array]:
  """What blocks report under `name`, by the path of their mixer or ffn."""
  return {
    f"layers/{i}/{j}/{part}": report[name]
    for i, pattern in seen.items()
    for j, report in pattern.items()
    if name in report
  }


def _variation(load: dict[str, Array]) -> Array:
  """Standard deviation over mean of the experts' load, mean over layers."""
  each = [x.std(-1) / x.mean(-1) for x in load.values()]
  return jnp.concatenate(each).mean()
