"""Names elsewhere: where other people's files keep a family's weights.

A family writes one table of (ours, theirs). `Names` reads it both ways, over
plain arrays: no files, no torch. Ours is a path in the model or in a block,
or several of them where theirs is one fused matrix; theirs holds `{}` where
the number of the layer goes. How an array is laid out follows from its Param:

- matrices are `[out, in]` there (torch.nn.Linear) and `[in, out]` here;
- heads are one flat dimension there;
- tables and vectors are the same in both places.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.errors import UserError
from jaxlm.layers.param import LOOKUP, Param, path_name, paths
from jaxlm.models.decoder import Decoder

Tree = Any
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Names:
  """A two-way table between our paths and theirs.

  Attributes:
    table: `("mixer/q", "model.layers.{}.self_attn.q_proj.weight")` and so on;
      `"mixer/q mixer/k mixer/v"` are joined along their outputs.
    transposed: their hidden matrices are `[out, in]`; False where they are
      `[in, out]` as here (GPT-2's Conv1D).
  """

  table: tuple[tuple[str, str], ...]
  transposed: bool = True

  def load(self, model: Decoder, tensors: Arrays) -> Tree:
    """Parameters of `model` from their tensors, as numpy arrays.

    Raises:
      UserError: for a tensor that is missing or of another shape.
    """
    parts = {n: self._read(n, tree, tensors) for n, tree in _parts(model)}

    def one(path: tuple, _: Param) -> np.ndarray:
      name, numbers = _place(model, path_name(path))
      if numbers is None:
        return parts[None][name]
      return np.stack([parts[n][name] for n in numbers])

    return jax.tree_util.tree_map_with_path(
      one, model.params(), is_leaf=lambda x: isinstance(x, Param)
    )

  def save(self, model: Decoder, params: Tree) -> dict[str, np.ndarray]:
    """Their tensors from the parameters of `model`."""
    parts: dict[int | None, dict] = {n: {} for n, _ in _parts(model)}
    for path, x in paths(params).items():
      name, numbers = _place(model, path)
      if numbers is None:
        parts[None][name] = np.asarray(x)
        continue
      for n, layer in zip(numbers, np.asarray(x), strict=True):
        parts[n][name] = layer
    out = {}
    for number, tree in _parts(model):
      for ours, theirs in self._entries(number, tree):
        columns = [self._to_flat(tree[k], parts[number][k]) for k in ours]
        out[theirs] = self._turn(tree[ours[0]], np.concatenate(columns, -1))
    return out

  def _read(self, number: int | None, tree: Tree, tensors: Arrays) -> dict:
    """The arrays of one layer (None: of what is outside the layers)."""
    out = {}
    for ours, theirs in self._entries(number, tree):
      if theirs not in tensors:
        raise UserError(f"the file has no tensor {theirs!r}, for {ours[0]}")
      x = self._turn(tree[ours[0]], np.asarray(tensors[theirs]))
      want = [_flat_shape(tree[k]) for k in ours]
      width = sum(shape[-1] for shape in want)
      if x.shape != (*want[0][:-1], width):
        raise UserError(
          f"tensor {theirs!r} is {tensors[theirs].shape}; the model's "
          f"{' and '.join(ours)} need {(*want[0][:-1], width)} as [in, out]"
        )
      cuts = np.cumsum([shape[-1] for shape in want])[:-1]
      for k, part in zip(ours, np.split(x, cuts, axis=-1), strict=True):
        out[k] = part.reshape(tree[k].shape)
    missing = sorted(tree.keys() - out.keys())
    if missing:
      raise KeyError(f"the table of names has no line for {missing}")
    return out

  def _entries(
    self, number: int | None, tree: Tree
  ) -> Iterator[tuple[list[str], str]]:
    """The lines of the table that speak of this layer, number filled in."""
    for ours, theirs in self.table:
      names = ours.split()
      if ("{}" in theirs) == (number is not None) and names[0] in tree:
        yield names, theirs.format(number)

  def _turn(self, p: Param, x: np.ndarray) -> np.ndarray:
    """Between `[out, in]` and `[in, out]`, where theirs is turned."""
    linear = p.is_matrix and p.axes[0] not in LOOKUP
    return x.T if linear and (self.transposed or not p.is_hidden) else x

  def _to_flat(self, p: Param, x: np.ndarray) -> np.ndarray:
    """Heads merged: `[in, out]`, or a vector."""
    return x.reshape(_flat_shape(p))


def _flat_shape(p: Param) -> tuple[int, ...]:
  """`(in, out)` of a matrix, `(size,)` of anything that is added."""
  return (p.fan_in, p.size // p.fan_in) if p.is_matrix else (p.size,)


def _parts(model: Decoder) -> Iterator[tuple[int | None, dict[str, Param]]]:
  """Parameters by path: None with those outside the layers, then each layer."""
  tree = model.params()
  del tree["layers"]
  yield None, paths(tree)
  for number, block in enumerate(model.blocks):
    yield number, paths(block.params())


def _place(model: Decoder, path: str) -> tuple[str, list[int] | None]:
  """A path of ours as the path in its block, and the layers stacked in it."""
  if not path.startswith("layers/"):
    return path, None
  _, i, j, name = path.split("/", 3)
  first = sum(len(p) * n for p, n in model.layers[: int(i)])
  pattern, n = model.layers[int(i)]
  return name, [first + len(pattern) * r + int(j) for r in range(n)]


# The names that most decoders on the Hugging Face hub share.
COMMON = (
  ("embed/tokens", "model.embed_tokens.weight"),
  ("mixer_norm/scale", "model.layers.{}.input_layernorm.weight"),
  ("mixer/q", "model.layers.{}.self_attn.q_proj.weight"),
  ("mixer/k", "model.layers.{}.self_attn.k_proj.weight"),
  ("mixer/v", "model.layers.{}.self_attn.v_proj.weight"),
  ("mixer/o", "model.layers.{}.self_attn.o_proj.weight"),
  ("ffn_norm/scale", "model.layers.{}.post_attention_layernorm.weight"),
  ("ffn/gate", "model.layers.{}.mlp.gate_proj.weight"),
  ("ffn/up", "model.layers.{}.mlp.up_proj.weight"),
  ("ffn/down", "model.layers.{}.mlp.down_proj.weight"),
  ("norm/scale", "model.norm.weight"),
  ("head", "lm_head.weight"),
)
