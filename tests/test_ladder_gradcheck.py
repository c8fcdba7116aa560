"""The judge of gradients is judged, then judges the library's layers.

Layers compute in float32 on purpose, where differences show three digits. So
each is run here with `jnp.float32` read as float64, gradients written by hand
included, and must then agree to 1e-7.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import losses
from jaxlm.ladder import gradcheck
from jaxlm.layers import attention, mask, mlp, norm, position, recurrent
from jaxlm.layers.compute import Compute
from jaxlm.layers.kernels.grouped import grouped_dot
from jaxlm.layers.linear import dot
from jaxlm.layers.param import init, map_params

# --- The tool ---------------------------------------------------------------


def test_the_step_sizes_are_as_told():
  """Forward 1e-8, central 1e-10, complex to the last digit."""
  f, exact = gradcheck.squire, gradcheck.squire_slope(1.5)
  assert abs(gradcheck.forward_difference(f, 1.5, 1.0, 1e-8) / exact - 1) < 1e-6
  assert abs(gradcheck.central(f, 1.5, 1.0) / exact - 1) < 1e-9
  assert abs(gradcheck.complex_step(f, 1.5, 1.0) / exact - 1) < 1e-15
  assert abs(gradcheck.central(f, 1.5, 1.0, 1e-14) / exact - 1) > 1e-4


def test_jacobian_hessian_and_product_are_jax():
  """A function of a matrix, with values of its own shape."""
  rng = np.random.default_rng(0)
  x, v, w = rng.normal(size=(3, 2, 3))

  def f(x, np=np):
    return np.tanh(x @ w.T) * np.exp(x[:, :2])

  def scalar(x, np=np):
    return np.sum(f(x, np) ** 2)

  with jax.enable_x64(True):
    exact = jax.jit(jax.jacobian(lambda x: f(x, jnp)))(jnp.asarray(x))
    curve = jax.jit(jax.hessian(lambda x: scalar(x, jnp)))(jnp.asarray(x))
    slope = jax.jit(jax.grad(lambda x: scalar(x, jnp)))
    got = gradcheck.hvp(lambda x: slope(jnp.asarray(x)), x, v)
  np.testing.assert_allclose(gradcheck.jacobian(f, x), exact, atol=1e-9)
  complex_ = gradcheck.jacobian(f, x, gradcheck.complex_step)
  np.testing.assert_allclose(complex_, exact, atol=1e-14)
  np.testing.assert_allclose(gradcheck.hessian(scalar, x), curve, atol=1e-7)
  np.testing.assert_allclose(got, np.einsum("abcd,cd->ab", curve, v), atol=1e-7)


def test_check_finds_what_is_wrong():
  """One part in a million, one slope that is NaN, and float32."""
  with jax.enable_x64(True):
    x = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}

    def f(x):
      return jnp.sum(jnp.sin(x["a"])) + jnp.sum(x["b"] ** 3)

    right = jax.grad(f)(x)
    assert gradcheck.check(f, x, right) < 1e-9
    assert gradcheck.check(f, x, rays=3) < 1e-9
    for wrong in (1 + 1e-6, jnp.nan):
      bad = right | {"b": right["b"].at[1, 0].mul(wrong)}
      with pytest.raises(gradcheck.WrongGradient, match="slope 5 of 7 is 3"):
        gradcheck.check(f, x, bad)
    with pytest.raises(TypeError, match="float64, not float32"):
      gradcheck.check(f, jax.tree.map(lambda x: x.astype(jnp.float32), x))


def test_the_program_prints_and_draws(tmp_path, capsys):
  """What the docs page shows."""
  gradcheck.main([f"--out={tmp_path}"])
  assert "complex step" in capsys.readouterr().out
  assert (tmp_path / "gradcheck.png").stat().st_size > 10_000


# --- The library's layers ---------------------------------------------------


@pytest.fixture
def wide(monkeypatch):
  """JAX in 64 bits, and the library's `jnp.float32` reading float64."""
  proxy = types.ModuleType("jnp")
  proxy.__dict__.update(jnp.__dict__ | {"float32": jnp.float64})
  for name, module in list(sys.modules.items()):
    ours = name.startswith(("jaxlm.layers", "jaxlm.losses"))
    if ours and getattr(module, "jnp", None) is jnp:
      monkeypatch.setattr(module, "jnp", proxy)
  with jax.enable_x64(True):
    yield


