"""Trees of arrays on disk, through orbax.

Arrays are stored under the plain names of their paths ("params/wte"), not as
the containers that held them: what was saved outlives a renamed state class,
and a part of it is simply fewer names. They can be read back onto any mesh.

Left uncompressed: weights do not compress, and the zstd that orbax would use
took 1.7 times the CPU time for 8 % fewer bytes.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
  ocp = _orbax()
  handler = ocp.PyTreeCheckpointHandler(use_compression=False)
  writer = ocp.AsyncCheckpointer(handler)
  # Orbax refuses empty arrays; `read` makes them again from their shapes.
  leaves = {name: leaf for name, leaf in named(tree).items() if leaf.size}
  writer.save(folder, ocp.args.PyTreeSave(leaves))
  return writer.wait_until_finished


def read(folder: Path, like: PyTree) -> PyTree:
  """Reads a tree, or the part of it that `like` names.

  Args:
    folder: what `start_write` wrote.
    like: tree of `jax.ShapeDtypeStruct`; arrays take its dtypes, and its
      shardings where given, else they go to the first device.
  """
  ocp = _orbax()
  everything = named(like)
  names = {name: x for name, x in everything.items() if x.size}
  places = {name: _place(x) for name, x in names.items()}
  arguments = ocp.args.PyTreeRestore(names, places, partial_restore=True)
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  found = reader.restore(folder, arguments) if names else {}
  leaves = [
    found[name] if x.size else _empty(x) for name, x in everything.items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _empty(leaf) -> jax.Array:
  return jax.device_put(np.empty(leaf.shape, leaf.dtype), _sharding(leaf))


def _sharding(leaf) -> jax.sharding.Sharding:
  given = getattr(leaf, "sharding", None)
  return given or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _place(leaf) -> Any:
  """Orbax's way to say shape, dtype and sharding of one array."""
  return _orbax().ArrayRestoreArgs(
    sharding=_sharding(leaf), global_shape=leaf.shape, dtype=leaf.dtype
  )


@functools.cache
def _orbax() -> Any:
  """The library, imported when first needed: it takes a quarter of a second.

  It logs a traceback for errors that it also raises; ours are raised once.
  """
  import orbax.checkpoint as ocp
  from absl import logging

  def keep(record) -> bool:
    return record.levelname != "ERROR" or "orbax" not in record.pathname

  logging.get_absl_logger().addFilter(keep)
  return ocp
