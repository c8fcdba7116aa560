"""Losses: arrays in, arrays out. No model, no config, no tokens' meaning."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.layers.compute import DEFAULT, Compute, platform
from jaxlm.layers.kernels.fused_loss import fused_cross_entropy
from jaxlm.layers.linear import dot
from jaxlm.layers.norm import soft_cap

Array = jax.Array


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
  """-log softmax(logits)[target], and the log of the normalizer.

  Args:
    logits: float32 `[..., vocab]`.
    targets: integers `[...]`.

  Returns:
    `(loss, log_z)`, both float32 `[...]`, in nats.
  """
  chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return log_z - picked, log_z


def chunked_cross_entropy(
  x: Array, w: Array, targets: Array, chunk: int, softcap: float | None = None
) -> tuple[Array, Array]:
  """Cross entropy of `softcap(x @ w)` that never holds all the logits.

  Positions are taken `chunk` at a time; the backward pass makes each chunk's
  logits again. Memory for logits falls from batch x seq x vocab to batch x
  chunk x vocab. Batch and rows may stay sharded: devices that share a row each
  take their share of a chunk.

  Args:
    x: hidden states `[batch, seq, dim]`.
    w: head `[dim, vocab]`.
    targets: integers `[batch, seq]`.
    chunk: positions at a time; the last chunk is padded.
    softcap: bounds the logits, or None.

  Returns:
    `(loss, log_z)`, both float32 `[batch, seq]`.
  """
  chex.assert_rank([x, w, targets], [3, 2, 2])
  each = jax.typeof(x).sharding.shard_shape(x.shape)[1]
  ways = x.shape[1] // each
  size = math.ceil(chunk / ways)
  n = math.ceil(each / size)

  def split(a: Array) -> Array:
    a = a.reshape(a.shape[0], ways, each, *a.shape[2:])
    a = jnp.pad(a, ((0, 0), (0, 0), (0, n * size - each), (0, 0))[: a.ndim])
    a = a.reshape(*a.shape[:2], n, size, *a.shape[3:])
    a = jnp.moveaxis(a, 2, 0)
    return a.reshape(n, a.shape[1], ways * size, *a.shape[4:])

  @jax.checkpoint
  def one(_, part):
    h, t = part
    y = dot(h, w, "btd,dv->btv", dtype=jnp.float32)
    y = y if softcap is None else soft_cap(y, softcap)
    return None, cross_entropy(y, t)

  _, parts = jax.lax.scan(one, None, (split(x), split(targets)))

  def joined(a: Array) -> Array:
    a = a.reshape(n, -1, ways, size)
    a = jnp.moveaxis(a, 0, 2).reshape(a.shape[1], ways, n * size)
    return a[:, :, :each].reshape(targets.shape)

  loss, log_z = (joined(a) for a in parts)
  return loss, log_z


def head_cross_entropy(
  x: Array,
  w: Array,
  targets: Array,
  chunk: int,
  softcap: float | None = None,
  compute: Compute = DEFAULT,
) -> tuple[Array, Array]:
  """Cross entropy of `softcap(x @ w)` for those who have no room for logits.

  On a TPU a kernel holds none of them, whatever `chunk` says; that costs a
  fifth product beside the four of `chunked_cross_entropy`, which is what runs
  elsewhere, and where a mesh cuts the vocabulary. Arguments and results are
  those of `chunked_cross_entropy`, and `compute`, which places the work.
  """
  spec = compute.spec(("batch", "seq", "vocab"), (*targets.shape, w.shape[1]))
  if platform() != "tpu" or (spec is not None and spec[2] is not None):
    return chunked_cross_entropy(x, w, targets, chunk, softcap)
  if spec is None:
    return fused_cross_entropy(x, w, targets, softcap)
  rows, whole = PartitionSpec(*spec[:2]), PartitionSpec(None, None)
  specs = PartitionSpec(*spec[:2], None), whole, rows
  args = map(jax.sharding.reshard, (x, w, targets), specs)
  return jax.shard_map(
    functools.partial(fused_cross_entropy, softcap=softcap),
    in_specs=specs,
    out_specs=(rows, rows),
    check_vma=False,
  )(*args)


def weighted_mean(x: Array, weights: Array | None) -> tuple[Array, Array]:
  """Mean of `x` under 0/1 `weights` (None: all ones), and their sum.

  A batch without any weight has mean zero, not NaN.
  """
  if weights is None:
    return jnp.mean(x), jnp.asarray(x.size, jnp.float32)
  weights = weights.astype(x.dtype)
  total = jnp.sum(weights)
  return jnp.sum(x * weights) / jnp.maximum(total, 1.0), total


# --- Distillation -----------------------------------------------------------
#
# How far a student is from its teacher at each position. A temperature divides
# both logits beforehand; the soft targets of arXiv:1503.02531 are `forward_kl`
# at one above 1, times its square.


def forward_kl(teacher: Array, student: Array) -> Array:
  """KL(teacher | student) = sum_v p_t (log p_t - log p_s).

  The student must cover all that the teacher may say.

  Args:
    teacher: logits `[..., vocab]`.
    student: logits of the same shape.

  Returns:
    `[...]`, in nats.
  """
  chex.assert_equal_shape([teacher, student])
  log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def reverse_kl(teacher: Array, student: Array) -> Array:
  """KL(student | teacher): the student may not say what the teacher would not.

  It chooses one mode rather than to blur all (MiniLLM, arXiv:2306.08543).

  Args:
    teacher: logits `[..., vocab]`.
    student: logits of the same shape.

  Returns:
    `[...]`, in nats.
  """
  return forward_kl(student, teacher)


def jensen_shannon(teacher: Array, student: Array, beta: float = 0.5) -> Array:
  """The mean of both to a mixture, M = b p_t + (1 - b) p_s.

    b KL(teacher | M) + (1 - b) KL(student | M)

  The generalised form of arXiv:2306.13649, equation 1. At 1/2 it is symmetric
  and never above log 2; divided by b, it goes to `forward_kl` as b goes to 0,
  and divided by 1 - b to `reverse_kl` as b goes to 1.

  Args:
    teacher: logits `[..., vocab]`.
    student: logits of the same shape.
    beta: b, above 0 and below 1.

  Returns:
    `[...]`, in nats.
  """
  chex.assert_equal_shape([teacher, student])
  log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
  kl_p = jnp.sum(jnp.exp(log_p) * (log_p - log_m), axis=-1)
  kl_q = jnp.sum(jnp.exp(log_q) * (log_q - log_m), axis=-1)
  return beta * kl_p + (1 - beta) * kl_q
