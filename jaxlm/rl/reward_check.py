r"""Whether a reward model can be trusted, before anything is trained on it.

    python -m jaxlm.rl.reward_check --workdir=runs/reward --task=reverse
    python -m jaxlm.rl.reward_check --workdir=runs/reward --task=reverse \
        --policy=runs/sft --samples=64 --control

It is asked about responses of a task to prompts that were never trained on,
where the truth is known: which of two is better, whether places in a batch and
padding matter, whether it likes length, whether its differences are
probabilities, whether it falls for repetition. With `--policy`, how the true
score follows the reward as more and more samples are chosen from. With
`--control`, the same training on labels that were shuffled, which must come out
at chance. Written are report.md, report.json and report.png.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, files, program, recipe
from jaxlm.errors import UserError
from jaxlm.interop.load import load, load_all, load_tokenizer
from jaxlm.models.reward import RewardModel
from jaxlm.objectives.pairs import render
from jaxlm.objectives.talks import named_task
from jaxlm.rl import sanity
from jaxlm.rl.candidates import candidates
from jaxlm.rl.rewards import Learned, Verifier
from jaxlm.tasks import Example, Task, examples

Report = dict[str, Any]


def parser() -> argparse.ArgumentParser:
  """The flags of the program."""
  flags = argparse.ArgumentParser(
    prog="python -m jaxlm.rl.reward_check",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = flags.add_argument
  add("--workdir", required=True, metavar="DIR", help="the reward model's run")
  add("--task", required=True, metavar="NAME", help="as task:NAME in data.path")
  add("--examples", type=int, default=500, metavar="N", help="pairs; 500")
  add("--policy", metavar="DIR", help="whose responses it is to choose from")
  add("--prompts", type=int, default=64, metavar="N", help="for those; 64")
  add("--samples", type=int, default=32, metavar="N", help="to each; 32")
  add("--control", action="store_true", help="train it on shuffled labels, too")
  add("--out", metavar="DIR", help="of the report; default: the workdir")
  return flags


def main(argv: Sequence[str]) -> None:
  """Runs the program.

  Raises:
    UserError: for wrong flags, a run that is no reward model, or a task that
      is not there.
  """
  flags = parser().parse_args(argv)
  path = Path(flags.workdir)
  judge, task = _judge(path), named_task(flags.task)
  found = examples(task, "test", flags.examples)
  report = about_pairs(judge, task, found)
  if flags.control:
    report["control"] = control(config.read(path), flags.examples)
  if flags.policy:
    asked = found[: flags.prompts]
    report["best_of_n"] = chosen_from(
      judge, task, asked, Path(flags.policy), flags.samples
    )
  out = Path(flags.out) if flags.out else path
  write(report, out)
  print((out / "report.md").read_text("utf-8"))


def _judge(path: Path) -> Learned:
  """The reward model of a run."""
  model, params = load(path)
  if not isinstance(model, RewardModel):
    raise UserError(
      f"{path} holds no reward model; train one with the objective reward"
    )
  return Learned(model, params, load_tokenizer(path))


# --- About pairs ------------------------------------------------------------


def about_pairs(judge: Learned, task: Task, found: Sequence[Example]) -> Report:
  """Everything that can be asked about right and wrong responses."""
  good, bad = (
    np.array(judge(found, [getattr(e, side) for e in found]))
    for side in ("response", "rejected")
  )
  right, error = sanity.accuracy(good, bad)
  sizes = [
    [len(getattr(e, s)) for e in found] for s in ("response", "rejected")
  ]
  return {
    "pairs": len(found),
    "accuracy": right,
    "accuracy_error": error,
    "accuracy_by_length": sanity.by_length(good, bad, *sizes),
    "place": _place(judge, found, good),
    "length_bias": sanity.length_bias(good, np.array(sizes[0])),
    "calibration": dataclasses.asdict(sanity.calibration(good, bad)),
    "tricks": _tricks(judge, task, found, good),
    "scores": {"right": good.tolist(), "wrong": bad.tolist()},
  }


def _place(
  judge: Learned, found: Sequence[Example], scores: np.ndarray
) -> float:
  """How much a score changes with its place in the batch and its neighbours."""
  back = judge(found[::-1], [e.response for e in found[::-1]])
  return float(np.abs(np.array(back)[::-1] - scores).max())


def _tricks(
  judge: Learned, task: Task, found: Sequence[Example], scores: np.ndarray
) -> dict[str, tuple[float, int]]:
  """How often a worthless change of a right response scores as well or higher.

  Changes that the task still calls right are left out, as those too long.
  """
  most, out = judge.model.max_positions, {}
  for name in sanity.tricks("ab"):
    asked = [
      (i, e, sanity.tricks(e.response)[name])
      for i, e in enumerate(found)
      if name in sanity.tricks(e.response)
    ]
    asked = [
      (i, e, text)
      for i, e, text in asked
      if task.score(e, text) < 1 and len(e.prompt + text) + 2 <= most
    ]
    if asked:
      made = judge([e for _, e, _ in asked], [text for _, _, text in asked])
      own = scores[[i for i, _, _ in asked]]
      out[name] = (float(np.mean(np.array(made) >= own)), len(asked))
  return out


# --- The control ------------------------------------------------------------


def control(settings: FrozenConfigDict, pairs: int) -> Report:
  """The same training on shuffled labels, judged on true ones.

  Returns:
    Accuracy on pairs that were held out, and its standard error.
  """
  shuffled = ConfigDict(settings.to_dict())
  shuffled.objective.noise = 0.5
  mixed = FrozenConfigDict(shuffled)
  jax.set_mesh(recipe.mesh(mixed))
  objective, origin = recipe.objective(mixed), recipe.origin(mixed)
  corpus = objective.data.read(**recipe.data_arguments(mixed, origin))
  model = recipe.model(mixed, corpus.tokenizer.vocab_size, origin)
  base = None if origin is None else load(origin)[1]
  tx = recipe.optimizer(
    mixed, objective.trained.params(model), recipe.schedule(mixed)
  )
  frozen = objective.trained.frozen(model, base)
  state = recipe.fresh_state(mixed, model, tx, jax.sharding.get_mesh(), base)
  step, rows = recipe.step(mixed, model, tx), np.arange(mixed.batch_size)
  feed = objective.data.batches(corpus, mixed, rows).stream()
  part = (1, mixed.accumulate, mixed.batch_size // mixed.accumulate)
  for _ in range(mixed.steps):
    batch = {k: x.reshape(*part, *x.shape[1:]) for k, x in next(feed).items()}
    state, _ = step(state, batch, frozen)
  clean = dataclasses.replace(objective.data, noise=0.0)
  held = clean.read(
    **recipe.data_arguments(mixed, origin) | {"tokenizer": corpus.tokenizer}
  ).val[:pairs]
  judge = jax.jit(recipe.loss(mixed, model))
  whole = render(held, np.arange(len(held)), mixed.seq_len)
  _, metrics = judge(state.params, whole, None, frozen)
  right = float(metrics["accuracy"])
  return {
    "accuracy": right,
    "error": float(np.sqrt(right * (1 - right) / len(held))),
    "pairs": len(held),
  }


# --- Best of n --------------------------------------------------------------


def chosen_from(
  judge: Learned, task: Task, asked: Sequence[Example], policy: Path, n: int
) -> Report:
  """How the true score follows the reward, over a policy's samples."""
  model, params, tokenizer = load_all(policy)
  if tokenizer is None:
    raise UserError(f"{policy} has no tokenizer, so it cannot be asked")
  found = candidates(model, params, tokenizer, asked, n)
  proxy, true = found.judged(judge), found.judged(Verifier(task))
  curve = dataclasses.asdict(sanity.over_optimisation(proxy, true))
  lengths = np.array([len(text) for row in found.texts for text in row])
  wrong = true.reshape(-1) < 1
  bias = sanity.length_bias(proxy.reshape(-1)[wrong], lengths[wrong])
  return curve | {"length_bias_of_wrong": bias, "prompts": len(found.texts)}


