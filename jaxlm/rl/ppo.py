"""PPO: a policy learns from rewards, and a critic what to expect.

    python -m jaxlm.rl.ppo --config=configs/ppo.py
    python -m jaxlm.rl.ppo --workdir=runs/ppo          # continues that run

Read `_train` from top to bottom. A step asks some questions, has the responses
judged, scores their tokens under the reference and the critic, makes
advantages of that, and updates policy and critic some times over. The
reference is the model the run began with; leaving it costs a penalty on every
token (arXiv:1909.08593, arXiv:2203.02155).

A run is a function of its config, and one that was stopped continues to the
bits it would have had.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from jaxlm.models.decoder import Decoder
from jaxlm.models.heads import ScalarHead
from jaxlm.rl import advantages, begin, collect, guards, look, losses, place
from jaxlm.rl.collect import Collected
from jaxlm.rl.options import PPO
from jaxlm.rl.rollout import Actor, Rollout, Scores, logprobs, scored
from jaxlm.state import TrainState
from jaxlm.workdir import claim

Array = jax.Array
Tree = Any


def main(argv: Sequence[str]) -> None:
  """Trains a policy and a critic by PPO."""
  asked = program.load(argv, program.parser("Trains a policy by PPO."))
  train(asked.config, asked.workdir)


def train(config: FrozenConfigDict, workdir: Path) -> TrainState:
  """Runs `config` to its end, or continues what `workdir` holds of it.

  Args:
    config: every key, as `jaxlm.program.load` gives it.
    workdir: gets config.json, reference/, checkpoints/, metrics.jsonl, rl.png,
      samples.txt and tb/.

  Returns:
    The last state; the critic's parameters are beside the policy's.

  Raises:
    UserError: for wrong input, or a guard that stops the run.
  """
  options = call(PPO, config.ppo, "ppo", (), "ppo")
  claim(workdir, config)
  with contextlib.ExitStack() as scope:
    return _train(config, options, workdir, scope.enter_context)


def _train(
  config: FrozenConfigDict,
  o: PPO,
  workdir: Path,
  enter: Callable[[Any], Any],
) -> TrainState:
  """The run itself; what it enters is left again, whatever happens."""
  # --- Mesh, model, questions, reward -----------------------------------------
  mesh = place.mesh(config)
  enter(jax.set_mesh(mesh))
  base = begin.begin(config, workdir)
  compute, policy = recipe.compute(config), Actor(base.model)
  actor = acting(o, base.model)
  train_on, held_out = begin.ask(config, o, base)
  reward, draw = begin.reward_of(o, compute), o.draw(base.eos)
  print(begin.told(config, base, mesh))

  # --- Optimizer and state ----------------------------------------------------
  updates = o.updates(config.batch_size)
  schedule = begin.schedule(config, updates * o.epochs)
  tx = recipe.optimizer(config, actor.params(), schedule)
  state = begin.fresh(actor, base.params, tx, config, compute.rules)
  memory, control = begin.Memory(beta=o.kl), losses.Controller(o.kl_target)
  checkpoints = enter(begin.checkpoints(config, workdir))
  if checkpoints.latest() is not None:
    state, memory = begin.restored(checkpoints, state)
    print(f"continue at step {memory.step} of {workdir}")

  # --- Step -------------------------------------------------------------------
  loss_fn = objective(actor, o, compute)
  update = begin.updates(config, actor, loss_fn, tx, updates)

  def responses(step: int, params: Tree) -> tuple[Collected, Scores]:
    """Answers to the questions of a step, judged, and what actors say."""
    asked = train_on.of_step(o.prompts, config.seed, step)
    when = (config.seed, step, 0)
    r, texts = collect.respond(base, draw, params, asked, compute, *when)
    said = scored(actor, params, r, draw, compute)
    theirs = scored(policy, base.params, r, draw, compute)
    got = collect.judge(reward, asked, r, texts, o, base.eos)
    return got.against(theirs), said

  def learn(
    step: int, state: TrainState, batch: dict[str, Any]
  ) -> tuple[TrainState, dict[str, float]]:
    """Epochs over a rollout, until the policy has gone far enough."""
    for epoch in range(o.epochs):
      order = collect.order(o.rows, config.seed, step, epoch)
      parts = collect.cut(
        batch, order, updates, config.accumulate, compute.rules
      )
      state, result = update(state, parts)
      far = o.stop_kl and np.mean(result["approx_kl"]) > o.stop_kl
      if far:
        break
    last = {k: float(v[-1]) for k, v in result.items()}
    return state, last | {"epochs": epoch + 1}

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
    got, said = responses(step, state.params)
    now = collect.numbers(got) | {"gap": collect.gap(got, said)}
    memory = memory.after(now, got.rollout.rewards)
    score = advantages.clip(
      advantages.scaled(got.rollout.rewards, memory.rewards)
      if o.scale_rewards
      else jnp.asarray(got.rollout.rewards),
      o.clip_rewards,
    )
    r = got.rollout.replace(values=np.asarray(said.values))
    beta = np.float32(memory.beta)
    batch = {"rollout": r} | advantage(o, r, score, beta)
    now["explained"] = explained(batch)
    if step == 0:
      begin.check(loss_fn, actor, state.params, batch, draw, config, compute)
    state, result = learn(step, state, batch)
    now |= result | {"beta": memory.beta}
    memory = replace(memory, beta=control(memory.beta, now["kl"]))
    step += 1
    clock.tick(step)
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
    print(f"stopped at step {step}, saved; python -m jaxlm.rl.ppo", end=" ")
    print(f"--workdir={workdir} continues")
    sys.exit(128 + interrupted.signal)
  print(look.before_and_after(workdir))
  print(f"plot     {look.plot(workdir)}")
  return state


def acting(o: PPO, model: Decoder) -> Actor:
  """The policy with its critic."""
  critic = model if o.critic == "separate" else None
  return Actor(model, ScalarHead(model.dim), critic)


# --- What is minimised ------------------------------------------------------


def objective(actor: Actor, o: PPO, compute: Compute) -> Callable:
  """`(params, batch, key) -> loss, metrics` of a batch of responses.

    L = mean over tokens of -min(w A, clip(w) A)
        + value_weight (V - R)^2 / 2, clipped - entropy H

  `batch` is a dict of `rollout`, `advantages` and `returns` [rows, new].
  """
  draw = o.draw(None)

  def loss_fn(params: Tree, batch: Tree, key: Array) -> tuple[Array, dict]:
    del key
    r: Rollout = batch["rollout"]
    said = logprobs(actor, params, r, draw, compute)
    log_w = losses.log_ratio(said.logp, r.logp_old, r.mask)
    each, clipped = losses.policy_loss(
      log_w, batch["advantages"], o.clip, o.clip
    )
    error, value_clipped = losses.value_loss(
      said.values, r.values, batch["returns"], o.clip_value
    )
    total = each + o.value_weight * error - o.entropy * said.entropy
    loss, weight = losses.aggregate(total, r.mask)
    means = {
      "policy_loss": each,
      "value_loss": error,
      "clipped": clipped,
      "value_clipped": value_clipped,
      "entropy": said.entropy,
      "approx_kl": losses.kl(r.logp_old, said.logp, "k3"),
    }
    told = {k: losses.aggregate(x, r.mask)[0] for k, x in means.items()}
    return loss, told | {"loss": loss, "weight": weight}

  return loss_fn


@functools.partial(jax.jit, static_argnums=0)
def advantage(
  o: PPO, r: Rollout, score: Array, beta: Array
) -> dict[str, Array]:
  """`advantages` and `returns` of each token, `[rows, new]`.

  Args:
    o: how.
    r: responses, with what reference and critic say of them.
    score: of each response, `[rows]`.
    beta: weight of the KL penalty.
  """
  kl = losses.kl(r.logp_old, r.logp_ref, o.kl_kind)
  earned = advantages.token_rewards(score, kl, r.mask, beta)
  if o.whiten_rewards:
    earned = advantages.whiten(earned, r.mask, shift=False)
  a, targets = advantages.gae(earned, r.values, r.mask, o.gamma, o.lam)
  if o.whiten:
    a = advantages.whiten(a, r.mask)
  return {"advantages": a, "returns": targets}


def explained(batch: dict[str, Any]) -> float:
  """1 - var(R - V) / var(R): how much of the returns the critic foresaw."""
  r, there = np.asarray(batch["returns"]), batch["rollout"].mask
  left = (r - batch["rollout"].values)[there]
  return float(1.0 - left.var() / max(r[there].var(), 1e-8))


if __name__ == "__main__":
  program.run(main)
