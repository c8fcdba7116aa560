"""Dropout: zero a share of the features, scale up the rest."""

import jax
import jax.numpy as jnp

Array = jax.Array


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """Keeps each element with probability 1 - rate (arXiv:1207.0580).

  The random bits are 16 wide: half the cost of uniforms, and a rate is met
  within 2^-16. Without a key (evaluation) or a rate this is the identity.
  """
  if key is None or rate == 0.0:
    return x
  bits = jax.random.bits(key, x.shape, jnp.uint16)
  keep = bits >= jnp.uint16(round(rate * 2**16))
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
