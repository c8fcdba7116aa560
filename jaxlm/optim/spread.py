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
  """`fn(x)`, with matrices dealt out over the devices of the current mesh.

  Args:
    fn: treats every index of the stacked dimensions alike and apart, keeps
      the shape, and turns zeros into something finite.
    x: any array; may be sharded in any way.
    stacked: the dimensions that stack matrices. The first is padded to what
      the mesh divides; without any, every device computes the same.

  Returns:
    `fn(x)`, sharded like `x` where the mesh's axes are Explicit.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return fn(x)
  spec, padded = _deal(x.shape, stacked, dict(mesh.shape))
  whole = jnp.pad(x, [(0, p - n) for n, p in zip(x.shape, padded, strict=True)])
  explicit = AxisType.Explicit in mesh.axis_types
  move = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
  y = fn(move(whole, spec))
  if explicit:
    y = move(y, jax.typeof(whole).sharding.spec)
  return y[tuple(slice(n) for n in x.shape)]


def _deal(
  shape: tuple[int, ...], stacked: tuple[int, ...], sizes: dict[str, int]
) -> tuple[PartitionSpec, tuple[int, ...]]:
  """Which mesh axes each stacked dimension takes, and the padded shape."""
  spec: list[tuple[str, ...] | None] = [None] * len(shape)
  padded, free = list(shape), dict(sizes)
  for dim in reversed(stacked):
    if dim == stacked[0]:  # takes what is left, padded to divide
      take = tuple(free)
      n = math.prod(free.values())
      padded[dim] = -(-shape[dim] // n) * n
    else:
      take = _dividing(shape[dim], free)
    for name in take:
      free.pop(name)
    spec[dim] = take or None
  return PartitionSpec(*spec), tuple(padded)


def _dividing(size: int, free: dict[str, int]) -> tuple[str, ...]:
  """Mesh axes, in order, that together divide `size`."""
  take, n = [], 1
  for name, count in free.items():
    if size % (n * count) == 0:
      take.append(name)
      n *= count
  return tuple(take)
