"""Decoding that reads a paged cache where its pages lie, or says it cannot."""

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxlm.layers.attend import choose
from jaxlm.layers.compute import Compute, active_mesh
from jaxlm.layers.kernels import paged_gpu
from jaxlm.layers.kernels.paged import paged_attention
from jaxlm.layers.mask import Mask
from jaxlm.layers.paged import Paged

Array = jax.Array


def in_place(cache: dict[str, Any], q: Array, compute: Compute) -> bool:
  """Whether queries `[batch, seq, heads, head_dim]` go to the pages themselves.

  One per row does, on a TPU or GPU. Heads that are no multiple of a TPU's 128
  lanes lie in memory as no kernel wants them: a copy of the pool would be made
  for each token, so there the pages are read first. A GPU's kernel counts in
  powers of two.
  """
  if not isinstance(cache.get("kind"), Paged) or q.shape[1] > 1:
    return False
  name, width = choose(compute)[0], q.shape[3]
  if name == "triton":
    return "k" in cache and paged_gpu.fits(width, cache["k"].shape[1])
  return name == "flash" and (width % 128 == 0 or compute.attention == name)


def attend_pages(
  q: Array,
  cache: dict[str, Any],
  positions: Array,
  mask: Mask,
  *,
  scale: float,
  softcap: float | None,
  sinks: Array | None,
  slopes: Array | None,
  compute: Compute,
) -> Array:
  """Attention of one query per row to a paged cache that already has its key.

  Args:
    q: `[batch, heads, head_dim]`.
    cache: with `k`, `v` `[blocks, block, kv_heads, ...]` and `table`.
    positions: of the queries, `[batch]`.
    mask: a causal one.
    scale: of the products.
    softcap: of the scores, or None.
    sinks: learned logits `[heads]`, or None.
    slopes: of ALiBi `[heads]`, or None.
    compute: places the work on a mesh: a device has heads of its own.

  Returns:
    `[batch, heads, value_dim]` in the dtype of `q`.
  """
  form = functools.partial(
    paged_attention,
    mask=mask,
    scale=scale,
    softcap=softcap,
    gpu=choose(compute)[0] == "triton",
  )
  numbers = {"sinks": sinks, "slopes": slopes}
  args = q, cache["k"], cache["v"], cache["table"], positions

  def run(args: tuple, numbers: dict) -> Array:
    return form(*args, **numbers).astype(q.dtype)

  if active_mesh() is None or compute.rules is None:
    return run(args, numbers)
  heads = jax.typeof(cache["k"]).sharding.spec
  each = heads[2] if len(heads) > 2 else None
  rows = PartitionSpec(None, each, None)
  pool = PartitionSpec(None, None, each, None)
  specs = rows, pool, pool, PartitionSpec(None, None), PartitionSpec(None)
  args = tuple(map(jax.sharding.reshard, args, specs))
  by_head = dict.fromkeys(numbers, PartitionSpec(each))
  return jax.shard_map(
    run, in_specs=(specs, by_head), out_specs=rows, check_vma=False
  )(args, numbers)
