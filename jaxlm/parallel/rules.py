"""Rule tables: which logical axis lies along which mesh axis.

A model names its dimensions ('embed', 'heads', 'batch', ...); a mesh names its
own ('data', 'fsdp', 'tensor', ...); a `Rules` value joins them, once for each
kind of array:

- `stored`: parameters at rest,
- `computed`: parameters while a layer uses them,
- `activations`: what flows between layers,
- `state`: the optimizer's memory of each parameter, and averaged parameters,
- `gradients`: what the gradients of microbatches are summed in.

FSDP is nothing but the difference between the first two (as in ZeRO-3,
arXiv:1910.02054), ZeRO-1 that between the first and the fourth; tensor
parallelism (arXiv:1909.08053) is the agreement of the first three. Parallelism
is changed by changing a table, never by changing a layer.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import PartitionSpec

from jaxlm.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert", "pipe")

# The names models give to dimensions. A mesh axis serves one dimension of an
# array; where two ask for it, the one whose name comes first here has it.
AXES = (
  "batch",
  "layers",
  "blocks",
  "experts",
  "heads",
  "kv_heads",
  "mlp",
  "vocab",
  "positions",
  "head_dim",
  "length",  # positions that a branch (attention, feed-forward) works on
  "seq",  # positions of the residual stream
  "embed",
  "latent",
)

Names = str | tuple[str, ...]
Table = tuple[tuple[str, Names], ...]


def _tuple(names: Names) -> tuple[str, ...]:
  return (names,) if isinstance(names, str) else tuple(names)


_BATCH = (("batch", ("data", "fsdp", "expert")), ("length", "context"))


@dataclass(frozen=True)
class Rules:
  """Tables of (logical axis, mesh axis or axes) and a mesh to go with.

  Attributes:
    stored: where parameters rest.
    computed: where parameters are while used.
    activations: where activations are.
    mesh: default size of each mesh axis; -1 takes the devices that are left.
    state: where the optimizer's state lies; None means as `stored`.
    gradients: where gradients are summed; None means as `stored`.

  Raises:
    UserError: for a mesh axis that there is not.
  """

  stored: Table = ()
  computed: Table = ()
  activations: Table = _BATCH
  mesh: tuple[tuple[str, int], ...] = (("data", -1),)
  state: Table | None = None
  gradients: Table | None = None

  def __post_init__(self):
    tables = (self.stored, self.computed, self.activations)
    for table in (*tables, self.state or (), self.gradients or ()):
      for axis, names in table:
        for name in _tuple(names):
          _known(name, MESH_AXES, f"a rule puts {axis!r} along mesh axis")
    for name, _ in self.mesh:
      _known(name, MESH_AXES, "a rule table's mesh has an axis")

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

  def state_spec(
    self, axes: Sequence[str | None], shape: Sequence[int], mesh: Any
  ) -> PartitionSpec:
    """Where the optimizer's state of a parameter of these axes lies."""
    table = self.stored if self.state is None else self.state
    return _spec(table, axes, shape, mesh)

  def gradient_spec(
    self, axes: Sequence[str | None], shape: Sequence[int], mesh: Any
  ) -> PartitionSpec:
    """Where gradients of a parameter of these axes are summed."""
    table = self.stored if self.gradients is None else self.gradients
    return _spec(table, axes, shape, mesh)

  def check(self, axes: Iterable[str]) -> None:
    """Checks that rules speak of `axes`, or of what the library names itself.

    Raises:
      UserError: for another logical axis, with the nearest that there is.
    """
    known = tuple(dict.fromkeys((*AXES, *axes)))
    tables = (self.stored, self.computed, self.activations)
    for table in (*tables, self.state or (), self.gradients or ()):
      for axis, _ in table:
        _known(axis, known, "a rule speaks of the dimension")

  def ways(self, axis: str, mesh: Any) -> int:
    """Into how many parts `mesh` cuts activations along a logical axis."""
    names = _tuple(dict(self.activations).get(axis, ()))
    return math.prod(mesh.shape.get(name, 1) for name in names)


def _known(name: str, among: Iterable[str], what: str) -> None:
  """Raises for a name that is not among those, with the nearest that is."""
  if name not in among:
    near = difflib.get_close_matches(name, among, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"{what} {name!r}; {hint}known: {', '.join(among)}")


def _spec(
  table: Table, axes: Sequence[str | None], shape: Sequence[int], mesh: Any
) -> PartitionSpec:
  """Looks up each axis; a mesh axis serves once, and only if it has a size.

  Of several mesh axes those in front are taken that divide the dimension; what
  none divides is left whole: a vocabulary of 65 on 8 devices is replicated, and
  everything else is still sharded.
  """
  lookup, used = dict(table), set()
  spec: list[Names | None] = [None] * len(axes)
  sizes = list(zip(axes, shape, strict=True))
  for i in sorted(range(len(sizes)), key=lambda i: _rank(axes[i])):
    axis, size = sizes[i]
    names = [
      n
      for n in _tuple(lookup.get(axis, ()))
      if _size(n, mesh) > 1 and n not in used
    ]
    while names and size % math.prod(mesh.shape[n] for n in names):
      names.pop()
    used.update(names)
    if names:
      spec[i] = tuple(names) if len(names) > 1 else names[0]
  return PartitionSpec(*spec)


