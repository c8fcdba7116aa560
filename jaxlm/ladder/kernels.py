"""Kernels: programs for the blocks that fit on the chip.

Pallas is JAX's language for them (2023). An array lies in large, slow memory;
a kernel gets one block of it at a time in small, fast memory, and a grid says
which. What is read once and used often is fast:

    add       every number is read, used once, written: memory decides
    softmax   three passes over a row become one if the row stays on the chip
    RMSNorm   the same
    matmul    a block of 128 x 128 is used 128 times: arithmetic decides

Here they are interpreted, so they run anywhere, slowly, with the same numbers.

What they could not do: one chip holds so much and no more. The next rung uses
eight.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxlm.errors import UserError
from jaxlm.ladder import rung

Array = jax.Array


def blocks(size: int, block: int) -> int:
  """How many blocks there are; `size` must be a multiple of `block`."""
  if size % block:
    raise UserError(f"{size} is no multiple of the block size {block}; pad it")
  return size // block


def add(x: Array, y: Array, block: int = 128) -> Array:
  """`x + y` [n], a block at a time."""

  def kernel(x_ref, y_ref, out_ref):
    out_ref[...] = x_ref[...] + y_ref[...]

  here = pl.BlockSpec((block,), lambda i: (i,))
  return pl.pallas_call(
    kernel,
    grid=(blocks(x.size, block),),
    in_specs=[here, here],
    out_specs=here,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    interpret=True,
  )(x, y)


def over_rows(kernel, x: Array, rows: int) -> Array:
  """A kernel that maps blocks of whole rows of `x` [n, d] to the same."""
  here = pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0))
  return pl.pallas_call(
    kernel,
    grid=(blocks(len(x), rows),),
    in_specs=[here],
    out_specs=here,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    interpret=True,
  )(x)


def softmax(x: Array, rows: int = 8) -> Array:
  """exp(x - max) / sum of it, for each row of `x` [n, d]."""

  def kernel(x_ref, out_ref):
    x = x_ref[...]
    y = jnp.exp(x - jnp.max(x, axis=1, keepdims=True))
    out_ref[...] = y / jnp.sum(y, axis=1, keepdims=True)

  return over_rows(kernel, x, rows)


def rms_norm(x: Array, rows: int = 8, eps: float = 1e-6) -> Array:
  """X / sqrt(mean(x^2) + eps), for each row of `x` [n, d]."""

  def kernel(x_ref, out_ref):
    x = x_ref[...]
    size = jnp.mean(jnp.square(x), axis=1, keepdims=True)
    out_ref[...] = x * jax.lax.rsqrt(size + eps)

  return over_rows(kernel, x, rows)


def matmul(x: Array, y: Array, block: int = 64) -> Array:
  """`x @ y`, [n, k] and [k, m], in square blocks.

  The grid is (row, column, inner): for each block of the result all inner
  blocks follow one another, and are added up where the result lies.
  """

  def kernel(x_ref, y_ref, out_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
      out_ref[...] = jnp.zeros_like(out_ref)

    out_ref[...] += x_ref[...] @ y_ref[...]

  (n, k), m, b = x.shape, y.shape[1], block
  return pl.pallas_call(
    kernel,
    grid=(blocks(n, b), blocks(m, b), blocks(k, b)),
    in_specs=[
      pl.BlockSpec((b, b), lambda i, j, k: (i, k)),
      pl.BlockSpec((b, b), lambda i, j, k: (k, j)),
    ],
    out_specs=pl.BlockSpec((b, b), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((n, m), jnp.float32),
    interpret=True,
  )(x, y)


def traffic(n: int, block: int) -> int:
  """Numbers a blocked n x n matmul reads and writes in slow memory.

  Each block of the result reads a row and a column of blocks.
  """
  return (n // block) ** 2 * 2 * n * block + n * n


def main(argv: list[str] | None = None) -> None:
  """Compares each kernel with JAX's own operation."""
  flags = rung.parser(__doc__)
  args = flags.parse_args(argv)
  key = jax.random.key(args.seed)
  x, y = jax.random.normal(key, (2, 128, 128), jnp.float32)
  pairs = {
    "add": (add(x.ravel(), y.ravel()), (x + y).ravel()),
    "softmax": (softmax(x), jax.nn.softmax(x, axis=1)),
    "rms_norm": (rms_norm(x), x / jnp.sqrt(jnp.mean(x**2, 1)[:, None] + 1e-6)),
    "matmul": (matmul(x, y), jnp.matmul(x, y, precision="highest")),
  }
  for name, (ours, theirs) in pairs.items():
    gap = float(jnp.abs(ours - theirs).max())
    print(f"{name:9} largest difference {gap:.1e}")
  draw(args.out)


def draw(out) -> None:
  """Why blocks: how often a number that was read is used."""
  page, (ax,) = rung.figure(1)
  sizes = 2 ** np.arange(0, 11)
  reads = np.array([traffic(1024, int(b)) for b in sizes])
  ax.loglog(sizes, 2 * 1024**3 / (2 * reads), "o-", base=2)
  # Peak operations over bytes of memory, both a second, as the makers say.
  for name, need, x in (
    ("v5e", 197e12 / 819e9, 1),
    ("H100", 989e12 / 3.35e12, 8),
  ):
    ax.axhline(need, ls="--", color=rung.COLORS[5])
    ax.text(x, need * 1.1, name, fontsize=9)
  ax.set(xlabel="block", ylabel="operations per byte (bfloat16)")
  ax.set_title("A matmul of 1,024: blocks feed the chip")
  rung.save(page, out, "kernels")


if __name__ == "__main__":
  rung.run(main)