def check(apply, layer, x, rays=0, seed=0):
  """The gradient with respect to parameters and input, both random."""
  rng = np.random.default_rng(seed)

  def draw(p):
    return jnp.asarray(rng.normal(size=p.shape) * 0.5)

  tree = {"x": jnp.asarray(rng.normal(size=x))}
  tree["p"] = {} if layer is None else map_params(draw, layer.params())
  out = jax.eval_shape(apply, tree["p"], tree["x"])
  assert out.dtype == jnp.float64
  way = jnp.asarray(rng.normal(size=out.shape))
  error = gradcheck.check(
    lambda t: jnp.sum(apply(t["p"], t["x"]) * way), tree, rays=rays
  )
  assert error < 1e-7


NORMS = [
  norm.LayerNorm(5),
  norm.LayerNorm(5, scale=False),
  norm.RMSNorm(5),
  norm.RMSNorm(5, offset=1.0),
]


@pytest.mark.parametrize("layer", NORMS)
def test_norms(wide, layer):
  """The gradient of `_standardise` is written by hand."""
  check(layer, layer, (2, 3, 5))


def test_batch_norm(wide):
  """The gradient flows through the batch's mean and variance."""
  layer = norm.BatchNorm(4)
  state = init(layer.state(), jax.random.key(0), jnp.float64)
  check(lambda p, x: layer(p, x, state, True)[0], layer, (3, 2, 4))


ACTS = [mlp.gelu, mlp.gelu_tanh, mlp.silu, mlp.relu, mlp.relu2]
FFNS = [*(mlp.MLP(3, 5, act, bias=True) for act in ACTS), mlp.GLU(3, 5)]


@pytest.mark.parametrize("layer", FFNS)
def test_feed_forward(wide, layer):
  """Every activation, and a gate."""
  check(lambda p, x: layer(p, x)[0], layer, (2, 2, 3))


@pytest.mark.parametrize("form", ["reference", "blocks"])
def test_attention(wide, form):
  """Grouped queries, rope and a norm; `blocks` has its gradient by hand."""
  layer = attention.Attention(
    8, 4, 2, position=position.Rope(), qk_norm=norm.RMSNorm(2)
  )
  run = Compute(attention=form)
  check(lambda p, x: layer(p, x, compute=run)[0], layer, (1, 5, 8), rays=40)


def test_attention_in_blocks(wide):
  """Seventy queries are three blocks, the last one short, in a window."""
  layer = attention.Attention(4, 2, mask=mask.Sliding(40))
  run = Compute(attention="blocks")
  check(lambda p, x: layer(p, x, compute=run)[0], layer, (1, 70, 4), rays=20)


def test_attention_with_everything(wide):
  """A soft cap, sinks, biases, and distances that count."""
  layer = attention.Attention(
    4, 2, position=position.Alibi(), softcap=2.0, sinks=True, bias=True
  )
  check(lambda p, x: layer(p, x)[0], layer, (1, 5, 4), rays=40)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(wide, interleaved):
  """A rotation; its gradient is the rotation back."""
  rope = position.Rope(interleaved=interleaved)
  at = jnp.arange(3)[None]
  check(lambda p, x: rope(x, at), None, (2, 3, 2, 4))


CELLS = [recurrent.Elman(), recurrent.LSTM(), recurrent.GRU()]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: type(c).__name__)
def test_recurrent_cells(wide, cell):
  """Through four steps of time."""
  layer = recurrent.RNN(3, cell, hidden=2)
  check(lambda p, x: layer(p, x)[0], layer, (2, 4, 3), rays=40)


def test_products(wide):
  """`dot`, whose gradient is written by hand."""
  w = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
  check(lambda p, x: dot(x, w, "btd,df->btf"), None, (2, 3, 4))
  check(lambda p, w: dot(jnp.ones((2, 3, 4)), w, "btd,df->btf"), None, (4, 3))


def test_grouped_products(wide):
  """The experts' product; its integers are 32 bits wide, so not strict."""
  rng = np.random.default_rng(1)
  w = jnp.asarray(rng.normal(size=(2, 4, 3)))
  x = jnp.asarray(rng.normal(size=(7, 4)))
  sizes = jnp.asarray([2, 5], jnp.int32)
  with jax.numpy_dtype_promotion("standard"):
    check(lambda p, x: grouped_dot(x, w, sizes), None, (7, 4))
    check(lambda p, w: grouped_dot(x, w, sizes), None, (2, 4, 3))


def test_losses(wide):
  """Cross entropy, whole and in chunks of which the last is padded."""
  targets = jnp.asarray([[0, 2, 1, 3, 0], [1, 1, 0, 2, 3]])
  w = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4)))
  check(lambda p, x: losses.cross_entropy(x, targets)[0], None, (2, 5, 4))
  for part in (0, 1):
    check(
      lambda p, x, part=part: losses.chunked_cross_entropy(
        x, w, targets, 2, softcap=3.0
      )[part],
      None,
      (2, 5, 3),
    )
