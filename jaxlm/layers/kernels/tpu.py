"""What the kernels for TPUs have in common."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

# Scores of unseen keys, and the least maximum: 2^(LOW - LEAST) is exactly 0,
# so a row that sees nothing sums to 0 and not to NaN.
LOW, LEAST = -1e30, -5e29
LOG2E = 1.4426950408889634  # of e: a TPU raises two to a power, not e
LANES = 128  # a number per row is kept once per lane of a register


def product(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
  """A matrix product with float32 sums."""
  axes = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def column(row: Array) -> Array:
  """[1, n] as [n, 1]; eight rows are what a TPU can turn."""
  return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def spread(x: Array, n: int) -> Array:
  """[rows, LANES], equal along lanes, as [rows, n]."""
  if n % LANES == 0:
    return jnp.tile(x, (1, n // LANES))
  return x[:, :n] if n < LANES else jnp.broadcast_to(x[:, :1], (len(x), n))


def grow(s: Array, top: Any, total: Any) -> tuple[Array, Array]:
  """Takes another block of scores into a softmax (arXiv:1805.02867).

  Args:
    s: scores times log2(e), float32 `[rows, n]`.
    top: reference to the largest of each row so far, `[rows, LANES]`.
    total: reference to the sums of 2^(s - top).

  Returns:
    2^(s - top), and what older sums have to be multiplied by.
  """
  new = jnp.maximum(top[...], jnp.max(s, axis=1, keepdims=True))
  shrink = jnp.exp2(top[...] - new)
  weights = jnp.exp2(s - spread(new, s.shape[1]))
  total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
  top[...] = new
  return weights, shrink


def padded(x: Array, block: int, axis: int, fill: int = 0) -> Array:
  """`x` with `axis` filled up to whole blocks."""
  more = -x.shape[axis] % block
  widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=fill) if more else x


def on_device(kernel: Callable, *args: Any, chip: str = "tpu") -> Any:
  """`kernel(*args, interpret=...)`: compiled on `chip`, interpreted on a CPU.

  Settled when the program is lowered, so that a machine without the chip can
  compile for it.
  """
  forms = {"cpu": True, chip: False}
  return jax.lax.platform_dependent(
    *args,
    **{
      platform: functools.partial(kernel, interpret=interpret)
      for platform, interpret in forms.items()
    },
  )
