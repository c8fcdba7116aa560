"""GRPO: a policy learns from how its responses compare within a group.

    python -m jaxlm.rl.grpo --config=configs/grpo.py
    python -m jaxlm.rl.grpo --workdir=runs/grpo        # continues that run

Read `_train` from top to bottom. A step asks some questions, several responses
to each (one compiled program), has them judged, and makes one or more updates
of them (another). There is no critic: what a response is compared with is the
rest of its group. Dr. GRPO, DAPO, GSPO, RLOO and REINFORCE are the same
program with other values of a few keys (docs/rl.md).

A run is a function of its config, and one that was stopped continues to the
bits it would have had.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import program, recipe, speed
from jaxlm.config import call
from jaxlm.interrupt import Interrupt
from jaxlm.layers.compute import Compute
from jaxlm.rl import advantages, begin, collect, guards, look, losses, place
from jaxlm.rl.advantages import Running
from jaxlm.rl.collect import Collected
from jaxlm.rl.options import GRPO
from jaxlm.rl.rollout import Actor, Rollout, logprobs, scored
from jaxlm.state import TrainState
from jaxlm.workdir import claim

Array = jax.Array
Tree = Any


def main(argv: Sequence[str]) -> None:
  """Trains a policy by GRPO."""
  asked = program.load(argv, program.parser("Trains a policy by GRPO."))
  train(asked.config, asked.workdir)


def train(config: FrozenConfigDict, workdir: Path) -> TrainState:
  """Runs `config` to its end, or continues what `workdir` holds of it.

  Args:
    config: every key, as `jaxlm.program.load` gives it.
    workdir: gets config.json, reference/, checkpoints/, metrics.jsonl, rl.png,
      samples.txt and tb/.

  Returns:
    The last state.

  Raises:
    UserError: for wrong input, or a guard that stops the run.
  """
  options = call(GRPO, config.grpo, "grpo", (), "grpo")
  claim(workdir, config)
  with contextlib.ExitStack() as scope:
    return _train(config, options, workdir, scope.enter_context)


def _train(
  config: FrozenConfigDict,
  o: GRPO,
  workdir: Path,
  enter: Callable[[Any], Any],
) -> TrainState:
  """The run itself; what it enters is left again, whatever happens."""
  # --- Mesh, model, questions, reward -----------------------------------------
  mesh = place.mesh(config)
  enter(jax.set_mesh(mesh))
  base = begin.begin(config, workdir)
  compute, actor = recipe.compute(config), Actor(base.model)
  train_on, held_out = begin.ask(config, o, base)
  reward, draw = begin.reward_of(o, compute), o.draw(base.eos)
  print(begin.told(config, base, mesh))

  # --- Optimizer and state ----------------------------------------------------
  updates = o.updates(config.batch_size)
  schedule = begin.schedule(config, updates * o.epochs)
  tx = recipe.optimizer(config, actor.params(), schedule)
  state = begin.fresh(actor, base.params, tx, config, compute.rules)
  memory = begin.Memory()
  checkpoints = enter(begin.checkpoints(config, workdir))
  if checkpoints.latest() is not None:
    state, memory = begin.restored(checkpoints, state)
    print(f"continue at step {memory.step} of {workdir}")

  # --- Step -------------------------------------------------------------------
  loss_fn = objective(actor, o, compute)
  update = begin.updates(config, actor, loss_fn, tx, updates)

  def responses(step: int, params: Tree) -> Collected:
    """Answers to the questions of a step, judged; again where all agree."""
    found: list[Collected] = []
    for again in range(o.rounds):
      asked = train_on.of_step(o.prompts, config.seed, step, again)
      when = (config.seed, step, again)
      r, texts = collect.respond(base, draw, params, asked, compute, *when)
      found.append(collect.judge(reward, asked, r, texts, o, base.eos))
      if sum(part.varied.sum() for part in found) >= o.prompts:
        break
    return collect.joined(found, o.prompts)

  def learn(
    step: int, state: TrainState, batch: dict[str, Any]
  ) -> tuple[TrainState, dict[str, float]]:
    """All updates of a rollout; metrics of the last, the gap of the first."""
    gap = 0.0
    for epoch in range(o.epochs):
      order = collect.order(o.rows, config.seed, step, epoch)
      parts = collect.cut(
        batch, order, updates, config.accumulate, compute.rules
      )
      state, result = update(state, parts)
      found = {k: np.asarray(v, np.float64) for k, v in result.items()}
      gap = gap if epoch else found["gap"][0]
    return state, {k: v[-1] for k, v in found.items()} | {"gap": gap}

  # --- Loop -------------------------------------------------------------------
  # A step's metrics are seen by the guards before anything of it is saved.
  clock = speed.Throughput(o.rows)
  limits = o.limits(config.precision)
  log = enter(begin.log(config, workdir, memory.step))
  interrupted = enter(Interrupt())
  step = memory.step
  evaluate = look.Evaluation(
    base, held_out, o, compute, workdir, log, checkpoints, limits
  )

  owed = recipe.due(step, config.eval_every, config.steps)
  if step == 0 or (owed and log.last("val_score") != step):
    evaluate(step, state)
  while step < config.steps and not interrupted:
    got = responses(step, state.params)
    if o.advantage != "reinforce":
      guards.check_groups(got.rollout.group, o.samples)
    if o.kl:
      got = got.against(scored(actor, base.params, got.rollout, draw, compute))
    r = got.rollout
    batch = {
      "rollout": r,
      "advantages": advantage(o, r.rewards, memory.rewards),
    }
    if memory.step == 0:
      begin.check(loss_fn, actor, state.params, batch, draw, config, compute)
    state, now = learn(step, state, batch)
    now |= collect.numbers(got)
    step += 1
    clock.tick(step)
    memory = memory.after(now, r.rewards)
    alarms = guards.alarms(now, memory.first, limits)
    guards.act(alarms, step, workdir, o.guards)
    if recipe.due(step, config.log_every, config.steps):
      rate = clock.tokens_per_sec()
      now["lr"] = float(schedule(int(state.step) - 1))
      log.scalars(step, now | look.finite(samples_per_sec=rate))
      left = clock.seconds_left(config.steps)
      print(look.progress(step, config.steps, now, rate, left), flush=True)
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
    print(f"stopped at step {step}, saved; python -m jaxlm.rl.grpo", end=" ")
    print(f"--workdir={workdir} continues")
    sys.exit(128 + interrupted.signal)
  print(look.before_and_after(workdir))
  print(f"plot     {look.plot(workdir)}")
  return state


# --- What is minimised ------------------------------------------------------


def objective(actor: Actor, o: GRPO, compute: Compute) -> Callable:
  """`(params, batch, key) -> loss, metrics` of a batch of responses.

    L = mean of -min(w A, clip(w) A) + kl KL(policy | reference) - entropy H

  `batch` is a dict of `rollout` and `advantages` [rows].
  """
  draw = o.draw(None)

  def loss_fn(params: Tree, batch: Tree, key: Array) -> tuple[Array, dict]:
    del key
    r: Rollout = batch["rollout"]
    said = logprobs(actor, params, r, draw, compute)
    log_w = losses.log_ratio(said.logp, r.logp_old, r.mask, o.ratio)
    a = jnp.broadcast_to(batch["advantages"][:, None], log_w.shape)
    each, clipped = losses.policy_loss(log_w, a, o.clip_low, o.clip_high)
    if o.kl:
      each = each + o.kl * losses.kl(said.logp, r.logp_ref, o.kl_kind)
    if o.entropy:
      each = each - o.entropy * said.entropy
    loss, weight = losses.aggregate(each, r.mask, o.over, o.tokens)
    means = {
      "clipped": clipped,
      "entropy": said.entropy,
      "approx_kl": losses.kl(r.logp_old, said.logp, "k3"),
    }
    told = {k: losses.aggregate(x, r.mask)[0] for k, x in means.items()}
    gap = losses.gap(said.logp, r.logp_old, r.mask)
    return loss, told | {"loss": loss, "weight": weight, "gap": gap}

  return loss_fn


@functools.partial(jax.jit, static_argnums=0)
def advantage(o: GRPO, earned: np.ndarray, running: Running) -> Array:
  """Of each response, `[rows]`, from rewards `[rows]` in whole groups."""
  r = jnp.asarray(earned).reshape(-1, o.samples)
  if o.advantage == "loo":
    a = advantages.leave_one_out(r)
  elif o.advantage == "reinforce":
    known = jnp.where(running.count > 0, running.mean, jnp.mean(r))
    a = advantages.reinforce(r, known)
  else:
    a = advantages.group_relative(r, o.scale)
  return a.reshape(-1)


if __name__ == "__main__":
  program.run(main)
