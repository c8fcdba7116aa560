"""From keys to values: what each part of a config stands for.

The programs and `--explain` build a run from these functions, so that what is
explained is what is run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import FrozenConfigDict

from jaxlm import config as configs
from jaxlm import keys
from jaxlm.errors import UserError
from jaxlm.interop.load import (
  has_tokenizer,
  load,
  load_model,
  load_tokenizer,
)
from jaxlm.layers import param
from jaxlm.layers.compute import Compute, Split
from jaxlm.models.build import build, check
from jaxlm.models.decoder import Decoder
from jaxlm.objectives import Objective, from_config
from jaxlm.objectives.distil import Teacher
from jaxlm.optim import Muon, Optimizer, Schedule, make, make_schedule
from jaxlm.optim.guards import skip_spikes
from jaxlm.optim.spread import sharded
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import Rules, preset
from jaxlm.state import LossFn, TrainState, create, make_step
from jaxlm.workdir import trunk

__all__ = [
  "batch_place",
  "compute",
  "data_arguments",
  "due",
  "eval_rows",
  "fresh_state",
  "loss",
  "mesh",
  "model",
  "objective",
  "optimizer",
  "origin",
  "rules",
  "schedule",
  "step",
]

Config = FrozenConfigDict
EVAL_TOKENS = 8192  # in one batch of an evaluation: enough to fill a CPU


def origin(config: Config, workdir: Path | None = None) -> Path | None:
  """Where the model that is trained on comes from; None: it is made new.

  A run that has begun keeps model and tokenizer itself, in its `workdir`.
  """
  path = config.model.get("path")
  if path is None:
    return None
  if workdir is not None and (workdir / "model.json").exists():
    return workdir
  return Path(str(path)).expanduser()


def data_arguments(
  config: Config, origin: Path | None = None
) -> dict[str, Any]:
  """The arguments of `jaxlm.data.prepare`.

  Raises:
    UserError: for a tokenizer that is not that of the model at `origin`.
  """
  names = ("path", "tokenizer", "vocab", "val_fraction", "text_key")
  arguments = {name: config.data[name] for name in names}
  if origin is not None and has_tokenizer(origin):
    if config.data.tokenizer != keys.KEYS["data.tokenizer"].default:
      raise UserError(
        f"data.tokenizer is {config.data.tokenizer!r}, but the model in "
        f"{config.model.path} has a tokenizer of its own; leave it out"
      )
    arguments["tokenizer"] = load_tokenizer(origin)
  return arguments | {"weights": config.data.weights or None}


def model(config: Config, vocab: int, origin: Path | None = None) -> Decoder:
  """The model that `config.model` describes, or the one at `origin`.

  Raises:
    UserError: as `build`; or for sizes beside a path, which has its own.
  """
  if origin is None:
    return build(config, vocab)
  given = {k for k, v in config.model.items() if v is not None} - {
    "family",
    "path",
  }
  if given:
    raise UserError(
      f"config.model.{min(given)} cannot be set beside config.model.path: the "
      "model there is as it is; leave one of them out"
    )
  here = origin == Path(str(config.model.path)).expanduser()
  found = load_model(origin) if here else trunk(origin)
  if not isinstance(found, Decoder):
    raise UserError(
      f"{config.model.path} is no decoder, so plain text cannot train it"
    )
  check(found, vocab, config.seq_len)
  return found


def eval_rows(config: Config) -> int:
  """Rows of a validation batch: whole training batches, `EVAL_TOKENS` or so."""
  tokens = config.batch_size * config.seq_len
  return config.batch_size * max(1, EVAL_TOKENS // tokens)


def rules(config: Config) -> Rules:
  """The rule table of `parallel.preset`."""
  return preset(config.parallel.preset)


def mesh(
  config: Config, devices: list[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """All devices, arranged as `parallel` says; checks that a batch divides.

  Args:
    config: says how.
    devices: what to arrange; None means those of all processes.

  Raises:
    UserError: for a mesh that does not fit, or a batch that does not divide.
  """
  made = make_mesh(rules(config), config.parallel.mesh, devices)
  rows, parts = config.batch_size, config.accumulate
  ways = rules(config).ways("batch", made)
  if rows % (parts * ways):
    raise UserError(
      f"batch_size={rows} does not divide into accumulate={parts} parts on "
      f"{ways} groups of devices; the next that does is "
      f"{-(-rows // (parts * ways)) * parts * ways}"
    )
  return made


def compute(config: Config) -> Compute:
  """How the model is run."""
  known = ("float32", "bfloat16", "float16")
  if config.precision not in known:
    raise UserError(
      f"precision is {config.precision!r}; it can be {', '.join(known)}"
    )
  return Compute(
    dtype=config.precision,
    remat=config.remat,
    unroll=config.unroll,
    split=configs.call(
      Split, config.parallel, "parallel", ("preset", "mesh"), "parallel"
    ),
    rules=rules(config),
    watch=config.optimizer.qk_clip > 0,
  )


def schedule(config: Config) -> Schedule:
  """The learning rate by step; with Muon, that of what is not Muon's."""
  o = config.optimizer
  return make_schedule(
    o.schedule, o.lr, config.steps, o.warmup, o.end_lr, o.decay_share
  )


