"""Layers in a row: a pattern of blocks, some number of times over.

Scanned, written out, or divided into stages that micro-batches pass through
(`jaxlm.models.pipeline`). What a layer computes is none of its business.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import gather
from jaxlm.models.pipeline import late, pipelined, stages

Array = jax.Array
Tree = Any


def run(
  pattern: tuple[Any, ...],
  n: int,
  params: Tree,
  x: Array,
  at: At,
  cache: Tree | None,
  compute: Compute,
  first: int,
) -> tuple[Array, Tree]:
  """A pattern of blocks `n` times over.

  The layers of `params` and `cache` are stacked, or apart (`layers_apart`):
  then they are written out, and an updated cache is apart as well.

  Args:
    pattern: the blocks.
    n: how often.
    params: of each place in the pattern, `[n, ...]`.
    x: the residual stream `[batch, seq, dim]`.
    at: where the tokens stand.
    cache: likewise, or None.
    compute: how to run.
    first: the number of the first block in the model; dropout asks.

  Returns:
    The stream, and the cache or the blocks' reports, `[n, ...]`.

  Raises:
    UserError: for what does not divide among stages, or a cache there.
  """
  numbers = first + len(pattern) * jnp.arange(n, dtype=jnp.int32)
  layers = functools.partial(_layers, pattern, compute)
  if cache is not None and stages(compute) > 1:
    raise UserError(
      "a cache is not kept across the stages of a pipeline; generate with "
      "another parallel.preset, for example fsdp or tp"
    )
  if stages(compute) > 1:
    return pipelined(layers, n, params, numbers, x, at, compute)
  return layers(params, numbers, x, at, cache)


def _layers(
  pattern: tuple[Any, ...],
  compute: Compute,
  params: Tree,
  numbers: Array,
  x: Array,
  at: At,
  cache: Tree | None = None,
) -> tuple[Array, Tree]:
  """As many layers as `numbers` names, scanned or written out."""
  tree = {str(j): b.params() for j, b in enumerate(pattern)}

  def body(x: Array, layer: tuple) -> tuple[Array, Tree]:
    p, c, number = layer
    p = gather(late(p, x), tree, compute.rules, compute.jnp_dtype)
    new = {}
    for j, block in enumerate(pattern):
      here = at
      if at.key is not None:
        here = at.replace(key=jax.random.fold_in(at.key, number + j))
      name = str(j)
      x, new[name] = block(
        p[name], x, here, None if c is None else c[name], compute
      )
    return x, new

  body = _remat(body, compute)
  if not compute.unroll and not isinstance(params, tuple):
    return jax.lax.scan(body, x, (params, cache, numbers))
  new, n = [], len(numbers)
  layers = zip(unstack(params, n), unstack(cache, n), range(n), strict=True)
  for p, c, i in layers:
    x, c = body(x, (p, c, numbers[i]))
    new.append(c)
  if isinstance(cache, tuple):
    return x, tuple(new)
  return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)


def unstack(tree: Tree, n: int) -> list[Tree]:
  """The `n` layers of a stacked tree; gradients come back by concatenation."""
  if tree is None or isinstance(tree, tuple):
    return [None] * n if tree is None else list(tree)
  leaves, structure = jax.tree.flatten(tree)
  parts = [jax.lax.split(leaf, (1,) * n, axis=0) for leaf in leaves]
  return [
    structure.unflatten([part[i].squeeze(0) for part in parts])
    for i in range(n)
  ]


_POLICIES = {
  "dots": "dots_saveable",
  "dots_no_batch": "dots_with_no_batch_dims_saveable",
  "full": "nothing_saveable",
}


def _remat(body: Any, compute: Compute) -> Any:
  """What of a layer is recomputed in the backward pass."""
  if compute.remat == "none":
    return body
  if compute.remat not in _POLICIES:
    raise UserError(
      f"unknown remat {compute.remat!r}; known: none, {', '.join(_POLICIES)}"
    )
  policy = getattr(jax.checkpoint_policies, _POLICIES[compute.remat])
  return jax.checkpoint(body, policy=policy, prevent_cse=compute.unroll)
