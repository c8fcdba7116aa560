"""On-policy distillation: a teacher corrects what the student itself says.

    python -m jaxlm.rl.distil --config=configs/distil.py
    python -m jaxlm.rl.distil --workdir=runs/distil       # continues that run

Each step asks some questions, lets the student answer (one compiled program),
and moves every token's distribution towards the teacher's (another). So the
student is taught where it really goes, not where texts go (generalised
knowledge distillation, arXiv:2306.13649, algorithm 1 with lambda = 1; the
samples are taken as given, no gradient passes through them). With reverse KL
that is MiniLLM without its policy gradient (arXiv:2306.08543).
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import program, recipe, speed
from jaxlm.config import call
from jaxlm.errors import UserError
from jaxlm.interop.load import load
from jaxlm.interrupt import Interrupt
from jaxlm.layers.compute import Compute
from jaxlm.losses import weighted_mean
from jaxlm.models.decoder import Decoder, hidden, logits
from jaxlm.objectives.distil import Divergence, check
from jaxlm.rl import begin, collect, look, place
from jaxlm.rl.options import Options
from jaxlm.rl.rollout import Actor, Rollout, windows
from jaxlm.state import TrainState
from jaxlm.workdir import claim

Array = jax.Array
Tree = Any


@dataclass(frozen=True)
class Pupil(Options):
  """What a run may be told, beside the keys of `Options`: `config.distil`.

  Attributes:
    teacher: a model's path, as `jaxlm.load` takes it.
    divergence: 'forward_kl', 'reverse_kl' or 'jensen_shannon'.
    beta: of the last one.
  """

  teacher: str = ""
  divergence: str = "reverse_kl"
  beta: float = 0.5
  samples: int = 1

  def __post_init__(self):
    super().__post_init__()
    if not self.teacher:
      raise UserError("distil needs config.distil.teacher, a model's path")
    _ = self.kind  # says what it cannot be

  @property
  def kind(self) -> Divergence:
    """How far the student is from the teacher; both at temperature 1."""
    return Divergence(self.divergence, self.beta)


def main(argv: Sequence[str]) -> None:
  """Distils a teacher into a student on the student's own responses."""
  asked = program.load(argv, program.parser("Distils a teacher, on policy."))
  train(asked.config, asked.workdir)


def train(config: FrozenConfigDict, workdir: Path) -> TrainState:
  """Runs `config` to its end, or continues what `workdir` holds of it.

  Args:
    config: every key, as `jaxlm.program.load` gives it.
    workdir: gets what a run of `jaxlm.rl.grpo` gets.

  Returns:
    The last state.

  Raises:
    UserError: for wrong input, or a teacher of other tokens.
  """
  options = call(Pupil, config.distil, "distil", (), "distil")
  claim(workdir, config)
  with contextlib.ExitStack() as scope:
    return _train(config, options, workdir, scope.enter_context)


