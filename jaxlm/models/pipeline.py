"""Pipeline parallelism: layers divided into stages that micro-batches pass.

Each group of devices along the mesh axis of 'layers' is a stage and has its
share of them. A batch is cut into micro-batches; at every step each stage works
on one and hands it to the next stage. With p stages, m micro-batches and one
visit to each stage this is GPipe (arXiv:1811.06965). With v rounds a stage has
v groups of layers, and each micro-batch goes around v times: interleaved
(arXiv:2104.04473, section 2.2). Steps in which a stage has nothing to do are
the bubble,

  (p - 1) / (v m + p - 1)

of all. The backward pass is the derivative of this program: the same steps in
reverse, and the same bubble.

Only 'layers' are divided here; along all other mesh axes a stage computes as it
would alone, so every other rule table composes with this one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute, active_mesh

Array = jax.Array
Tree = Any

AXIS = "pipe"
TOPS = ("max_logits",)  # reports that are joined by maximum; others by mean


@dataclass(frozen=True)
class Schedule:
  """Who works on what, and when.

  Attributes:
    stages: p.
    microbatches: m, a multiple of p.
    rounds: v, how often each micro-batch visits each stage.
  """

  stages: int
  microbatches: int
  rounds: int = 1

  @property
  def steps(self) -> int:
    """How long it takes, in visits of a micro-batch to a stage."""
    return self.rounds * self.microbatches + self.stages - 1

  @property
  def bubble(self) -> float:
    """Share of the steps in which a stage has nothing to do."""
    return (self.stages - 1) / self.steps

  def __str__(self) -> str:
    return f"{self.stages} stages, {self.microbatches} micro-batches"

  def explain(self) -> str:
    """What that costs, in words."""
    name = "GPipe" if self.rounds == 1 else f"{self.rounds} rounds, interleaved"
    return f"{name}: {self.steps} steps, {self.bubble:.0%} of them idle"

  def work(self, step: Any, stage: Any) -> tuple[Any, Any, Any]:
    """The round, the micro-batch, and whether there is anything to do.

    Micro-batches come in groups of as many as there are stages, and a group
    goes around v times before the next one enters: what leaves the last stage
    is then what the first one needs next.
    """
    place = step - stage
    group, place = divmod(place, self.rounds * self.stages)
    turn, i = divmod(place, self.stages)
    micro = group * self.stages + i
    live = (micro >= 0) & (micro < self.microbatches)
    return turn, micro, live


def stages(compute: Compute) -> int:
  """How many stages the layers are divided into."""
  mesh = active_mesh()
  if mesh is None or compute.rules is None or AXIS in mesh.manual_axes:
    return 1
  divided = dict(compute.rules.computed).get("layers")
  return mesh.shape[AXIS] if divided == AXIS or divided == (AXIS,) else 1


def schedule(n: int, rows: int, compute: Compute) -> Schedule:
  """How `n` layers and `rows` of a batch are divided.

  Raises:
    UserError: for what does not divide; it names what is near and does.
  """
  p, v = stages(compute), compute.split.rounds
  m = compute.split.microbatches or p
  if v < 1:
    raise UserError(f"parallel.rounds={v}; it is at least 1")
  if n % (p * v):
    near = max(round(n / (p * v)), 1) * p * v
    how = f" in parallel.rounds={v}" if v != 1 else ""
    raise UserError(
      f"a segment of {n} layers does not divide among {p} stages{how} of the "
      f"mesh axis {AXIS}; the nearest number that does is {near}"
    )
  if m < 1 or m % p:
    raise UserError(
      f"parallel.microbatches={m} is no multiple of the {p} stages of the mesh "
      f"axis {AXIS}; the nearest that is one is {max(round(m / p), 1) * p}"
    )
  groups = compute.rules.ways("batch", active_mesh()) // p
  if rows % (m * groups):
    near = max(round(rows / (m * groups)), 1) * m * groups
    raise UserError(
      f"{rows} rows do not divide into {m} micro-batches on {groups} groups of "
      f"devices; the nearest number that does is {near} (batch_size / "
      "accumulate), or set parallel.microbatches"
    )
  return Schedule(p, m, v)


def late(p: Tree, x: Array) -> Tree:
  """Parameters of a layer, not to be had before its input `x`.

  What no step of a stage changes is moved out of all of them, by JAX and by
  compilers: gathered there, the layers of a stage would be whole all at once.
  """
  if AXIS not in jax.sharding.get_abstract_mesh().manual_axes:
    return p
  return jax.lax.optimization_barrier((p, x))[0]


def pipelined(
  layers: Callable,
  n: int,
  params: Tree,
  numbers: Array,
  x: Array,
  at: At,
  compute: Compute,
) -> tuple[Array, Tree]:
  """All layers on all rows, stage by stage.

  Args:
    layers: `(params, numbers, x, at) -> (x, reports)`, some of the layers on
      some of the rows.
    n: how many layers there are.
    params: of all layers, `[n, ...]`.
    numbers: of all layers, int32 `[n]`.
    x: the residual stream `[batch, seq, dim]`.
    at: where the tokens stand.
    compute: how to run.

  Returns:
    The stream, and the reports of all layers, `[n, ...]`.

  Raises:
    UserError: for layers or rows that do not divide.
  """
  plan = schedule(n, x.shape[0], compute)
  fields = at.positions, at.segments, at.blocks
  inputs = jax.tree.map(lambda x: _deal(plan, x, compute), (x, fields))
  walk = jax.shard_map(
    lambda *args: _walk(plan, layers, at, *args),
    in_specs=(*(PartitionSpec(AXIS),) * 3, PartitionSpec()),
    out_specs=PartitionSpec(AXIS),
    axis_names={AXIS},
    check_vma=False,
  )
  y, reports = walk(params, numbers, inputs, at.key)
  return _collect(plan, y, x, compute), _by_layer(plan, reports)


# --- Micro-batches ----------------------------------------------------------


def _places(x: Array, compute: Compute) -> tuple[PartitionSpec, PartitionSpec]:
  """Where rows `[batch, ...]` lie, and micro-batches `[p, rows, m, ...]`."""
  names = compute.spec(("batch",), x.shape[:1])[0]
  names = names if isinstance(names, tuple) else (names,)
  rest = jax.typeof(x).sharding.spec[1:]
  others = tuple(name for name in names if name != AXIS)
  return (
    PartitionSpec(names, *rest),
    PartitionSpec(AXIS, others or None, None, *rest),
  )


def _deal(plan: Schedule, x: Array, compute: Compute) -> Array:
  """Rows `[batch, ...]` as micro-batches `[p, rows, m, ...]`, on every stage.

  Which rows share a micro-batch is the devices' choice: whatever lies on one
  stage is spread over all of them, so nothing has to change its place.
  """
  rows, micro = _places(x, compute)

  def local(x: Array) -> Array:
    x = x.reshape(-1, plan.microbatches // plan.stages, *x.shape[1:])
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)[None]

  x = jax.sharding.reshard(x, rows)
  return jax.shard_map(local, in_specs=rows, out_specs=micro, check_vma=False)(
    x
  )


def _collect(plan: Schedule, y: Array, x: Array, compute: Compute) -> Array:
  """What the last stage has, as rows that lie and are ordered as those of x."""
  rows, micro = _places(x, compute)

  def local(y: Array) -> Array:
    last = jax.lax.axis_index(AXIS) == plan.stages - 1
    y = jnp.where(last, y[0], jnp.zeros((), y.dtype))
    y = jax.lax.psum_scatter(y, AXIS, scatter_dimension=1, tiled=True)
    return y.reshape(-1, *y.shape[2:])

  return jax.shard_map(local, in_specs=micro, out_specs=rows, check_vma=False)(
    y
  )


# --- The walk ---------------------------------------------------------------


def _walk(plan: Schedule, layers, at: At, params, numbers, inputs, key):
  """What one stage does, inside `shard_map` over the stages."""
  stage = jax.lax.axis_index(AXIS)
  rows, fields = jax.tree.map(lambda x: x[0], inputs)
  params, numbers = _regrouped(plan, stage, (params, numbers))
  # Picked at each step, they would be kept for each step's backward pass.
  alone = None if plan.rounds > 1 else _pick((params, numbers), 0)
  onward = [(i, (i + 1) % plan.stages) for i in range(plan.stages)]

  def one(carry: tuple, step: Array) -> tuple[tuple, tuple]:
    x, out = carry
    turn, micro, live = plan.work(step, stage)
    micro = jnp.clip(micro, 0, plan.microbatches - 1)
    x = jnp.where((stage == 0) & (turn == 0), _pick(rows, micro, 1), x)
    positions, segments, blocks = _pick(fields, micro, 1)
    here = at.replace(positions=positions, segments=segments, blocks=blocks)
    if key is not None:
      here = here.replace(key=jax.random.fold_in(key, micro))
    mine = alone or _pick((params, numbers), turn)
    x, report = layers(*mine, x, here)
    done = live & (turn == plan.rounds - 1)
    new = jnp.where(done, x, _pick(out, micro, 1))
    out = jax.lax.dynamic_update_index_in_dim(out, new, micro, 1)
    x = jax.lax.ppermute(x, AXIS, onward)
    return (x, out), (report, turn, live)

  start = jnp.zeros_like(rows[:, 0]), jnp.zeros_like(rows)
  steps = jnp.arange(plan.steps, dtype=jnp.int32)
  (_, out), (reports, turns, live) = jax.lax.scan(one, start, steps)
  reports = _joined(plan, reports, turns, live)
  return jax.tree.map(lambda x: x[None], (out, reports))


def _pick(tree: Tree, i: Array, axis: int = 0) -> Tree:
  """Entry `i` along an axis of every array."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False), tree
  )


