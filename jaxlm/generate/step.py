"""The two forward passes of every decoding method: read prompts, read on.

`prefill` reads prompts into a new cache, `step` reads further tokens; both are
the forward pass of training with a cache. `take` picks rows of a cache, for
methods that keep several continuations of a prompt and drop some; `forget`
takes tokens back that should not have been read.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.attend import At
from jaxlm.layers.cache import FULL, empty
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import path_name
from jaxlm.models.decoder import Decoder, hidden, layers_apart

Array = jax.Array
Tree = Any

UNROLLED = Compute(unroll=True)


def prefill(
  model: Decoder,
  params: Tree,
  tokens: Array,
  lengths: Array,
  length: int,
  compute: Compute = UNROLLED,
  kind: Any = FULL,
) -> tuple[Array, Tree]:
  """Reads prompts into a new cache.

  Args:
    model: what to run.
    params: its arrays, best as `decode.ready` makes them.
    tokens: int32 `[batch, seq]`, padded on the left.
    lengths: how many of the last tokens of each row are its prompt, `[batch]`.
    length: positions the cache has room for.
    compute: how to run.
    kind: how the cache remembers (`layers/cache.py`).

  Returns:
    The last hidden states `[batch, 1, dim]`, and the cache.
  """
  x, cache = read(model, params, tokens, lengths, length, compute, kind)
  return x[:, -1:], cache


def read(
  model: Decoder,
  params: Tree,
  tokens: Array,
  lengths: Array,
  length: int,
  compute: Compute = UNROLLED,
  kind: Any = FULL,
) -> tuple[Array, Tree]:
  """`prefill`, with all hidden states `[batch, seq, dim]`."""
  batch, seq = tokens.shape
  cache = empty(model.cache(batch, length, kind), compute.jnp_dtype)
  if compute.unroll:
    cache = layers_apart(model, cache)
  # Padding stands at negative positions: it is never written and never seen.
  positions = jnp.arange(seq, dtype=jnp.int32)[None] + lengths[:, None] - seq
  x, cache = hidden(
    model, params, tokens, At(positions=positions), cache, compute
  )
  return x, cache


def step(
  model: Decoder,
  params: Tree,
  tokens: Array,
  position: Array,
  cache: Tree,
  compute: Compute = UNROLLED,
) -> tuple[Array, Tree]:
  """Reads tokens `[rows, some]`, the first of each row at `position` [rows].

  Returns:
    Hidden states `[rows, some, dim]`, and the cache with them.
  """
  places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  at = At(positions=position[:, None] + places)
  return hidden(model, params, tokens, at, cache, compute)


def take(cache: Tree, rows: Array, compute: Compute = UNROLLED) -> Tree:
  """The cache of those rows, int32 `[new rows]`, in that order."""
  axis = 0 if compute.unroll else 1  # that of the rows, behind the layers
  return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis), cache)


def forget(cache: Tree, position: Array, compute: Compute = UNROLLED) -> Tree:
  """The cache of rows that have read nothing from `position` [rows] on.

  Keys and values stay in their slots, which count as empty.
  """
  bound = position[:, None] if compute.unroll else position[None, :, None]

  def one(path: tuple, leaf: Array) -> Array:
    if path_name(path).rpartition("/")[2] != "positions":
      return leaf
    return jnp.where(leaf >= bound, -1, leaf)

  return jax.tree_util.tree_map_with_path(one, cache)
