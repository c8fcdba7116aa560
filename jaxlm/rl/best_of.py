r"""Rejection sampling: many responses to each prompt, and the best are kept.

    python -m jaxlm.rl.best_of --workdir=runs/sft --task=add --samples=16 \
        --out=best.jsonl
    python -m jaxlm.train --config=configs/sft.py --workdir=runs/sft2 \
        --config.start=runs/sft --config.data.path=best.jsonl

The best are chosen by the task's scorer, or with `--reward` by a reward model,
and are written beside the worst, so that the file is one of preferences, too
(RAFT, arXiv:2304.06767; Llama 2, arXiv:2307.09288, section 3.2.3). Prompts that
have no good sample teach nothing; they are left out and counted.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm import files, program
from jaxlm.errors import UserError
from jaxlm.interop.load import load_all
from jaxlm.objectives.talks import named_task
from jaxlm.rl.candidates import Candidates, candidates
from jaxlm.rl.rewards import Learned, Verifier
from jaxlm.tasks import examples


def parser() -> argparse.ArgumentParser:
  """The flags of the program."""
  flags = argparse.ArgumentParser(
    prog="python -m jaxlm.rl.best_of",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = flags.add_argument
  add("--workdir", required=True, metavar="DIR", help="the model that responds")
  add("--task", required=True, metavar="NAME", help="as task:NAME in data.path")
  add("--out", required=True, metavar="FILE", help="JSON lines; new")
  add("--prompts", type=int, default=500, metavar="N", help="of train; 500")
  add("--samples", type=int, default=16, metavar="N", help="to each; 16")
  add("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
  add("--reward", metavar="DIR", help="a reward model; default: the scorer")
  add("--least", type=float, default=1.0, metavar="X", help=_LEAST)
  add("--seed", type=int, default=0, metavar="N", help="of prompts and samples")
  return flags


_LEAST = "of the scorer: only responses of this score are kept; default: 1"


@dataclass(frozen=True)
class Kept:
  """The best and the worst response to one prompt.

  Attributes:
    prompt, best, worst: texts.
    score: of the best, by whoever chose it.
  """

  prompt: str
  best: str
  worst: str
  score: float


def choose(
  found: Candidates, scores: np.ndarray, least: float | None
) -> tuple[list[Kept], Counter]:
  """The best and worst of each prompt, and why others are left out.

  Args:
    found: what was said.
    scores: of each response, [prompts, samples].
    least: what the best must reach; None: anything.
  """
  kept, skipped = [], Counter()
  for example, texts, row in zip(
    found.examples, found.texts, scores, strict=True
  ):
    best, worst = int(np.argmax(row)), int(np.argmin(row))
    if least is not None and row[best] < least:
      skipped["no sample that is good enough"] += 1
    elif not texts[best].strip():
      skipped["an empty response"] += 1
    else:
      kept.append(
        Kept(example.prompt, texts[best], texts[worst], float(row[best]))
      )
  return kept, skipped


def main(argv: Sequence[str]) -> None:
  """Runs the program.

  Raises:
    UserError: for wrong flags, a model that cannot be asked, or if nothing is
      worth keeping.
  """
  flags = parser().parse_args(argv)
  out = Path(flags.out)
  if out.exists():
    raise UserError(f"{out} exists already; choose another --out")
  task = named_task(flags.task)
  asked = examples(task, "train", flags.prompts, flags.seed)
  model, params, tokenizer = load_all(Path(flags.workdir))
  if tokenizer is None:
    raise UserError(f"{flags.workdir} has no tokenizer; it cannot be asked")
  found = candidates(
    model,
    params,
    tokenizer,
    asked,
    flags.samples,
    temperature=flags.temperature,
    seed=flags.seed,
  )
  true = found.judged(Verifier(task))
  judge = Learned.load(flags.reward) if flags.reward else None
  scores = true if judge is None else found.judged(judge)
  kept, skipped = choose(found, scores, None if judge else flags.least)
  if found.skipped:
    skipped["a prompt that is too long"] = found.skipped
  _write(out, kept)
  best = np.take_along_axis(true, scores.argmax(1)[:, None], 1).mean()
  told = "".join(f"; left out: {n:,} with {why}" for why, n in skipped.items())
  print(
    f"{out}: the best of {flags.samples} for {len(kept):,} of {len(asked):,} "
    f"prompts{told}\ntrue score: {true.mean():.3f} of all samples, "
    f"{best:.3f} of the chosen"
  )


def _write(out: Path, kept: Sequence[Kept]) -> None:
  """One line for each; where both are the same, `jaxlm.train` leaves it out."""
  if not kept:
    raise UserError(
      "no response is worth keeping; use more samples, or --least"
    )
  rows = [
    {
      "prompt": k.prompt,
      "response": k.best,
      "rejected": k.worst,
      "score": k.score,
    }
    for k in kept
  ]
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    files.replace(out, "".join(json.dumps(row) + "\n" for row in rows))
  except OSError as error:
    raise UserError(f"cannot write {out} ({files.reason(error)})") from error


if __name__ == "__main__":
  program.run(main)
