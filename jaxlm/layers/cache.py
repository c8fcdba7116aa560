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
    "positions": Param(
      (batch, length), ("batch", None), 0, Constant(-1), jnp.int32
    ),
  }


def empty(tree: Any, dtype: Any = jnp.float32) -> Any:
  """The arrays of a declared cache, nothing remembered yet."""

  def one(p: Param) -> Array:
    return init(p, jax.random.key(0), p.compute or dtype)

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Param))


def write(
  cache: dict[str, Array], k: Array, v: Array, positions: Array
) -> dict[str, Array]:
  """Puts keys and values `[batch, seq, heads, dim]` at their positions.

  Of a chunk longer than the cache only the last `length` positions are kept:
  the slots of the others would be written twice, in no defined order.
  """
  length = cache["k"].shape[1]
  last = jnp.max(positions, axis=1, keepdims=True)
  kept = (positions >= 0) & (positions > last - length)
  slots = jnp.where(kept, positions % length, length)
  rows = jnp.arange(k.shape[0])[:, None]

  def put(old: Array, new: Array) -> Array:
    return old.at[rows, slots].set(new.astype(old.dtype), mode="drop")

  return {
    "k": put(cache["k"], k),
    "v": put(cache["v"], v),
    "positions": put(cache["positions"], positions),
  }
