r"""Rejection sampling: many responses to each prompt, and the best are kept.

    python -m jaxlm.rl.best_of --workdir=runs/sft --task=add --samples=16 \
        --out=best.jsonl
    python -m jaxlm.train --config=configs/sft.py --workdir=runs/sft2 \
        --config.start=runs/sft --config.data.path=best.jsonl

The best are chosen by the task's scorer, or with `--reward` by a reward model,
and are written beside the worst, so that the file is one of preferences, too
(RAFT, arXiv:2304.06767; Llama 2, arXiv:2307.09288, section 3.2.3). Prompts that
have no good sample teach nothing; they are left out and counted.

    python -m jaxlm.rl.best_of --workdir=runs/sft --task=add --samples=8 \
        --pairs=4 --gold --out=pairs.jsonl

A reward model is to judge what the policy says, so it is trained on just that:
the best beside up to four that are worse. With `--gold` the task's own answer
is a candidate, too, and hard prompts are not left out.
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
  add("--tokens", type=int, metavar="N", help=_TOKENS)
  add("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
  add("--reward", metavar="DIR", help="a reward model; default: the scorer")
  add("--least", type=float, default=1.0, metavar="X", help=_LEAST)
  add("--pairs", type=int, default=1, metavar="N", help=_PAIRS)
  add("--gold", action="store_true", help="the task's answer is a candidate")
  add("--seed", type=int, default=0, metavar="N", help="of prompts and samples")
  return flags


_LEAST = "of the scorer: only responses of this score are kept; default: 1"
_TOKENS = "the most of a response; default: twice the longest gold one and 8"
_PAIRS = "lines of a prompt at most, each with another worse response; 1"


@dataclass(frozen=True)
class Kept:
  """The best response to one prompt, and worse ones.

  Attributes:
    prompt, best: texts.
    worse: different texts of lower scores, the worst first; the best itself
      where there is none.
    score: of the best, by whoever chose it.
  """

  prompt: str
  best: str
  worse: tuple[str, ...]
  score: float


def choose(
  found: Candidates, scores: np.ndarray, least: float | None, pairs: int = 1
) -> tuple[list[Kept], Counter]:
  """The best and worst of each prompt, and why others are left out.

  Args:
    found: what was said.
    scores: of each response, [prompts, samples].
    least: what the best must reach; None: anything.
    pairs: how many of the worse are wanted.
  """
  kept, skipped = [], Counter()
  for example, texts, row in zip(
    found.examples, found.texts, scores, strict=True
  ):
    best, order = int(np.argmax(row)), np.argsort(row, kind="stable")
    worse = dict.fromkeys(texts[i] for i in order if row[i] < row[best])
    few = tuple(worse)[:pairs] or (texts[best],)
    if least is not None and row[best] < least:
      skipped["no sample that is good enough"] += 1
    elif not texts[best].strip():
      skipped["an empty response"] += 1
    else:
      kept.append(Kept(example.prompt, texts[best], few, float(row[best])))
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
  if flags.pairs < 1:
    raise UserError(f"--pairs={flags.pairs}; use 1 or more")
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
    flags.tokens,
    flags.temperature,
    flags.seed,
  )
  share = found.judged(Verifier(task)).mean()
  found = found.with_gold() if flags.gold else found
  true = found.judged(Verifier(task))
  judge = Learned.load(flags.reward) if flags.reward else None
  scores = true if judge is None else found.judged(judge)
  least = None if judge else flags.least
  kept, skipped = choose(found, scores, least, flags.pairs)
  if found.skipped:
    skipped["a prompt that is too long"] = found.skipped
  _write(out, kept)
  best = np.take_along_axis(true, scores.argmax(1)[:, None], 1).mean()
  told = "".join(f"; left out: {n:,} with {why}" for why, n in skipped.items())
  print(
    f"{out}: the best of {flags.samples} for {len(kept):,} of {len(asked):,} "
    f"prompts{told}\ntrue score: {share:.3f} of all samples, "
    f"{best:.3f} of the chosen"
  )


def _write(out: Path, kept: Sequence[Kept]) -> None:
  """One line for each pair; equal ones `jaxlm.train` leaves out."""
  if not kept:
    raise UserError(
      "no response is worth keeping; use more samples, or --least"
    )
  rows = [
    {
      "prompt": k.prompt,
      "response": k.best,
      "rejected": worse,
      "score": k.score,
    }
    for k in kept
    for worse in k.worse
  ]
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    files.replace(out, "".join(json.dumps(row) + "\n" for row in rows))
  except OSError as error:
    raise UserError(f"cannot write {out} ({files.reason(error)})") from error


if __name__ == "__main__":
  program.run(main)
