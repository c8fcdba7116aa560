"""Low-rank adapters: a function from parameters to parameters.

Beside a frozen weight W are two thin matrices, and what the model uses is

    W' = W + s A B            A [in, rank], B [rank, out], B = 0 at first

with s = alpha / rank (LoRA, Hu et al., arXiv:2106.09685, section 4.1) or
alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732). DoRA also learns how long each
column is (arXiv:2402.09353, equation 5; the length in the denominator has no
gradient, section 4.3):

    W' = m (W + s A B) / |W + s A B|      m [out] = |W| at first

Nothing of the model changes:

    lora = LoRA(rank=8)
    adapters = lora.start(key, model.params(), params)
    y = forward(model, lora.apply(params, adapters), tokens)

Gradients reach the adapters alone if only these are asked for. The base may be
of anything that `jnp.asarray` can read, quantised weights included.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.layers.compute import active_mesh
from jaxlm.layers.param import (
  LOOKUP,
  ONES,
  ZEROS,
  FanIn,
  Init,
  Param,
  init,
  paths,
)

Array = jax.Array
Tree = Any

# PEFT draws A from U(-1, 1) / sqrt(in), which has this standard deviation.
_START = FanIn(3**-0.5)
_PARTS = {"a", "b", "m", "length"}
# Whether the scale has a root, and whether lengths are learned, by kind.
KINDS = {
  "lora": (False, False),
  "rslora": (True, False),
  "dora": (False, True),
  "rsdora": (True, True),
}


@dataclass(frozen=True)
class LoRA:
  """Which matrices get adapters, and of what kind.

  Attributes:
    rank: of A B.
    alpha: how much they count; see above.
    targets: regular expressions for whole paths of matrices; at least one must
      match a matrix to adapt it, and each must match some.
    kind: 'lora', 'rslora', 'dora', or 'rsdora' (both).
  """

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = (r".*/(mixer|ffn)/.*",)
  kind: str = "lora"

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f"lora.kind={self.kind!r}; it can be {', '.join(KINDS)}")
    if self.rank < 1:
      raise UserError(
        f"lora.rank={self.rank}: adapters have a rank of 1 or more"
      )
    object.__setattr__(self, "alpha", float(self.alpha))

  @property
  def scale(self) -> float:
    """What A B is multiplied by: s."""
    rooted, _ = KINDS[self.kind]
    return self.alpha / (self.rank**0.5 if rooted else self.rank)

  @property
  def learns_lengths(self) -> bool:
    """Whether each column's length is a parameter (DoRA)."""
    return KINDS[self.kind][1]

  def chosen(self, tree: Tree) -> list[str]:
    """Paths of the matrices in `tree` that get adapters.

    Raises:
      UserError: for a target that matches none, or is no regular expression.
    """
    known = [path for path, p in paths(tree).items() if adaptable(p)]
    found = {target: _matches(target, known) for target in self.targets}
    for target, hits in found.items():
      if not hits:
        raise UserError(
          f"lora.targets: {target!r} matches no matrix of this model (whole "
          f"paths are compared); some are {', '.join(known[:8])}"
        )
    return [p for p in known if any(p in hits for hits in found.values())]

  def declare(self, tree: Tree) -> Tree:
    """The adapters as `Param`s: `a`, `b` and for DoRA `m`, at each path.

    Args:
      tree: of a model, as `model.params()`.

    Raises:
      UserError: as `chosen`.
    """
    declared, leaves = {}, paths(tree)
    for path in self.chosen(tree):
      *folders, name = path.split("/")
      place = declared
      for folder in folders:
        place = place.setdefault(folder, {})
      place[name] = self._adapter(leaves[path])
    return declared

  def _adapter(self, p: Param) -> dict[str, Param]:
    """The adapter of one matrix. It is small, so every device has all of it."""
    n = p.n_stacked
    ins, outs = p.shape[n : n + p.n_in], p.shape[n + p.n_in :]

    def part(sizes: tuple[int, ...], n_in: int, start: Init) -> Param:
      axes = p.axes[:n] + (None,) * len(sizes)
      return Param(p.shape[:n] + sizes, axes, n_in, start)

    adapter = {
      "a": part((*ins, self.rank), p.n_in, _START),
      "b": part((self.rank, *outs), 1, ZEROS),
    }
    if self.learns_lengths:
      adapter["m"] = part(outs, 0, ONES)
    return adapter

  def start(self, key: Array, tree: Tree, params: Tree) -> Tree:
    """Adapters before training: with them the model says what it said.

    Args:
      key: of A.
      tree: the model's declaration.
      params: its arrays; read for DoRA's lengths.
    """
    adapters = init(self.declare(tree), key)
    if not self.learns_lengths:
      return adapters
    return _walk(lambda x, w: x | {"m": _lengths(w, x)}, adapters, params)

  def apply(self, params: Tree, adapters: Tree) -> Tree:
    """The parameters that the model uses: each W replaced by W'.

    Args:
      params: of the base; W may be in any float dtype, and W' is in it, too.
      adapters: as `start` made them, and training left them.

    Returns:
      A tree like `params`, differentiable in `adapters`.
    """
    return _walk(self._adapted, adapters, params, rest=params)

  def _adapted(self, adapter: dict[str, Array], w: Any) -> Array:
    """W' of one matrix."""
    w = jnp.asarray(w)
    moved = w.astype(jnp.float32) + self._delta(adapter, w)
    if self.learns_lengths:
      length = jax.lax.stop_gradient(_lengths(moved, adapter))
      ratio = adapter["m"].astype(jnp.float32) / length
      moved = moved * _over_inputs(ratio, adapter, w)
    return moved.astype(w.dtype)

  def _delta(self, adapter: dict[str, Array], w: Array) -> Array:
    """The product s A B in float32, in the shape and the place of W."""
    stacked, ins, outs = _dims(adapter, w)
    s, i, o = "uvw"[:stacked], "abc"[:ins], "xyz"[:outs]
    return self.scale * jnp.einsum(
      f"{s}{i}r,{s}r{o}->{s}{i}{o}",
      adapter["a"].astype(jnp.float32),
      adapter["b"].astype(jnp.float32),
      preferred_element_type=jnp.float32,
      out_sharding=None if active_mesh() is None else jax.typeof(w).sharding,
    )

  def merge(self, params: Tree, adapters: Tree) -> Tree:
    """`apply`, done for good: a model like any other, as fast as the base."""
    return jax.jit(self.apply)(params, adapters)

  def unmerge(
    self, merged: Tree, adapters: Tree, lengths: Tree | None = None
  ) -> Tree:
    """The base again, to rounding, from what `merge` gave.

    Args:
      merged: the parameters.
      adapters: that were merged.
      lengths: for DoRA, what `lengths` said before the merge.

    Raises:
      UserError: for DoRA without them.
    """
    if self.learns_lengths and lengths is None:
      raise UserError(
        "how long DoRA's columns were is not in the merged weights; keep what "
        "`lengths(params, adapters)` says before merging, or keep the base"
      )
    if lengths is not None:
      adapters = _walk(lambda a, n: a | {"length": n}, adapters, lengths)

    def back(adapter: dict[str, Array], w: Array) -> Array:
      moved = w.astype(jnp.float32)
      if self.learns_lengths:
        ratio = adapter["length"] / adapter["m"].astype(jnp.float32)
        moved = moved * _over_inputs(ratio, adapter, w)
      return (moved - self._delta(adapter, w)).astype(w.dtype)

    return jax.jit(lambda m, a: _walk(back, a, m, rest=m))(merged, adapters)

  def lengths(self, params: Tree, adapters: Tree) -> Tree:
    """The columns' lengths |W + s A B|, float32, at the adapters' places."""

    def one(adapter: dict[str, Array], w: Any) -> Array:
      w = jnp.asarray(w)
      return _lengths(w.astype(jnp.float32) + self._delta(adapter, w), adapter)

    return _walk(one, adapters, params)


