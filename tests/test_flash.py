"""Flash attention's kernels, interpreted, against the definition.

Interpretation runs the same grid, blocks and sums as a TPU would, on the CPU;
tests/test_tpu_compile.py hands them to the TPU's compiler.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.attend import At, attend_reference
from jaxlm.layers.kernels.flash import Tiles, flash_attention
from jaxlm.layers.mask import Causal, Chunked, Full, PrefixLM, Sliding

SMALL = Tiles(rows=32, keys=16, lanes=8)
MASKS = (Causal(), Full(), Sliding(5), Sliding(4, 2), Chunked(8), PrefixLM())


def draw(*shape: int, seed: int = 0) -> jax.Array:
  """Normal values, float32."""
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


def both(mask, at=None, keys=None, tiles=SMALL, **shape):
  """Values and gradients of the kernels and of the definition."""
  size = {"b": 2, "t": 21, "s": 21, "n": 4, "g": 2, "h": 8, "d": 8} | shape
  b, t, s, n, g, h, d = (size[name] for name in "btsnghd")
  at, options = at or At(), {}
  args = {"q": draw(b, t, n, h), "k": draw(b, s, g, h, seed=1)}
  args["v"] = draw(b, s, g, d, seed=2)
  if shape.get("sinks"):
    args["sinks"] = draw(n, seed=3)
  if shape.get("slopes"):
    options["slopes"] = jnp.linspace(0.1, 0.5, n)
  options |= {"softcap": shape.get("softcap"), "scale": h**-0.5}
  weights = draw(b, t, n, d, seed=4)

  def run(form, **more):
    def loss(args):
      q, k, v = args["q"], args["k"], args["v"]
      y = form(
        q,
        k,
        v,
        mask,
        at,
        keys or at,
        sinks=args.get("sinks"),
        **options,
        **more,
      )
      return jnp.sum(y * weights), y

    grads, y = jax.grad(loss, has_aux=True)(args)
    return y, grads

  return run(flash_attention, tiles=tiles), run(attend_reference)


def check(found, expected):
  """The kernels' promise: values at 2e-6, gradients at 1e-5."""
  np.testing.assert_allclose(found[0], expected[0], atol=2e-6, rtol=2e-6)
  for name, grad in expected[1].items():
    np.testing.assert_allclose(
      found[1][name], grad, atol=1e-5, rtol=1e-5, err_msg=name
    )


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(mask):
  """One kernel, every mask, groups of heads, rows that fill no block."""
  check(*both(mask))


def test_everything_at_once():
  """Sinks, soft cap, ALiBi, unequal lengths and widths, odd groups."""
  options = {"sinks": True, "slopes": True, "softcap": 2.0}
  check(*both(Causal(), t=9, s=40, n=6, g=2, d=12, **options))
