"""The two forward passes of every decoding method: read prompts, read on.

`prefill` reads prompts into a new cache, `step` reads further tokens; both are
the forward pass of training with a cache. `take` picks rows of a cache, for
methods that keep several continuations of a prompt and drop some; `forget`
takes tokens back that should not have been read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.cache import FULL, empty, number
from jaxlm.layers.compute import Compute, active_mesh
from jaxlm.layers.param import path_name, paths
from jaxlm.layers.recurrent import place
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
  chunk: int | None = None,
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
    chunk: read so many tokens at a time: what a pass needs beside the cache
      is then bounded, however long the prompts.

  Returns:
    The last hidden states `[batch, 1, dim]`, and the cache.
  """
  if chunk is None or chunk >= tokens.shape[1]:
    x, cache = read(model, params, tokens, lengths, length, compute, kind)
    return whole(x[:, -1:], compute), cache
  tokens = jnp.pad(tokens, ((0, 0), (-tokens.shape[1] % chunk, 0)))
  cache = new_cache(model, len(tokens), length, compute, kind)

  def part(cache: Tree, new: tuple[Array, Array]) -> tuple[Tree, Array]:
    tokens, positions = new
    x, cache = hidden(
      model, params, tokens, At(positions=positions), cache, compute
    )
    return cache, x[:, -1:]

  parts = (
    jnp.moveaxis(x.reshape(len(x), -1, chunk), 1, 0)
    for x in (tokens, places(tokens, lengths))
  )
  cache, x = jax.lax.scan(part, cache, tuple(parts))
  return whole(x[-1], compute), cache


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
  cache = new_cache(model, len(tokens), length, compute, kind)
  at = At(positions=places(tokens, lengths))
  return hidden(model, params, tokens, at, cache, compute)


def new_cache(
  model: Decoder, batch: int, length: int, compute: Compute, kind: Any = FULL
) -> Tree:
  """An empty cache; its layers are apart where they are written out."""
  cache = empty(model.cache(batch, length, kind), number(compute), compute)
  return layers_apart(model, cache) if compute.unroll else cache


def places(tokens: Array, lengths: Array) -> Array:
  """Positions of prompts that are padded on the left, int32 [batch, seq].

  Padding stands at negative ones: it is never written and never seen.
  """
  seq = tokens.shape[1]
  return jnp.arange(seq, dtype=jnp.int32)[None] + lengths[:, None] - seq


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
  x, cache = hidden(model, params, tokens, at, cache, compute)
  return whole(x, compute), cache


def whole(x: Array, compute: Compute) -> Array:
  """The same on every device of a mesh: each chooses tokens for all rows."""
  return place(x, (None,) * x.ndim, compute)


def take(cache: Tree, rows: Array, compute: Compute = UNROLLED) -> Tree:
  """The cache of those rows, int32 `[new rows]`, in that order.

  Raises:
    UserError: if it is paged: rows would write to the same blocks.
  """
  if any(name.endswith("table") for name in paths(cache)):
    raise UserError(
      "rows of a paged cache cannot be copied, and several samples, beams or "
      "candidates of a prompt need that; use a full cache, or give the prompt "
      "several times to jaxlm.generate.pages.generate_paged"
    )
  axis = 0 if compute.unroll else 1  # that of the rows, behind the layers

  def one(leaf: Array) -> Array:
    if active_mesh() is None:
      return jnp.take(leaf, rows, axis)
    spec = jax.typeof(leaf).sharding.spec
    leaf = jax.sharding.reshard(leaf, PartitionSpec())
    return jax.sharding.reshard(jnp.take(leaf, rows, axis), spec)

  return jax.tree.map(one, cache)


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
