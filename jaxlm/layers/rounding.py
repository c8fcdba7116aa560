"""Few-valued numbers inside float arrays, as BitNet b1.58 computes.

Weights become -s, 0 or s with one scale s a matrix, activations 8-bit integers
times a scale for each token (arXiv:2402.17764, section 2). Both stay float
arrays here that hold no other values: the matmul is the ordinary one. Rounding
has no derivative, so gradients pass as if it were not there (straight-through,
arXiv:1308.3432): train float weights on the loss of `ternary_weights`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers.param import Param, map_params

Array = jax.Array
Tree = Any
_LEAST = 1e-5  # of a scale: zeros stay zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def ternary(w: Array, stacked: int = 0) -> Array:
  """Weights of three values: s * clip(round(w / s), -1, 1), s = mean |w|.

  Equations 1 to 3 of arXiv:2402.17764.

  Args:
    w: weights `[stacked..., in..., out...]`.
    stacked: how many leading dimensions stack matrices; each has its own s.

  Returns:
    An array like `w`, of at most three values in each matrix.
  """
  y = w.astype(jnp.float32)
  axes = tuple(range(stacked, y.ndim))
  scale = jnp.mean(jnp.abs(y), axes, keepdims=True)
  scale = jnp.maximum(scale, _LEAST)
  return (scale * jnp.clip(jnp.round(y / scale), -1, 1)).astype(w.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def integers(x: Array, bits: int = 8) -> Array:
  """Activations in steps: s * round(x / s), s = max |x| / (2^(bits-1) - 1).

  Args:
    x: activations `[..., dim]`; each row has its own s.
    bits: of the integers, sign included.

  Returns:
    An array like `x`, of at most 2^bits - 1 values in each row.
  """
  most = 2 ** (bits - 1) - 1
  y = x.astype(jnp.float32)
  top = jnp.max(jnp.abs(y), axis=-1, keepdims=True)
  scale = most / jnp.maximum(top, _LEAST)
  return (jnp.round(y * scale) / scale).astype(x.dtype)


def _straight(n: int, _: None, dy: Array) -> tuple[Array]:
  """The gradient, unchanged."""
  del n
  return (dy,)


ternary.defvjp(lambda w, stacked: (ternary(w, stacked), None), _straight)
integers.defvjp(lambda x, bits: (integers(x, bits), None), _straight)


def ternary_weights(tree: Tree, arrays: Tree) -> Tree:
  """`ternary` of every matrix inside a network; the rest is unchanged.

  Embeddings, head, norms and biases keep their values, as in BitNet.

  Args:
    tree: the declarations, `model.params()`.
    arrays: the parameters.
  """

  def one(p: Param, x: Array) -> Array:
    return ternary(x, p.n_stacked) if p.is_hidden else x

  return map_params(one, tree, arrays)
