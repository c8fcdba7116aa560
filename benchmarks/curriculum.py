"""Do curricula help? Three orders of the same examples, at equal steps.

    python benchmarks/curriculum.py
    python benchmarks/curriculum.py --task='add?levels=1-3' --steps=800

A small decoder (2 layers, 64 wide) learns a generated task from nothing: in
random order, each epoch from short to long, and with growing competence
(arXiv:1903.09848, whole at half of the run). Every run sees 32 examples a step,
one a row, so steps and examples are equal; tokens are not, since short examples
have fewer, and are printed. Judged is the share of held-out prompts of which
every token of the response is the likeliest one, after a quarter, a half and
all of the steps: mean and standard deviation over seeds.
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxlm import config as configs
from jaxlm import host, recipe
from jaxlm.data.orders import ORDERS
from jaxlm.evaluate import evaluate
from jaxlm.state import create

CALL = 10  # steps in a call of the compiled step


def keys(flags: argparse.Namespace, order: str, seed: int) -> Any:
  """The config of a run."""
  return configs.freeze(
    {
      "objective.name": "sft",
      "objective.order": order,
      "objective.packed": False,
      "objective.examples": flags.examples,
      "data.path": f"task:{flags.task}",
      "data.tokenizer": "chars",
      "steps": flags.steps,
      "seed": seed,
      "batch_size": 32,
      "seq_len": 64,
      "unroll": True,
      "model.family": "modern",
      "model.dim": 64,
      "model.layers": 2,
      "model.heads": 4,
      "optimizer.name": "muon",
      "optimizer.lr": 3e-3,
      "optimizer.muon_lr": 0.02,
      "optimizer.warmup": 20,
      "optimizer.end_lr": 0.0,
    }
  )


class Course:
  """Everything the runs share: examples, model, compiled programs."""

  def __init__(self, flags: argparse.Namespace):
    """Reads the task and declares the model; compiles nothing yet."""
    self.flags = flags
    config = keys(flags, "random", 0)
    objective = recipe.objective(config)
    self.corpus = objective.data.read(**recipe.data_arguments(config))
    self.model = recipe.model(config, self.corpus.tokenizer.vocab_size)
    tree = self.model.params()
    self.tx = recipe.optimizer(config, tree, recipe.schedule(config))
    self.step = recipe.step(config, self.model, self.tx, CALL)
    self.held_out = objective.data.held_out(
      self.corpus, config, 256, np.arange(256)
    )
    loss_fn = recipe.loss(config, self.model)
    self.judge = jax.jit(lambda p, batch: loss_fn(p, batch, None)[1])

  def run(self, order: str, seed: int) -> Iterator[tuple[float, int]]:
    """Trains; yields the share that is exact and the tokens read, thrice."""
    config = keys(self.flags, order, seed)
    objective, steps = recipe.objective(config), self.flags.steps
    batches = objective.data.batches(self.corpus, config, np.arange(32))
    params = jax.jit(objective.trained.start, static_argnums=(0, 2))(
      self.model, jax.random.key(seed), None
    )
    state, tokens = create(params, self.tx), 0
    for at in range(0, steps, CALL):
      parts = [batches[i] for i in range(at, at + CALL)]
      tokens += sum(int((part["segments"] > 0).sum()) for part in parts)
      batch = jax.tree.map(lambda *x: np.stack(x)[:, None], *parts)
      state, _ = self.step(state, batch)
      if at + CALL in (steps // 4, steps // 2, steps):
        found = evaluate(self.judge, state.params, self.held_out)
        yield found["exact"], tokens


def main() -> None:
  """Prints a table with a row for each order."""
  flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  flags.add_argument("--task", default="sort?levels=1-5")
  flags.add_argument("--steps", type=int, default=400)
  flags.add_argument("--seeds", type=int, default=3)
  flags.add_argument("--examples", type=int, default=5000)
  flags = flags.parse_args()
  if flags.steps % (4 * CALL):
    raise SystemExit(f"give a multiple of {4 * CALL} steps")
  host.prepare()
  course = Course(flags)
  print(f"{flags.task}: {course.corpus.describe()}", flush=True)
  print("| order | exact at 1/4 | at 1/2 | at the end | tokens read |")
  print("|---|---|---|---|---|")
  for order in ORDERS:
    runs = [list(course.run(order, seed)) for seed in range(flags.seeds)]
    shown = [
      f"{100 * statistics.mean(x):.1f} ± {100 * statistics.stdev(x):.1f}"
      for x in ([run[i][0] for run in runs] for i in range(3))
    ]
    tokens = statistics.mean(run[-1][1] for run in runs)
    print(f"| {order} | {' | '.join(shown)} | {tokens:,.0f} |", flush=True)


if __name__ == "__main__":
  main()
