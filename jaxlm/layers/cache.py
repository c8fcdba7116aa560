"""What attention remembers while generating: keys, values, and their places.

Every slot stores the position of its key, so that full caches, ring buffers,
padding and chunks of any size need no special case: a token of position m goes
to slot m mod length, and whether a slot is seen is the mask's decision. A
negative position marks an empty slot, or a padding token that is not written.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.param import ZEROS, Constant, Param, init

Array = jax.Array


def kv_cache(
  batch: int, length: int, heads: int, key_dim: int, value_dim: int
) -> dict[str, Param]:
  """Declares `k`, `v` `[batch, length, heads, dim]` and `positions`."""
  axes = ("batch", None, "kv_heads", None)
  return {
    "k": Param((batch, length, heads, key_dim), axes, 0, ZEROS),
    "v": Param((batch, length, heads, value_dim), axes, 0, ZEROS),
    "positions": _positions(batch, length),
  }


def latent_cache(batch: int, length: int, width: int) -> dict[str, Param]:
  """Declares `latent` `[batch, length, width]`, one for all heads."""
  return {
    "latent": Param((batch, length, width), ("batch", None, None), 0, ZEROS),
    "positions": _positions(batch, length),
  }


def _positions(batch: int, length: int) -> Param:
  """Where the key of each slot stands; negative marks an empty slot."""
  return Param((batch, length), ("batch", None), 0, Constant(-1), jnp.int32)


def empty(tree: Any, dtype: Any = jnp.float32) -> Any:
  """The arrays of a declared cache, nothing remembered yet."""

  def one(p: Param) -> Array:
    return init(p, jax.random.key(0), p.compute or dtype)

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Param))


def write(
  cache: dict[str, Array], new: dict[str, Array], positions: Array
) -> dict[str, Array]:
  """Puts arrays `[batch, seq, ...]` at their positions `[batch, seq]`.

  Of a chunk longer than the cache only the last `length` positions are kept:
  the slots of the others would be written twice, in no defined order.
  """
  length = cache["positions"].shape[1]
  last = jnp.max(positions, axis=1, keepdims=True)
  kept = (positions >= 0) & (positions > last - length)
  slots = jnp.where(kept, positions % length, length)
  rows = jnp.arange(positions.shape[0])[:, None]

  def put(old: Array, x: Array) -> Array:
    return old.at[rows, slots].set(x.astype(old.dtype), mode="drop")

  new = new | {"positions": positions}
  return {name: put(cache[name], x) for name, x in new.items()}


def extend(
  cache: dict[str, Array],
  new: dict[str, Array],
  positions: Array,
  reach: int | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Adds tokens, and says what they may read.

  A cache that holds all a chunk can see is written first and read once. A
  ring shorter than that would lose keys its own chunk still needs, so the
  chunk is read beside the old ring.

  Args:
    cache: what is remembered.
    new: arrays `[batch, seq, ...]` of the new tokens.
    positions: theirs, `[batch, seq]`.
    reach: of the mask.

  Returns:
    The arrays to read, `positions` with them, and the new cache.
  """
  t, length = positions.shape[1], cache["positions"].shape[1]
  written = write(cache, new, positions)
  if t == 1 or (reach is None and t <= length):
    return written, written
  new = new | {"positions": positions}
  beside = {
    name: jnp.concatenate([cache[name].astype(x.dtype), x], axis=1)
    for name, x in new.items()
  }
  return beside, written