# --- The report -------------------------------------------------------------


def write(report: Report, out: Path) -> None:
  """report.md, report.json and report.png in a folder."""
  try:
    out.mkdir(parents=True, exist_ok=True)
    files.replace(out / "report.json", json.dumps(report, indent=1) + "\n")
    files.replace(out / "report.md", told(report))
    draw(report, out / "report.png")
  except OSError as error:
    raise UserError(f"cannot write to {out} ({files.reason(error)})") from error


def told(report: Report) -> str:
  """The report as a table, with what each figure should be."""
  rows = [
    (
      f"accuracy on {report['pairs']} held-out pairs",
      f"{report['accuracy']:.3f} ± {report['accuracy_error']:.3f}",
      "near 1 - share of wrong labels",
    ),
    *(
      (f"... where the better one is {name}", f"{right:.3f} ({n})", "the same")
      for name, (right, n) in report["accuracy_by_length"].items()
    ),
    ("change of a score with place and padding", f"{report['place']:.1e}", "0"),
    (
      "rank correlation of length and score, right responses",
      f"{report['length_bias']:+.2f}",
      "near 0",
    ),
    ("calibration error", f"{report['calibration']['error']:.3f}", "near 0"),
    *(
      (f"{name}: scores as high as the right one", f"{share:.3f} ({n})", "0")
      for name, (share, n) in report["tricks"].items()
    ),
  ]
  if "control" in report:
    c = report["control"]
    text = f"{c['accuracy']:.3f} ± {c['error']:.3f}"
    rows.append(("trained on shuffled labels", text, "0.50 ± 0.05"))
  if "best_of_n" in report:
    b = report["best_of_n"]
    rows += [
      (
        f"best of {n} by reward: true score",
        f"{true:.3f}",
        f"at most {best:.3f}",
      )
      for n, true, best in zip(b["n"], b["true"], b["best"], strict=True)
    ]
    bias = f"{b['length_bias_of_wrong']:+.2f}"
    rows.append(("length and reward, wrong responses", bias, "near 0"))
  lines = "".join(f"| {a} | {b} | {c} |\n" for a, b, c in rows)
  return f"| asked | found | should be |\n|---|---|---|\n{lines}"


