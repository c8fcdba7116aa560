"""Adam in JAX, for the rungs that are about something else.

Kingma and Ba, arXiv:1412.6980; the rung `optimizers` derives it. Decays of 0.9
and 0.99.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any


def start(p: Tree) -> tuple[Tree, Tree]:
  """Means of gradients and of their squares before the first step."""
  zeros = jax.tree.map(jnp.zeros_like, p)
  return zeros, zeros


def step(
  p: Tree, g: Tree, means: tuple[Tree, Tree], t: Array, lr: Array
) -> tuple[Tree, tuple[Tree, Tree]]:
  """Parameters and means after step `t` (the first is 1) at the rate `lr`."""
  m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, means[0], g)
  v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, means[1], g)

  def move(p: Array, m: Array, v: Array) -> Array:
    size = jnp.sqrt(v / (1 - 0.99**t)) + 1e-8
    return p - lr * (m / (1 - 0.9**t)) / size

  return jax.tree.map(move, p, m, v), (m, v)
