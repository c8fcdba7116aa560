"""Cross entropy of a head that never holds the logits, for TPUs.

Twin: `jaxlm.losses.chunked_cross_entropy`. Logits live in blocks of tokens by
vocabulary that never leave the chip; the backward pass makes each block again,
twice: once for the gradient of the hidden states, where blocks of vocabulary
follow each other, and once for that of the head, where blocks of tokens do
(as in Cut Cross-Entropy, arXiv:2411.09009, without its filter).

Numbers of a token (target, log of the sum, cotangents) lie along lanes, eight
rows to a block, and are turned in the kernel.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.layers.kernels.tpu import (
  LANES,
  LEAST,
  LOG2E,
  LOW,
  grow,
  on_device,
  padded,
  product,
)

Array = jax.Array

MEMORY = 48 << 20  # bytes on the chip that a kernel may use


@dataclass(frozen=True)
class Setting:
  """What is fixed when the kernels are compiled.

  Attributes:
    rows: tokens of a block.
    columns: words of a block.
    vocab: words; the last block may hang over.
    softcap: of the logits, or None.
  """

  rows: int = 512
  columns: int = 512
  vocab: int = 0
  softcap: float | None = None


def fused_cross_entropy(
  x: Array,
  w: Array,
  targets: Array,
  softcap: float | None = None,
  rows: int | None = None,
  columns: int | None = None,
) -> tuple[Array, Array]:
  """-log softmax(softcap(x w))[target], and the log of the normalizer.

  Runs compiled on a TPU and interpreted, slowly, on a CPU.

  Args:
    x: hidden states `[batch, seq, dim]`; products are in its dtype.
    w: head `[dim, vocab]`.
    targets: integers `[batch, seq]`.
    softcap: bounds the logits, or None.
    rows: tokens of a block; None means what fits the chip.
    columns: words of a block; likewise.

  Returns:
    `(loss, log_z)`, both float32 `[batch, seq]`, in nats.
  """
  fits = 512 if x.shape[2] <= 4096 else 256 if x.shape[2] <= 8192 else 128
  setting = Setting(rows or fits, columns or fits, w.shape[1], softcap)
  flat = x.reshape(-1, x.shape[2])
  loss, log_z = _loss(setting, flat, w, targets.reshape(-1))
  return loss.reshape(targets.shape), log_z.reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(setting: Setting, x: Array, w: Array, targets: Array):
  return _forward(setting, x, w, targets)[0]


def _forward(setting: Setting, x: Array, w: Array, targets: Array):
  rows = padded(x, setting.rows, 0)
  numbers = _numbers(setting, targets)
  out = on_device(
    functools.partial(_sums, setting), rows, w.astype(x.dtype), numbers
  )
  picked, log_z = (y[0, : len(x)] for y in out)
  return (log_z - picked, log_z), (x, w, targets, log_z)


def _backward(setting: Setting, saved, cotangents):
  x, w, targets, log_z = saved
  of_loss, of_log = cotangents
  numbers = _numbers(setting, targets, log_z, of_loss + of_log, of_loss)
  dx, dw = on_device(
    functools.partial(_gradients, setting),
    padded(x, setting.rows, 0),
    w.astype(x.dtype),
    numbers,
  )
  return dx[: len(x)], dw.astype(w.dtype), None


_loss.defvjp(_forward, _backward)


def _numbers(setting: Setting, *rows: Array) -> Array:
  """What belongs to tokens, as float32 [8, padded tokens]."""
  stack = jnp.stack([row.astype(jnp.float32) for row in rows])
  return padded(padded(stack, setting.rows, 1), 8, 0)


# --- Kernels ----------------------------------------------------------------


def _logits(setting: Setting, x: Array, w: Array, block: Array):
  """Logits of a block [rows, columns], their soft cap's slope, and columns."""
  s, slope, word = product(x, w), None, _words(setting, block)
  over = setting.vocab % setting.columns > 0
  if setting.softcap is not None:
    s = jnp.where(word < setting.vocab, s, 0.0) if over else s
    bent = jnp.tanh(s * (1.0 / setting.softcap))
    s, slope = bent * setting.softcap, 1.0 - bent * bent
  s = jnp.where(word < setting.vocab, s, LOW) if over else s
  return s, slope, word


def _words(setting: Setting, block: Array) -> Array:
  """Which words a block holds, int32 [1, columns]."""
  words = jax.lax.broadcasted_iota(jnp.int32, (1, setting.columns), 1)
  return words + block * setting.columns


def _is_target(numbers: Array, word: Array) -> Array:
  """True where a word [1, columns] is a token's target [rows, >= 1]."""
  return numbers[:, :1].astype(jnp.int32) == word


def _grid(setting: Setting, x: Array) -> tuple[int, int]:
  """How many blocks of tokens and of words there are."""
  return x.shape[0] // setting.rows, pl.cdiv(setting.vocab, setting.columns)


