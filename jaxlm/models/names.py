"""Names elsewhere: where other people's files keep a family's weights.

A family writes one table of lines (ours, theirs) or (ours, theirs, layout).
`Names` reads it both ways, one tensor at a time, over plain arrays: no files,
no torch. Ours is a path in the model or in a block, or several of them where
theirs is one fused tensor. Theirs holds `{}` where the number of the layer
goes, and `{expert}` where each expert has a tensor of its own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxlm.errors import UserError
from jaxlm.layers.param import LOOKUP, Param, path_name, paths
from jaxlm.models.decoder import Decoder

Tree = Any
Array = Any  # of NumPy or of JAX
Arrays = Mapping[str, Array]

# --- Layouts ----------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
  """Heads are one flat dimension; fused tensors join along their outputs.

  Matrices are `[out, in]` there (torch.nn.Linear) and `[in, out]` here, or
  `[in, out]` in both places where not `transposed`. What stacks matrices
  (experts) leads. Tables and vectors are the same in both places.
  """

  transposed: bool = True

  def shape(self, params: Sequence[Param]) -> tuple[int, ...]:
    """The shape of their tensor."""
    width = sum(_flat(p)[-1] for p in params)
    return _turned(params[0], (*_flat(params[0])[:-1], width), self.transposed)

  def split(self, params: Sequence[Param], x: Array) -> list[Array]:
    """Their tensor as arrays of ours."""
    x = _turn(params[0], x, self.transposed)
    cuts = np.cumsum([_flat(p)[-1] for p in params]).tolist()
    starts = [0, *cuts[:-1]]
    return [
      x[..., a:b].reshape(p.shape)
      for p, a, b in zip(params, starts, cuts, strict=True)
    ]

  def join(self, params: Sequence[Param], arrays: Sequence[Array]) -> Array:
    """Arrays of ours as their tensor."""
    flat = [
      np.asarray(x).reshape(_flat(p))
      for p, x in zip(params, arrays, strict=True)
    ]
    whole = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
    return _turn(params[0], whole, self.transposed)


@dataclass(frozen=True)
class Interleaved:
  """Fused tensors whose outputs take turns along our first output dimension.

  Head by head with queries, keys and values (GPT-NeoX), or one gate and one
  up column after another (gpt-oss).
  """

  transposed: bool = True

  def shape(self, params: Sequence[Param]) -> tuple[int, ...]:
    """The shape of their tensor."""
    return Joined(self.transposed).shape(params)

  def split(self, params: Sequence[Param], x: Array) -> list[Array]:
    """Their tensor as arrays of ours."""
    x = _turn(params[0], x, self.transposed)
    turns = _turns(params[0])
    x = x.reshape(*x.shape[:-1], turns, -1)
    cuts = np.cumsum([_flat(p)[-1] // turns for p in params]).tolist()
    starts = [0, *cuts[:-1]]
    return [
      x[..., a:b].reshape(p.shape)
      for p, a, b in zip(params, starts, cuts, strict=True)
    ]

  def join(self, params: Sequence[Param], arrays: Sequence[Array]) -> Array:
    """Arrays of ours as their tensor."""
    turns = _turns(params[0])
    parts = [
      np.asarray(x).reshape(*_flat(p)[:-1], turns, -1)
      for p, x in zip(params, arrays, strict=True)
    ]
    whole = np.concatenate(parts, axis=-1)
    whole = whole.reshape(*whole.shape[:-2], -1)
    return _turn(params[0], whole, self.transposed)


Layout = Joined | Interleaved


def _flat(p: Param) -> tuple[int, ...]:
  """`(stacked..., in, out)` of a matrix, `(stacked..., size)` of a vector.

  A vector with a number for each expert is no stack.
  """
  stacked = p.shape[: min(p.n_stacked, len(p.shape) - 1)]
  size = p.size // int(np.prod(stacked, dtype=int))
  if p.is_matrix:
    return (*stacked, p.fan_in, size // p.fan_in)
  return (*stacked, size)


def _turns(p: Param) -> int:
  """Size of the first output dimension."""
  return p.shape[p.n_stacked + p.n_in]


def _is_linear(p: Param) -> bool:
  """True for what a matmul contracts; tables are read by row everywhere."""
  return p.is_matrix and p.axes[p.n_stacked] not in LOOKUP


def _turned(p: Param, shape: tuple, transposed: bool) -> tuple[int, ...]:
  """A shape with its last two dimensions swapped where theirs are."""
  if _is_linear(p) and transposed:
    return (*shape[:-2], shape[-1], shape[-2])
  return shape


def _turn(p: Param, x: Array, transposed: bool) -> Array:
  """Between `[out, in]` and `[in, out]`, where theirs is turned."""
  return x.swapaxes(-1, -2) if _is_linear(p) and transposed else x


# --- The table --------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
  """One of their tensors, and where in the model its parts belong.

  Attributes:
    theirs: its name.
    ours: paths of the leaves that hold its parts.
    index: where in those leaves: the layer in its stack, the expert.
    params: what each part is, without the dimensions of `index`.
    layout: how the tensor is laid out.
  """

  theirs: str
  ours: tuple[str, ...]
  index: tuple[int, ...]
  params: tuple[Param, ...]
  layout: Layout

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape their tensor has."""
    return self.layout.shape(self.params)

  def read(self, tensors: Arrays) -> Array:
    """Their tensor, checked.

    Raises:
      UserError: if it is missing or of another shape.
    """
    if self.theirs not in tensors:
      raise UserError(
        f"the checkpoint has no tensor {self.theirs!r}; the model needs it, of "
        f"shape {self.shape}, for {' and '.join(self.ours)}"
      )
    x = tensors[self.theirs]
    if tuple(x.shape) != self.shape:
      raise UserError(
        f"tensor {self.theirs!r} has shape {tuple(x.shape)}; by its config the "
        f"model needs {self.shape}, for {' and '.join(self.ours)}"
      )
    return x

  def split(self, x: Array) -> list[Array]:
    """The parts of their tensor, in the order of `ours`."""
    return self.layout.split(self.params, x)

  def join(self, leaves: Mapping[str, Array]) -> np.ndarray:
    """Their tensor, from the leaves of our parameters by path."""
    parts = [np.asarray(leaves[path][self.index]) for path in self.ours]
    return self.layout.join(self.params, parts)