def draw(report: Report, path: Path) -> None:
  """Scores, calibration and, where there is one, the curve of best of n."""
  from matplotlib.figure import Figure

  panels = 3 if "best_of_n" in report else 2
  figure = Figure(figsize=(4.2 * panels, 3.6), dpi=130, layout="constrained")
  axes = figure.subplots(1, panels)
  for name, scores in report["scores"].items():
    axes[0].hist(scores, 30, alpha=0.6, label=f"{name} responses")
  axes[0].set(xlabel="reward", ylabel="responses")
  axes[0].legend()
  found = report["calibration"]
  axes[1].plot([0, 1], [0, 1], color="0.7")
  axes[1].plot(found["promised"], found["seen"], "o-")
  axes[1].set(xlabel="promised probability", ylabel="how often it was so")
  if panels == 3:
    curve = report["best_of_n"]
    axes[2].plot(curve["kl"], curve["true"], "o-", label="true score")
    axes[2].plot(curve["kl"], curve["best"], "--", label="a perfect judge's")
    axes[2].set(xlabel="KL from the policy, nats", ylabel="true score")
    other = axes[2].twinx()
    other.plot(curve["kl"], curve["proxy"], "s-", color="C3", label="reward")
    other.set_ylabel("reward", color="C3")
    axes[2].legend(loc="center left")
  figure.savefig(path)


if __name__ == "__main__":
  program.run(main)
