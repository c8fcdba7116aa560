"""The page's model is the library's model, and it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.ladder import babygpt
from jaxlm.layers.attention import Attention
from jaxlm.layers.mlp import MLP, relu2
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import init, paths
from jaxlm.layers.position import Learned
from jaxlm.models.decoder import Block, Decoder, forward


def test_the_same_arrays_give_the_same_logits():
  """In the Decoder of the main job: names, shapes and numbers agree."""
  tree = babygpt.declare(vocab=11, dim=8, layers=2, heads=2, length=6)
  block = Block(Attention(8, 2), MLP(8, 32, relu2), RMSNorm(8))
  model = Decoder(11, 8, (((block,), 2),), RMSNorm(8), 6, positions=Learned(6))
  shapes = {k: p.shape for k, p in paths(model.params()).items()}
  assert {k: p.shape for k, p in paths(tree).items()} == shapes
  params = init(tree, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (3, 6), 0, 11)
  np.testing.assert_allclose(
    babygpt.logits(params, tokens), forward(model, params, tokens), atol=1e-5
  )


def test_a_step_is_adam():
  """Three steps of optax's Adam from the same start."""
  import optax

  tree = babygpt.declare(vocab=7, dim=8, layers=1, heads=2, length=6)
  params = init(tree, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 7)
  tx, zeros = optax.adam(1e-2, b2=0.99), jax.tree.map(jnp.zeros_like, params)
  state, theirs, kept = (params, zeros, zeros, jnp.float32(0)), params, None
  kept = tx.init(params)
  lr = jnp.float32(1e-2)
  for _ in range(3):
    state, value = babygpt.step(state, tokens, lr)
    g = jax.grad(babygpt.loss)(theirs, tokens)
    with jax.numpy_dtype_promotion("standard"):
      updates, kept = tx.update(g, kept)
    theirs = optax.apply_updates(theirs, updates)
  for ours, want in zip(
    jax.tree.leaves(state[0]), jax.tree.leaves(theirs), strict=True
  ):
    np.testing.assert_allclose(ours, want, atol=1e-5)
  assert float(value) < float(babygpt.loss(params, tokens))


def test_no_steps():
  """One clear error."""
  with pytest.raises(UserError, match="--steps=0"):
    babygpt.main(["--steps=0"])
