"""Evaluation: the exact loss of a split, every target counted once."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxlm.metrics import Mean

Tree = Any
EvalFn = Callable[[Tree, Tree], dict[str, jax.Array]]


def evaluate(
  eval_fn: EvalFn,
  params: Tree,
  batches: Sequence[Tree],
  limit: int = 0,
  put: Callable[[Tree], Tree] = lambda batch: batch,
) -> dict[str, float]:
  """Weighted means of an objective's metrics over batches.

  Args:
    eval_fn: `(params, batch) -> metrics`, jitted, with `weight` among them:
      over how many targets the others are means. One that is a mean over
      something else is a pair, (mean, weight).
    params: the parameters to judge.
    batches: a finite sequence, for example `jaxlm.data.windows(...)`.
    limit: read this many batches, evenly spread; 0 for all of them.
    put: places a batch on the devices.

  Returns:
    `loss` in nats per token, `perplexity` = e^loss, and the other metrics.
  """
  total = len(batches)
  chosen = range(total)
  if 0 < limit < total:
    chosen = [i * total // limit for i in range(limit)]
  mean = Mean()
  for i in chosen:
    metrics = eval_fn(params, put(batches[i]))
    # What is told layer by layer is for the optimizer.
    metrics = {k: v for k, v in metrics.items() if not isinstance(v, dict)}
    weight = metrics.pop("weight")
    for name, value in metrics.items():
      value, n = value if isinstance(value, tuple) else (value, weight)
      mean.add(n, **{name: value})
  result = mean.result()
  return result | {"perplexity": math.exp(min(result["loss"], 700.0))}


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
  """Nats per token as bits per byte: comparable between tokenizers."""
  return loss / math.log(2) / bytes_per_token
