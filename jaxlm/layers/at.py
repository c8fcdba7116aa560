"""Where tokens stand: what comes with a batch besides its tokens."""

import jax
from flax import struct

Array = jax.Array


@struct.dataclass
class At:
  """Where tokens stand. Every field may be None: the usual case is implied.

  Attributes:
    positions: int32 [batch, seq]; None means 0, 1, 2, ... in every row. As
      the position of a cached key, negative means an empty slot.
    segments: int32 [batch, seq], the document of each token in a packed row;
      tokens see only their own document. None means one document a row.
    blocks: int32 [batch, seq], tokens with the same non-negative id see each
      other both ways (images, prefixes) under `PrefixLM`.
    key: randomness for dropout; None means none (evaluation).
    context: what cross-attention reads, [batch, keys, dim], in the dtype of
      the layers; None means what the cache holds of it.
    sources: the `At` of the context's tokens.
    table: learned relative biases [buckets, heads], one for all layers.
    order: 'zigzag' where rows are split over devices and positions, though
      given, are no more than that order (`layers/context.py`).
    turned: whether rows are laid out in that order, whatever their positions.
  """

  positions: Array | None = None
  segments: Array | None = None
  blocks: Array | None = None
  key: Array | None = None
  context: Array | None = None
  sources: "At | None" = None
  table: Array | None = None
  order: str | None = struct.field(pytree_node=False, default=None)
  turned: bool = struct.field(pytree_node=False, default=False)

  @property
  def aligned(self) -> bool:
    """True if rows are plain sequences, known when the program is traced."""
    return self.positions is None and self.segments is None