Line = tuple[str, str] | tuple[str, str, Layout]


@dataclass(frozen=True)
class Names:
  """A two-way table between our paths and theirs.

  Attributes:
    table: `("mixer/q", "model.layers.{}.self_attn.q_proj.weight")` and so on;
      `"mixer/q mixer/k mixer/v"` are one tensor there. A line whose first
      path a layer does not have is not for that layer.
    layout: of lines that give none.
    base: what all names but the head's begin with; files of a model without
      its head leave it out.
    ignored: patterns of tensors that hold nothing to load: buffers, and heads
      that are copies of the embedding.
  """

  table: tuple[Line, ...]
  layout: Layout = Joined()
  base: str = "model."
  ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)

  def entries(self, model: Decoder) -> Iterator[Entry]:
    """Every tensor that a file of this model has.

    Raises:
      KeyError: if the table says nothing of some parameter.
    """
    seen = set()
    for place, number, index, tree in _places(model):
      for line in self.table:
        for entry in self._entries(line, place, number, index, tree):
          seen.update((path, entry.index[:1]) for path in entry.ours)
          yield entry
      want = {(place + name, index) for name in tree}
      if want - seen:
        missing = sorted(path for path, _ in want - seen)
        raise KeyError(f"the table of names has no line for {missing}")

  def _entries(
    self,
    line: Line,
    place: str,
    number: int | None,
    index: tuple[int, ...],
    tree: dict[str, Param],
  ) -> Iterator[Entry]:
    """What one line of the table says of one layer (None: of none)."""
    ours, theirs, *layout = line
    names, each = ours.split(), "{expert}" in theirs
    if names[0] not in tree or ("{}" in theirs) != (number is not None):
      return
    params = [tree[name] for name in names]
    if each and params[0].axes[0] != "experts":
      return
    if each:
      params = [replace(p, shape=p.shape[1:], axes=p.axes[1:]) for p in params]
    for expert in range(tree[names[0]].shape[0]) if each else [None]:
      yield Entry(
        theirs.format(number, expert=expert),
        tuple(place + name for name in names),
        index if expert is None else (*index, expert),
        tuple(params),
        layout[0] if layout else self.layout,
      )

  def load(self, model: Decoder, tensors: Arrays) -> Tree:
    """Parameters of `model` from their tensors, as NumPy arrays.

    Raises:
      UserError: for a tensor that is missing or of another shape.
    """
    tree, leaves = model.params(), {}
    declared = paths(tree)
    for entry in self.entries(model):
      parts = entry.split(np.asarray(entry.read(tensors)))
      for path, part in zip(entry.ours, parts, strict=True):
        if path not in leaves:
          leaves[path] = np.empty(declared[path].shape, part.dtype)
        leaves[path][entry.index] = part
    return jax.tree_util.tree_map_with_path(
      lambda path, _: leaves[path_name(path)],
      tree,
      is_leaf=lambda x: isinstance(x, Param),
    )

  def save(self, model: Decoder, params: Tree) -> dict[str, np.ndarray]:
    """Their tensors from the parameters of `model`."""
    leaves = paths(params)
    return {e.theirs: e.join(leaves) for e in self.entries(model)}

  def extra(self, model: Decoder, names: Sequence[str]) -> list[str]:
    """Those of `names` that this model has no place for."""
    known = {entry.theirs for entry in self.entries(model)}
    return [
      name
      for name in sorted(set(names) - known)
      if not any(re.search(pattern, name) for pattern in self.ignored)
    ]


