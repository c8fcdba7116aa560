"""Rule tables: which logical axis lies along which mesh axis.

A model names its dimensions ('embed', 'heads', 'batch', ...); a mesh names its
own ('data', 'fsdp', 'tensor', ...); a `Rules` value joins them, three times
over:

- `stored`: parameters (and their optimizer state) at rest,
- `computed`: parameters while a layer uses them,
- `activations`: what flows between layers.

FSDP is nothing but the difference between the first two (as in ZeRO-3,
arXiv:1910.02054); tensor parallelism (arXiv:1909.08053) is their agreement.
Parallelism is changed by changing a table, never by changing a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from jaxlm.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert", "pipe")

Table = tuple[tuple[str, str | tuple[str, ...]], ...]


@dataclass(frozen=True)
class Rules:
  """Three tables of (logical axis, mesh axis or axes) and a mesh to go with.

  Attributes:
    stored: where parameters rest.
    computed: where parameters are while used.
    activations: where activations are.
    mesh: default size of each mesh axis; -1 takes the devices that are left.
  """

  stored: Table = ()
  computed: Table = ()
  activations: Table = (("batch", ("data", "fsdp")),)
  mesh: tuple[tuple[str, int], ...] = (("data", -1),)

  def stored_spec(
    self, axes: Sequence[str | None], shape: Sequence[int], mesh: Any
  ) -> PartitionSpec:
    """Where a parameter of these axes rests on `mesh`."""
    return _spec(self.stored, axes, shape, mesh)

  def computed_spec(
    self, axes: Sequence[str | None], shape: Sequence[int], mesh: Any
  ) -> PartitionSpec:
    """Where a parameter of these axes is while a layer uses it."""
    return _spec(self.computed, axes, shape, mesh)

  def activation_spec(
    self, axes: Sequence[str | None], shape: Sequence[int], mesh: Any
  ) -> PartitionSpec:
    """Where an activation of these axes is."""
    return _spec(self.activations, axes, shape, mesh)


def _spec(
  table: Table, axes: Sequence[str | None], shape: Sequence[int], mesh: Any
) -> PartitionSpec:
  """Looks up each axis; a mesh axis serves once, and only if it has a size.

  A dimension that the mesh axes do not divide is left whole: a vocabulary of
  65 on 8 devices is replicated, and everything else is still sharded.
  """
  lookup, used, spec = dict(table), set(), []
  for axis, size in zip(axes, shape, strict=True):
    names = lookup.get(axis, ()) if axis else ()
    names = (names,) if isinstance(names, str) else names
    names = tuple(
      n for n in names if mesh.shape.get(n, 1) > 1 and n not in used
    )
    if names and size % math.prod(mesh.shape[n] for n in names) == 0:
      used.update(names)
      spec.append(names if len(names) > 1 else names[0])
    else:
      spec.append(None)
  return PartitionSpec(*spec)


# --- Presets ----------------------------------------------------------------

_SHARDED = (("embed", "fsdp"), ("latent", "fsdp"))
_TENSOR = (
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
)
_BATCH = (("batch", ("data", "fsdp")),)

PRESETS: dict[str, Rules] = {
  # Every device holds the whole model and takes a share of the batch.
  "dp": Rules(activations=_BATCH, mesh=(("data", -1),)),
  # Parameters and optimizer state are split; a layer is gathered when used.
  "fsdp": Rules(stored=_SHARDED, activations=_BATCH, mesh=(("fsdp", -1),)),
  # Heads and hidden units are split; activations meet after each block.
  "tp": Rules(
    stored=_TENSOR,
    computed=_TENSOR,
    activations=_BATCH + _TENSOR,
    mesh=(("tensor", -1),),
  ),
  # Both: FSDP between groups, tensor parallelism inside a group of two.
  "fsdp_tp": Rules(
    stored=_SHARDED + _TENSOR,
    computed=_TENSOR,
    activations=_BATCH + _TENSOR,
    mesh=(("fsdp", -1), ("tensor", 2)),
  ),
}


def preset(name: str) -> Rules:
  """The rule table of that name; an unknown name lists the known ones."""
  if name not in PRESETS:
    known = ", ".join(sorted(PRESETS))
    raise UserError(f"unknown parallel.preset {name!r}; known: {known}")
  return PRESETS[name]
