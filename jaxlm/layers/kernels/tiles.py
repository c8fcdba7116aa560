"""How large the blocks of flash attention are."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiles:
  """How large the blocks are.

  Attributes:
    rows: the most rows (queries times heads of a group) of a block.
    keys: the most keys of a block.
    lanes: what both are rounded up to; a TPU's registers have 128.
  """

  rows: int = 512
  keys: int = 512
  lanes: int = 128

  def queries(self, t: int, group: int) -> int:
    """Queries of a block: a power of two."""
    most = max(1, self.rows // group)
    return min(1 << (most.bit_length() - 1), 1 << (t - 1).bit_length())

  def up(self, n: int) -> int:
    """`n` rounded up to whole registers."""
    return math.ceil(n / self.lanes) * self.lanes

  def fit(self, size: int) -> "Tiles":
    """Those for heads of `size` bytes, where the chip is small."""
    del size
    return self


@dataclass(frozen=True)
class Powers(Tiles):
  """Blocks for Triton, where every array has a power of two of numbers.

  64 x 64 is the largest for which no kernel spills registers on an H100 at
  head_dim 128; a tensor core's product has at least 16 rows.
  """

  rows: int = 64
  keys: int = 64
  lanes: int = 16

  def up(self, n: int) -> int:
    """The next power of two, at least `lanes`."""
    return max(self.lanes, 1 << (n - 1).bit_length())

  def fit(self, size: int) -> "Powers":
    """Smaller blocks for wide heads: 32 KiB each, of 227 on the chip."""
    most = max(self.lanes, (1 << 15) // self.up(size))
    return replace(self, rows=min(self.rows, most), keys=min(self.keys, most))
