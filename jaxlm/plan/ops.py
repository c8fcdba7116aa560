"""Operations of traced programs, and one device's part of an array."""

import math
from collections.abc import Iterable
from typing import Any

from jax.sharding import AxisType

# What XLA fuses into what reads it, so that it never lies in memory.
FREE = frozenset(
  (
    *("broadcast_in_dim", "convert_element_type", "copy", "iota", "reshape"),
    *("squeeze", "expand_dims", "transpose", "stop_gradient", "split"),
    *("slice", "dynamic_slice", "rev", "pad", "select_n"),
  )
)
# Element by element: the result may lie where an operand was.
IN_PLACE = frozenset(
  (
    *("add", "add_any", "and", "abs", "clamp", "cos", "div", "eq", "erf"),
    *("exp", "exp2", "expm1", "ge", "gt", "integer_pow", "is_finite", "le"),
    *("log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg"),
    *("not", "or", "pow", "rem", "round", "rsqrt", "sign", "sin", "sqrt"),
    *("square", "sub", "tanh", "xor"),
    *("dynamic_update_slice", "scatter", "scatter-add", "while"),
  )
)
REDUCTIONS = frozenset(
  (
    *("dot_general", "scatter-add", "reduce_sum", "reduce_max"),
    *("reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"),
  )
)
PLACES = frozenset(("reshard", "sharding_constraint", "mesh_cast"))
COLLECTIVES = {
  **dict.fromkeys(
    ("psum", "psum2", "psum_invariant", "pmax", "pmin"), "all-reduce"
  ),
  **dict.fromkeys(("all_gather", "all_gather_invariant"), "all-gather"),
  **dict.fromkeys(("reduce_scatter", "psum_scatter"), "reduce-scatter"),
  **dict.fromkeys(("all_to_all", "ragged_all_to_all"), "all-to-all"),
  "ppermute": "collective-permute",
}


def local_shape(aval: Any) -> tuple[int, ...]:
  """The shape of one device's part."""
  sharding = getattr(aval, "sharding", None)
  if sharding is None or sharding.mesh.empty:
    return aval.shape
  size = sharding.mesh.shape
  return tuple(
    -(-n // math.prod(size[a] for a in axes))
    for n, axes in zip(aval.shape, axes_of(aval), strict=True)
  )


def n_bytes(aval: Any) -> int:
  """Bytes of one device's part."""
  if not hasattr(aval, "shape"):
    return 0
  return math.prod(local_shape(aval)) * getattr(aval.dtype, "itemsize", 4)


def axes_of(aval: Any) -> list[tuple[str, ...]]:
  """The mesh axes along which each dimension is cut."""
  sharding = getattr(aval, "sharding", None)
  spec = () if sharding is None else tuple(sharding.spec)
  spec += (None,) * (getattr(aval, "ndim", 0) - len(spec))
  sizes = {} if sharding is None else sharding.mesh.shape
  found = []
  for entry in spec:
    entry = (entry,) if isinstance(entry, str) else entry or ()
    found.append(tuple(a for a in entry if sizes.get(a, 1) > 1))
  return found


def automatic(v: Any) -> bool:
  """True where the compiler places an array, not its type."""
  sharding = getattr(v.aval, "sharding", None)
  if sharding is None or sharding.mesh.empty:
    return False
  return any(t == AxisType.Auto for t in sharding.mesh.axis_types)


def flat(axes: Iterable[tuple[str, ...]]) -> set[str]:
  """All of them together."""
  return {a for entry in axes for a in entry}


def spec_text(aval: Any) -> str:
  """How an array is cut, for people: '(fsdp -)', '' where it is whole."""
  parts = [",".join(entry) or "-" for entry in axes_of(aval)]
  return f"({' '.join(parts)})" if any(p != "-" for p in parts) else ""


# --- Work -------------------------------------------------------------------


def dot_flops(eqn: Any) -> float:
  """Two for each product: elements of the result times what each sums over."""
  dims, _ = eqn.params["dimension_numbers"]
  left, right = (local_shape(v.aval) for v in eqn.invars)
  # Where only one side is cut, that one is gathered first.
  each = math.prod(max(left[i], right[j]) for i, j in zip(*dims, strict=True))
  return 2.0 * math.prod(local_shape(eqn.outvars[0].aval)) * each


def ragged_flops(eqn: Any) -> float:
  """Rows times the one matrix each of them meets."""
  left, right = (local_shape(v.aval) for v in eqn.invars[:2])
  out = local_shape(eqn.outvars[0].aval)
  if len(out) == 2 and len(right) == 3:  # [m, k] x [g, k, n]
    return 2.0 * math.prod(left) * out[-1]
  return 2.0 * math.prod(left) * (right[-1] if len(right) else 1)
