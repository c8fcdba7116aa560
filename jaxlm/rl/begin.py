"""How a run of PPO or GRPO begins, or goes on: what both programs need first.

Functions, not a trainer: each program calls them in its own order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from jaxlm import files, recipe, values, workdir
from jaxlm.checkpoint import Checkpoints
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop.load import load_all
from jaxlm.layers import param
from jaxlm.layers.compute import Compute
from jaxlm.metrics import Log
from jaxlm.models.decoder import Decoder
from jaxlm.optim import Schedule, make_schedule
from jaxlm.parallel.rules import Rules
from jaxlm.rl import guards, place, questions
from jaxlm.rl.advantages import Running, seen
from jaxlm.rl.options import Options
from jaxlm.rl.questions import Questions
from jaxlm.rl.rewards import Learned, Reward, Verifier
from jaxlm.rl.rollout import Actor, Draw, scored
from jaxlm.state import TrainState, create, make_step
from jaxlm.tasks import examples

Array = jax.Array
Tree = Any
HELD_OUT_SEED = 1  # of the questions that evaluations ask, in every run


@dataclass(frozen=True, eq=False)
class Base:
  """What a run begins with, and is held to: the frozen reference.

  Attributes:
    model: of reference and policy.
    params: of the reference, float32; never trained.
    tokenizer: of both.
    eos: the token that ends a response.
  """

  model: Decoder
  params: Tree
  tokenizer: Tokenizer
  eos: int


def begin(config: FrozenConfigDict, path: Path) -> Base:
  """Loads what is to be trained; the run at `path` keeps it as `reference`.

  Its arrays lie on the mesh in force, as `parallel` says.

  Raises:
    UserError: if there is nothing to load, or it cannot act.
  """
  kept = path / "reference"
  where = jax.sharding.get_mesh(), recipe.rules(config)
  if not (kept / "model.json").exists():
    origin = config.model.get("path")
    if origin is None:
      raise UserError(
        "config.model.path names the model to begin with, for example that of "
        "python -m jaxlm.train --config=configs/sft.py"
      )
    found = load_all(Path(str(origin)).expanduser(), "float32", *where)
    model, params, tokenizer = found
    if not isinstance(model, Decoder) or tokenizer is None:
      raise UserError(f"{origin} is no decoder with a tokenizer beside it")
    questions.end_of(tokenizer)
    workdir.save(kept, model, params, tokenizer)
    files.replace(path / "model.json", values.to_json(model))
    tokenizer.save(path)
  model, params, tokenizer = load_all(kept, "float32", *where)
  return Base(model, params, tokenizer, questions.end_of(tokenizer))


def told(config: FrozenConfigDict, base: Base, mesh: Mesh) -> str:
  """The line about the model and where it is."""
  device = mesh.devices.flat[0].device_kind
  return (
    f"model    {base.model.n_params():,} parameters, {config.precision} on "
    f"{mesh.size} x {device}"
  )


def ask(
  config: FrozenConfigDict, options: Options, base: Base
) -> tuple[Questions, Questions]:
  """Questions to train on and questions held out; tells what was left out.

  Raises:
    UserError: if the model has no room for a prompt and a response.
  """
  most = min(config.seq_len, base.model.max_positions)
  room = most - options.tokens
  if room < 1:
    raise UserError(
      f"tokens={options.tokens} leaves no room for a prompt in a context of "
      f"{most}; allow fewer, or raise seq_len"
    )
  task, encode = options.made(), base.tokenizer.encode
  found = []
  for split, n, seed in (
    ("train", options.questions, config.seed),
    ("test", options.held_out, HELD_OUT_SEED),
  ):
    asked = questions.encoded(examples(task, split, n, seed), encode, room)
    left = f", {asked.skipped} too long and left out" if asked.skipped else ""
    print(f"{split:8} {len(asked):,} questions of {task.name}{left}")
    found.append(asked)
  return found[0], found[1]


def reward_of(options: Options, compute: Compute) -> Reward:
  """The scorer of the task, or the reward model in a workdir.

  Every device has the whole of a reward model, and reads its share of rows.
  """
  if options.reward == "verifier":
    return Verifier(options.made())
  return Learned.load(options.reward, compute.rules)


def schedule(config: FrozenConfigDict, updates: int) -> Schedule:
  """The learning rate by update, of which a step makes `updates`."""
  o, steps = config.optimizer, max(config.steps, 1)
  return make_schedule(
    o.schedule,
    o.lr,
    steps * updates,
    o.warmup * updates,
    o.end_lr,
    o.decay_share,
  )


# --- State ------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
  """What a run knows beside the state of its optimizer.

  Attributes:
    step: rollouts done.
    beta: weight of the KL penalty, where a controller moves it.
    running: count, mean and squares of all rewards so far.
    first: metrics of the first step, which guards compare with.
  """

  step: int = 0
  beta: float = 0.0
  running: tuple[float, float, float] = (0.0, 0.0, 0.0)
  first: Mapping[str, float] = field(default_factory=dict)

  @property
  def rewards(self) -> Running:
    """`running` as arrays."""
    return Running(*(np.float32(x) for x in self.running))

  def after(self, now: Mapping[str, float], earned: np.ndarray) -> "Memory":
    """One step later: metrics `now`, rewards `earned` [rows]."""
    r = jax.device_get(seen(self.rewards, earned))
    running = (float(r.count), float(r.mean), float(r.squares))
    first = self.first or dict(now)
    return replace(self, step=self.step + 1, running=running, first=first)

  def json(self) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    first = {k: float(v) for k, v in self.first.items()}
    return vars(self) | {"first": first}


def fresh(
  actor: Actor,
  params: Tree,
  tx: Any,
  config: FrozenConfigDict,
  rules: Rules | None = None,
) -> TrainState:
  """The state of step 0: the policy is the reference, the critic is new.

  A critic of its own begins as a copy of the policy, whose layers know the
  language already; its head begins with zeros. On a mesh all of it is made
  where `rules` say.
  """
  tree, table = actor.params(), Rules() if rules is None else rules
  here = jax.sharding.get_abstract_mesh()
  if not here.empty:
    param.check_mesh(tree, here, table)

  @jax.jit
  def make(params: Tree) -> TrainState:
    # Copies: the step gives its buffers away, and the reference stays.
    params = jax.tree.map(jnp.copy, params)
    if actor.critic is not None:
      copy = {k: params[k] for k in tree["critic"]}
      params = params | {"critic": jax.tree.map(jnp.copy, copy)}
    if actor.value is not None:
      head = {"value": tree["value"]}
      params = params | param.init(head, jax.random.key(config.seed))
    params = param.move(params, tree, table.stored_spec)
    state = create(params, tx, config.ema > 0)
    if state.ema is None:
      return state
    return state.replace(ema=param.move(state.ema, tree, table.state_spec))

  return make(params)


def updates(
  config: FrozenConfigDict,
  actor: Actor,
  loss_fn: Callable,
  tx: Any,
  steps: int,
  jit: bool = True,
) -> Callable:
  """`steps` updates of an actor, compiled as one; as `recipe.step`."""
  tree, table = actor.params(), recipe.rules(config)
  return make_step(
    loss_fn,
    tx,
    seed=config.seed,
    accumulate=config.accumulate,
    steps=steps,
    ema_decay=config.ema,
    sums=lambda grads: param.move(grads, tree, table.gradient_spec),
    jit=jit,
  )


def checkpoints(config: FrozenConfigDict, path: Path) -> Checkpoints:
  """Those of the run at `path`; the best has the highest score held out."""
  best = "val_loss" if config.checkpoint.best else None
  return Checkpoints(path / "checkpoints", config.checkpoint.keep, best)


def log(config: FrozenConfigDict, path: Path, step: int) -> Log:
  """The log of the run at `path`, which goes on from `step`."""
  return Log(
    path,
    tensorboard=config.log.tensorboard,
    wandb=config.log.wandb is not None,
    config=config.to_dict(),
    step=step,
  )


def restored(
  checkpoints: Checkpoints, state: TrainState
) -> tuple[TrainState, Memory]:
  """State and memory of the newest good checkpoint, where `state` lies."""
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  found = checkpoints.restore(like)
  data = found.data | {"running": tuple(found.data["running"])}
  return found.state, Memory(**data)


def check(
  loss_fn: Callable,
  actor: Actor,
  params: Tree,
  batch: dict[str, Any],
  draw: Draw,
  config: FrozenConfigDict,
  compute: Compute,
) -> None:
  """What is tried once, with the first rollout: padding and accumulation.

  Raises:
    UserError: if either changes a number.
  """
  r = batch["rollout"]

  def said(tokens: np.ndarray) -> Array:
    return scored(actor, params, r.replace(tokens=tokens), draw, compute).logp

  vocab = actor.model.vocab
  guards.check_padding(said, r.tokens, r.mask, r.starts, vocab)
  if config.accumulate > 1:
    size, n = config.batch_size, config.accumulate

    @jax.jit
    def judge(params: Tree, part: Tree) -> tuple[Array, Array]:
      loss, told = loss_fn(params, part, None)
      return loss, told["weight"]

    def of(start: int, rows: int) -> tuple[float, float]:
      part = jax.tree.map(lambda x: np.asarray(x)[start : start + rows], batch)
      loss, weight = judge(params, place.rows(part, compute.rules))
      return float(loss), float(weight)

    parts = [of(i, size // n) for i in range(0, size, size // n)]
    guards.check_accumulation(of(0, size)[0], parts)