def _regrouped(plan: Schedule, stage: Array, tree: Tree) -> Tree:
  """A stage's arrays by round, `[v, n / (p v), ...]`, from `[n / p, ...]`.

  At rest a stage has layers that follow each other: groups v s to v s + v - 1
  of all p v. What it works on in round r is group p r + s. Each stage sends v
  groups and gets v: in v exchanges, each of them with every stage once. (With
  blocks of p / gcd(p, v) stages, all slots are shifted by one from block to
  block; then no two stages send to the same.)
  """
  p, v = plan.stages, plan.rounds
  if v == 1:
    return jax.tree.map(lambda x: x[None], tree)
  block = p // math.gcd(p, v)
  slots = [[(k + s // block) % v for s in range(p)] for k in range(v)]

  def one(x: Array) -> Array:
    x = x.reshape(v, -1, *x.shape[1:])
    out = x
    for slot in slots:
      to = [(s * v + slot[s]) % p for s in range(p)]
      turn = [0] * p
      for s in range(p):
        turn[to[s]] = (s * v + slot[s]) // p
      group = _pick(x, jnp.asarray(slot, jnp.int32)[stage])
      group = jax.lax.ppermute(group, AXIS, list(enumerate(to)))
      turn = jnp.asarray(turn, jnp.int32)[stage]
      out = jax.lax.dynamic_update_index_in_dim(out, group, turn, 0)
    return out

  return jax.tree.map(one, tree)


# --- Reports ----------------------------------------------------------------


def _joined(plan: Schedule, reports: Tree, turns: Array, live: Array) -> Tree:
  """Reports of all steps `[steps, ...]` as those of rounds `[v, ...]`."""
  rounds = jnp.arange(plan.rounds, dtype=jnp.int32)[None]
  mine = (turns[:, None] == rounds) & live[:, None]

  def one(path: tuple, x: Array) -> Array:
    where = mine.reshape(*mine.shape, *(1,) * (x.ndim - 1))
    if path[-1].key in TOPS:
      return jnp.max(jnp.where(where, x[:, None], -jnp.inf), axis=0)
    total = jnp.sum(jnp.where(where, x[:, None], 0.0), axis=0)
    return total / plan.microbatches

  return jax.tree_util.tree_map_with_path(one, reports)


def _by_layer(plan: Schedule, reports: Tree) -> Tree:
  """Reports `[p, v, n / (p v), ...]` as `[n, ...]`."""

  def one(x: Array) -> Array:
    spec = jax.typeof(x).sharding.spec
    x = jax.sharding.reshard(x, PartitionSpec(None, *spec[1:]))
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(-1, *x.shape[3:])

  return jax.tree.map(one, reports)
