"""A few rows times all matrices of SmolLM2-135M: XLA's product and `Rowwise`.

    python benchmarks/row.py [--rows=1] [--rounds=7]

Random weights, in the order of a decoder, tokens one after the other in one
compiled loop as in decoding; a last line is the tied head alone. Ways take
turns; each figure is the best round. GB/s count the bytes of weights as stored.
"""

import argparse
import time

from jaxlm import host

LAYERS, DIM, HIDDEN, VOCAB, TOKENS = 30, 576, 1536, 49152, 10


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument("--rows", type=int, default=1)
  flags.add_argument("--rounds", type=int, default=7)
  flags = flags.parse_args()
  host.prepare()
  import jax
  import jax.numpy as jnp

  from jaxlm.generate.loop import WHOLE_VECTORS
  from jaxlm.layers.kernels.row import rowwise
  from jaxlm.layers.linear import dot

  def normal(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(i), shape, jnp.float32) * 0.03

  def layer(i: int) -> dict[str, jax.Array]:
    return {
      "qkv": normal(i, DIM, DIM + 2 * DIM // 3),
      "o": normal(i, DIM, DIM),
      "gate": normal(i, DIM, HIDDEN),
      "up": normal(i, DIM, HIDDEN),
      "down": normal(i, HIDDEN, DIM),
    }

  def times(x, w):
    return dot(x.astype(w.dtype), w, "bi,io->bo", dtype=jnp.float32)

  def layers(x, weights):
    for w in weights:
      x = x + times(times(x, w["qkv"])[:, :DIM], w["o"])
      x = x + times(times(x, w["gate"]) * times(x, w["up"]), w["down"])
      x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x

  def head(x, table):
    y = times(x, table.T)
    return x + 1e-3 * y[:, :DIM] + 1e-9 * jnp.max(y)

  @jax.jit(compiler_options=WHOLE_VECTORS)
  def run(x, weights):
    step = layers if isinstance(weights, list) else head
    return jax.lax.fori_loop(0, TOKENS, lambda i, x: step(x, weights), x)

  x = normal(0, flags.rows, DIM)
  both = {"layers": [layer(i) for i in range(LAYERS)]}
  both["head"] = normal(0, VOCAB, DIM)
  for part, weights in both.items():
    ways = {}
    for dtype in ("float32", "bfloat16"):
      plain = jax.tree.map(lambda w, d=dtype: w.astype(d), weights)
      ways[dtype, "XLA"] = plain
      ways[dtype, "Rowwise"] = jax.tree.map(rowwise, plain)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(flags.rounds + 1):  # the first compiles
      for way, w in ways.items():
        start = time.perf_counter()
        run(x, w).block_until_ready()
        best[way] = min(best[way], (time.perf_counter() - start) / TOKENS)
    for way, seconds in best.items():
      size = sum(w.nbytes for w in jax.tree.leaves(ways[way[0], "XLA"]))
      print(
        f"{part:6}  {' '.join(way):16}  {seconds * 1e3:6.2f} ms"
        f"  {size / seconds / 1e9:5.1f} GB/s"
      )


if __name__ == "__main__":
  main()
