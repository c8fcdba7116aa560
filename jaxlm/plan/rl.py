"""The programs of a step of GRPO or PPO, traced from shapes.

A step runs three: `rollout` writes responses, `score` asks a reference and a
critic what they say of them, `update` learns. They are those that the programs
of `jaxlm.rl` run. Each keeps in memory what the others need, too: the policy's
training state and the frozen reference lie on the devices all the time, so all
are arguments of each program here.

How long responses are is data. A plan takes all prompts and responses to be as
long as they may.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from jaxlm import recipe
from jaxlm.config import call
from jaxlm.layers import param
from jaxlm.models.decoder import Decoder
from jaxlm.plan.programs import Program, named, placed, state_names
from jaxlm.rl import begin, grpo, place, ppo
from jaxlm.rl.options import GRPO, PPO, Options
from jaxlm.rl.rollout import Actor, Rollout, logprobs, sample

Tree = Any


@dataclass(frozen=True)
class Step:
  """What a step of a config is made of.

  Attributes:
    config: every key.
    options: its section.
    model: the policy.
    actor: the policy and its critic.
    objective: of `jaxlm.rl.grpo` or `jaxlm.rl.ppo`.
  """

  config: FrozenConfigDict
  options: Options
  model: Decoder
  actor: Actor
  objective: Callable

  @property
  def prompt(self) -> int:
    """Tokens of the longest prompt."""
    return self.config.seq_len - self.options.tokens

  @property
  def referred(self) -> bool:
    """Whether the reference is asked."""
    return bool(self.options.kl) or self.actor.value is not None

  def heads(self, tokens: int) -> float:
    """FLOPs of the logits of so many tokens."""
    return 2.0 * self.model.dim * self.model.vocab * tokens

  def layers(self, tokens: int) -> float:
    """FLOPs of all layers below, forward."""
    each = self.model.flops_per_token(self.config.seq_len)
    return tokens * each - self.heads(tokens)

  def runs(self) -> dict[str, int]:
    """How often each program runs in a step, by its name.

    Dynamic sampling may draw more than the one rollout that is counted.
    """
    known = {"score": 1} if self.referred else {}
    return {"rollout": 1} | known | {"update": self.options.epochs}


def asked(config: FrozenConfigDict) -> bool:
  """Whether a config is one of PPO or GRPO."""
  return bool(config.grpo) or bool(config.ppo)


def step(config: FrozenConfigDict, model: Decoder) -> Step:
  """The step of a config: of PPO, where it has that section."""
  if config.ppo:
    o = call(PPO, config.ppo, "ppo", (), "ppo")
    return Step(config, o, model, ppo.acting(o, model), ppo.objective)
  o = call(GRPO, config.grpo, "grpo", (), "grpo")
  return Step(config, o, model, Actor(model), grpo.objective)


def traced(
  config: FrozenConfigDict, model: Decoder, mesh: Mesh, name: str
) -> Program:
  """The program of that name: 'rollout', 'score' or 'update'.

  Raises:
    UserError: for options that do not fit together, or a mesh that cannot.
  """
  place.check(config, mesh)
  form = {"rollout": rollout, "score": score, "update": update}[name]
  with jax.set_mesh(mesh):
    return form(step(config, model), mesh)


def alternatives(
  config: FrozenConfigDict, name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Single changes that may save memory: what to type, and keys with values."""
  section = "ppo" if config.ppo else "grpo"
  o = config[section]
  if name == "rollout" and o.get("gathered", True):
    yield f"--config.{section}.gathered=false", {f"{section}__gathered": False}
  if section == "ppo" and o.get("critic") == "separate":
    yield "--config.ppo.critic=shared", {"ppo__critic": "shared"}
  if name != "update" and o.get("prompts", 1) > 1:
    half, rows = o.prompts // 2, config.batch_size // 2
    text = f"--config.{section}.prompts={half} --config.batch_size={rows}"
    yield text, {f"{section}__prompts": half, "batch_size": rows}


def rollout(s: Step, mesh: Mesh) -> Program:
  """Prompts are read and responses written, as `rollout.sample` does it."""
  o, rules = s.options, recipe.rules(s.config)
  state, reference = _held(s, mesh)
  given = (
    _rows(mesh, rules, (o.prompts, s.prompt), jnp.int32),
    _rows(mesh, rules, (o.prompts,), jnp.int32),
    _rows(mesh, rules, (o.rows,), jax.eval_shape(jax.random.key, 0).dtype),
  )
  draw, compute = o.draw(0), recipe.compute(s.config)

  def run(state: Tree, reference: Tree, *given: jax.Array) -> Any:
    return sample(s.model, draw, state.params, *given, compute)

  names = _held_names(state, reference)
  names += tuple(("batch", name) for name in ("prompts", "lengths", "keys"))
  read = o.prompts * (s.prompt - 1) + o.rows * (o.tokens - 1)
  return Program(
    "rollout",
    jax.jit(run, keep_unused=True).trace(state, reference, *given),
    names,
    o.rows * o.tokens,
    1,
    s.model.vocab,
    model_flops=s.layers(read) + s.heads(o.rows * o.tokens),
    loops=max(o.tokens - 1, 1),
  )


