"""BatchNorm against torch's: values, gradients, and what keeps running."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.layers.norm import BatchNorm
from jaxlm.layers.param import init

GOLDEN = dict(np.load(pathlib.Path(__file__).parent / "golden/batchnorm.npz"))
NORM = BatchNorm(5)


def run():
  """Three training batches, then an evaluation; outputs and states."""
  state = init(NORM.state(), jax.random.key(0))
  p = {k: jnp.asarray(GOLDEN[k]) for k in ("scale", "bias")}
  outs, states = [], []
  for i, x in enumerate(GOLDEN["x"]):
    y, state = NORM(p, jnp.asarray(x), state, train=i < 3)
    outs.append(y)
    states.append(state)
  return p, outs, states


def test_values_and_running_moments_equal_torch():
  """The running variance is unbiased, the batch's is not; both to 1e-5."""
  _, outs, states = run()
  np.testing.assert_allclose(jnp.stack(outs), GOLDEN["out"], atol=1e-5)
  for name in ("mean", "var"):
    np.testing.assert_allclose(states[2][name], GOLDEN[name], rtol=1e-5)
    np.testing.assert_array_equal(states[3][name], states[2][name])


def test_gradients_equal_torch():
  """Through the batch's own mean and variance, and none into the state."""
  p, _, states = run()
  cotangent = jnp.asarray(GOLDEN["cotangent"])

  def fn(p, x, state):
    return jnp.sum(NORM(p, x, state, train=True)[0] * cotangent)

  x = jnp.asarray(GOLDEN["x"][2])
  by_p, by_x, by_state = jax.grad(fn, argnums=(0, 1, 2))(p, x, states[1])
  np.testing.assert_allclose(by_x, GOLDEN["grad/x"], atol=1e-5)
  for name in ("scale", "bias"):
    np.testing.assert_allclose(by_p[name], GOLDEN[f"grad/{name}"], atol=1e-5)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_state))
