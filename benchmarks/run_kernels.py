"""The kernels on the accelerator at hand: their error, and their time.

    python benchmarks/run_kernels.py [--seq 4096] [--dtype bfloat16]

Each form of attention (forward and gradients), of decoding from pages, of the
grouped product and, on a TPU, of the loss without logits runs beside its twin.
Printed are the largest difference from the twin in float32 at the highest
precision, over the largest number of that answer, and the least time of a call
in twenty. On a CPU the kernels are interpreted: ask for `--seq 64`, and read
the errors only.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.layers.at import At
from jaxlm.layers.attend import attend
from jaxlm.layers.compute import Compute, platform
from jaxlm.layers.kernels.fused_loss import fused_cross_entropy
from jaxlm.layers.kernels.grouped import grouped_dot
from jaxlm.layers.kernels.paged import paged_attention
from jaxlm.layers.mask import Causal, Chunked, PrefixLM, Sliding
from jaxlm.layers.paged import Paged
from jaxlm.layers.position import Alibi
from jaxlm.losses import chunked_cross_entropy

HEADS, GROUPS, WIDTH, TURNS = 8, 2, 128, 20


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seq", type=int, default=4096)
  parser.add_argument("--dtype", default="bfloat16")
  given = parser.parse_args()
  device = jax.devices()[0]
  print(f"{device.device_kind}, {given.dtype}", flush=True)
  gpu = platform() in ("gpu", "cuda")
  for part in (attention, pages, experts, loss):
    part(given.seq, jnp.dtype(given.dtype), gpu)


def draw(*shape: int, seed: int, dtype) -> jax.Array:
  """Normal values."""
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(
    dtype
  )


def compare(title: str, forms: dict, twin, args: tuple) -> None:
  """Prints error and time of each form of a function of `args`."""

  def wide(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float32) if floating else x

  with jax.default_matmul_precision("highest"):
    want = jax.jit(twin)(*jax.tree.map(wide, args))
  for name, form in forms.items():
    run = jax.jit(form)
    found = jax.block_until_ready(run(*args))
    errors = jax.tree.map(error, found, want)
    took = []
    for _ in range(TURNS):
      start = time.perf_counter()
      jax.block_until_ready(run(*args))
      took.append(time.perf_counter() - start)
    worst = max(jax.tree.leaves(errors))
    print(
      f"{title:34} {name:12} error {worst:.1e}  {1e3 * min(took):9.3f} ms",
      flush=True,
    )


def error(found: jax.Array, want: jax.Array) -> float:
  """The largest difference over the largest number."""
  a, b = (np.asarray(x, np.float32) for x in (found, want))
  return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def with_gradients(form):
  """The value of `form` and its gradients by every floating argument."""

  def run(*args):
    floats = [
      i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)
    ]

    def of_floats(*values):
      rest = list(args)
      for i, x in zip(floats, values, strict=True):
        rest[i] = x
      return form(*rest)

    y, back = jax.vjp(of_floats, *(args[i] for i in floats))
    weights = draw(*y.shape, seed=9, dtype=y.dtype)
    return y, back(weights)

  return run


def attention(seq: int, dtype, gpu: bool) -> None:
  """Every form on several masks."""
  names = ("blocks", "triton", "cudnn") if gpu else ("blocks", "flash")
  q, k, v = (
    draw(1, seq, n, WIDTH, seed=i, dtype=dtype)
    for i, n in enumerate((HEADS, GROUPS, GROUPS))
  )
  ids = (jnp.arange(seq, dtype=jnp.int32) // (seq // 4))[None]
  sinks = draw(HEADS, seed=5, dtype=jnp.float32)
  for mask, at, more in (
    (Causal(), At(), {}),
    (Sliding(seq // 4), At(), {}),
    (Sliding(seq // 4, 4), At(), {"sinks": sinks, "softcap": 30.0}),
    (Chunked(seq // 4), At(), {"alibi": Alibi()}),
    (Causal(), At(segments=ids), {}),
    (PrefixLM(), At(blocks=ids), {}),
  ):

    def form(q, k, v, name, mask=mask, at=at, more=more):
      return attend(q, k, v, mask, at, compute=Compute(attention=name), **more)

    kinds = {
      name: with_gradients(functools.partial(form, name=name)) for name in names
    }
    twin = with_gradients(functools.partial(form, name="reference"))
    title = f"attention {type(mask).__name__} {' '.join(more)}"
    title += " documents" * (at.segments is not None)
    compare(title, kinds, twin, (q, k, v))


def pages(seq: int, dtype, gpu: bool) -> None:
  """A step of decoding for eight rows."""
  rows, block, heads, groups = 8, 16, 32, 8
  columns = seq // block
  pool = [
    draw(rows * columns, block, groups, WIDTH, seed=i, dtype=dtype)
    for i in range(2)
  ]
  table = jax.random.permutation(jax.random.key(2), rows * columns)
  table = table.reshape(rows, columns).astype(jnp.int32)
  at = jnp.arange(rows, dtype=jnp.int32) * (seq // rows) + seq // rows - 1
  q = draw(rows, heads, WIDTH, seed=3, dtype=dtype)
  scale, kind = WIDTH**-0.5, Paged(block)

  def kernel(q, k, v, table, at):
    return paged_attention(q, k, v, table, at, Causal(), scale=scale, gpu=gpu)

  def gathered(q, k, v, table, at):
    none = jnp.zeros((rows, 0, groups, WIDTH), k.dtype)
    cache = {"k": k, "v": v, "table": table}
    seen, _ = kind.extend(
      cache, {"k": none, "v": none}, jnp.zeros((rows, 0), jnp.int32), Causal()
    )
    return attend(
      q[:, None],
      seen["k"],
      seen["v"],
      Causal(),
      At(at[:, None]),
      At(seen["positions"]),
      compute=Compute(attention="reference"),
    )[:, 0]

  forms = {"kernel": kernel, "gathered": gathered}
  compare("decoding from pages", forms, gathered, (q, *pool, table, at))


def experts(seq: int, dtype, gpu: bool) -> None:
  """Rows sorted by 16 experts, some of which have none."""
  del gpu
  cuts = np.sort(np.random.default_rng(0).integers(0, seq, 13))
  sizes = np.diff([0, 0, *cuts, seq, seq]).astype(np.int32)
  x = draw(seq, 512, seed=0, dtype=dtype)
  w = draw(len(sizes), 512, 768, seed=1, dtype=dtype)
  ragged = functools.partial(
    jax.lax.ragged_dot, preferred_element_type=jnp.float32
  )
  forms = {"kernel": with_gradients(grouped_dot)}
  forms["ragged_dot"] = with_gradients(ragged)
  compare(
    "grouped products",
    forms,
    with_gradients(ragged),
    (x, w, jnp.asarray(sizes)),
  )


def loss(seq: int, dtype, gpu: bool) -> None:
  """Cross entropy of 32,000 words (512 on a CPU)."""
  if gpu:
    return
  vocab = 512 if platform() == "cpu" else 32000
  x = draw(1, seq, 512, seed=0, dtype=dtype)
  w = draw(512, vocab, seed=1, dtype=dtype) * jnp.asarray(0.05, dtype)
  targets = jax.random.randint(jax.random.key(2), (1, seq), 0, vocab)

  def chunked(x, w, targets):
    return chunked_cross_entropy(x, w, targets, 512)[0]

  def kernel(x, w, targets):
    return fused_cross_entropy(x, w, targets)[0]

  forms = {"kernel": with_gradients(kernel), "chunks": with_gradients(chunked)}
  compare("loss", forms, with_gradients(chunked), (x, w, targets))


if __name__ == "__main__":
  main()
