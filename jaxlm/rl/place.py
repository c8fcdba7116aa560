"""Where a run of PPO or GRPO lies: the mesh it may have, and rows upon it.

Parameters lie where training puts them; what is added here are responses, which
come from the host and return to it between two programs. A batch is cut along
the axes that cut one in training, and each device writes, scores and learns
from the responses it has.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from ml_collections import FrozenConfigDict

from jaxlm import recipe
from jaxlm.errors import UserError
from jaxlm.parallel.rules import Rules

Tree = Any


def mesh(
  config: FrozenConfigDict, devices: list[jax.Device] | None = None
) -> Mesh:
  """All devices, arranged as `parallel` says.

  Args:
    config: says how.
    devices: what to arrange; None means all there are.

  Raises:
    UserError: as `recipe.mesh`; for rows or layers divided among devices.
  """
  made = recipe.mesh(config, devices)
  check(config, made)
  return made


def check(config: FrozenConfigDict, mesh: Mesh) -> None:
  """Raises a UserError for a mesh that divides rows or layers."""
  for axis, part, what in (
    ("context", "cp", "the positions of a row"),
    ("pipe", "pp", "the layers"),
  ):
    if mesh.shape[axis] > 1:
      raise UserError(
        f"parallel.preset={config.parallel.preset} divides {what} among "
        f"devices (mesh axis {axis}), and responses cannot be written so; "
        f"leave out {part}: dp, fsdp, tp and fsdp_tp can"
      )


def rows(tree: Tree, rules: Rules | None) -> Tree:
  """Leaves `[rows, ...]` on the mesh in force, each device its share.

  Where there is no mesh, or one of one device, they stay as they are.
  """
  return _put(tree, rules, of_rows)


def of_rows(rules: Rules, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """Where an array `[rows, ...]` lies on a mesh."""
  axes = ("batch", *(None,) * (len(shape) - 1))
  return NamedSharding(mesh, rules.activation_spec(axes, shape, mesh))


def parts(tree: Tree, rules: Rules | None) -> Tree:
  """The same for leaves as a step takes them, `[steps, parts, rows, ...]`."""
  return _put(tree, rules, recipe.batch_place)


def _put(tree: Tree, rules: Rules | None, where: Callable) -> Tree:
  """Leaves where `where(rules, shape, mesh)` says."""
  here = jax.sharding.get_mesh()
  if rules is None or here.empty or here.size == 1:
    return tree
  return jax.tree.map(
    lambda x: jax.device_put(x, where(rules, x.shape, here)), tree
  )
