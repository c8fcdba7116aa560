"""Muon against AdamW: the same loss in three quarters of the steps?

    python benchmarks/optimizer_race.py                     # Python's own docs
    python benchmarks/optimizer_race.py --path=input.txt --model=gpt2

One small decoder (4 layers, 4 heads, 128 wide, context 64, batch 12: nanoGPT's
CPU setting), one text by characters. Each optimizer runs at four learning
rates with the first seed; its best rate then runs with the other seeds. AdamW
takes all the steps, Muon only a share of them, with its schedule shortened to
end there. Judged is the loss over the whole validation split. Prints a table,
the mean and spread over seeds, and the verdict. Also prints what a step costs
with each, for Muon's steps are dearer.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import data, host
from jaxlm.evaluate import evaluate
from jaxlm.layers import param
from jaxlm.layers.compute import Compute
from jaxlm.models.families import gpt2, modern
from jaxlm.objectives import next_token
from jaxlm.optim import Muon, Optimizer, make, make_schedule
from jaxlm.state import create, make_step

SEQ, ROWS, CALL = 64, 12, 8
COMPUTE = Compute(unroll=True)
RATES = {
  "adamw": (2e-3, 4e-3, 8e-3, 16e-3),
  "muon": {  # of the hidden matrices, by the scale of the update
    "original": (1e-2, 2e-2, 4e-2, 8e-2),
    "match_rms_adamw": (2e-3, 4e-3, 8e-3, 16e-3),
  },
}


def optimizer(name: str, muon: Muon) -> Optimizer:
  """The two sides; both with the same decay, clipping and moments."""
  return Optimizer(name, weight_decay=0.1, b2=0.99, muon=muon)


@dataclass
class Race:
  """Everything the runs share."""

  model: Any
  train: Any
  val: Any

  def runner(self, name: str, steps: int, muon: Muon) -> Callable:
    """`run(peak, seed) -> (validation loss, milliseconds a step)`.

    The peak learning rate is an array in the optimizer's state, so that one
    compiled step serves all of them.
    """
    tree = self.model.params()
    lr = make_schedule("cosine", 1.0, steps, min(100, steps // 10), 0.1)
    tx = optax.inject_hyperparams(
      lambda peak: optax.chain(
        make(tree, lr, optimizer(name, muon)), optax.scale(peak)
      )
    )(peak=1.0)
    objective = partial(next_token, self.model, compute=COMPUTE)
    step = make_step(objective, tx, steps=CALL)

    @jax.jit
    def judge(params: Any, batch: Any) -> dict[str, jax.Array]:
      return objective(params, batch, None)[1]

    def run(peak: float, seed: int) -> tuple[float, float]:
      with jax.numpy_dtype_promotion("standard"):
        state = create(param.init(tree, jax.random.key(seed)), tx)
      state.opt_state.hyperparams["peak"] = jnp.float32(peak)
      feed = data.batches(self.train, SEQ, ROWS, seed)
      times = []
      for i in range(0, steps, CALL):
        batch = jax.tree.map(
          lambda *x: np.stack(x)[:, None], *(feed[i + k] for k in range(CALL))
        )
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
      loss = evaluate(judge, state.params, self.val)["loss"]
      return loss, 1e3 * statistics.median(times) / CALL

    return run


def compete(
  race: Race, name: str, steps: int, seeds: int, muon: Muon
) -> list[float]:
  """Validation losses of `name` at its best rate, one for each seed."""
  run = race.runner(name, steps, muon)
  rates, ratio, losses = RATES[name], 1.0, {}
  if name == "muon":
    rates, ratio = rates[muon.scale], muon.lr_ratio
  for rate in rates:
    losses[rate], cost = run(rate / ratio, 0)
    print(
      f"{name:6} {steps:5} steps  rate {rate:<6} seed 0  "
      f"loss {losses[rate]:.4f}  {cost:.1f} ms/step",
      flush=True,
    )
  best = min(losses, key=losses.get)
  found = [losses[best]] + [run(best / ratio, s)[0] for s in range(1, seeds)]
  spread = statistics.stdev(found) if seeds > 1 else 0.0
  print(
    f"{name:6} {steps:5} steps  rate {best:<6} {seeds} seeds: "
    f"{statistics.mean(found):.4f} ± {spread:.4f}  {np.round(found, 4)}",
    flush=True,
  )
  return found


def main() -> None:
  """Runs the race and prints the verdict."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--path", help="a text file; default: Python's docs")
  parser.add_argument("--model", choices=("modern", "gpt2"), default="gpt2")
  parser.add_argument("--steps", type=int, default=600)
  parser.add_argument("--share", type=float, default=0.75)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--only", choices=("adamw", "muon"))
  parser.add_argument("--coefficients", default="polar_express")
  parser.add_argument("--newton-schulz", type=int, default=5)
  parser.add_argument("--scale", default="original")
  parser.add_argument("--ratio", type=float, default=7.0)
  parser.add_argument("--per-head", action="store_true")
  args = parser.parse_args()
  host.prepare()

  corpus = data.prepare(args.path, tokenizer="chars")
  family = {"modern": modern, "gpt2": gpt2}[args.model]
  model = family.decoder(
    corpus.tokenizer.vocab_size, dim=128, layers=4, heads=4, max_positions=SEQ
  )
  print(f"{args.model}, {model.n_params():,} parameters; {corpus.describe()}")
  muon = Muon(
    coefficients=args.coefficients,
    steps=args.newton_schulz,
    scale=args.scale,
    lr_ratio=args.ratio,
    per_head=args.per_head,
  )
  race = Race(model, corpus.train, data.windows(corpus.val, SEQ, 120))

  full = args.steps // CALL * CALL
  part = int(args.share * full) // CALL * CALL
  if args.only:
    steps = full if args.only == "adamw" else part
    compete(race, args.only, steps, args.seeds, muon)
    return
  adamw = compete(race, "adamw", full, args.seeds, muon)
  ours = compete(race, "muon", part, args.seeds, muon)
  reached = statistics.mean(ours) <= statistics.mean(adamw)
  print(
    f"Muon in {part / full:.2f} of the steps: {statistics.mean(ours):.4f}; "
    f"AdamW in all: {statistics.mean(adamw):.4f}: "
    f"{'reached' if reached else 'NOT reached'}"
  )


if __name__ == "__main__":
  main()
