"""Trains a language model: from text to weights, in one file.

    python -m jaxlm.train --config=configs/tiny.py
    python -m jaxlm.train --config=configs/tiny.py --explain
    python -m jaxlm.train --workdir=runs/tiny          # continues that run

Read `_train` from top to bottom: data, model, mesh, optimizer, state, step,
loop, end. A run is a function of its config: the order of the data and all
randomness follow from (seed, step). So a run that was stopped, at whatever
moment, continues to the very bits it would have had.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import metrics, program, recipe, speed, values
from jaxlm.checkpoint import Checkpoints
from jaxlm.config import to_json
from jaxlm.errors import UserError
from jaxlm.evaluate import bits_per_byte, evaluate
from jaxlm.explain import explain
from jaxlm.files import replace
from jaxlm.generate.text import sample_text
from jaxlm.interop.load import load
from jaxlm.interrupt import Interrupt
from jaxlm.layers import param
from jaxlm.metrics import Log
from jaxlm.models.decoder import Decoder
from jaxlm.parallel import distributed
from jaxlm.parallel.mesh import process_rows
from jaxlm.parallel.rules import Rules
from jaxlm.profiling import Profile
from jaxlm.state import TrainState
from jaxlm.workdir import claim

Tree = Any
STARTED = time.perf_counter()


def main(argv: Sequence[str]) -> None:
  """Trains, or with `--explain` only says what would be trained."""
  flags = program.parser("Trains a language model.")
  distributed.add_flags(flags)
  flags.add_argument(
    "--profile",
    type=int,
    nargs="?",
    const=3,
    default=0,
    metavar="CALLS",
    help="trace so many calls of the step (3) into WORKDIR/profile",
  )
  run = program.load(argv, flags)
  if run.explain:
    print(explain(run.config))
    return
  with distributed.joined(run.flags), _memory_explained(run.config):
    train(run.config, run.workdir, run.flags.profile)


def train(
  config: FrozenConfigDict, workdir: Path, profile: int = 0
) -> TrainState:
  """Runs `config` to its end, or continues what `workdir` holds of it.

  Args:
    config: every key, as `jaxlm.program.load` gives it.
    workdir: gets config.json, the tokenizer, checkpoints/, metrics.jsonl,
      loss.png, samples.txt and tb/.
    profile: calls of the step to trace into profile/, after the first.

  Returns:
    The last state.

  Raises:
    UserError: for wrong input, a workdir of another config, a full disk, or a
      loss that is not a number. What is already saved is never harmed.
  """
  _claim(workdir, config)
  with contextlib.ExitStack() as scope:
    calls = scope.enter_context(Profile(workdir / "profile", profile))
    return _train(config, workdir, scope.enter_context, calls)


def _train(
  config: FrozenConfigDict,
  workdir: Path,
  enter: Callable[[Any], Any],
  profile: Profile,
) -> TrainState:
  """The run itself; what it enters is left again, whatever happens."""
  mesh = recipe.mesh(config)
  enter(jax.set_mesh(mesh))
  objective = recipe.objective(config)

  # --- Data -------------------------------------------------------------------
  origin = _origin(config, workdir)
  with distributed.first_alone():
    corpus = objective.data.read(**recipe.data_arguments(config, origin))
  distributed.same("the tokenizer", corpus.tokenizer.fingerprint())
  distributed.same("the data", corpus.describe())
  rules, rows = recipe.rules(config), recipe.eval_rows(config)
  mine = process_rows(mesh, rules, config.batch_size, config.accumulate)
  batches = objective.data.batches(corpus, config, mine)
  mine = process_rows(mesh, rules, rows)
  held_out = objective.data.held_out(corpus, config, rows, mine)
  if distributed.is_first():
    corpus.tokenizer.save(workdir)
  print(f"data     {corpus.describe()}")

  # --- Model and mesh ---------------------------------------------------------
  model = recipe.model(config, corpus.tokenizer.vocab_size, origin)
  if origin is not None and distributed.is_first():  # the run keeps it
    replace(workdir / "model.json", values.to_json(model))
  compute = recipe.compute(config)
  device = mesh.devices.flat[0].device_kind
  print(
    f"model    {origin or config.model.family}, "
    f"{model.n_params():,} parameters, "
    f"{config.precision} on {mesh.size} x {device}"
  )

  # --- Optimizer and state ----------------------------------------------------
  schedule = recipe.schedule(config)
  trained = objective.trained
  tx = recipe.optimizer(config, trained.params(model), schedule)
  checkpoints = enter(
    Checkpoints(
      workdir / "checkpoints",
      keep=config.checkpoint.keep,
      best="val_loss" if config.checkpoint.best else None,
    )
  )
  begun = distributed.from_first(checkpoints.latest()) is not None
  loads = origin is not None and (trained.needs_base or not begun)
  base = _base(config, model, mesh) if loads else None
  frozen = trained.frozen(model, base)
  state = recipe.fresh_state(config, model, tx, mesh, base)
  del base  # the first step may take its memory
  if begun:
    state = checkpoints.restore(_places(state)).state
    print(f"continue at step {int(state.step)} of {workdir}")
  first = step = int(state.step)

  # --- Step -------------------------------------------------------------------
  loss_fn = recipe.loss(config, model)

  @functools.cache
  def step_fn(steps: int) -> Callable:
    return recipe.step(config, model, tx, steps)

  @jax.jit
  def judge(frozen: Tree, params: Tree, batch: Tree) -> dict[str, jax.Array]:
    batch = jax.tree.map(lambda x: x[0, 0], batch)
    plain = dataclasses.replace(compute, watch=False)
    return loss_fn(params, batch, None, frozen, plain)[1]

  # --- Loop -------------------------------------------------------------------
  # Metrics of a call are read after the next call has been launched, so the
  # device never waits for the host. A checkpoint is saved before anything that
  # may fail, and only after every loss before it was seen to be a number.
  tokens = config.batch_size * config.seq_len * objective.data.sequences
  clock = speed.Throughput(tokens)
  flops = 3 * model.flops_per_token(config.seq_len)
  peak = speed.matmul_peak(compute.dtype)
  feed = batches.stream(step)
  log = enter(
    Log(
      workdir,
      tensorboard=config.log.tensorboard,
      wandb=config.log.wandb is not None,
      config=config.to_dict(),
      step=step,
      write=distributed.is_first(),
    )
  )

  def report(last: int, result: dict[str, jax.Array]) -> None:
    """Reads the metrics of the steps up to `last`; logs where it is time."""
    found = {k: np.asarray(v, np.float32) for k, v in result.items()}
    _check_finite(found, last, workdir)
    clock.tick(last)
    if last - len(found["loss"]) == first:
      print(f"start    {time.perf_counter() - STARTED:.1f} s to the first step")
    if not recipe.due(last, config.log_every, config.steps):
      return
    rate = clock.tokens_per_sec()
    line = {k: v[-1] for k, v in found.items() if k != "weight"}
    line["lr"] = schedule(last - 1)
    log.scalars(last, line | _known(tokens_per_sec=rate))
    share, left = rate * flops / peak, clock.seconds_left(config.steps)
    print(
      speed.progress(last, config.steps, line["loss"], rate, share, left),
      flush=True,
    )

  def look(step: int, state: TrainState) -> float:
    """Evaluates on what is held out; the averaged weights, where kept."""
    params = state.params if state.ema is None else state.ema
    put = functools.partial(_put, mesh, compute.rules, (1, rows))
    eval_fn = functools.partial(judge, frozen)
    found = evaluate(eval_fn, params, held_out, config.eval_batches, put)
    told = _told(found, corpus.counts)
    log.scalars(step, {f"val_{name}": value for name, value in told.items()})
    print(f"step {step} | validation {_listed(told)}")
    if config.log.histograms:
      for name, array in param.paths(params).items():
        log.histogram(step, name, distributed.whole(array))
    return told["loss"]

  def sample(step: int, state: TrainState) -> None:
    """Writes what the model says now to samples.txt, if it can talk."""
    params = state.params if state.ema is None else state.ema
    params = trained.policy(params, frozen)
    params = jax.tree.map(distributed.whole, params)
    if params is None or not distributed.is_first():
      return
    asked = {k: v for k, v in config.sample.items() if k != "every"}
    text = sample_text(model, params, corpus.tokenizer, **asked)
    log.text(step, "sample", text)
    with open(workdir / "samples.txt", "a", encoding="utf-8") as file:
      file.write(f"--- step {step}\n{text}\n\n")
    print(f"--- a sample at step {step}\n{text}\n---")

  owed = step and held_out and recipe.due(step, config.eval_every, 0)
  seen = distributed.from_first(log.last("val_loss"))
  if owed and seen != step:  # killed before it was evaluated
    checkpoints.note(step, val_loss=look(step, state))

  pending, interrupted = None, distributed.Together(enter(Interrupt()))
  part = (config.accumulate, config.batch_size // config.accumulate)
  while step < config.steps and not interrupted:
    n = min(config.steps_per_call, _next_event(config, step) - step)
    parts = itertools.islice(feed, n)
    batch = _put(mesh, compute.rules, part, *parts)
    with profile.call(before=state):
      state, result = step_fn(n)(state, batch, frozen)
    if pending:
      report(*pending)
    step, pending = step + n, (step + n, result)
    interrupted.poll()
    saving = recipe.due(step, config.checkpoint_every, config.steps)
    looking = held_out and recipe.due(step, config.eval_every, config.steps)
    sampling = recipe.due(step, config.sample.every, config.steps)
    if not (saving or looking or sampling or interrupted):
      continue
    report(*pending)
    pending = None
    with clock.paused():
      if saving or interrupted:
        checkpoints.save(step, state, {"step": step}, config.to_dict())
      if interrupted:
        break
      if looking:
        loss = look(step, state)
        if step in checkpoints:
          checkpoints.note(step, val_loss=loss)
      if sampling and config.sample.tokens:
        sample(step, state)
      stale = looking and distributed.from_first(_stale(workdir))
      if looking and stale >= (config.early_stop or math.inf):
        print(f"early stop: {config.early_stop} evaluations without gain")
        break

  # --- End --------------------------------------------------------------------
  if not distributed.from_first(step in checkpoints):
    checkpoints.save(step, state, {"step": step}, config.to_dict())
  checkpoints.close()
  log.close()
  if interrupted:
    print(f"stopped at step {step}, saved; python -m jaxlm.train", end=" ")
    print(f"--workdir={workdir} continues")
    sys.exit(128 + interrupted.signal)
  if not distributed.is_first():
    return state
  plot = metrics.plot_loss(workdir)
  used = speed.memory()["host"]
  rate = clock.mean()
  told = (
    "nothing left to do" if math.isnan(rate) else speed.short(rate) + " tok/s"
  )
  print(f"done     {told}, {speed.short(used)}B peak")
  print(f"plot     {plot}")
  if isinstance(trained.model(model), Decoder):  # it can talk
    print(f"sample   python -m jaxlm.generate --workdir={workdir}")
  return state


# --- Parts --------------------------------------------------------------------


def _memory_explained(
  config: FrozenConfigDict,
) -> contextlib.AbstractContextManager:
  """Where memory runs out, the error says of what and what would help."""
  from jaxlm.plan import failure

  return failure.explained(lambda: failure.of_training(config))


def _claim(workdir: Path, config: FrozenConfigDict) -> None:
  """Makes the workdir this config's, or checks that it already is."""
  if not distributed.is_first():
    _check_shared(workdir, config)
    return
  claim(workdir, config)
  distributed.from_first(to_json(config))


