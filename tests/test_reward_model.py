"""Heads that say one number, and reward models built of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.layers.param import FanIn, init
from jaxlm.models.heads import ScalarHead

# --- Heads ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8)])
def test_a_head_is_a_product_and_a_sum(shape: tuple[int, ...]):
  """At any rank: PPO asks at every position, a reward once a text."""
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  p = {"w": jnp.arange(8.0), "b": jnp.float32(0.5)}
  want = x @ np.arange(8.0) + 0.5
  np.testing.assert_allclose(ScalarHead(8)(p, jnp.asarray(x)), want, rtol=1e-5)
  half = ScalarHead(8)(p, jnp.asarray(x, jnp.bfloat16))
  assert half.dtype == jnp.float32


def test_a_head_starts_without_opinion():
  """Zeros by default; else the usual start, of variance 1 / dim."""
  head = ScalarHead(4096)
  p = init(head.params(), jax.random.key(0))
  assert float(jnp.abs(head(p, jnp.ones((2, 4096)))).max()) == 0.0
  p = init(ScalarHead(4096, False, FanIn()).params(), jax.random.key(0))
  assert set(p) == {"w"}
  np.testing.assert_allclose(p["w"].std() * 64, 1.0, atol=0.05)


def test_a_head_needs_a_width():
  """Said where it is made, not where shapes clash later."""
  with pytest.raises(UserError, match="width 0"):
    ScalarHead(0)
