"""`attend`: softmax(q k' / sqrt(d)) v under a mask, in several forms.

One signature. `attend_reference` is the definition, written to be read;
`attend_blocks` gives the same numbers faster on a CPU by skipping what the
mask excludes. Under a mesh of several devices either runs on each device's own
batch and heads, so neither knows about sharding.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute, active_mesh, platform
from jaxlm.layers.context import attend_divided, whole_rows, written_out
from jaxlm.layers.kernels.blocks import attend_causal
from jaxlm.layers.kernels.flash import GPU, TPU, fits_gpu, flash_attention
from jaxlm.layers.mask import Causal, Full, Mask, Sliding
from jaxlm.layers.norm import soft_cap
from jaxlm.layers.position import Alibi
from jaxlm.layers.scores import (
  Moved,
  distances,
  masked_softmax,
  products,
  visible,
)

__all__ = [
  "FORMS",
  "Moved",
  "attend",
  "attend_blocks",
  "attend_flash",
  "attend_reference",
  "choose",
  "largest_logits",
  "masked_softmax",
  "visible",
]

Array = jax.Array

FEW, SMALL = 16, 32  # heads and their width up to which a CPU takes all as one


def attend_reference(
  q: Array,
  k: Array,
  v: Array,
  mask: Mask,
  at: At,
  keys: At,
  *,
  scale: float,
  softcap: float | None = None,
  sinks: Array | None = None,
  slopes: Array | None = None,
  bias: Array | None = None,
  moved: Moved | None = None,
) -> Array:
  """The definition; see `attend` for the arguments."""
  b, t, n = q.shape[:3]
  s, groups = k.shape[1], k.shape[2]
  see = visible(mask, at, keys, t, s)[:, None, None]
  scores = products(q, k, moved) * scale
  if softcap is not None:
    scores = soft_cap(scores, softcap)
  if slopes is not None:
    away = distances(at, keys, t, s, moved)[:, None, None]
    scores = scores + slopes.reshape(1, groups, n // groups, 1, 1) * away
  if bias is not None:
    scores = scores + bias.reshape(-1, groups, n // groups, t, s)
  probs = masked_softmax(
    scores, see, None if sinks is None else sinks.reshape(1, groups, -1, 1, 1)
  )
  # Not by einsum, which puts the values in front: a CPU then turns them round.
  out = jax.lax.dot_general(
    probs.astype(v.dtype),
    v,
    (((4,), (1,)), ((0, 1), (0, 2))),
    preferred_element_type=jnp.float32,
  )
  out = jnp.moveaxis(out.astype(v.dtype), 3, 1)
  return out.reshape(b, t, n, v.shape[-1])


def largest_logits(
  q: Array, k: Array, mask: Mask, at: At, scale: float | None = None
) -> Array:
  """The largest score before the softmax of each head, float32 [heads].

  What QK clip watches (Kimi K2, arXiv:2507.20534, section 2.1). Arguments as
  in `attend`.
  """
  t, n, h = q.shape[1:]
  scale = h**-0.5 if scale is None else scale
  keys = whole_rows(At(at.positions, at.segments, at.blocks))
  see = visible(mask, at, keys, t, t)[:, None, None]
  scores = products(q, whole_rows(k), None) * scale
  top = jnp.max(jnp.where(see, scores, -jnp.inf), axis=(0, 3, 4))
  return jax.lax.stop_gradient(top.reshape(n))


def attend_blocks(
  q: Array,
  k: Array,
  v: Array,
  mask: Mask,
  at: At,
  keys: At,
  *,
  scale: float,
  softcap: float | None = None,
  sinks: Array | None = None,
  slopes: Array | None = None,
  bias: Array | None = None,
  moved: Moved | None = None,
) -> Array:
  """The same, one block of queries at a time, on the keys it can see.

  Half of a causal square is never computed, and a window costs O(seq *
  window). Where positions come with the data, or scores are capped or biased,
  the reference takes over.
  """
  extras = (softcap, sinks, slopes, bias, moved)
  plain = all(extra is None for extra in extras)
  own = at.aligned and keys.aligned and q.shape[1] == k.shape[1]
  if plain and own and mask.causal:
    return attend_causal(q, k, v, mask, scale)
  groups, width = k.shape[2], v.shape[3]
  small = q.shape[2] <= FEW and width <= SMALL
  if one := len(q) > 1 and q.shape[1] == 1 and groups > 1 and small:
    q, k, v, moved = _as_one(q, k, v, moved)
  y = attend_reference(
    q,
    k,
    v,
    mask,
    at,
    keys,
    scale=scale,
    softcap=softcap,
    sinks=sinks,
    slopes=slopes,
    bias=bias,
    moved=moved,
  )
  return _own_part(y, groups, width) if one else y


def _as_one(q: Array, k: Array, v: Array, moved: Moved | None) -> tuple:
  """One query of each row, and all key heads as one that is as wide as all.

  The queries are zero where the key is not theirs. That is more to multiply;
  but a cache [batch, keys, kv_heads, head_dim] is read as it lies, and a CPU
  would turn all of it round for a product by heads: 1.1 to 1.5 times the time
  of a layer up to 16 heads of 32 features, and less than this for wider ones.
  """
  groups = k.shape[2]
  k, v = (x.reshape(*x.shape[:2], 1, -1) for x in (k, v))
  if moved is not None:
    moved = moved.replace(q=_wide(moved.q, groups))
  return _wide(q, groups), k, v, moved


def _wide(q: Array, groups: int) -> Array:
  """Queries `[batch, 1, heads, groups * head_dim]`, each in its own part."""
  b, t, n, h = q.shape
  place = jnp.eye(groups, dtype=q.dtype).repeat(n // groups, axis=0)
  wide = q[:, :, :, None] * place[None, None, :, :, None]
  return wide.reshape(b, t, n, groups * h)


def _own_part(y: Array, groups: int, width: int) -> Array:
  """The part of each head's group: from `[..., groups * width]`."""
  b, t, n = y.shape[:3]
  y = y.reshape(b, t, groups, n // groups, groups, width)
  parts = [y[:, :, i : i + 1, :, i] for i in range(groups)]
  return jnp.concatenate(parts, axis=2).reshape(b, t, n, width)


def attend_flash(
  q: Array,
  k: Array,
  v: Array,
  mask: Mask,
  at: At,
  keys: At,
  *,
  scale: float,
  softcap: float | None = None,
  sinks: Array | None = None,
  slopes: Array | None = None,
  bias: Array | None = None,
  moved: Moved | None = None,
) -> Array:
  """The same by Pallas kernels: compiled on a TPU, interpreted on a CPU.

  A bias is as large as the scores themselves, and there, as for keys that are
  met elsewhere, the reference takes over.
  """
  options = {"scale": scale, "softcap": softcap, "sinks": sinks}
  options["slopes"] = slopes
  if bias is None and moved is None:
    return flash_attention(q, k, v, mask, at, keys, **options)
  options |= {"bias": bias, "moved": moved}
  return attend_reference(q, k, v, mask, at, keys, **options)


def attend_triton(
  q: Array,
  k: Array,
  v: Array,
  mask: Mask,
  at: At,
  keys: At,
  *,
  scale: float,
  softcap: float | None = None,
  sinks: Array | None = None,
  slopes: Array | None = None,
  bias: Array | None = None,
  moved: Moved | None = None,
) -> Array:
  """The same by Pallas kernels for GPUs, interpreted on a CPU.

  What has no kernel, and heads too wide for a GPU, go by `attend_blocks`.
  """
  options = {"scale": scale, "softcap": softcap, "sinks": sinks}
  options["slopes"] = slopes
  if bias is None and moved is None and fits_gpu(q, k, v):
    return flash_attention(q, k, v, mask, at, keys, **options, chip=GPU)
  options |= {"bias": bias, "moved": moved}
  return attend_blocks(q, k, v, mask, at, keys, **options)


def attend_cudnn(
  q: Array,
  k: Array,
  v: Array,
  mask: Mask,
  at: At,
  keys: At,
  *,
  scale: float,
  softcap: float | None = None,
  sinks: Array | None = None,
  slopes: Array | None = None,
  bias: Array | None = None,
  moved: Moved | None = None,
) -> Array:
  """The same by NVIDIA's library, and by XLA on a CPU.

  It knows plain causal, full and sliding attention in half precision, of even
  lengths and heads up to 128 wide; `attend_triton` does the rest.
  """
  extras = (softcap, sinks, slopes, bias, moved)
  own = at.aligned and keys.aligned and q.shape[1] == k.shape[1]
  half = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[1] % 2 == 0
  wide = max(q.shape[3], v.shape[3]) > 128 or q.shape[3] % 8 or v.shape[3] % 8
  window = isinstance(mask, Sliding) and mask.reach
  plain = window or isinstance(mask, Causal | Full)
  if any(x is not None for x in extras) or wide or not (own and half and plain):
    return attend_triton(
      q,
      k,
      v,
      mask,
      at,
      keys,
      scale=scale,
      softcap=softcap,
      sinks=sinks,
      slopes=slopes,
      bias=bias,
      moved=moved,
    )
  with (  # JAX's own code widens and broadcasts in silence
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      scale=scale,
      is_causal=mask.causal,
      local_window_size=(window - 1, 0) if window else None,
      implementation="cudnn" if platform() in GPUS else "xla",
    )


FORMS = {
  "reference": attend_reference,
  "blocks": attend_blocks,
  "flash": attend_flash,
  "triton": attend_triton,
  "cudnn": attend_cudnn,
}
GPUS = ("gpu", "cuda")
CHIPS = {attend_flash: TPU, attend_triton: GPU, attend_cudnn: GPU}
KERNELS = {"tpu": ("flash", "the kernel for TPUs")}
KERNELS |= dict.fromkeys(GPUS, ("triton", "the kernel for GPUs"))


def choose(compute: Compute, queries: int | None = None) -> tuple[str, str]:
  """Which form runs, and why.

  Args:
    compute: 'auto' chooses by the devices of the mesh in force, or the default
      ones.
    queries: how many there are in a row; None means many.

  Raises:
    UserError: if `compute.attention` is no implementation.
  """
  if compute.attention in FORMS:
    return compute.attention, "asked for"
  if compute.attention != "auto":
    raise UserError(
      f"unknown attention {compute.attention!r}; known: auto, "
      f"{', '.join(FORMS)}"
    )
  chip = platform()
  if chip not in KERNELS:
    return "blocks", f"plain XLA, on {chip}"
  if queries == 1:
    return "reference", "one query's scores are one row"
  return KERNELS[chip]


def attend(
  q: Array,
  k: Array,
  v: Array,
  mask: Mask,
  at: At | None = None,
  keys: At | None = None,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  sinks: Array | None = None,
  alibi: Alibi | None = None,
  bias: Array | None = None,
  moved: Moved | None = None,
  compute: Compute,
) -> Array:
  """Attention of queries to keys, softmax in float32.

  Args:
    q: queries `[batch, seq, heads, head_dim]`.
    k: keys `[batch, keys, kv_heads, head_dim]`; heads are shared in groups
      where `kv_heads < heads` (GQA, arXiv:2305.13245).
    v: values `[batch, keys, kv_heads, value_dim]`.
    mask: who sees whom.
    at: where the queries stand.
    keys: where the keys stand; None means as the queries.
    scale: of the products; None means `head_dim ** -0.5`.
    softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
    sinks: learned logits `[heads]` that only join the denominator (gpt-oss).
    alibi: linear biases, or None.
    bias: added to the scores, `[batch or 1, heads, seq, keys]`.
    moved: how queries meet the first keys, where that differs (a ring's
      sinks).
    compute: chooses the implementation, and places the work on a mesh.

  Returns:
    `[batch, seq, heads, value_dim]` in the dtype of `v`.

  Raises:
    UserError: if `compute.attention` is no implementation.
  """
  at = At() if at is None else at
  keys = at if keys is None else keys
  name, _ = choose(compute, q.shape[1])
  form = functools.partial(
    FORMS[name],
    scale=q.shape[-1] ** -0.5 if scale is None else scale,
    softcap=softcap,
  )
  slopes = None if alibi is None else alibi.slopes(q.shape[2])
  at, keys = (
    At(a.positions, a.segments, a.blocks, order=a.order) for a in (at, keys)
  )
  extras = {"sinks": sinks, "slopes": slopes, "bias": bias, "moved": moved}
  if active_mesh() is None or compute.rules is None:
    return form(q, k, v, mask, at, keys, **extras)
  return _attend_sharded(form, q, k, v, mask, at, keys, extras, compute)


def _attend_sharded(form, q, k, v, mask, at, keys, extras, compute) -> Array:
  """Runs `form` on each device's batch and heads; no communication.

  Unless rows are split as well: then it is `attend_divided`'s.
  """
  heads = compute.spec(("batch", "length", "heads", None), q.shape)
  row = heads[1] and "length"  # one query, in a cache: keys are whole too
  kv = compute.spec(("batch", row, "kv_heads", None), k.shape)
  one = k.shape[2] == 1  # of all queries: each device has it whole
  if kv[2] != heads[2] and not one:  # fewer than devices: repeat them first
    times = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
    kv = heads
  q, k, v = (
    jax.sharding.reshard(x, spec)
    for x, spec in zip((q, k, v), (heads, kv, kv), strict=True)
  )

  def rows(x: Array) -> str | None:
    return heads[0] if x.shape[0] == q.shape[0] else None

  by_row = (
    jax.tree.map(lambda x: PartitionSpec(rows(x), heads[1]), at),
    jax.tree.map(lambda x: PartitionSpec(rows(x), kv[1]), keys),
  )
  at, keys = jax.tree.map(jax.sharding.reshard, (at, keys), by_row)
  each = PartitionSpec(heads[2])
  by_head = {"sinks": each, "slopes": each, "bias": None, "moved": None}
  if extras["bias"] is not None:
    spec = PartitionSpec(rows(extras["bias"]), heads[2], heads[1], None)
    extras = extras | {"bias": jax.sharding.reshard(extras["bias"], spec)}
    by_head["bias"] = spec
  if extras["moved"] is not None:
    where = PartitionSpec(heads[0], None)
    spec = extras["moved"].replace(q=heads, positions=where)
    moved = jax.tree.map(jax.sharding.reshard, extras["moved"], spec)
    extras, by_head["moved"] = extras | {"moved": moved}, spec

  chip = CHIPS.get(form.func)
  chip = None if chip == GPU and not fits_gpu(q, k, v) else chip

  def local(q, k, v, at, keys, extras):
    if row and kv[1]:
      return attend_divided(
        form, q, k, v, mask, at, keys, extras, kv[1], compute, chip
      )
    at = at if heads[1] is None else written_out(at, q.shape[1], heads[1])
    return form(q, k, v, mask, at, keys, **extras)

  return jax.shard_map(
    local,
    in_specs=(heads, kv, kv, *by_row, by_head),
    out_specs=heads,
    check_vma=False,
  )(q, k, v, at, keys, extras)
