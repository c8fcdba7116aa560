"""Trees of arrays on disk, through orbax.

Arrays are stored under the plain names of their paths ("params/wte"), not as
the containers that held them: what was saved outlives a renamed state class,
and a part of it is simply fewer names. They can be read back onto any mesh.

Left uncompressed: weights do not compress, and the zstd that orbax would use
took 1.7 times the CPU time for 8 % fewer bytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

PyTree = Any
Shapes = dict[str, list]  # {name: [shape, dtype]}, fit for JSON


def named(tree: PyTree) -> dict[str, Any]:
  """{'params/wte': leaf}, in the tree's order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  names = {
    jax.tree_util.keystr(path, simple=True, separator="/") or "leaf": leaf
    for path, leaf in leaves
  }
  if len(names) != len(leaves):
    raise ValueError("two leaves of the tree have the same path")
  return names


def shapes(tree: PyTree) -> Shapes:
  """{'params/wte': [[65, 128], 'float32']}."""
  return {n: [list(x.shape), str(x.dtype)] for n, x in named(tree).items()}


def difference(saved: Shapes, wanted: Shapes, part: bool = False) -> str | None:
  """The first leaf that keeps what was saved from fitting the model.

  Args:
    saved: what is on disk.
    wanted: what the model has.
    part: whether `wanted` may be a part of `saved`, in other dtypes.
  """
  for name, (shape, dtype) in wanted.items():
    if name not in saved:
      return f"the model has {name} {shape} and the checkpoint has not"
    old_shape, old_dtype = saved[name]
    if old_shape != shape:
      return f"{name} is {old_shape} in the checkpoint and {shape} in the model"
    if old_dtype != dtype and not part:
      return f"{name} is {old_dtype} in the checkpoint and {dtype} in the model"
  for name in () if part else saved:
    if name not in wanted:
      return f"the checkpoint has {name} {saved[name][0]} and the model has not"
  return None


def start_write(folder: Path, tree: PyTree) -> Callable[[], None]:
  """Starts to write a tree into a new folder and returns `wait()`.

  The arrays are safe from donation when this returns: on accelerators they
  have been copied to the host, on CPU their memory is held until written.

  Raises:
    OSError, ValueError: it could not be written; so does `wait()`.
  """
  import orbax.checkpoint as ocp  # a quarter of a second: only when needed

  handler = ocp.PyTreeCheckpointHandler(use_compression=False)
  writer = ocp.AsyncCheckpointer(handler)
  with _Quiet():
    writer.save(folder, ocp.args.PyTreeSave(named(tree)))

  def wait() -> None:
    with _Quiet():
      writer.wait_until_finished()

  return wait


def read(folder: Path, like: PyTree) -> PyTree:
  """Reads a tree, or the part of it that `like` names.

  Args:
    folder: what `start_write` wrote.
    like: tree of `jax.ShapeDtypeStruct`; arrays take its dtypes, and its
      shardings where given, else they go to the first device.
  """
  import orbax.checkpoint as ocp

  def to(leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(
      sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
    )

  names = named(like)
  places = {name: to(leaf) for name, leaf in names.items()}
  arguments = ocp.args.PyTreeRestore(names, places, partial_restore=True)
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  leaves = reader.restore(folder, arguments)
  structure = jax.tree.structure(like)
  return jax.tree.unflatten(structure, [leaves[name] for name in names])


class _Quiet:
  """Keeps orbax from logging a traceback for an error that it raises."""

  def __enter__(self):
    from absl import logging

    self._logger = logging.get_absl_logger()
    self._logger.addFilter(self._foreign)
    return self

  def __exit__(self, *exc):
    self._logger.removeFilter(self._foreign)

  @staticmethod
  def _foreign(record) -> bool:
    return "orbax" not in record.pathname
