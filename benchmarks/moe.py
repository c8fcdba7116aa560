"""Speed of the three dispatches of a mixture of experts, side by side.

    python benchmarks/moe.py

One layer, its forward pass and its gradients, next to the dense layer that
costs a token as much (top_k times as wide). The forms take turns, so that a
machine that slows down slows all of them; each figure is the least of all
turns, and what counts is the ratio to the dense layer.
"""

import time

import jax
import jax.numpy as jnp

from jaxlm.layers.mlp import GLU
from jaxlm.layers.moe import Capacity, Dense, MoE, Ragged
from jaxlm.layers.param import init
from jaxlm.layers.router import TopK

DIM, HIDDEN, TOP_K, TOKENS, TURNS = 256, 256, 2, 2048, 20


def seconds(fn, *args) -> float:
  """Of one call, already compiled."""
  start = time.perf_counter()
  jax.block_until_ready(fn(*args))
  return time.perf_counter() - start


def forms(experts: int) -> dict:
  """The layers by name."""
  expert = GLU(DIM, HIDDEN)
  layers = {"one dense layer": GLU(DIM, TOP_K * HIDDEN)}
  for dispatch in (Ragged(), Capacity(1.25), Capacity(2.0), Dense()):
    layer = MoE(expert, experts, TOP_K, TopK(), dispatch=dispatch)
    layers[str(dispatch)] = layer
  return layers


def main() -> None:
  """A table for 8 and for 32 experts."""
  x = jax.random.normal(jax.random.key(0), (8, TOKENS // 8, DIM), jnp.float32)
  for experts in (8, 32):
    calls = {}
    for name, layer in forms(experts).items():
      p = init(layer.params(), jax.random.key(1))

      def forward(p, layer=layer):
        return layer(p, x)[0]

      def train(p, forward=forward):
        return jax.grad(lambda p: jnp.sum(forward(p) ** 2))(p)

      calls[name] = jax.jit(forward), jax.jit(train), p
    best = dict.fromkeys(calls, (float("inf"),) * 2)
    for turn in range(TURNS + 1):
      for name, (forward, train, p) in calls.items():
        took = seconds(forward, p), seconds(train, p)
        if turn:  # the first compiles
          best[name] = tuple(map(min, best[name], took))
    base = best["one dense layer"]
    print(f"{experts} experts, {TOP_K} a token, {TOKENS} tokens of {DIM}")
    for name, took in best.items():
      cells = (
        f"{1e3 * t:7.1f} ms {t / b:5.2f} x"
        for t, b in zip(took, base, strict=True)
      )
      print(f"  {name:24} forward {'   gradients'.join(cells)}")


if __name__ == "__main__":
  main()