# --- Parts ------------------------------------------------------------------


def adaptable(p: Param) -> bool:
  """True for what a matmul contracts; tables are read by row."""
  return p.is_matrix and p.axes[p.n_stacked] not in LOOKUP


def _matches(target: str, known: list[str]) -> set[str]:
  """Those paths that a pattern matches whole."""
  try:
    return {path for path in known if re.fullmatch(target, path)}
  except re.error as error:
    raise UserError(
      f"lora.targets: {target!r} is no regular expression: {error}"
    ) from error


def is_adapter(x: Any) -> bool:
  """True for the node of a tree that holds `a` and `b` of one matrix."""
  return isinstance(x, dict) and {"a", "b"} <= set(x) <= _PARTS


def _walk(
  fn: Callable, adapters: Tree, params: Tree, rest: Tree | None = None
) -> Tree:
  """`fn(adapter, w)` wherever there is an adapter.

  The result has those places alone, or, with `rest`, all that is there.
  """
  if is_adapter(adapters):
    return fn(adapters, params)
  out = dict(rest) if rest is not None else {}
  for name, x in adapters.items():
    if name not in params:
      raise UserError(
        f"these adapters are for another model: this one has no {name!r}"
      )
    below = None if rest is None else rest[name]
    out[name] = _walk(fn, x, params[name], below)
  return out


def _dims(adapter: dict[str, Any], w: Any) -> tuple[int, int, int]:
  """How many dimensions of W are stacked, inputs and outputs."""
  ins = w.ndim - adapter["b"].ndim + 1
  outs = w.ndim - adapter["a"].ndim + 1
  return w.ndim - ins - outs, ins, outs


def _lengths(w: Array, adapter: dict[str, Array]) -> Array:
  """The length of each column of W: float32 [stacked..., out...]."""
  w = jnp.asarray(w)
  stacked, ins, _ = _dims(adapter, w)
  axes = tuple(range(stacked, stacked + ins))
  return jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32)), axis=axes))


def _over_inputs(x: Array, adapter: dict[str, Array], w: Array) -> Array:
  """`x` [stacked..., out...] with axes of size one where W has inputs."""
  stacked, ins, _ = _dims(adapter, w)
  return jnp.expand_dims(x, tuple(range(stacked, stacked + ins)))
