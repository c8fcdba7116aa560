"""Rows split over devices: how their tokens lie, and who attends to what.

Between attentions each device works on its own part of every row, and nothing
else changes. Under a causal mask the parts are unequal work: the last tokens
see everything, the first almost nothing. So a row is cut into twice as many
chunks as devices, and device i takes chunk i from the front and chunk i from
the back ('zigzag'): then all have the same. Masks, rotations and losses read
positions, so nobody else needs to know.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute, active_mesh
from jaxlm.layers.mask import Mask, PrefixLM
from jaxlm.layers.ring import attend_ring
from jaxlm.layers.ring_plan import Setting

Array = jax.Array
Tree = Any

FORMS = ("ring", "gather")


def ways(compute: Compute) -> int:
  """How many devices share a row."""
  mesh = active_mesh()
  if mesh is None or compute.rules is None:
    return 1
  return compute.rules.ways("length", mesh)


def share(length: int, compute: Compute) -> int:
  """How many of a row's `length` tokens each device has.

  Raises:
    UserError: for rows that do not divide.
  """
  n = ways(compute)
  if length % n:
    near = max(round(length / n), 1) * n
    raise UserError(
      f"rows of {length} tokens do not divide among the {n} devices of the "
      f"mesh axis context; the nearest length that does is {near}"
    )
  return length // n


def divide(
  tokens: Array, at: At, compute: Compute, turn: bool
) -> tuple[Array, At]:
  """Lays rows out over the devices that share them.

  Args:
    tokens: `[batch, seq]`, or embeddings `[batch, seq, dim]`.
    at: where they stand.
    compute: says which devices.
    turn: lay them out as a zigzag, where their number allows it. What reads
      the place of a token, and not its position, wants False.

  Returns:
    The same, in place; positions are written out where tokens changed theirs.

  Raises:
    UserError: for rows that do not divide.
  """
  n, length = ways(compute), tokens.shape[1]
  if n == 1:
    return tokens, at
  share(length, compute)
  tokens = _placed(tokens, compute)
  fields = At(at.positions, at.segments, at.blocks)
  fields = jax.tree.map(lambda x: _placed(x, compute), fields)
  order = at.order
  if turn and length % (2 * n) == 0:
    if fields.positions is None:
      order, row = "zigzag", jnp.arange(length, dtype=jnp.int32)[None]
      row = _placed(jnp.broadcast_to(row, tokens.shape[:2]), compute)
      fields = fields.replace(positions=row)
    tokens, fields = zigzag((tokens, fields), compute)
  return tokens, at.replace(
    positions=fields.positions,
    segments=fields.segments,
    blocks=fields.blocks,
    order=order,
    turned=turn and length % (2 * n) == 0,
  )


def restore(x: Array, at: At, compute: Compute) -> Array:
  """Features `[batch, seq, dim]` in the order in which their tokens came."""
  return zigzag(x, compute, back=True) if at.turned else x


def _placed(x: Array, compute: Compute) -> Array:
  """`[batch, seq, ...]` where the devices that share a row have it."""
  spec = compute.spec(
    ("batch", "length", *(None for _ in x.shape[2:])), x.shape
  )
  return jax.sharding.reshard(x, spec)


def zigzag(tree: Tree, compute: Compute, back: bool = False) -> Tree:
  """Moves chunks of rows `[batch, seq, ...]` to where they are balanced.

  Device d has chunks 2d and 2d + 1 of a plain row, one even and one odd, and of
  a zigzag likewise: so the even chunks trade places, and the odd ones.

  Args:
    tree: arrays that all are split over the same devices.
    compute: says which.
    back: from a zigzag to plain rows.
  """
  tree = jax.tree.map(lambda x: _placed(x, compute), tree)
  specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)
  axis = jax.tree.leaves(specs)[0][1]
  n = ways(compute)
  home = [min(j, 2 * n - 1 - j) for j in range(2 * n)]  # of chunk j
  trades = [[(d, home[2 * d + odd]) for d in range(n)] for odd in (0, 1)]
  if back:
    trades = [[(b, a) for a, b in trade] for trade in trades]

  def move(x: Array) -> Array:
    crossed = jax.lax.axis_index(axis) % 2 == 1
    pair = jnp.split(x, 2, axis=1)
    pair = _crossed(pair, crossed) if back else pair
    pair = [
      jax.lax.ppermute(x, axis, to) for x, to in zip(pair, trades, strict=True)
    ]
    return jnp.concatenate(pair if back else _crossed(pair, crossed), axis=1)

  return jax.shard_map(
    lambda tree: jax.tree.map(move, tree),
    in_specs=(specs,),
    out_specs=specs,
    check_vma=False,
  )(tree)


def _crossed(pair: list[Array], crossed: Array) -> list[Array]:
  """The pair, or its reverse where `crossed`."""
  a, b = pair
  return [jnp.where(crossed, b, a), jnp.where(crossed, a, b)]


def undivided(mixer: Any, p: Tree, x: Array, at: At, compute: Compute):
  """What a mixer says that reads rows in order: every device runs it on all.

  Returns:
    `[batch, seq, dim]`, split again, and the mixer's report.
  """
  table = tuple(
    row for row in compute.rules.activations if row[0] not in ("length", "seq")
  )
  rules = replace(compute.rules, activations=table)
  at = jax.tree.map(whole_rows, (at.positions, at.segments))
  y, report = mixer(
    p, whole_rows(x), At(*at), None, replace(compute, rules=rules)
  )
  return _placed(y, compute), report


# --- Attention --------------------------------------------------------------


def attend_divided(
  form: Any,
  q: Array,
  k: Array,
  v: Array,
  mask: Mask,
  at: At,
  keys: At,
  extras: Tree,
  axis: str,
  compute: Compute,
  chip: Any = None,
) -> Array:
  """Attention of a device's queries, inside `shard_map`.

  Args:
    form: what would do it if it had the keys; see `attend`.
    q: this device's queries `[batch, queries, heads, head_dim]`.
    k: its keys, or all of them.
    v: its values, likewise.
    mask: who sees whom.
    at: where the queries stand.
    keys: where the keys stand.
    extras: as in `attend`: sinks, slopes, bias, moved.
    axis: the mesh axis that rows are split over; keys too, unless they are as
      many as a whole row of them.
    compute: says in which form.
    chip: whose kernel works on a pair of parts; None means plain XLA.

  Returns:
    `[batch, queries, heads, value_dim]`.

  Raises:
    UserError: for an unknown form.
  """
  form_of = compute.split.context
  if form_of not in FORMS:
    raise UserError(
      f"unknown parallel.context {form_of!r}; known: {', '.join(FORMS)}"
    )
  orders = [at.order or (at.positions is None and "plain") for at in (at, keys)]
  known = orders[0] == orders[1] and not (
    isinstance(mask, PrefixLM) and at.blocks is not None
  )
  at, keys = (written_out(a, x.shape[1], axis) for a, x in ((at, q), (keys, k)))
  if extras["bias"] is not None:
    k, v, keys = jax.tree.map(
      lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), (k, v, keys)
    )
    return form(q, k, v, mask, at, keys, **extras)
  order = orders[0] if known and orders[0] else None
  setting = Setting(
    mask=mask,
    axis=axis,
    ways=jax.lax.axis_size(axis),
    queries=q.shape[1],
    keys=k.shape[1],
    order=order,
    checks=order is None or at.segments is not None,
    gather=form_of == "gather",
    scale=form.keywords["scale"],
    softcap=form.keywords["softcap"],
    chip=chip,
  )
  return attend_ring(
    q, k, v, at, keys, setting, extras["sinks"], extras["slopes"]
  )


def written_out(at: At, n: int, axis: str) -> At:
  """`at` with the positions of a device's `n` tokens written out."""
  if at.positions is not None:
    return at
  first = jax.lax.axis_index(axis) * n
  return at.replace(positions=first + jnp.arange(n, dtype=jnp.int32)[None])


def whole_rows(tree: Tree) -> Tree:
  """`[batch, seq, ...]` with the positions of a row all in one place."""

  def one(x: Array) -> Array:
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, PartitionSpec(spec[0], None, *spec[2:]))

  return tree if active_mesh() is None else jax.tree.map(one, tree)
