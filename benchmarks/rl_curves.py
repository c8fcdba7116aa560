"""Curves of PPO and GRPO over seeds: configs/ppo.py and configs/grpo.py.

    python benchmarks/rl_curves.py --seeds=5

For each seed, a small model first imitates a teacher that errs in most of its
sums (`--noise`: the share of wrong ones), so that it knows how sums are
written, and gets some right. From there PPO and GRPO learn by themselves, with
the task's own scorer for a reward. Questions of evaluations are held out from
all of it. Printed are, before and after, the score (pass@1), best-of-4 of the
imitator, KL to it and seconds; runs/rl_curves/curves.png, and with --docs also
docs/rl-curves.png, shows mean and spread. Seeds that are done are not run
again, and one that was stopped goes on.
"""

import argparse
import shutil
import time
from pathlib import Path

from jaxlm import host

host.prepare()

import jax  # noqa: E402
import numpy as np  # noqa: E402

import jaxlm  # noqa: E402
from jaxlm import metrics, program, tasks  # noqa: E402
from jaxlm.data.tokenizers import Chars  # noqa: E402
from jaxlm.layers import param  # noqa: E402
from jaxlm.layers.compute import Compute  # noqa: E402
from jaxlm.models.families import gpt2  # noqa: E402
from jaxlm.objectives.likelihood import next_token  # noqa: E402
from jaxlm.optim import Optimizer, make, make_schedule  # noqa: E402
from jaxlm.rl import grpo, ppo  # noqa: E402
from jaxlm.state import create, make_step  # noqa: E402

ROOT = Path(__file__).parent.parent
PROGRAMS = {"ppo": ppo, "grpo": grpo}
LENGTH, ROWS = 12, 64


# --- The imitator -----------------------------------------------------------


def imitator(path: Path, seed: int, steps: int, noise: float) -> None:
  """A model of 0.1 million parameters that has seen a teacher's sums."""
  tokenizer = Chars("0123456789+=", ["<|endoftext|>"])
  task = tasks.make("add", levels=2)
  shown = tasks.examples(task, "train", 6000, seed)
  rng = np.random.default_rng(seed)
  rows = [row(tokenizer, e, rng.random() < noise) for e in shown]
  rows = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
  vocab, room = tokenizer.vocab_size, LENGTH + 4
  model = gpt2.decoder(vocab, 64, 2, 4, room)
  schedule = make_schedule("cosine", 2e-3, steps, 20, 0.1)
  tx = make(model.params(), schedule, Optimizer(weight_decay=0.01))
  compute, call = Compute(unroll=True), 20

  def loss_fn(params, batch, key):
    return next_token(model, params, batch, key, compute)

  step = make_step(loss_fn, tx, steps=call)
  key = jax.random.key(seed)
  state = jax.jit(lambda: create(param.init(model.params(), key), tx))()
  for _ in range(0, steps, call):
    which = rng.integers(len(shown), size=(call, 1, ROWS))
    state, _ = step(state, {k: x[which] for k, x in rows.items()})
  jaxlm.save(path, model, state.params, tokenizer)


def row(tokenizer, example, wrong: bool) -> dict[str, np.ndarray]:
  """Tokens of a sum, what follows each, and which of that is the answer."""
  answer = example.rejected if wrong else example.response
  prompt = tokenizer.encode(example.prompt)
  ids = [*prompt, *tokenizer.encode(answer), tokenizer.eot]
  ids = np.pad(ids, (0, LENGTH + 1 - len(ids))).astype(np.int32)
  place = np.arange(LENGTH)
  n = len(prompt) + len(answer) + 1
  mask = (place >= len(prompt) - 1) & (place < n - 1)
  return {"inputs": ids[:-1], "targets": ids[1:], "mask": mask}


# --- Runs -------------------------------------------------------------------


