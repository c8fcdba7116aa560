"""A cache in pages: rows own blocks of a common pool, and may share them.

The pool is `[blocks, block, ...]`; a table `[batch, columns]` says which block
holds positions c * block to (c + 1) * block - 1 of a row (PagedAttention,
arXiv:2309.06180). Nothing is reserved for what a row might still say, and rows
that begin alike have the blocks of their beginning in common. Who owns which
block is decided on the host, by `jaxlm.generate.pages`.

Reading gathers a row's blocks, the reference form; on TPUs and GPUs a kernel
follows the table in place (`kernels/paged.py`) and gives the same numbers.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.layers.mask import Mask
from jaxlm.layers.param import Param

Array = jax.Array
Cache = dict[str, Any]


@dataclass(frozen=True)
class InTurn:
  """Rows own blocks one after the other: 0, 1, ...; nothing is shared."""

  def __call__(self, key: Array, param: Param, dtype: Any) -> Array:
    """A table `[..., batch, columns]`."""
    del key
    rows, columns = param.shape[-2:]
    table = jnp.arange(rows * columns, dtype=dtype).reshape(rows, columns)
    table = table.reshape((1,) * (len(param.shape) - 2) + table.shape)
    return jnp.broadcast_to(table, param.shape)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Paged:
  """Every position, in blocks of a pool that all rows share.

  For causal masks alone: what of a block is not yet written stands at later
  positions than any query, and no position has to be stored.

  Attributes:
    block: tokens in a block.
    blocks: how many there are; None means as many as rows need that share
      nothing.
  """

  block: int = 16
  blocks: int | None = None
  endless: ClassVar[bool] = False

  def __post_init__(self):
    if self.block < 1 or (self.blocks is not None and self.blocks < 1):
      raise UserError(
        f"a pool of {self.blocks} blocks of {self.block} tokens; both are at "
        "least 1"
      )

  def columns(self, length: int) -> int:
    """How many blocks `length` positions fill."""
    return -(-length // self.block)

  def declare(self, token: Cache, batch: int, length: int, mask: Mask) -> Cache:
    """The pool, and a table in which rows follow each other."""
    if not mask.causal:
      raise UserError(
        f"a paged cache needs a causal mask, and {mask} is none; use a full "
        "cache"
      )
    needed = batch * self.columns(length)
    blocks = needed if self.blocks is None else self.blocks
    if blocks < needed:
      raise UserError(
        f"{batch} rows of {length} positions fill {needed} blocks of "
        f"{self.block}, and the pool has {blocks}; give it more, or let rows "
        "share what they begin with (jaxlm.generate.pages)"
      )
    pool = {
      name: replace(
        p, shape=(blocks, self.block, *p.shape), axes=(None, None, *p.axes)
      )
      for name, p in token.items()
    }
    shape = (batch, self.columns(length))
    table = Param(shape, (None, None), 0, InTurn(), jnp.int32)
    return pool | {"table": table, "kind": self}

  def extend(
    self, cache: Cache, new: Cache, positions: Array, mask: Mask
  ) -> tuple[Cache, Cache]:
    """Writes tokens to the blocks of their rows, and reads these.

    A table's entry of -1 is no block: nothing is written there or seen.
    """
    del mask
    table, size = cache["table"], self.block
    columns = table.shape[1]
    column = jnp.clip(positions // size, 0, columns - 1)
    blocks = jnp.take_along_axis(table, column, axis=1)
    live = (positions >= 0) & (positions < columns * size) & (blocks >= 0)

    def put(pool: Array, x: Array) -> Array:
      where = jnp.where(live, blocks, pool.shape[0])
      x = x.astype(pool.dtype)
      return pool.at[where, positions % size].set(x, mode="drop")

    def read(pool: Array) -> Array:
      rows = pool[jnp.maximum(table, 0)]
      return rows.reshape(len(table), columns * size, *pool.shape[2:])

    written = {name: put(cache[name], x) for name, x in new.items()}
    seen = {name: read(pool) for name, pool in written.items()}
    places = jnp.arange(columns * size, dtype=jnp.int32)[None]
    owned = jnp.repeat(table >= 0, size, axis=1)
    seen["positions"] = jnp.where(owned, places, -1)
    return seen, cache | written

  def sees(self, mask: Mask) -> Mask:
    """The mask as it is."""
    return mask

  def near(self, positions: Array) -> Array | None:
    """Nothing is moved."""
    del positions
    return None


def with_table(cache: Any, table: Array) -> Any:
  """A paged cache of other rows: `table` int32 [batch, columns].

  The pool stays as it is. `cache` is that of a model; what is not paged in it
  has to be without rows.
  """

  def one(path: tuple, old: Array) -> Array:
    if getattr(path[-1], "key", None) != "table":
      return old
    lead = (1,) * (old.ndim - 2)
    shape = (*old.shape[:-2], *table.shape)
    return jnp.broadcast_to(table.reshape(lead + table.shape), shape)

  return jax.tree_util.tree_map_with_path(one, cache)
