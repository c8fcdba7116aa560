"""Examines a model and its training by named checks.

    python -m jaxlm.doctor --config=configs/tiny.py   # before training
    python -m jaxlm.doctor --workdir=runs/tiny        # what was trained
    python -m jaxlm.doctor --bug="rope twice"         # a sick one, to see it
    python -m jaxlm.doctor --bugs                     # all of those

It ends with status 1 if a check finds something.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import keys, program, recipe, workdir
from jaxlm.doctor.bugs import BUGS, healthy
from jaxlm.doctor.checks import CHECKS, examine
from jaxlm.doctor.subject import Subject, alone
from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.compute import DEFAULT
from jaxlm.models.decoder import embed, logits
from jaxlm.optim import make_schedule

ROWS, SEQ = 4, 32  # of the batch that is looked at
LARGEST = 300_000_000  # parameters; gradients and Adam take four times that


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flags = program.parser(__doc__)
  flags.formatter_class = argparse.RawDescriptionHelpFormatter
  add = flags.add_argument
  add("--checks", help=f"only these, with commas: {', '.join(CHECKS)}")
  add("--bug", help="examine a small model with this mistake")
  add("--bugs", action="store_true", help="list the mistakes, and stop")
  return flags


def main(argv: Sequence[str]) -> None:
  """Runs the program.

  Raises:
    UserError: for wrong flags or a config that cannot be examined.
    SystemExit: with status 1 if a check finds something.
  """
  flags = parser()
  known, _ = flags.parse_known_args(list(argv))
  if known.bugs:
    width = max(map(len, BUGS))
    for name, bug in BUGS.items():
      print(f"{name:{width}}  found by: {bug.check}")
    return
  if known.bug is None:
    subject = from_config(program.load(argv, flags))
  else:
    _known("bug", known.bug, BUGS)
    subject = BUGS[known.bug].make(healthy())
  names = tuple(CHECKS)
  if known.checks:
    names = tuple(n.strip() for n in known.checks.split(","))
    for name in names:
      _known("check", name, CHECKS)
  if known.bug is None:
    print(shapes(subject))
  if not report(subject, names):
    raise SystemExit(1)


def _known(kind: str, name: str, among: Any) -> None:
  if name not in among:
    hint = keys.nearest(name, among) or f"; known: {', '.join(among)}"
    raise UserError(f"no {kind} {name!r}{hint}")


def from_config(run: program.Run) -> Subject:
  """The model, the data and the optimizer of a config, or of a run.

  Raises:
    UserError: for a model too large to be examined here, an objective other
      than next_token and sft, or a batch that is too small.
  """
  config = run.config
  objective = recipe.objective(config)
  name = config.objective.get("name", "next_token")
  if name not in ("next_token", "sft"):
    raise UserError(
      f"the doctor knows next_token and sft, and the objective is {name}; "
      "examine it with --config.objective.name=next_token"
    )
  origin = recipe.origin(config)
  corpus = objective.data.read(**recipe.data_arguments(config, origin))
  model = recipe.model(config, corpus.tokenizer.vocab_size, origin)
  if model.n_params() > LARGEST:
    raise UserError(
      f"{model.n_params():,} parameters are too many to train on one batch "
      "here; examine the same kind of model with fewer layers and a smaller "
      "dim, as in --config.model.layers=2 --config.model.dim=256"
    )
  rows = np.arange(config.batch_size)[:ROWS]
  batch = objective.data.batches(corpus, config, rows)[0]
  if len(rows) < 2 or config.seq_len < 16:
    raise UserError(
      f"batch_size={config.batch_size} and seq_len={config.seq_len} are too "
      "small to be examined; give 2 and 16 at least"
    )
  batch = {k: np.asarray(v)[:, :SEQ] for k, v in batch.items()}
  params = None
  if (run.workdir / "checkpoints").exists():
    params = workdir.load(run.workdir)[1]
  # A warm-up would leave everything still at the first step.
  steady = make_schedule("constant", config.optimizer.lr, 1)
  tx = recipe.optimizer(config, model.params(), steady)
  return Subject(model, batch, params, tx=tx)


def shapes(s: Subject) -> str:
  """What flows from part to part, as `jax.eval_shape` sees it."""
  tokens = jax.ShapeDtypeStruct(s.batch["inputs"].shape, jnp.int32)
  x = jax.eval_shape(
    lambda p, t: embed(s.model, p, t, At(), DEFAULT), s.initial, tokens
  )
  lines = [("tokens", tokens), ("embedding", x)]
  layers = jax.eval_shape(lambda p: [a for *_, a in s.layers(p)], s.initial)
  blocks = list(s.model.blocks)
  for i, (block, p) in enumerate(zip(blocks, layers, strict=True)):
    x = jax.eval_shape(alone(block), p, x)
    parts = f"{type(block.mixer).__name__}, {type(block.ffn).__name__}"
    lines.append((f"block {i}: {parts}", x))
  y = jax.eval_shape(lambda p, x: logits(s.model, p, x, DEFAULT), s.initial, x)
  lines.append(("logits", y))
  return "\n".join(f"{a:32} {list(b.shape)} {b.dtype}" for a, b in lines)


def report(subject: Subject, names: Sequence[str]) -> bool:
  """Prints every finding; True if all is well."""
  width, bad = max(map(len, names)), []
  for name, found in examine(subject, tuple(names)):
    sign = {True: "ok  ", False: "FAIL", None: "-   "}[found.ok]
    print(f"{sign} {name:{width}}  {found.seen}", flush=True)
    if found.ok is False:
      bad.append(name)
      print(f"     {'':{width}}  {found.advice}")
  print(f"{len(names) - len(bad)} of {len(names)} checks found nothing")
  return not bad


if __name__ == "__main__":
  program.run(main)
