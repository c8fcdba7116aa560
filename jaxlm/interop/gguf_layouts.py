"""How llama.cpp stores tensors otherwise than the Hugging Face hub does.

A layout turns some of a file's tensors into some of the hub's, `hub`, and
back, `file`. Both take the config for the number of heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Config = Mapping[str, Any]  # a config.json
Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Same:
  """Stored alike."""

  def hub(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """The hub's tensors from the file's."""
    return list(arrays)

  def file(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """The file's tensors from the hub's."""
    return list(arrays)


@dataclass(frozen=True)
class PairedRows:
  """Rows of a head regrouped for rotary positions of neighbouring pairs.

  The hub rotates (i, i + d/2); llama.cpp, for these architectures, (2i, 2i+1):
  its row 2i + j is the hub's row j·d/2 + i.
  """

  heads: str  # the config's key for how many

  def hub(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """Each head as two halves."""
    return [self._swap(x, config, -1, 2) for x in arrays]

  def file(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """Each head as neighbouring pairs."""
    return [self._swap(x, config, 2, -1) for x in arrays]

  def _swap(self, x: np.ndarray, config: Config, *pair: int) -> np.ndarray:
    heads = config.get(self.heads) or config["num_attention_heads"]
    size = x.shape[0] // heads // 2
    shape = [size if n == -1 else n for n in pair]
    y = x.reshape(heads, *shape, *x.shape[1:]).swapaxes(1, 2)
    return y.reshape(x.shape)


@dataclass(frozen=True)
class PlusOne:
  """A norm's scale, stored as what is multiplied; on the hub, less one."""

  def hub(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """Less one."""
    return [x - np.ones((), x.dtype) for x in arrays]

  def file(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """Plus one, in float32."""
    return [np.asarray(x, np.float32) + np.float32(1) for x in arrays]


@dataclass(frozen=True)
class Turned:
  """The last two axes swapped."""

  def hub(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """`[in, out]`."""
    return [x.swapaxes(-1, -2) for x in arrays]

  def file(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """`[out, in]`."""
    return [x.swapaxes(-1, -2) for x in arrays]


@dataclass(frozen=True)
class HeadsApart:
  """Queries, keys and values: all of each in the file, by head on the hub."""

  heads: str

  def hub(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """`[heads, 3, head_dim]` flattened."""
    return [self._swap(x, (3, config[self.heads])) for x in arrays]

  def file(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """`[3, heads, head_dim]` flattened."""
    return [self._swap(x, (config[self.heads], 3)) for x in arrays]

  def _swap(self, x: np.ndarray, first: tuple[int, int]) -> np.ndarray:
    y = x.reshape(*first, -1, *x.shape[1:]).swapaxes(0, 1)
    return y.reshape(x.shape)


@dataclass(frozen=True)
class GateUp:
  """Gates and ups of all experts: two tensors in the file, one on the hub.

  Attributes:
    turns: on the hub their columns take turns; else all gates come first.
    biases: they are vectors `[experts, mlp]`, else `[experts, mlp, embed]`.
  """

  turns: bool
  biases: bool = False

  def hub(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """`[experts, embed, 2·mlp]`, or `[experts, 2·mlp]`."""
    gate, up = arrays if self.biases else [x.swapaxes(1, 2) for x in arrays]
    axis = -1 if self.turns else -2
    both = np.stack([gate, up], axis)
    return [both.reshape(*gate.shape[:-1], -1)]

  def file(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """The two, `[experts, mlp, embed]` or `[experts, mlp]`."""
    (x,) = arrays
    half = x.shape[-1] // 2
    parts = (
      (x[..., ::2], x[..., 1::2])
      if self.turns
      else (x[..., :half], x[..., half:])
    )
    return [y if self.biases else y.swapaxes(1, 2) for y in parts]


@dataclass(frozen=True)
class LatentHeads:
  """What expands a latent: keys (turned) and values apart in the file."""

  def hub(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """`[heads·(nope + value), rank]`."""
    k, v = arrays  # [heads, rank, nope], [heads, value, rank]
    both = np.concatenate([k.swapaxes(1, 2), v], axis=1)
    return [both.reshape(-1, both.shape[-1])]

  def file(self, arrays: Arrays, config: Config) -> list[np.ndarray]:
    """`[heads, rank, nope]` and `[heads, value, rank]`."""
    (x,) = arrays
    both = x.reshape(config["num_attention_heads"], -1, x.shape[-1])
    nope = config["qk_nope_head_dim"]
    return [both[:, :nope].swapaxes(1, 2), both[:, nope:]]


Layout = (
  Same | PairedRows | PlusOne | Turned | HeadsApart | GateUp | LatentHeads
)