def _places(model: Decoder) -> Iterator[tuple]:
  """What is outside the layers, then each layer: its path, number, index.

  Yields (prefix of its paths, number of the layer or None, index in the
  stacked leaves, its parameters by path).
  """
  tree = {k: v for k, v in model.params().items() if k != "layers"}
  yield "", None, (), paths(tree)
  number = 0
  for i, (pattern, n) in enumerate(model.layers):
    for repeat in range(n):
      for j, block in enumerate(pattern):
        yield f"layers/{i}/{j}/", number, (repeat,), paths(block.params())
        number += 1


# The names that most decoders on the Hugging Face hub share.
COMMON = (
  ("embed/tokens", "model.embed_tokens.weight"),
  ("mixer_norm/scale", "model.layers.{}.input_layernorm.weight"),
  ("mixer/q", "model.layers.{}.self_attn.q_proj.weight"),
  ("mixer/q_bias", "model.layers.{}.self_attn.q_proj.bias"),
  ("mixer/q_norm/scale", "model.layers.{}.self_attn.q_norm.weight"),
  ("mixer/k", "model.layers.{}.self_attn.k_proj.weight"),
  ("mixer/k_bias", "model.layers.{}.self_attn.k_proj.bias"),
  ("mixer/k_norm/scale", "model.layers.{}.self_attn.k_norm.weight"),
  ("mixer/v", "model.layers.{}.self_attn.v_proj.weight"),
  ("mixer/v_bias", "model.layers.{}.self_attn.v_proj.bias"),
  ("mixer/o", "model.layers.{}.self_attn.o_proj.weight"),
  ("mixer/o_bias", "model.layers.{}.self_attn.o_proj.bias"),
  ("ffn_norm/scale", "model.layers.{}.post_attention_layernorm.weight"),
  ("ffn/gate", "model.layers.{}.mlp.gate_proj.weight"),
  ("ffn/up", "model.layers.{}.mlp.up_proj.weight"),
  ("ffn/down", "model.layers.{}.mlp.down_proj.weight"),
  ("norm/scale", "model.norm.weight"),
  ("head", "lm_head.weight"),
)

# The same where layers also, or only, have norms after their branches.
SANDWICH = (
  *(line for line in COMMON if line[0] != "ffn_norm/scale"),
  ("mixer_post_norm/scale", "model.layers.{}.post_attention_layernorm.weight"),
  ("ffn_norm/scale", "model.layers.{}.pre_feedforward_layernorm.weight"),
  ("ffn_post_norm/scale", "model.layers.{}.post_feedforward_layernorm.weight"),
)
