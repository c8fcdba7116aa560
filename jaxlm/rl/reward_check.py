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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, program
from jaxlm.errors import UserError
from jaxlm.interop.load import load, load_all, load_tokenizer
from jaxlm.models.reward import RewardModel
from jaxlm.objectives.talks import named_task
from jaxlm.rl import sanity
from jaxlm.rl.candidates import candidates
from jaxlm.rl.reward_page import write
from jaxlm.rl.rewards import Learned, Verifier
from jaxlm.tasks import Example, Task, examples
from jaxlm.train import train

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
  for name in ("examples", "prompts", "samples"):
    if getattr(flags, name) < 1:
      raise UserError(f"--{name}={getattr(flags, name)}; ask for 1 or more")
  path = Path(flags.workdir)
  out = Path(flags.out) if flags.out else path
  judge, task = _judge(path), named_task(flags.task)
  found = examples(task, "test", flags.examples)
  report = about_pairs(judge, task, found)
  if flags.control:
    report["control"] = control(config.read(path), found, out / "control")
  if flags.policy:
    asked = found[: flags.prompts]
    report["best_of_n"] = chosen_from(
      judge, task, asked, Path(flags.policy), flags.samples
    )
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
  good, bad = _sides(judge, found)
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


def _sides(
  judge: Learned, found: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
  """Rewards of the right responses and of the wrong ones, [pairs] each."""
  good, bad = (
    np.array(judge(found, [getattr(e, side) for e in found]))
    for side in ("response", "rejected")
  )
  return good, bad


def _place(
  judge: Learned, found: Sequence[Example], scores: np.ndarray
) -> float:
  """How much a score changes with its place in the batch and its neighbours."""
  back = judge(found[::-1], [e.response for e in found[::-1]])
  return float(np.abs(np.array(back)[::-1] - scores).max())


def _tricks(
  judge: Learned, task: Task, found: Sequence[Example], scores: np.ndarray
) -> dict[str, dict[str, float | int | None]]:
  """How often a worthless change of a right response scores as well or higher.

  Returns:
    By name: `share`, None where nothing could be asked; `asked`, of how many
    changes, without those that the task still calls right; and how many were
    `too_long` for the model.
  """
  most, out = judge.model.max_positions, {}
  for name in sanity.tricks("ab"):
    made = [
      (i, e, text)
      for i, e in enumerate(found)
      if (text := sanity.tricks(e.response).get(name)) is not None
      and task.score(e, text) < 1
    ]
    asked = [row for row in made if _size(judge, *row[1:]) <= most]
    share = None
    if asked:
      own = scores[[i for i, _, _ in asked]]
      told = judge([e for _, e, _ in asked], [text for _, _, text in asked])
      share = float(np.mean(np.array(told) >= own))
    long = len(made) - len(asked)
    out[name] = {"share": share, "asked": len(asked), "too_long": long}
  return out


def _size(judge: Learned, example: Example, text: str) -> int:
  """Tokens of a prompt, a response and its end."""
  encode = judge.tokenizer.encode
  return len(encode(example.prompt)) + len(encode(text)) + 1


# --- The control ------------------------------------------------------------


def control(
  settings: FrozenConfigDict, found: Sequence[Example], workdir: Path
) -> Report:
  """The same training on shuffled labels, judged on true ones.

  Args:
    settings: of the run that is checked.
    found: what is judged.
    workdir: of this training; one that was stopped goes on.

  Returns:
    Accuracy and its standard error, as if pairs were independent, and the mean
    probability that the better one is given.
  """
  shuffled = ConfigDict(settings.to_dict())
  shuffled.objective.noise = 0.5
  shuffled.log.wandb = None
  train(FrozenConfigDict(shuffled), workdir)
  sides = _sides(_judge(workdir), found)
  right, error = sanity.accuracy(*sides)
  promised = sanity.promise(*sides)
  return {"accuracy": right, "error": error, "promise": promised}


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


if __name__ == "__main__":
  program.run(main)
