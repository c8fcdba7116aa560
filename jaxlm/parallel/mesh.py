"""The mesh: all devices as a grid with named axes. One device is a mesh too."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxlm.errors import UserError
from jaxlm.parallel.rules import MESH_AXES, Rules


def parse_sizes(text: str) -> dict[str, int]:
  """`'fsdp:4,tensor:2'` as sizes by axis; an empty text as no sizes.

  Raises:
    UserError: for a malformed entry or an unknown axis.
  """
  sizes = {}
  for part in filter(None, (p.strip() for p in text.split(","))):
    name, _, size = part.partition(":")
    if name not in MESH_AXES:
      raise UserError(
        f"parallel.mesh names the axis {name!r}; known: {', '.join(MESH_AXES)}"
      )
    if name in sizes:
      raise UserError(f"parallel.mesh names the axis {name!r} twice")
    try:
      sizes[name] = int(size)
    except ValueError:
      raise UserError(
        f"parallel.mesh entry {part!r} should read like '{name}:4' or "
        f"'{name}:-1' for all devices that are left"
      ) from None
  return sizes


def make_mesh(
  rules: Rules, sizes: str = "", devices: list[jax.Device] | None = None
) -> Mesh:
  """A mesh over `devices` (default: all) with all of `MESH_AXES`.

  Args:
    rules: gives the default size of each axis.
    sizes: overrides them, as in `'fsdp:4,tensor:2'`; -1 fills in.
    devices: what to arrange.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  wanted = dict.fromkeys(MESH_AXES, 1)
  wanted.update(parse_sizes(sizes) or dict(rules.mesh))
  fixed = math.prod(n for n in wanted.values() if n > 0)
  free = [name for name, n in wanted.items() if n == -1]
  if any(n == 0 or n < -1 for n in wanted.values()) or len(free) > 1:
    raise UserError(
      f"parallel.mesh {wanted}: sizes are positive, and one may be -1"
    )
  if free and len(devices) % fixed == 0:
    wanted[free[0]] = len(devices) // fixed
  elif free and len(devices) < fixed and not sizes:
    # A preset's default group is wider than this machine: shrink it to fit.
    wanted = dict.fromkeys(MESH_AXES, 1) | {free[0]: len(devices)}
  if math.prod(wanted.values()) != len(devices):
    shape = " x ".join(f"{k}:{v}" for k, v in wanted.items() if v != 1)
    needs = f"a multiple of {fixed}" if -1 in wanted.values() else fixed
    raise UserError(
      f"a mesh of {shape or 'ones'} needs {needs} devices and there are "
      f"{len(devices)}; set parallel.mesh to sizes that multiply to "
      f"{len(devices)}, or one of them to -1 to fill in"
    )
  shape = tuple(wanted.values())
  kinds = (AxisType.Explicit,) * len(MESH_AXES)
  try:
    return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=devices)
  except NotImplementedError:  # an axis that is part of one of a TPU's torus
    grid = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
    return Mesh(grid, MESH_AXES, axis_types=kinds)


def process_rows(
  mesh: Mesh,
  rules: Rules,
  rows: int,
  accumulate: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> np.ndarray:
  """Which rows of a global batch a process's devices hold, ascending.

  What each process reads is decided here, by where the batch is to lie: all
  rows where the mesh does not cut the batch (tensor parallelism over hosts),
  and a share of every part where a batch is computed in parts.

  Args:
    mesh: all devices.
    rules: says along which axes a batch is cut.
    rows: in the global batch.
    accumulate: parts it is computed in, one after the other.
    devices: those of the process; None means this process.

  Returns:
    Numbers of rows, each 0 to `rows` - 1.
  """
  mine = set(mesh.local_devices if devices is None else devices)
  shape = (rows // accumulate,)
  place = NamedSharding(mesh, rules.activation_spec(("batch",), shape, mesh))
  held = {
    i
    for device, (part,) in place.devices_indices_map(shape).items()
    if device in mine
    for i in range(*part.indices(shape[0]))
  }
  starts = np.arange(accumulate)[:, None] * shape[0]
  return (starts + np.array(sorted(held), np.int64)).ravel()