def _check_shared(workdir: Path, config: FrozenConfigDict) -> None:
  """Checks that process 0 runs the same, and wrote where we can read."""
  if distributed.from_first(None) != to_json(config):
    raise UserError(
      "this process and process 0 have different configs; start all alike"
    )
  if not (workdir / "config.json").exists():
    raise UserError(
      f"process 0 wrote to {workdir}, and here is nothing; give a --workdir "
      "on a file system that all processes share"
    )


def _origin(config: FrozenConfigDict, workdir: Path) -> Path | None:
  """Where the model that is trained on comes from; the same for all."""
  origin = recipe.origin(config, workdir)
  origin = distributed.from_first(None if origin is None else str(origin))
  return None if origin is None else Path(origin)


def _base(config: FrozenConfigDict, model: Decoder, mesh) -> Tree:
  """The parameters at `model.path`, where they are to lie."""
  path, rules = recipe.origin(config), recipe.rules(config)
  found, params = load(path, "float32", mesh, rules)
  if found != model:
    raise UserError(
      f"{path} holds another model than when this run began; start again in "
      "another workdir"
    )
  return params


def _places(state: TrainState) -> Tree:
  """Shapes, dtypes and shardings of the state, to restore into."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )


def _put(
  mesh: jax.sharding.Mesh,
  rules: Rules,
  part: tuple[int, int],
  *batches: Tree,
) -> Tree:
  """Batches on the devices, as `[steps, accumulate, rows, ...]`.

  Args:
    mesh: all devices.
    rules: along which axes a batch lies.
    part: accumulate, and the rows of each part in all processes together.
    batches: for each step the rows that this process's devices hold.
  """

  def join(*parts: np.ndarray) -> jax.Array:
    x = np.stack(parts)
    x = x.reshape(len(parts), part[0], -1, *x.shape[2:])
    shape = (len(parts), *part, *x.shape[3:])
    place = recipe.batch_place(rules, shape, mesh)
    return jax.make_array_from_process_local_data(place, x, shape)

  return jax.tree.map(join, *batches)


def _next_event(config: FrozenConfigDict, step: int) -> int:
  """The first step after `step` at which the loop has to look up."""
  periods = (
    config.log_every,
    config.eval_every,
    config.checkpoint_every,
    config.sample.every,
  )
  return min([config.steps, *((step // n + 1) * n for n in periods if n)])


def _told(
  found: dict[str, float], counts: dict[str, float]
) -> dict[str, float]:
  """What is told of an evaluation; of text also the loss in bits per byte."""
  told = {"loss": found["loss"]}
  told |= {k: v for k, v in found.items() if k != "perplexity"}
  if "val_bytes" in counts:
    width = counts["val_bytes"] / counts["val_tokens"]
    told["bits_per_byte"] = bits_per_byte(told["loss"], width)
  return told


def _listed(values: dict[str, float]) -> str:
  """'loss 3.7012, bits per byte 1.9731'."""
  words = (f"{k.replace('_', ' ')} {v:.4f}" for k, v in values.items())
  return ", ".join(words)


def _known(**values: float) -> dict[str, float]:
  """Those that are numbers."""
  return {k: v for k, v in values.items() if math.isfinite(v)}


def _stale(workdir: Path) -> int:
  """How many evaluations have passed since the best one."""
  losses = [r["val_loss"] for r in metrics.read(workdir) if r.get("val_loss")]
  return len(losses) - 1 - int(np.argmin(losses)) if losses else 0


def _check_finite(values: dict, last: int, workdir: Path) -> None:
  """Stops a run whose loss or gradient is no longer a number.

  In float16 an infinite gradient is expected now and then: its step has been
  skipped and the loss scale halved.
  """
  names = ["loss"] if "loss_scale" in values else ["loss", "grad_norm"]
  for name in names:
    bad = np.flatnonzero(~np.isfinite(values[name]))
    if len(bad):
      step = last - len(values[name]) + int(bad[0]) + 1
      raise UserError(
        f"{name} is {values[name][bad[0]]} at step {step}; the checkpoints in "
        f"{workdir} are from before. Lower optimizer.lr, lengthen "
        "optimizer.warmup, or set optimizer.clip or spike_skip, and start "
        "again in another workdir"
      )


if __name__ == "__main__":
  program.run(main)