def score(s: Step, mesh: Mesh) -> Program:
  """What the reference and, in PPO, policy and critic say of a rollout."""
  o, rules = s.options, recipe.rules(s.config)
  state, reference = _held(s, mesh)
  r = _rollout(s, mesh, (o.rows,), _rows, rules)
  draw, compute = o.draw(0), recipe.compute(s.config)
  actors = [(Actor(s.model), lambda state, reference: reference)]
  if s.actor.value is not None:
    actors.append((s.actor, lambda state, reference: state.params))

  @jax.jit
  def said(state: Tree, reference: Tree, r: Rollout) -> Any:
    return [
      logprobs(actor, of(state, reference), r, draw, compute)
      for actor, of in actors
    ]

  def run(*given: Tree) -> Any:
    return said(*given)  # while it runs, all that is given stays

  tokens = o.rows * (s.config.seq_len - 1)
  passes = len(actors) + (s.actor.critic is not None)
  heads = len(actors) * s.heads(o.rows * o.tokens)
  return Program(
    "score",
    jax.jit(run, keep_unused=True).trace(state, reference, r),
    (*_held_names(state, reference), *named("batch", r)),
    tokens,
    passes,
    s.model.vocab,
    model_flops=passes * s.layers(tokens) + heads,
  )


def update(s: Step, mesh: Mesh) -> Program:
  """All updates of an epoch, one after the other."""
  o, rules = s.options, recipe.rules(s.config)
  state, reference = _held(s, mesh)
  updates = o.updates(s.config.batch_size)
  parts = s.config.accumulate
  shape = (updates, parts, o.rows // updates // parts)
  batch = {"rollout": _rollout(s, mesh, shape, _parts, rules)}
  row = () if s.actor.value is None else (o.tokens,)
  kinds = (
    ("advantages",) if s.actor.value is None else ("advantages", "returns")
  )
  batch |= {k: _parts(mesh, rules, (*shape, *row), jnp.float32) for k in kinds}
  loss_fn = s.objective(s.actor, o, recipe.compute(s.config))
  schedule = begin.schedule(s.config, updates * o.epochs)
  tx = recipe.optimizer(s.config, s.actor.params(), schedule)
  one = begin.updates(s.config, s.actor, loss_fn, tx, updates, jit=False)

  def run(state: Tree, reference: Tree, batch: Tree) -> Any:
    return one(state, batch)

  jitted = jax.jit(run, donate_argnums=0, keep_unused=True)
  tokens = o.rows * (s.config.seq_len - 1)
  passes = 1 + (s.actor.critic is not None)
  once = passes * s.layers(tokens) + s.heads(o.rows * o.tokens)
  return Program(
    "update",
    jitted.trace(state, reference, batch),
    (*_held_names(state, reference), *named("batch", batch)),
    tokens,
    3 * passes,
    s.model.vocab,
    model_flops=3 * once,
  )


# --- Shapes -----------------------------------------------------------------


def _held(s: Step, mesh: Mesh) -> tuple[Tree, Tree]:
  """The training state and the reference, as a run has them on its devices."""
  rules = recipe.rules(s.config)
  reference = param.abstract(s.model.params(), mesh=mesh, rules=rules)
  schedule = begin.schedule(s.config, 1)
  tx = recipe.optimizer(s.config, s.actor.params(), schedule)

  def fresh(params: Tree) -> Tree:
    return begin.fresh(s.actor, params, tx, s.config, rules)

  state = jax.eval_shape(fresh, reference)
  return jax.tree.map(lambda x: placed(x, mesh), state), reference


def _held_names(state: Tree, reference: Tree) -> tuple[tuple[str, str], ...]:
  """What each of those arrays is: the policy's, the critic's, frozen ..."""

  def kind(kind: str, path: str) -> str:
    own = path.startswith(("params/critic", "params/value"))
    return "critic" if own else "policy" if kind == "parameters" else kind

  names = tuple((kind(*name), name[1]) for name in state_names(state))
  return (*names, *named("frozen reference", reference))


def _rollout(
  s: Step, mesh: Mesh, lead: tuple[int, ...], leaf: Callable, rules: Any
) -> Rollout:
  """Shapes of responses, with all that a step knows of them."""
  new, held = s.options.tokens, s.actor.value is not None

  def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return leaf(mesh, rules, (*lead, *shape), dtype)

  cuts = s.options.draw(0).cuts
  known = s.referred and leaf is _parts
  return Rollout(
    tokens=of(jnp.int32, s.config.seq_len),
    starts=of(jnp.int32),
    mask=of(bool, new),
    logp_old=of(jnp.float32, new),
    group=of(jnp.int32),
    kept=of(bool, new, s.model.vocab) if cuts else None,
    logp_ref=of(jnp.float32, new) if known else None,
    values=of(jnp.float32, new) if held and leaf is _parts else None,
    rewards=of(jnp.float32) if leaf is _parts else None,
  )


def _rows(
  mesh: Mesh, rules: Any, shape: tuple[int, ...], dtype: Any
) -> jax.ShapeDtypeStruct:
  """An array `[rows, ...]`, as `place.rows` puts it."""
  where = place.of_rows(rules, shape, mesh)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _parts(
  mesh: Mesh, rules: Any, shape: tuple[int, ...], dtype: Any
) -> jax.ShapeDtypeStruct:
  """An array `[updates, parts, rows, ...]`, as `place.parts` puts it."""
  where = recipe.batch_place(rules, shape, mesh)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
