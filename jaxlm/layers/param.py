"""Parameters, declared once; everything else about them is a view.

A module answers `params()` with a tree (nested dicts) of `Param`. From that
one declaration come the arrays (`init`), the abstract shapes (`abstract`), how
they lie on a mesh (`shardings`), how they are cast and gathered before use
(`gather`), their number (`count`), the work they cause (`flops`), which of
them decay (`decay_mask`), how Muon sees them (`muon_dims`), and a table for
people (`describe`). Key-value caches are declared with the same class.

Weights are stored `(in..., out...)`: the first `n_in` dimensions are the ones
a matmul contracts. Dimensions named 'layers' or 'experts' lead, stack equal
matrices, and never count as fan-in.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.errors import UserError
from jaxlm.parallel.rules import Rules

Array = jax.Array
DType = Any
Tree = Any  # nested dicts (or tuples) whose leaves are Param or arrays

STACKED = ("layers", "experts", "blocks")  # axes that stack equal matrices
LOOKUP = ("vocab", "positions")  # tables read by index: no hidden matrices


# --- Initializers -----------------------------------------------------------


@dataclass(frozen=True)
class Normal:
  """Gaussian of fixed standard deviation `std`."""

  std: float = 0.02

  def __call__(self, key: Array, param: "Param", dtype: DType) -> Array:
    """An array of the parameter's shape."""
    return (jax.random.normal(key, param.shape) * self.std).astype(dtype)


@dataclass(frozen=True)
class FanIn:
  """Gaussian of standard deviation `gain / sqrt(fan_in)` (LeCun et al. 1998).

  Outputs of the matmul then have the variance of its inputs times `gain**2`.
  """

  gain: float = 1.0

  def __call__(self, key: Array, param: "Param", dtype: DType) -> Array:
    """An array of the parameter's shape."""
    std = self.gain / math.sqrt(max(param.fan_in, 1))
    return (jax.random.normal(key, param.shape) * std).astype(dtype)


@dataclass(frozen=True)
class Constant:
  """The same `value` everywhere: zeros for biases, ones for norm scales."""

  value: float = 0.0

  def __call__(self, key: Array, param: "Param", dtype: DType) -> Array:
    """An array of the parameter's shape."""
    del key
    return jnp.full(param.shape, self.value, dtype)


Init = Callable[[Array, "Param", DType], Array]
ZEROS, ONES = Constant(0.0), Constant(1.0)


# --- The declaration --------------------------------------------------------


@dataclass(frozen=True)
class Param:
  """One array: its shape, what each dimension means, and how it starts.

  Attributes:
    shape: sizes, `(stacked..., in..., out...)`.
    axes: one logical name per dimension ('embed', 'heads', 'kv_heads',
      'head_dim', 'mlp', 'vocab', 'positions', 'experts', 'layers', ...);
      sharding rules speak of these names.
    n_in: how many dimensions (after the stacked ones) the matmul contracts;
      0 for what is added, not multiplied (biases).
    init: a frozen value `(key, param, dtype) -> array`.
    compute: the dtype it is used in, where not the model's compute dtype.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  n_in: int = 1
  init: Init = FanIn()
  compute: DType | None = None

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f"{self.shape} and {self.axes} differ in rank")

  @property
  def n_stacked(self) -> int:
    """How many leading dimensions stack equal matrices."""
    n = 0
    while n < len(self.axes) and self.axes[n] in STACKED:
      n += 1
    return n

  @property
  def fan_in(self) -> int:
    """How many inputs each output of the matmul sums over."""
    return math.prod(self.shape[self.n_stacked :][: self.n_in])

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def is_matrix(self) -> bool:
    """True if it multiplies: it has contracted and produced dimensions."""
    return 0 < self.n_in < len(self.shape) - self.n_stacked

  @property
  def is_hidden(self) -> bool:
    """True for matrices inside the network: neither looked up nor the head."""
    return self.is_matrix and not any(a in LOOKUP for a in self.axes)


# --- Trees ------------------------------------------------------------------


def _is_param(x: Any) -> bool:
  return isinstance(x, Param)


def map_params(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
  """Applies `fn(param, *leaves)` to every Param of `tree`."""
  return jax.tree.map(fn, tree, *rest, is_leaf=_is_param)


def path_name(path: tuple[Any, ...]) -> str:
  """A tree path as text: `layers/0/mixer/q`."""
  return "/".join(
    str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))))
    for k in path
  )


def paths(tree: Tree) -> dict[str, Any]:
  """All leaves by their path: `{'layers/0/mixer/q': Param(...)}`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_param)
  return {path_name(path): leaf for path, leaf in leaves}


def stack(tree: Tree, n: int, axis: str = "layers") -> Tree:
  """`n` equal copies of every parameter, stacked on a leading axis."""
  return map_params(
    lambda p: replace(p, shape=(n, *p.shape), axes=(axis, *p.axes)), tree
  )


# --- Views ------------------------------------------------------------------


def init(tree: Tree, key: Array, dtype: DType = jnp.float32) -> Tree:
  """The arrays of a tree, each from a key folded from its own path.

  Adding a parameter leaves every other one as it was.
  """

  def one(path, p: Param) -> Array:
    leaf = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
    return p.init(leaf, p, dtype)

  return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_param)