def _train(
  config: FrozenConfigDict,
  o: Pupil,
  workdir: Path,
  enter: Callable[[Any], Any],
) -> TrainState:
  """The run itself; what it enters is left again, whatever happens."""
  # --- Mesh, models, questions ------------------------------------------------
  mesh = place.mesh(config)
  enter(jax.set_mesh(mesh))
  base, compute = begin.begin(config, workdir), recipe.compute(config)
  where = Path(o.teacher).expanduser()
  teacher, wisdom = load(where, "float32", mesh, compute.rules)
  check(teacher, base.model)
  train_on, held_out = begin.ask(config, o, base)
  draw, actor = o.draw(base.eos), Actor(base.model)
  print(begin.told(config, base, mesh))
  print(f"teacher  {o.teacher}, {teacher.n_params():,} parameters")

  # --- Optimizer, state, step -------------------------------------------------
  updates = o.updates(config.batch_size)
  schedule = begin.schedule(config, updates)
  tx = recipe.optimizer(config, actor.params(), schedule)
  state = begin.fresh(actor, base.params, tx, config, compute.rules)
  memory = begin.Memory()
  checkpoints = enter(begin.checkpoints(config, workdir))
  if checkpoints.latest() is not None:
    state, memory = begin.restored(checkpoints, state)
    print(f"continue at step {memory.step} of {workdir}")
  loss_fn = objective(base.model, teacher, o.kind, compute)
  update = begin.updates(config, actor, loss_fn, tx, updates)

  # --- Loop -------------------------------------------------------------------
  log = enter(begin.log(config, workdir, memory.step))
  clock, step = speed.Throughput(o.rows), memory.step
  interrupted = enter(Interrupt())

  def evaluate(step: int, state: TrainState) -> None:
    """Asks what is held out; the averaged weights, where kept."""
    params = state.params if state.ema is None else state.ema
    found, texts = look.look(base, params, held_out, o, compute)
    log.scalars(step, {f"val_{k}": v for k, v in found.items()})
    log.text(step, "samples", look.show(workdir, step, held_out, texts))
    print(f"step {step} | {look.told(found)}", flush=True)

  if step == 0:
    evaluate(step, state)
  while step < config.steps and not interrupted:
    asked = train_on.of_step(o.prompts, config.seed, step)
    when = (config.seed, step, 0)
    r, _ = collect.respond(base, draw, state.params, asked, compute, *when)
    order = collect.order(o.rows, config.seed, step, 0)
    parts = collect.cut(r, order, updates, config.accumulate, compute.rules)
    state, result = update(state, parts, wisdom)
    now = {k: float(np.mean(v)) for k, v in result.items()}
    if not np.isfinite(now["loss"]):
      raise UserError(
        f"loss is {now['loss']} at step {step + 1}; lower optimizer.lr and "
        "start again in another workdir"
      )
    step += 1
    clock.tick(step)
    memory = memory.after(now, np.zeros(1))
    if recipe.due(step, config.log_every, config.steps):
      now["lr"] = float(schedule(int(state.step) - 1))
      log.scalars(step, now)
      print(f"step {step}/{config.steps} | loss {now['loss']:.4f}", flush=True)
    saving = recipe.due(step, config.checkpoint_every, config.steps)
    with clock.paused():
      if saving or interrupted:
        checkpoints.save(step, state, memory.json(), config.to_dict())
      if recipe.due(step, config.eval_every, config.steps) and not interrupted:
        evaluate(step, state)

  # --- End --------------------------------------------------------------------
  if step not in checkpoints:
    checkpoints.save(step, state, memory.json(), config.to_dict())
  checkpoints.close()
  log.close()
  if interrupted:
    print(f"stopped at step {step}, saved; python -m jaxlm.rl.distil", end=" ")
    print(f"--workdir={workdir} continues")
    sys.exit(128 + interrupted.signal)
  print(look.before_and_after(workdir))
  return state


# --- What is minimised ------------------------------------------------------


def objective(
  student: Decoder, teacher: Decoder, kind: Divergence, compute: Compute
) -> Callable:
  """`(params, rollout, key, teacher's params) -> loss, metrics`.

  The mean over the tokens of the responses of how far the student's next-token
  distribution is from the teacher's.
  """

  def says(model: Decoder, params: Tree, r: Rollout) -> Array:
    x, _ = hidden(model, params, r.tokens[:, :-1], None, None, compute)
    x = windows(x, r.starts - 1, r.mask.shape[1])
    return logits(model, params, x, compute)

  def loss_fn(
    params: Tree, r: Rollout, key: Array, wisdom: Tree
  ) -> tuple[Array, dict]:
    del key
    away = kind(says(teacher, wisdom, r), says(student, params, r))
    loss, weight = weighted_mean(away, r.mask)
    length = jnp.mean(jnp.sum(r.mask, axis=1).astype(jnp.float32))
    return loss, {"loss": loss, "weight": weight, "length": length}

  return loss_fn


if __name__ == "__main__":
  program.run(main)
