"""Cells equal torch's; the state is carried; clipping clips."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.ladder import charrnn, memory, recurrent

FILE = Path(__file__).parent / "golden" / "recurrent.npz"


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_cells_equal_torch(kind):
  """Outputs to 1e-6, gradients of inputs and weights to 1e-5."""
  prefix = "tanh" if kind == "rnn" else kind
  with np.load(FILE) as file:
    g = {
      k.split("/", 1)[1]: file[k].astype(np.float32)
      for k in file.files
      if k.startswith(prefix + "/")
    }
  p = {
    "x": g["weight_ih_l0"].T,
    "h": g["weight_hh_l0"].T,
    "x_bias": g["bias_ih_l0"],
    "h_bias": g["bias_hh_l0"],
  }
  p = jax.tree.map(jnp.asarray, p)
  x, hidden = jnp.asarray(g["x"]), p["h"].shape[0]

  def out(p, x):
    return recurrent.run(kind, p, recurrent.start(kind, len(x), hidden), x)

  np.testing.assert_allclose(out(p, x)[0], g["out"], atol=2e-6)
  np.testing.assert_allclose(out(p, x)[1][0], g["last/h"], atol=2e-6)
  dp, dx = jax.grad(
    lambda p, x: jnp.sum(out(p, x)[0] * g["cotangent"]), argnums=(0, 1)
  )(p, x)
  np.testing.assert_allclose(dx, g["grad/x"], atol=1e-5)
  for ours, theirs in (("x", "weight_ih_l0"), ("h", "weight_hh_l0")):
    np.testing.assert_allclose(dp[ours].T, g[f"grad/{theirs}"], atol=1e-5)


def test_the_state_is_carried():
  """Two windows read one after another are one text."""
  m = charrnn.Model("lstm", 7, 8)
  p = m.fresh(jax.random.key(0))
  text = jax.random.randint(jax.random.key(1), (2, 21), 0, 7)
  whole, last = m.loss(p, m.start(2), text)
  first, state = m.loss(p, m.start(2), text[:, :11])
  second, end = m.loss(p, state, text[:, 10:])
  assert float((first + second) / 2) == pytest.approx(float(whole), abs=1e-6)
  for a, b in zip(end, last, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_rows_go_on_from_window_to_window():
  """The last character of a row's window is the first of its next one."""
  found = charrnn.windows(np.arange(1000), rows=3)
  np.testing.assert_array_equal(found[1:, :, 0], found[:-1, :, -1])
  with pytest.raises(UserError, match="too few"):
    charrnn.windows(np.arange(50), rows=3)


def test_sizes_are_counted_right():
  """`Model.size` is what the comparison at equal parameters rests on."""
  for kind in ("rnn", "lstm"):
    m = charrnn.Model(kind, 11, 6)
    leaves = jax.tree.leaves(m.fresh(jax.random.key(0)))
    assert m.size() == sum(x.size for x in leaves)


def test_gradients_by_lag():
  """They vanish in a fresh RNN, explode in a wide one, last where f is open."""
  found = recurrent.lags(0)
  fall = {name: norms[99] / norms[0] for name, norms in found.items()}
  assert fall["rnn"] < 1e-3
  assert fall["rnn, U x 1.6"] > 1e3
  assert fall["lstm, f bias 4"] > 0.1


def test_clipping():
  """Long gradients get the limit's length and keep their direction."""
  g = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
  short, norm = recurrent.clip(g, 1.0)
  assert float(norm) == pytest.approx(5.0)
  np.testing.assert_allclose(short["a"], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(recurrent.clip(g, 9.0)[0]["a"], g["a"])


def test_the_memory_task_needs_memory():
  """All inputs but the first say nothing of the bit."""
  x, bit = memory.task(jax.random.key(0), 5, 400)
  np.testing.assert_array_equal(np.sign(x[:, 0, 1]), 2 * np.asarray(bit) - 1)
  assert not np.any(x[:, 1:, 1])
  r = np.corrcoef(np.asarray(x[:, :, 0]).T, np.asarray(bit))[-1, :-1]
  assert np.abs(r).max() < 0.2