def abstract(
  tree: Tree,
  dtype: DType = jnp.float32,
  mesh: Mesh | None = None,
  rules: Rules | None = None,
) -> Tree:
  """Shapes and dtypes without memory; with a mesh, shardings as well."""

  def one(p: Param):
    sharding = None
    if mesh is not None and rules is not None:
      sharding = NamedSharding(mesh, rules.stored_spec(p.axes, p.shape, mesh))
    return jax.ShapeDtypeStruct(p.shape, dtype, sharding=sharding)

  return map_params(one, tree)


def shardings(tree: Tree, mesh: Mesh, rules: Rules) -> Tree:
  """Where each parameter lies at rest, by the *stored* rules."""
  return map_params(
    lambda p: NamedSharding(mesh, rules.stored_spec(p.axes, p.shape, mesh)),
    tree,
  )


# What has to be cut where the rules say so: left whole, every device would do
# all of its work.
EXACT = ("heads", "mlp", "experts")


def check_mesh(tree: Tree, mesh: Mesh, rules: Rules) -> None:
  """Checks that rules know the tree's dimensions, and that a mesh divides them.

  Raises:
    UserError: for a rule about a dimension that neither the library nor this
      tree has; for heads, hidden units or experts that do not divide.
  """
  rules.check({a for p in paths(tree).values() for a in p.axes if a})
  table = dict(rules.computed)
  for path, p in paths(tree).items():
    for axis, size in zip(p.axes, p.shape, strict=True):
      names = table.get(axis, ()) if axis in EXACT else ()
      names = (names,) if isinstance(names, str) else names
      ways = math.prod(mesh.shape.get(name, 1) for name in names)
      if size % ways:
        fits = math.gcd(size, mesh.size)
        fewer = max(n for n in range(1, ways) if fits % n == 0)
        where = f"{path} has {size} {axis}, which do not divide over"
        raise UserError(where + _hint(axis, size, names, ways, fewer))


def _hint(
  axis: str, size: int, names: tuple[str, ...], ways: int, fewer: int
) -> str:
  """The end of that sentence: the nearest mesh and model that would do."""
  below, above = size // ways * ways, -(-size // ways) * ways
  near = f"{below} or {above}" if below else str(above)
  mesh = " x ".join(names)
  return (
    f" {mesh}:{ways}; set parallel.mesh to data:-1,{mesh}:{fewer}, or take a "
    f"model with {near} {axis}"
  )


def gather(arrays: Tree, tree: Tree, rules: Rules | None, dtype: DType) -> Tree:
  """Parameters as the layers use them: moved from *stored* to *computed* rules.

  This is FSDP's all-gather. The cast to the compute dtype comes first, so that
  what travels is already small; gradients take the way back. Call it inside
  the scan over layers and one layer at a time is whole. On one device nothing
  travels and nothing is cast: `dot` casts where it multiplies, and the
  gradient of a float32 weight is then never rounded.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if rules is None or mesh.empty or mesh.size == 1:
    return arrays
  arrays = map_params(lambda p, x: x.astype(p.compute or dtype), tree, arrays)
  return move(arrays, tree, rules.computed_spec)


def move(
  arrays: Tree, tree: Tree, spec: Callable[..., PartitionSpec] | None
) -> Tree:
  """Arrays like the parameters, moved on the current mesh.

  Args:
    arrays: one for each Param of `tree`.
    tree: says what their dimensions mean.
    spec: `(axes, shape, mesh)` to where they go, a method of the rules:
      `rules.state_spec`, for example. None leaves them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if spec is None or mesh.empty or mesh.size == 1:
    return arrays

  def one(p: Param, x: Array) -> Array:
    return jax.sharding.reshard(x, spec(p.axes, p.shape, mesh))

  return map_params(one, tree, arrays)


def count(tree: Tree) -> int:
  """Number of scalars in the tree."""
  return sum(leaf.size for leaf in paths(tree).values())


def flops(tree: Tree) -> int:
  """Floating point operations of one token's forward pass through the matmuls.

  Two (a multiply and an add) for each matrix element; what is looked up costs
  none. Attention's products of activations are not parameters and not here.
  """
  return sum(2 * p.size for p in paths(tree).values() if p.is_hidden)


def decay_mask(tree: Tree) -> Tree:
  """True where weight decay applies: matrices, not norms and biases."""
  return map_params(lambda p: p.is_matrix, tree)


@dataclass(frozen=True)
class MatrixDims:
  """How an array reads as a stack of matrices: counts of leading dims."""

  stacked: int
  n_in: int


def muon_dims(tree: Tree) -> Tree:
  """`MatrixDims` for hidden matrices, None for everything else."""
  return map_params(
    lambda p: MatrixDims(p.n_stacked, p.n_in) if p.is_hidden else None, tree
  )


def describe(tree: Tree) -> str:
  """A table for people: path, shape, axes, elements."""
  rows = [("parameter", "shape", "axes", "elements")]
  for name, p in paths(tree).items():
    axes = " ".join(a or "-" for a in p.axes)
    rows.append((name, "x".join(map(str, p.shape)), axes, f"{p.size:,}"))
  rows.append(("total", "", "", f"{count(tree):,}"))
  widths = [max(len(r[i]) for r in rows) for i in range(4)]
  return "\n".join(
    "  ".join(
      c.rjust(w) if i == 3 else c.ljust(w)
      for i, (c, w) in enumerate(zip(r, widths, strict=True))
    ).rstrip()
    for r in rows
  )