def _call(name: str, body, grid, ins, outs, scratch, work, interpret: bool):
  """A kernel over a grid whose second axis is summed over, `work` a step."""
  steps = grid[0] * grid[1]
  read = sum(
    x.dtype.itemsize
    * (steps * math.prod(block) if at(0, 0) != at(0, 1) else x.size)
    for x, (block, at) in ins
  )
  return pl.pallas_call(
    body,
    name=name,
    grid=grid,
    in_specs=[pl.BlockSpec(*spec) for _, spec in ins],
    out_specs=[pl.BlockSpec(*spec) for _, spec in outs],
    out_shape=[shape for shape, _ in outs],
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY
    ),
    cost_estimate=pl.CostEstimate(
      flops=steps * work, transcendentals=0, bytes_accessed=read
    ),
    interpret=interpret,
  )(*(array for array, _ in ins))


def _sums(setting: Setting, x, w, numbers, interpret: bool):
  """The logit of the target and the log of the sum: float32 [8, tokens]."""
  rows, dim = setting.rows, x.shape[1]

  def body(x, w, numbers, picked, log_z, top, total, found):
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
      top[...] = jnp.full_like(top, LEAST)
      total[...] = jnp.zeros_like(total)
      found[...] = jnp.zeros_like(found)

    s, _, word = _logits(setting, x[...], w[...], block)
    grow(s * LOG2E, top, total)
    own = jnp.where(_is_target(numbers[...].T, word), s, 0.0)
    found[...] += jnp.sum(own, axis=1, keepdims=True)

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
      picked[...] = found[...].T[:8]
      log = top[...] + jnp.log2(total[...])
      log_z[...] = (log * (1.0 / LOG2E)).T[:8]

  along = ((8, rows), lambda i, j: (0, i))
  like = jax.ShapeDtypeStruct((8, x.shape[0]), jnp.float32)
  ins = [
    (x, ((rows, dim), lambda i, j: (i, 0))),
    (w, ((dim, setting.columns), lambda i, j: (0, j))),
    (numbers, along),
  ]
  return _call(
    "loss_forward",
    body,
    _grid(setting, x),
    ins,
    [(like, along)] * 2,
    [(rows, LANES)] * 3,
    2 * rows * setting.columns * dim,
    interpret,
  )


def _slopes(setting: Setting, x, w, numbers, block) -> Array:
  """Gradient of the logits of a block: p (a + b) - a [word is target].

  a and b are the cotangents of the loss and of log_z.
  """
  s, slope, word = _logits(setting, x, w, block)
  numbers = numbers.T
  p = jnp.exp(s - numbers[:, 1:2])
  own = jnp.where(_is_target(numbers, word), numbers[:, 3:4], 0.0)
  ds = p * numbers[:, 2:3] - own
  return (ds if slope is None else ds * slope).astype(x.dtype)


def _gradients(setting: Setting, x, w, numbers, interpret: bool):
  """Gradients of `x` [tokens, dim] and `w` [dim, vocab]."""
  rows, columns, dim = setting.rows, setting.columns, x.shape[1]
  tokens, blocks = _grid(setting, x)

  def of_tokens(x, w, numbers, dx, total):
    block = pl.program_id(1)
    _start(total)
    ds = _slopes(setting, x[...], w[...], numbers[...], block)
    head = w[...]
    if setting.vocab % columns:  # what hangs over is no number at all
      head = jnp.where(_words(setting, block) < setting.vocab, head, 0)
    total[...] += product(ds, head, (1, 1))
    _finish(dx, total)

  def of_words(x, xt, w, numbers, dw, total):
    _start(total)
    ds = _slopes(setting, x[...], w[...], numbers[...], pl.program_id(0))
    total[...] += product(xt[...], ds)
    _finish(dw, total)

  (dx,) = _call(
    "loss_backward_tokens",
    of_tokens,
    (tokens, blocks),
    [
      (x, ((rows, dim), lambda i, j: (i, 0))),
      (w, ((dim, columns), lambda i, j: (0, j))),
      (numbers, ((8, rows), lambda i, j: (0, i))),
    ],
    [
      (
        _like(x),
        ((rows, dim), lambda i, j: (i, 0)),
      )
    ],
    [(rows, dim)],
    4 * rows * columns * dim,
    interpret,
  )
  (dw,) = _call(
    "loss_backward_words",
    of_words,
    (blocks, tokens),
    [
      (x, ((rows, dim), lambda j, i: (i, 0))),
      (x.T, ((dim, rows), lambda j, i: (0, i))),
      (w, ((dim, columns), lambda j, i: (0, j))),
      (numbers, ((8, rows), lambda j, i: (0, i))),
    ],
    [
      (
        _like(w),
        ((dim, columns), lambda j, i: (0, j)),
      )
    ],
    [(dim, columns)],
    4 * rows * columns * dim,
    interpret,
  )
  return dx, dw


def _like(x: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _start(total) -> None:
  """Sums begin at zero."""

  @pl.when(pl.program_id(1) == 0)
  def _():
    total[...] = jnp.zeros_like(total)


def _finish(out, total) -> None:
  """Sums are written after the last block."""

  @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
  def _():
    out[...] = total[...].astype(out.dtype)