def run(name: str, seed: int, work: Path, keys: list[str]) -> Path:
  """One run of a program, or what is there of it already; its workdir."""
  workdir = work / f"{name}-{seed}"
  flags = [
    f"--config={ROOT}/configs/{name}.py",
    f"--workdir={workdir}",
    f"--config.model.path={work / f'imitator-{seed}'}",
    f"--config.seed={seed}",
    "--config.eval_every=25",
    "--config.log_every=5",
    *keys,
  ]
  asked = program.load(flags)
  if (workdir / "rl.png").exists():
    return workdir
  begun = time.perf_counter()
  PROGRAMS[name].train(asked.config, asked.workdir)
  seconds = time.perf_counter() - begun
  (workdir / "seconds.txt").write_text(f"{seconds:.1f}\n")
  return workdir


def curve(workdir: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of one metric."""
  points = [(r["step"], r[name]) for r in metrics.read(workdir) if name in r]
  return tuple(np.array(points, float).T)


def table(runs: dict[str, list[Path]]) -> str:
  """Before and after, seed by seed."""
  head = "program seed  before  best of 4   +1 std    after   KL     seconds"
  lines = [head]
  for name, workdirs in runs.items():
    for seed, workdir in enumerate(workdirs):
      seen = [r for r in metrics.read(workdir) if "val_score" in r]
      a, b = seen[0], seen[-1]
      seconds = (workdir / "seconds.txt").read_text().strip()
      lines.append(
        f"{name:7} {seed:4}  {a['val_score']:6.3f}  {a['val_best_of_4']:9.3f}"
        f"  {a['val_score'] + a['val_score_std']:7.3f}  {b['val_score']:7.3f}"
        f"  {b['val_kl']:5.2f}  {seconds:>8}"
      )
  return "\n".join(lines)


def draw(runs: dict[str, list[Path]], path: Path) -> None:
  """Mean and spread (least and most) of score and KL over the seeds."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
  panels = (
    ("val_score", "pass@1, held out"),
    ("val_kl", "KL, nats a response"),
  )
  for i, (metric, title) in enumerate(panels):
    axes = figure.add_subplot(1, 2, i + 1)
    axes.set_title(title, fontsize=11)
    for name, workdirs in runs.items():
      steps = curve(workdirs[0], metric)[0]
      values = np.stack([curve(w, metric)[1] for w in workdirs])
      axes.plot(steps, values.mean(0), label=name.upper())
      axes.fill_between(steps, values.min(0), values.max(0), alpha=0.2)
    if metric == "val_score":
      known = [metrics.read(w)[0] for w in runs["ppo"]]
      best = np.mean([r["val_best_of_4"] for r in known])
      axes.axhline(
        best, color="gray", linestyle=":", label="imitator, best of 4"
      )
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
  figure.suptitle(
    f"{len(runs['ppo'])} seeds: mean, least and most", fontsize=11
  )
  figure.savefig(path)


def main() -> None:
  """Runs what is missing, prints the table, draws the curves."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument("--seeds", type=int, default=5)
  flags.add_argument("--noise", type=float, default=0.7)
  flags.add_argument("--sft_steps", type=int, default=1600)
  flags.add_argument("--work", type=Path, default=Path("runs/rl_curves"))
  flags.add_argument("--docs", action="store_true")
  flags, keys = flags.parse_known_args()
  runs: dict[str, list[Path]] = {name: [] for name in PROGRAMS}
  for seed in range(flags.seeds):
    begins = flags.work / f"imitator-{seed}"
    if not (begins / "model.json").exists():
      imitator(begins, seed, flags.sft_steps, flags.noise)
    for name, workdirs in runs.items():
      workdirs.append(run(name, seed, flags.work, keys))
    print(table(runs), flush=True)
  draw(runs, flags.work / "curves.png")
  if flags.docs:
    shutil.copy(flags.work / "curves.png", ROOT / "docs" / "rl-curves.png")


if __name__ == "__main__":
  main()