def optimizer(config: Config, tree: Any, lr: Schedule) -> Any:
  """The optax transformation for the parameters declared in `tree`."""
  o = config.optimizer
  tx = make(
    tree,
    lr,
    Optimizer(
      name=o.name,
      weight_decay=o.weight_decay,
      clip_norm=o.clip,
      b1=o.b1,
      b2=o.b2,
      eps=o.eps,
      muon=Muon(
        coefficients=o.muon_coefficients,
        scale=o.muon_scale,
        lr_ratio=o.muon_lr / o.lr if o.lr else 1.0,
      ),
      lr_table=o.lr_table,
      decay_table=o.decay_table,
      freeze_table=tuple((p, True) for p in o.freeze) + ((".*", False),)
      if o.freeze
      else (),
      qk_clip=o.qk_clip,
      balance=o.balance,
    ),
  )
  if config.spike_skip:
    tx = skip_spikes(tx, config.spike_skip)
  return sharded(tx, tree, rules(config))


def objective(config: Config) -> Objective:
  """As `jaxlm.objectives.from_config`, with what it looks for on the disk."""

  def find(path: str) -> Teacher:
    where = Path(path).expanduser()

    def read() -> Any:
      mesh = jax.sharding.get_mesh()
      return load(where, "float32", mesh, rules(config))[1]

    return Teacher(load_model(where), read)

  return from_config(config, find)


def loss(config: Config, model: Decoder) -> LossFn:
  """What a step minimises, `(params, batch, key, frozen) -> loss, metrics`.

  A fifth argument, optional, is how to compute, if not as the config says.
  """
  how, minimised = compute(config), objective(config).loss

  def loss_fn(params: Any, batch: Any, key: Any, frozen: Any = None, way=how):
    return minimised(model, params, batch, key, way, frozen)

  return loss_fn


def step(config: Config, model: Decoder, tx: Any, steps: int = 1) -> Callable:
  """The compiled training step of `jaxlm.state.make_step`."""
  tree = objective(config).trained.params(model)

  def sums(grads: Any) -> Any:
    return param.move(grads, tree, rules(config).gradient_spec)

  return make_step(
    loss(config, model),
    tx,
    seed=config.seed,
    accumulate=config.accumulate,
    steps=steps,
    ema_decay=config.ema,
    sums=sums,
  )


def fresh_state(
  config: Config,
  model: Decoder,
  tx: Any,
  mesh: jax.sharding.Mesh,
  base: Any = None,
) -> TrainState:
  """The state of step 0, every array made where it will stay.

  Args:
    config: every key.
    model: what is trained.
    tx: the optimizer.
    mesh: all devices.
    base: parameters of the model to begin with; None makes them.
  """
  trained = objective(config).trained
  tree, table = trained.params(model), rules(config)
  param.check_mesh(tree, mesh, table)
  places = param.shardings(tree, mesh, table)

  @jax.jit
  def fresh(base: Any) -> TrainState:
    params = trained.start(model, jax.random.key(config.seed), base)
    params = jax.tree.map(jax.sharding.reshard, params, places)
    state = create(params, tx, config.ema > 0, config.precision == "float16")
    if state.ema is None:
      return state
    return state.replace(ema=param.move(state.ema, tree, table.state_spec))

  return fresh(base)


def batch_place(
  rules: Rules, shape: tuple[int, ...], mesh: jax.sharding.Mesh
) -> NamedSharding:
  """Where a leaf `[steps, accumulate, rows, ...]` of a batch lies."""
  axes = (None, None, "batch", "length", *(None for _ in shape[4:]))
  spec = rules.activation_spec(axes[: len(shape)], shape, mesh)
  return NamedSharding(mesh, spec)


def due(step: int, every: int, steps: int) -> bool:
  """True at every multiple of `every` (0: of nothing), and at the end."""
  return step == steps or (every > 0 and step % every == 0)
