"""Looking at a policy and telling of it: scores, samples, plots."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm import metrics, speed
from jaxlm.checkpoint import Checkpoints
from jaxlm.layers.compute import Compute
from jaxlm.metrics import Log
from jaxlm.rl import guards, questions
from jaxlm.rl.begin import Base
from jaxlm.rl.collect import respond
from jaxlm.rl.guards import Limits
from jaxlm.rl.options import Options
from jaxlm.rl.questions import Questions
from jaxlm.rl.rewards import Verifier
from jaxlm.rl.rollout import Actor, Draw, scored
from jaxlm.state import TrainState

Tree = Any
LOOKS = 4  # responses to each question of an evaluation


def look(
  base: Base,
  params: Tree,
  held_out: Questions,
  options: Options,
  compute: Compute,
) -> tuple[dict[str, float], list[str]]:
  """The true scores of a policy on what is held out, and all its texts.

  Each question is asked `LOOKS` times at temperature 1, with the same
  randomness in every evaluation.

  Returns:
    `score`, its mean (pass@1 where scores are 0 or 1), and `score_std`;
    `best_of_4`, the mean of the best of each question; `kl` to the reference in
    nats a response; `length`, and the share that `ended`.
  """
  draw = Draw(options.tokens, LOOKS, base.eos, gathered=options.gathered)
  rollout, texts = respond(base, draw, params, held_out, compute, 0, 0, 0)
  asked = [e for e in held_out.examples for _ in range(LOOKS)]
  score = np.array(Verifier(options.made())(asked, texts))
  said = scored(Actor(base.model), base.params, rollout, draw, compute)
  kl = np.asarray(rollout.logp_old) - np.asarray(said.logp)
  found = {
    "score": score.mean(),
    "score_std": score.std(),
    "best_of_4": score.reshape(-1, LOOKS).max(1).mean(),
    "kl": np.where(rollout.mask, kl, 0.0).sum(1).mean(),
    "length": np.asarray(rollout.mask).sum(1).mean(),
    "ended": questions.ended(rollout, base.eos).mean(),
  }
  return {name: float(x) for name, x in found.items()}, texts


@dataclass(frozen=True, eq=False)
class Evaluation:
  """What a run does at every evaluation: looks, tells, and notes.

  Attributes:
    base: the model, its reference and tokenizer.
    held_out: what is asked.
    options: of the run.
    compute: how to run.
    workdir: gets samples.txt.
    log: gets the numbers.
    checkpoints: get the score noted, if the step is saved.
    limits: where guards act.
  """

  base: Base
  held_out: Questions
  options: Options
  compute: Compute
  workdir: Path
  log: Log
  checkpoints: Checkpoints
  limits: Limits

  def __call__(self, step: int, state: TrainState) -> None:
    """Of the policy after `step`; the averaged weights, where kept."""
    params = state.params if state.ema is None else state.ema
    of = (self.base, params, self.held_out, self.options, self.compute)
    found, texts = look(*of)
    self.log.scalars(step, {f"val_{k}": v for k, v in found.items()})
    shown = show(self.workdir, step, self.held_out, texts)
    self.log.text(step, "samples", shown)
    print(f"step {step} | {told(found)}", flush=True)
    alarms = guards.alarms(found, {}, self.limits)
    guards.act(alarms, step, self.workdir, self.options.guards)
    if step in self.checkpoints:
      self.checkpoints.note(step, val_loss=-found["score"])


# --- Telling ----------------------------------------------------------------


def show(
  path: Path, step: int, held_out: Questions, texts: Sequence[str], n: int = 5
) -> str:
  """Adds some questions and responses to samples.txt, and returns them."""
  asked = held_out.examples[:n]
  lines = [
    f"{e.prompt}{text}   (answer: {e.answer})"
    for e, text in zip(asked, texts[::LOOKS], strict=False)
  ]
  text = "\n".join(lines)
  with open(path / "samples.txt", "a", encoding="utf-8") as file:
    file.write(f"--- step {step}\n{text}\n\n")
  return text


def progress(
  step: int, steps: int, now: Mapping[str, float], rate: float, left: float
) -> str:
  """A line about a step: its metrics, samples a second, seconds left."""
  names = ("reward", "kl", "length", "entropy", "clipped")
  parts = [f"{name} {now[name]:.3g}" for name in names if name in now]
  parts += [f"{rate:.0f} samples/s"] if np.isfinite(rate) else []
  parts += [f"{speed.clock(left)} left"] if np.isfinite(left) else []
  return " | ".join([f"step {step:>{len(str(steps))}}/{steps}", *parts])


def told(found: Mapping[str, float]) -> str:
  """An evaluation in one line."""
  return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


def before_and_after(path: Path) -> str:
  """The first and the last evaluation of a run, as a table."""
  seen = [r for r in metrics.read(path) if "val_score" in r]
  first, last = seen[0], seen[-1]
  rows = [f"{'held out':12}{'before':>10}{'after':>10}"]
  rows += [
    f"{name.removeprefix('val_'):12}{first[name]:>10.3f}{last[name]:>10.3f}"
    for name in first
    if name.startswith("val_") and name in last
  ]
  return "\n".join(rows)


def plot(path: Path) -> Path:
  """Draws rl.png: score, KL, length and entropy against steps."""
  from matplotlib.figure import Figure  # no pyplot: no display, no state

  records = metrics.read(path)
  figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
  panels = (
    ("score", ("reward", "val_score", "val_best_of_4")),
    ("KL to the reference, nats a response", ("kl", "val_kl")),
    ("tokens of a response", ("length", "val_length")),
    ("entropy of a token, nats", ("entropy",)),
  )
  for i, (title, names) in enumerate(panels):
    axes = figure.add_subplot(2, 2, i + 1)
    axes.set_title(title, fontsize=10)
    for name in names:
      points = [
        (r["step"], r[name]) for r in records if r.get(name) is not None
      ]
      if points:
        style = "o-" if name.startswith("val_") else "-"
        axes.plot(*zip(*points, strict=True), style, markersize=3, label=name)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
  partial = path / "rl.new.png"
  figure.savefig(partial)
  os.replace(partial, path / "rl.png")
  return path / "rl.png"


def finite(**values: float) -> dict[str, float]:
  """Those that are numbers."""
  return {k: float(v) for k, v in values.items() if np.isfinite(v)}
