"""Where an optimizer works: on shares of parameters, or on whole matrices.

`sharded` is ZeRO-1 (arXiv:1910.02054): parameters may be whole everywhere, but
each device keeps the optimizer's state of its share alone, updates that share,
and gets the other updates from the others.

`on_whole_matrices` is how Muon works on sharded parameters. FSDP and tensor
parallelism cut each matrix; orthogonalising needs it whole. But layers (and
experts, and heads) stack many matrices of one shape, so the cut is turned by a
quarter: from inside the matrices to between them. Each device then has some
matrices whole, works on those alone, and the result is cut again as the
parameter was. Nothing is computed twice and two all-to-alls travel per array,
as in Moonlight's distributed Muon (arXiv:2502.16982) and Dion's reference
(arXiv:2504.05295).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

from jaxlm.layers.param import Tree, move
from jaxlm.parallel.rules import Rules

Array = jax.Array


def sharded(
  tx: optax.GradientTransformation, tree: Tree, rules: Rules
) -> optax.GradientTransformation:
  """`tx`, working where the rules say that the optimizer's state lies.

  Args:
    tx: any transformation.
    tree: the `Param` of every parameter it sees.
    rules: where they have no table of their own for the state, this is `tx`.

  Returns:
    A transformation of the same numbers. `init` makes the state where it is to
    lie; `update` takes each device's share of gradients and parameters (where
    they are reduced over the devices, XLA may then reduce-scatter them), and
    gathers the updates to where the parameters are.
  """
  if rules.state is None:
    return tx
  tx = optax.with_extra_args_support(tx)

  def share(arrays: Tree) -> Tree:
    return move(arrays, tree, rules.state_spec)

  def init(params: Tree) -> Tree:
    return tx.init(share(params))

  def update(grads, state, params=None, **extra):
    params = None if params is None else share(params)
    updates, state = tx.update(share(grads), state, params, **extra)
    return move(updates, tree, rules.stored_spec), state

  return optax.GradientTransformationExtraArgs(init, update)


def on_whole_matrices(
  fn: Callable[[Array], Array], x: Array, stacked: tuple[int, ...]
) -> Array:
  """`fn` of stacked matrices, dealt out over the devices of the current mesh.

  Args:
    fn: maps `[n, ...]`, some of the matrices and their other dimensions whole,
      to the same shape; treats each index of the first dimension alike and
      apart, and turns zeros into something finite.
    x: any array; may be sharded in any way.
    stacked: the dimensions that stack matrices; together they are padded to
      what the mesh divides.

  Returns:
    The results in the shape of `x`, sharded like `x` where the mesh's axes are
    Explicit.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return _in_line(fn, x, stacked)
  if AxisType.Auto in mesh.axis_types:  # where `x` is, is for XLA to know
    spec = PartitionSpec(mesh.axis_names)

    def dealt(flat: Array) -> Array:
      padded = _pad(flat, mesh.size)
      padded = jax.lax.with_sharding_constraint(padded, spec)
      return fn(padded)[: len(flat)]

    return _in_line(dealt, x, stacked)
  spec = jax.typeof(x).sharding.spec
  moves = _moves(spec, stacked, dict(mesh.shape))
  ways = math.prod(mesh.shape[axis] for axis, _ in moves)

  def local(flat: Array) -> Array:
    whole = _pad(flat, ways)
    for axis, dim in moves:
      whole = _deal(whole, axis, dim)
    whole = fn(whole)
    for axis, dim in reversed(moves):
      whole = _undo(whole, axis, dim)
    return whole[: len(flat)]

  return jax.shard_map(
    lambda x: _in_line(local, x, stacked),
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )(x)


def _in_line(
  fn: Callable[[Array], Array], x: Array, stacked: tuple[int, ...]
) -> Array:
  """`fn` of `x` with its stacked dimensions made one, in front."""
  front = tuple(range(len(stacked)))
  x = jnp.moveaxis(x, stacked, front)
  y = fn(x.reshape(-1, *x.shape[len(stacked) :]))
  return jnp.moveaxis(y.reshape(x.shape), front, stacked)


def _pad(x: Array, ways: int) -> Array:
  """Zeros at the end, so that `ways` divide the first dimension."""
  return jnp.pad(x, [(0, -len(x) % ways)] + [(0, 0)] * (x.ndim - 1))


Move = tuple[str, int | None]


def _moves(
  spec: PartitionSpec, stacked: tuple[int, ...], sizes: dict[str, int]
) -> list[Move]:
  """Mesh axes to deal matrices over, each with the dimension that it cuts now.

  None is for an axis along which all devices hold the same. An axis that cuts
  a stacked dimension has dealt its share already. Of several axes that cut one
  dimension the last goes first, so that parts are joined in their order.
  """
  names = [e if isinstance(e, tuple) else (e,) for e in spec]
  used = {name for part in names for name in part}
  moves: list[Move] = [(n, None) for n in sizes if n not in used]
  rest = [dim for dim in range(len(spec)) if dim not in stacked]
  for place, dim in enumerate(rest, start=1):
    moves += [(name, place) for name in reversed(names[dim]) if name]
  return [(name, place) for name, place in moves if sizes[name] > 1]


def _deal(x: Array, axis: str, dim: int | None) -> Array:
  """Each device along `axis` takes a part of the matrices, whole along `dim`.

  One axis at a time: XLA's own way from one placement to the other would be
  to gather everything everywhere first.
  """
  if dim is None:
    n = len(x) // jax.lax.axis_size(axis)
    start = jax.lax.axis_index(axis) * n
    return jax.lax.dynamic_slice_in_dim(x, start, n, 0)
  return jax.lax.all_to_all(x, axis, 0, dim, tiled=True)


def _undo(x: Array, axis: str, dim: int | None) -> Array:
  """The inverse of `_deal`."""
  if dim is None:
    return jax.lax.all_gather(x, axis, axis=0, tiled=True)
  return jax.lax.all_to_all(x, axis, dim, 0, tiled=True)
