"""Mixture of experts: many feed-forward layers, a few of which see a token.

`MoE` has an expert (any `MLP` or `GLU` value, its weights stacked), a router
(`jaxlm.layers.router`) and a dispatch: how tokens and experts meet. `Dense` is
the definition, every expert on every token; `Capacity` gives each expert a
buffer of fixed size; `Ragged` sorts tokens by expert. They give the same
numbers, except that a full buffer drops tokens. Where experts are split over
devices, each dispatch has its own way to bring tokens there and back.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.errors import UserError
from jaxlm.layers import exchange
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.kernels.grouped import Grouped
from jaxlm.layers.linear import dot
from jaxlm.layers.mlp import GLU, MLP, Report
from jaxlm.layers.param import FanIn, Param, count, flops, map_params, stack
from jaxlm.layers.router import Route, Router, TopK

Array = jax.Array
Tree = Any
Expert = MLP | GLU


# --- Dispatch ---------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
  """Every expert on every token, times the weight: the definition.

  It costs experts / top_k times what is needed.
  """

  def __call__(
    self,
    expert: Expert,
    p: Tree,
    x: Array,
    route: Route,
    weigh_input: bool,
    compute: Compute,
    across: str | None = None,
  ) -> tuple[Array, Report]:
    """The weighted sum of each token's experts.

    Args:
      expert: one of them.
      p: the arrays of all, stacked.
      x: tokens `[tokens, dim]`.
      route: who works on what.
      weigh_input: weights multiply what an expert reads, not what it says.
      compute: how to run.
      across: the mesh axis along which the experts are split, or None; `p`
        then has those of this device, and `x` and `route` are its own tokens'.

    Returns:
      `[tokens, dim]` in float32, and what there is to report.
    """
    n = jax.tree.leaves(p)[0].shape[0]
    if across:
      x, route = _of_everyone(x, route, n, across)
    zeros = jnp.zeros((n, len(x)), jnp.float32)
    weight = zeros.at[route.experts, route.tokens].add(route.weights)
    chosen = zeros.at[route.experts, route.tokens].add(1.0)

    def one(y: Array, each: tuple[Tree, Array, Array]) -> tuple[Array, None]:
      p, weight, chosen = each
      before, after = (weight, chosen) if weigh_input else (chosen, weight)
      h = _weighted(x, before)
      out, _ = expert(p, h[None], compute)
      return y + after[:, None] * out[0], None

    y, _ = jax.lax.scan(
      one, jnp.zeros(x.shape, jnp.float32), (p, weight, chosen)
    )
    if across:
      y = jax.lax.psum_scatter(y, across, tiled=True)
    return y, {}


def _of_everyone(
  x: Array, route: Route, n: int, across: str
) -> tuple[Array, Route]:
  """The tokens of all devices, and who of them works with the experts here."""
  here = jax.lax.axis_index(across)
  own = route.replace(tokens=route.tokens + here * len(x))
  x, route = jax.lax.all_gather((x, own), across, tiled=True)
  at = route.experts - here * n
  return x, route.replace(experts=jnp.where((at >= 0) & (at < n), at, n))


@dataclass(frozen=True)
class Capacity:
  """Each expert has room for `factor` times its fair share (GShard).

  Shapes are fixed and experts are one batched matmul (arXiv:2006.16668). What
  finds its expert full is dropped: it passes by on the residual stream. The
  report's `dropped` is their share. Under a mesh each device fills buffers of
  its own with its own rows; where experts are split over devices, the buffers
  travel, by an all-to-all whose size is known beforehand.

  Attributes:
    factor: room by the fair share; experts / top_k never drops.
  """

  factor: float = 1.25

  def __call__(
    self,
    expert: Expert,
    p: Tree,
    x: Array,
    route: Route,
    weigh_input: bool,
    compute: Compute,
    across: str | None = None,
  ) -> tuple[Array, Report]:
    """As of `Dense`."""
    n = jax.tree.leaves(p)[0].shape[0] * _ways(across)
    route, sizes = _by_expert(route, n)
    room = min(len(x), math.ceil(self.factor * len(route.tokens) / n))
    starts = jnp.cumsum(sizes) - sizes
    place = jnp.arange(len(route.tokens)) - starts[route.experts]
    fits = place < room
    slot = jnp.where(fits, route.experts * room + place, n * room)

    h = _inputs(x, route, weigh_input)
    rooms = jnp.zeros((n * room, x.shape[1]), h.dtype)
    rooms = rooms.at[slot].set(h, mode="drop").reshape(n, 1, room, -1)
    if across:  # [experts, 1, room] to [experts here, 1, devices * room]
      rooms = jax.lax.all_to_all(rooms, across, 0, 2, tiled=True)
    y, _ = jax.vmap(lambda p, h: expert(p, h, compute))(p, rooms)
    if across:
      y = jax.lax.all_to_all(y, across, 2, 0, tiled=True)
    y = y.reshape(n * room, -1)
    y = y.at[slot].get(mode="fill", fill_value=0)
    dropped = 1.0 - jnp.mean(fits.astype(jnp.float32))
    return _combine(y, x, route, weigh_input), {"dropped": dropped}


@dataclass(frozen=True)
class Ragged:
  """Tokens sorted by expert, each group times its matrix; nothing is dropped.

  See `jaxlm.layers.kernels.grouped` (and MegaBlocks, arXiv:2211.15841). Where
  experts are split over devices, each token's row travels to its experts, is
  weighted there, and travels back (`jaxlm.layers.exchange`).

  Attributes:
    room: rows that a device has room for, by its fair share; where it gets
      more, they come in rounds. None: for all rows of all devices.
  """

  room: float | None = 1.5

  def __call__(
    self,
    expert: Expert,
    p: Tree,
    x: Array,
    route: Route,
    weigh_input: bool,
    compute: Compute,
    across: str | None = None,
  ) -> tuple[Array, Report]:
    """As of `Dense`."""
    ways = _ways(across)
    n = jax.tree.leaves(p)[0].shape[0]
    route, sizes = _by_expert(route, n * ways)
    h = _inputs(x, route, weigh_input)
    if across is None:
      y = _in_groups(expert, p, h, sizes, compute)
      return _combine(y, x, route, weigh_input), {}

    def work(p: Tree, rows: tuple[Array, ...], sizes: Array) -> Array:
      h, *weights = rows
      y = _in_groups(expert, p, h, sizes, compute)
      return _weighted(y, *weights).astype(h.dtype) if weights else y

    most = exchange.room(len(h), ways, self.room)
    rows = (h,) if weigh_input else (h, route.weights)
    y = exchange.visit(work, across, most, p, rows, sizes.reshape(ways, n))
    return _combine(y, x, route, weighed=True), {}


def _in_groups(
  expert: Expert, p: Tree, h: Array, sizes: Array, compute: Compute
) -> Array:
  """What experts say to rows `[rows, dim]` sorted by expert."""
  grouped = {
    name: Grouped(w, sizes, p.get(name + "_bias"))
    for name, w in p.items()
    if not name.endswith("_bias")
  }
  y, _ = replace(expert, bias=False)(grouped, h[None], compute)
  return y[0]


Dispatch = Dense | Capacity | Ragged


def _ways(across: str | None) -> int:
  """Over how many devices experts are split."""
  return jax.lax.axis_size(across) if across else 1


def _by_expert(route: Route, n: int) -> tuple[Route, Array]:
  """Assignments sorted by expert, in their order, and how many each has."""
  order = jnp.argsort(route.experts, stable=True)
  sizes = jnp.bincount(route.experts, length=n).astype(jnp.int32)
  return jax.tree.map(lambda a: a[order], route), sizes


def _weighted(x: Array, weight: Array) -> Array:
  """Rows times their weights, in float32 and back."""
  return (x.astype(jnp.float32) * weight[:, None]).astype(x.dtype)


def _inputs(x: Array, route: Route, weigh_input: bool) -> Array:
  """What the expert of each assignment reads, `[n, dim]`."""
  h = x[route.tokens]
  return _weighted(h, route.weights) if weigh_input else h


def _combine(y: Array, x: Array, route: Route, weighed: bool) -> Array:
  """What experts say, summed by token: `[n, dim]` to `[tokens, dim]`."""
  y = y.astype(jnp.float32)
  if not weighed:
    y = y * route.weights[:, None]
  return jnp.zeros(x.shape, jnp.float32).at[route.tokens].add(y)


# --- The layer --------------------------------------------------------------


@dataclass(frozen=True)
class MoE:
  """y = sum_i w_i expert_i(x) over the experts a router chose for x.

  Attributes:
    expert: one expert; all are alike.
    experts: how many.
    top_k: how many work on a token.
    router: chooses them.
    shared: an expert that works on every token, or None (arXiv:2401.06066).
    shared_gate: what it says is multiplied by sigmoid(x W) (Qwen 1.5 MoE).
    weigh_input: weights multiply what an expert reads instead of what it says
      (Llama 4).
    dispatch: how tokens and experts meet.
  """

  expert: Expert
  experts: int
  top_k: int = 2
  router: Router = TopK()
  shared: Expert | None = None
  shared_gate: bool = False
  weigh_input: bool = False
  dispatch: Dispatch = Ragged()

  def __post_init__(self):
    self.router.check(self.experts, self.top_k)
    if self.expert.hidden_norm is not None:
      raise UserError("an expert cannot have a norm inside: use none")
    room = getattr(self.dispatch, "room", None)
    if room is not None and room <= 0:
      raise UserError(
        f"a dispatch with room={room} can take no row: use one above 0, for "
        "example 1.5, or None for the worst case"
      )
    if isinstance(self.dispatch, Capacity) and self.dispatch.factor <= 0:
      raise UserError(
        f"a capacity factor of {self.dispatch.factor} leaves experts no room: "
        "use one above 0, for example 1.25"
      )

  @property
  def dim(self) -> int:
    """Width of the residual stream."""
    return self.expert.dim

  def params(self) -> dict[str, Any]:
    """`router`, `experts` (stacked), and `shared` with its gate."""
    tree = {
      "router": self.router.params(self.dim, self.experts),
      "experts": stack(self.expert.params(), self.experts, "experts"),
    }
    if self.shared is not None:
      tree["shared"] = self.shared.params()
      if self.shared_gate:
        tree["shared_gate"] = Param(
          (self.dim, 1), ("embed", None), 1, FanIn(), jnp.float32
        )
    return tree

  def active(self) -> int:
    """Number of parameters that work on one token."""
    idle = self.experts - self.top_k
    return count(self.params()) - idle * count(self.expert.params())

  def flops(self) -> int:
    """Operations of one token's forward pass through the matmuls."""
    idle = self.experts - self.top_k
    return flops(self.params()) - idle * flops(self.expert.params())

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    compute: Compute = DEFAULT,
    key: Array | None = None,
  ) -> tuple[Array, Report]:
    """Maps `x` [batch, seq, dim] to the same shape, in float32.

    Args:
      p: arrays as declared by `params`.
      x: activations in the compute dtype.
      compute: how to run.
      key: for a router with noise; None means none (evaluation).

    Returns:
      The output, and a report: `aux`, the router's losses times their
      coefficients; `load`, each expert's share of the assignments
      `[experts]`; with `Capacity` also `dropped`.
    """
    noise = None
    if self.router.noise and key is not None:
      noise = jax.random.normal(key, (*x.shape[:2], self.experts))
    y, report = self._routed(p, x, noise, compute)
    if self.shared is not None:
      always, _ = self.shared(p["shared"], x, compute)
      if self.shared_gate:
        gate = dot(x.astype(jnp.float32), p["shared_gate"], "btd,do->bto")
        always = always * jax.nn.sigmoid(gate)
      y = y + always
    return y, report

  def _routed(
    self, p: dict[str, Any], x: Array, noise: Array | None, compute: Compute
  ) -> tuple[Array, Report]:
    """What the chosen experts say; under a mesh, on each device for itself.

    Each device routes its own rows and holds its share of the experts, and of
    every expert's hidden units; the sums over those, and the means a loss is a
    function of, are joined by collectives. A mesh of one device goes the same
    way: not every primitive of a grouped product knows explicit axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
      return self._local(p, x, noise, compute)
    rows = compute.spec(("batch", "length", None), x.shape) or PartitionSpec()
    split = self._split(compute, mesh)
    whole = jax.tree.map(lambda _: PartitionSpec(), p["router"])
    arrays = {"router": p["router"], "experts": p["experts"]}, x, noise
    noisy = None if noise is None else rows
    specs = {"router": whole, "experts": split}, rows, noisy

    def local(p: Tree, x: Array, noise: Array | None) -> tuple[Array, Report]:
      plain = replace(compute, rules=None)
      (across, *_), hidden = split["down"] or (None,), split["down"][1:2]
      return self._local(p, x, noise, plain, rows[:2], hidden, across)

    return jax.shard_map(
      local,
      in_specs=specs,
      out_specs=(rows, PartitionSpec()),
      check_vma=False,
    )(*jax.tree.map(jax.sharding.reshard, arrays, specs))

  def _split(self, compute: Compute, mesh: Any) -> dict[str, PartitionSpec]:
    """Where the experts' arrays lie while used.

    They may be split, and so may their hidden units.
    """

    def one(p: Param) -> PartitionSpec:
      if compute.rules is None:
        return PartitionSpec()
      axes = tuple(a if a in ("experts", "mlp") else None for a in p.axes)
      return compute.rules.computed_spec(axes, p.shape, mesh)

    return map_params(one, stack(self.expert.params(), self.experts, "experts"))

  def _local(
    self,
    p: dict[str, Any],
    x: Array,
    noise: Array | None,
    compute: Compute,
    rows: tuple = (),
    hidden: tuple = (),
    across: str | None = None,
  ) -> tuple[Array, Report]:
    """Routes and works; the last three name the mesh axes of each."""
    rows, hidden = _names(rows), _names(hidden)
    experts = p["experts"]
    if hidden and "down_bias" in experts:  # summed over devices: one adds it
      first = jax.lax.axis_index(hidden) == 0
      bias = jnp.where(first, experts["down_bias"], 0)
      experts = experts | {"down_bias": bias}
    route, means = self.router(p["router"], x, self.top_k, noise)
    y, seen = self.dispatch(
      self.expert,
      experts,
      x.reshape(-1, self.dim),
      route,
      self.weigh_input,
      compute,
      across,
    )
    if hidden:
      y = jax.lax.psum(y, hidden)
    if rows:
      means, seen = jax.lax.pmean((means, seen), rows)
    return y.reshape(x.shape), self.router.report(means) | seen


def _names(spec: tuple) -> tuple[str, ...]:
  """The mesh axes in a part of a `PartitionSpec`."""
  flat = [e if isinstance(e, tuple) else (e,) for e in spec if e is not None]
  return tuple(name for names in flat for name in names)