def _size(name: str, mesh: Any) -> int:
  """Of a mesh axis that is there to be used: inside a stage, its own is not."""
  return 1 if name in mesh.manual_axes else mesh.shape.get(name, 1)


def _rank(axis: str | None) -> int:
  return AXES.index(axis) if axis in AXES else len(AXES)


# --- Presets ----------------------------------------------------------------

_SPREAD = ("fsdp", "context", "expert")  # where parameters would else be alike
_SHARDED = (("embed", _SPREAD), ("latent", _SPREAD))
_TENSOR = (("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"))
_STAGES = (("layers", "pipe"),)
_EXPERTS = (("experts", "expert"),)

PARTS: dict[str, Rules] = {
  # Every device holds the whole model and takes a share of the batch.
  "dp": Rules(),
  # ... but remembers for the optimizer, and updates, only its share of it.
  "zero1": Rules(state=_SHARDED, mesh=(("fsdp", -1),)),
  # ... and sums the gradients of microbatches only for its share.
  "zero2": Rules(state=_SHARDED, gradients=_SHARDED, mesh=(("fsdp", -1),)),
  # Parameters and optimizer state are split; a layer is gathered when used.
  "fsdp": Rules(stored=_SHARDED, mesh=(("fsdp", -1),)),
  # Heads and hidden units are split; activations meet after each block.
  "tp": Rules(
    stored=_TENSOR,
    computed=_TENSOR,
    activations=_BATCH + _TENSOR,
    mesh=(("tensor", -1),),
  ),
  # ... and between them each device keeps its share of the positions
  # (arXiv:2205.05198).
  "sp": Rules(
    stored=_TENSOR,
    computed=_TENSOR,
    activations=(*_BATCH, *_TENSOR, ("seq", ("context", "tensor"))),
    mesh=(("tensor", -1),),
  ),
  # Rows are split: a device has its share of the positions all the way, and
  # attention goes around (arXiv:2310.01889).
  "cp": Rules(
    activations=(*_BATCH, ("seq", "context")), mesh=(("context", -1),)
  ),
  # Experts are split, and tokens travel to them (arXiv:2006.16668).
  "ep": Rules(stored=_EXPERTS, computed=_EXPERTS, mesh=(("expert", -1),)),
  # Layers are divided into stages that micro-batches pass (arXiv:1811.06965).
  # Before and after them each stage has rows of its own, and its share of the
  # tables.
  "pp": Rules(
    stored=(*_STAGES, ("vocab", "pipe")),
    computed=_STAGES,
    activations=(("batch", (*_BATCH[0][1], "pipe")), *_BATCH[1:]),
    mesh=(("pipe", -1),),
  ),
}

# At most one of these: they answer the same question in different ways.
_STORAGE = ("zero1", "zero2", "fsdp")


def preset(name: str) -> Rules:
  """The rule table of a name, or of several joined by underscores.

  The first part's mesh axis takes the devices that are left by groups of two
  for each of the others: `fsdp_tp_ep` on 8 devices is 2 x 2 x 2.

  Raises:
    UserError: for a part that is not known, twice there, or contradicts
      another.
  """
  names = name.split("_")
  for part in names:
    _known(part, PARTS, f"parallel.preset {name!r} has the part")
  if len(set(names)) < len(names):
    raise UserError(f"parallel.preset {name!r} has a part twice")
  storage = [part for part in names if part in _STORAGE]
  if len(storage) > 1:
    raise UserError(
      f"parallel.preset {name!r}: {' and '.join(storage)} say different things "
      "of where the optimizer's state is; keep one of them"
    )
  return join(*(PARTS[part] for part in names))


def join(*parts: Rules) -> Rules:
  """One table that says what all of `parts` say."""
  if len(parts) == 1:
    return parts[0]
  sizes = dict(parts[0].mesh)
  for axis, size in (row for part in parts[1:] for row in part.mesh):
    sizes.setdefault(axis, 2 if size == -1 else size)
  return replace(
    parts[0],
    stored=_union(p.stored for p in parts),
    computed=_union(p.computed for p in parts),
    activations=_union(p.activations for p in parts),
    mesh=tuple(sizes.items()),
    state=_union_or_none([p.state for p in parts], parts),
    gradients=_union_or_none([p.gradients for p in parts], parts),
  )


def _union(tables: Iterable[Table]) -> Table:
  """Every row of every table; rows of one logical axis become one."""
  rows: dict[str, tuple[str, ...]] = {}
  for axis, names in (row for table in tables for row in table):
    rows[axis] = tuple(dict.fromkeys(rows.get(axis, ()) + _tuple(names)))
  return tuple(rows.items())


def _union_or_none(
  tables: Sequence[Table | None], parts: Sequence[Rules]
) -> Table | None:
  """The same where some part has such a table; the others mean `stored`."""
  if all(table is None for table in tables):
    return None
  pairs = zip(tables, parts, strict=True)
  return _union(p.stored if t is None else t for t, p in pairs)
