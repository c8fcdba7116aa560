"""Layers against torch and transformers: values, gradients, edge cases.

`golden/layers.npz` was made in float64 by golden/make_layers.py; the names of
its arrays say what each is.
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.layers import mlp
from jaxlm.layers.dropout import dropout
from jaxlm.layers.linear import dot
from jaxlm.layers.mask import Chunked, Sliding
from jaxlm.layers.mlp import GLU, MLP
from jaxlm.layers.norm import LayerNorm, RMSNorm, soft_cap
from jaxlm.layers.param import count, init
from jaxlm.layers.position import (
  Alibi,
  Learned,
  Linear,
  Llama3,
  Rope,
  Sinusoidal,
)

KEY = jax.random.key(0)
with np.load(pathlib.Path(__file__).parent / "golden/layers.npz") as file:
  GOLDEN = dict(file)


def golden(name: str, *inputs: str) -> tuple:
  """Inputs as float32, the output, the cotangent, gradients by input."""
  values = [jnp.asarray(GOLDEN[f"{name}/{k}"], jnp.float32) for k in inputs]
  cotangent = jnp.asarray(GOLDEN[f"{name}/cotangent"], jnp.float32)
  grads = [GOLDEN[f"{name}/grad/{k}"] for k in inputs]
  return values, GOLDEN[f"{name}/out"], cotangent, grads


def agrees(fn, name: str, *inputs: str, tol: float = 2e-6) -> None:
  """Values and all gradients of `fn` equal the golden ones."""
  values, want, cotangent, grads = golden(name, *inputs)
  out, pull = jax.vjp(jax.jit(fn), *values)
  np.testing.assert_allclose(out, want, rtol=tol, atol=tol)
  for key, got, grad in zip(inputs, pull(cotangent), grads, strict=True):
    scale = max(1.0, float(np.abs(grad).max()))
    np.testing.assert_allclose(
      got, grad, rtol=tol, atol=tol * scale, err_msg=f"{name} by {key}"
    )


# --- Norms ------------------------------------------------------------------


def test_layernorm_equals_torch():
  """With scale and bias, and without either at another eps."""
  norm = LayerNorm(7)
  agrees(
    lambda x, s, b: norm({"scale": s, "bias": b}, x),
    "layernorm",
    "x",
    "scale",
    "bias",
    tol=5e-6,
  )
  plain = LayerNorm(7, eps=1e-2, scale=False)
  assert plain.params() == {}
  agrees(lambda x: plain({}, x), "layernorm_plain", "x", tol=5e-6)


def test_rmsnorm_equals_torch_and_gemma():
  """Gemma stores its scale as a difference from one."""
  norm, gemma = RMSNorm(7), RMSNorm(7, offset=1.0)
  agrees(lambda x, s: norm({"scale": s}, x), "rmsnorm", "x", "scale")
  agrees(lambda x, s: gemma({"scale": s}, x), "rmsnorm_gemma", "x", "scale")


@pytest.mark.parametrize(
  "norm",
  [
    LayerNorm(16),
    LayerNorm(16, bias=False),
    LayerNorm(16, scale=False),
    RMSNorm(16),
    RMSNorm(16, offset=1.0),
    RMSNorm(16, scale=False),
  ],
)
def test_norms_start_as_the_plain_normalisation(norm):
  """Whatever the parameters, the first output has unit mean square.

  Large inputs in float16 must not overflow in the squares, and a row of zeros
  stays zero, with gradients that are finite.
  """
  p = init(norm.params(), KEY)
  x = 300.0 * jax.random.normal(KEY, (2, 3, 16)).astype(jnp.float16)
  y = norm(p, x)
  assert y.dtype == jnp.float16
  square = jnp.mean(jnp.square(y.astype(jnp.float32)), -1)
  np.testing.assert_allclose(square, 1.0, rtol=0.02)
  if isinstance(norm, LayerNorm):
    np.testing.assert_allclose(
      np.mean(np.asarray(y, np.float32), -1), 0, atol=1e-3
    )
  zero = jnp.zeros((1, 16))
  np.testing.assert_array_equal(norm(p, zero), zero)
  grad = jax.grad(lambda x: jnp.sum(norm(p, x) * jnp.arange(16.0)))(zero[0])
  assert np.all(np.isfinite(grad))


def test_soft_cap_bounds_and_passes():
  """Near zero the identity, far away the cap."""
  x = jnp.array([-1e6, -0.01, 0.0, 0.01, 1e6])
  np.testing.assert_allclose(
    soft_cap(x, 15.0), [-15, -0.01, 0, 0.01, 15], rtol=1e-6
  )


# --- Feed-forward -----------------------------------------------------------


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu", "relu2"])
def test_activations_equal_torch(name: str):
  """Through the tails, where the two forms of GELU part."""
  agrees(getattr(mlp, name), f"act_{name}", "x")


def test_the_forms_of_gelu_differ():
  """Else the test above could not tell them apart."""
  gap = GOLDEN["act_gelu/out"] - GOLDEN["act_gelu_tanh/out"]
  assert np.abs(gap).max() > 1e-4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cls", [MLP, GLU])
def test_feed_forwards_are_their_equations(cls, bias: bool):
  """In float64 by numpy, every parameter random, biases too."""
  layer = cls(6, 10, act=mlp.silu, bias=bias)
  tree = layer.params()
  keys = jax.random.split(KEY, len(tree))
  p = {
    k: jax.random.normal(key, v.shape)
    for (k, v), key in zip(tree.items(), keys, strict=True)
  }
  x = jax.random.normal(jax.random.key(1), (2, 3, 6))
  w = {k: np.asarray(v, np.float64) for k, v in p.items()}
  h = np.asarray(x, np.float64)

  def silu(y):
    return y / (1 + np.exp(-y))

  def column(name):
    return h @ w[name] + w.get(f"{name}_bias", 0.0)

  if cls is GLU:
    y = silu(column("gate")) * column("up")
  else:
    y = silu(column("up"))
  want = y @ w["down"] + w.get("down_bias", 0.0)
  y, report = layer(p, x)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
  assert report == {}
  assert layer.active() == count(tree)
  assert len(tree) == (2 + (cls is GLU)) * (1 + bias)


# --- dot --------------------------------------------------------------------

SPECS = {
  "btd,dv->btv": ((2, 3, 4), (4, 5)),
  "btd,dnh->btnh": ((2, 3, 4), (4, 5, 6)),
  "btnh,nhd->btd": ((2, 3, 4, 5), (4, 5, 6)),
  "bd,df->bf": ((2, 4), (4, 5)),
}


@pytest.mark.parametrize("spec", SPECS)
def test_dot_is_its_einsum(spec: str):
  """Values and both gradients, in float64 by numpy's own einsum."""
  shapes = SPECS[spec]
  x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
  y, pull = jax.vjp(lambda x, w: dot(x, w, spec), x, w)
  np.testing.assert_allclose(
    y,
    np.einsum(spec, np.float64(x), np.float64(w)),
    rtol=1e-5,
    atol=1e-5,
  )
  g = jax.random.normal(jax.random.key(2), y.shape)
  operands, out = spec.split("->")
  a, b = operands.split(",")
  dx, dw = pull(g)
  np.testing.assert_allclose(
    dx, np.einsum(f"{out},{b}->{a}", g, w), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
    dw, np.einsum(f"{a},{out}->{b}", x, g), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  "spec", ["btd,vd->btv", "btd,dv->bvt", "btd,bdv->btv", "bt,dv->btdv"]
)
def test_dot_wants_weights_as_they_are_stored(spec: str):
  """`(in..., out...)` is the one layout; another is a mistake."""
  with pytest.raises(ValueError, match="dot wants"):
    dot(jnp.zeros((2, 3, 4)), jnp.zeros((4, 5)), spec)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dot_sums_in_float32(dtype):
  """4096 products of 1 and 2^-4 + 2^-8: a narrow sum would lose half of it.

  The result is rounded once, and the float32 form is exact.
  """
  n = 4096
  x = jnp.ones((1, 1, n), dtype)
  w = jnp.full((n, 1), 2**-4 + 2**-8, dtype)
  exact = n * (2**-4 + 2**-8)
  assert dot(x, w, "btd,dv->btv", dtype=jnp.float32)[0, 0, 0] == exact
  assert dot(x, w, "btd,dv->btv").dtype == dtype
  assert dot(x, w, "btd,dv->btv")[0, 0, 0] == jnp.asarray(exact, dtype)


def test_dot_takes_its_dtype_from_the_activations():
  """A float32 weight under bfloat16 activations does not widen them."""
  y = dot(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 3)), "bd,df->bf")
  assert y.dtype == jnp.bfloat16


# --- Positions --------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "rope"),
  [
    ("rope_halves", Rope()),
    ("rope_interleaved", Rope(interleaved=True)),
    ("rope_partial", Rope(fraction=0.5)),
  ],
)
def test_rope_equals_transformers(name: str, rope: Rope):
  """Both layouts and a partial rotation, at positions up to 500.

  The judge's angles are float64, ours float32 as in every published model: an
  angle of 500 is known to 3e-5.
  """
  places = jnp.asarray(GOLDEN["rope/positions"])
  agrees(lambda x: rope(x, places), name, "x", tol=1e-4)


@pytest.mark.parametrize(
  ("name", "scaling"),
  [("default", None), ("linear", Linear(4.0)), ("llama3", Llama3())],
)
def test_frequencies_equal_transformers(name: str, scaling):
  """Heads 128 wide at base 500,000, as Llama 3.1 has them."""
  freq = Rope(5e5, scaling).frequencies(128)
  np.testing.assert_allclose(freq, GOLDEN[f"frequencies/{name}"], rtol=2e-6)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_rope_products_depend_on_distance_alone(q: int, k: int, shift: int):
  """That is its purpose: <R_m q, R_n k> is a function of m - n."""
  x = jax.random.normal(KEY, (2, 1, 1, 8))

  def product(q: int, k: int):
    a = Rope()(x[:1], jnp.array([[q]], jnp.int32))
    b = Rope()(x[1:], jnp.array([[k]], jnp.int32))
    return float(jnp.sum(a * b))

  assert math.isclose(
    product(q, k), product(q + shift, k + shift), abs_tol=5e-3
  )


def test_rope_layouts_differ_by_a_permutation():
  """Interleaved is halves on reordered features: how weights are converted."""
  x = jax.random.normal(KEY, (1, 5, 2, 8))
  places = jnp.arange(5)
  mixed = Rope(interleaved=True)(x, places)
  order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
  halves = Rope()(x[..., order], places)
  np.testing.assert_allclose(mixed[..., order], halves, atol=1e-6)


def test_rope_keeps_dtype_and_length():
  """A rotation changes no norm, and bfloat16 stays bfloat16."""
  x = jax.random.normal(KEY, (2, 5, 3, 8))
  y = Rope()(x, jnp.arange(5))
  np.testing.assert_allclose(
    jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
  )
  np.testing.assert_array_equal(y[:, 0], x[:, 0])
  assert Rope()(x.astype(jnp.bfloat16), jnp.arange(5)).dtype == jnp.bfloat16


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 20, 112])
def test_alibi_slopes_equal_bloom(heads: int):
  """Also where the number of heads is no power of two."""
  np.testing.assert_allclose(
    Alibi().slopes(heads), GOLDEN[f"slopes/{heads}"], rtol=1e-6
  )


def test_sinusoidal_equals_distilbert():
  """Sines at even features, cosines at odd ones."""
  got = Sinusoidal()({}, jnp.arange(11)[None], 10)[0]
  np.testing.assert_allclose(got, GOLDEN["sinusoidal"], atol=2e-6)
  odd = Sinusoidal()({}, jnp.arange(11)[None], 9)[0]
  assert odd.shape == (11, 9)


def test_learned_positions_are_rows_of_their_table():
  """And their gradient goes to the rows that were read."""
  table = Learned(6)
  p = init(table.params(4), KEY)
  where = jnp.array([[0, 3, 3]])
  np.testing.assert_array_equal(table(p, where, 4)[0], p["table"][where[0]])
  grad = jax.grad(lambda p: table(p, where, 4).sum())(p)["table"]
  np.testing.assert_array_equal(grad[:, 0], [1, 0, 0, 2, 0, 0])


# --- Masks ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "mask"), [("sliding", Sliding(4)), ("chunked", Chunked(4))]
)
def test_masks_equal_transformers(name: str, mask):
  """Off by one here is a model that reads one token too many."""
  want = GOLDEN[f"mask/{name}"]
  i = jnp.arange(len(want))
  np.testing.assert_array_equal(mask.allows(i[:, None], i[None]), want)
  assert want.sum(-1).max() == mask.reach


# --- Dropout ----------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_meets_its_rate_and_keeps_the_mean(rate: float):
  """The share of zeros within four sigma; survivors scaled by 1/(1-rate)."""
  x = jnp.ones((400, 500))
  y = dropout(x, rate, KEY)
  zeros = float(jnp.mean((y == 0).astype(jnp.float32)))
  assert abs(zeros - rate) < 4 * math.sqrt(rate * (1 - rate) / x.size)
  np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
  # Independent between neighbours: rows and columns agree no more than chance.
  share = (y == 0).mean(0), (y == 0).mean(1)
  for s, n in zip(share, (400, 500), strict=True):
    assert abs(float(s.std()) - math.sqrt(rate * (1 - rate) / n)) < 0.004


def test_dropout_is_a_function_of_its_key():
  """The same key, the same mask; another key, another; none, the identity."""
  x = jax.random.normal(KEY, (8, 64))
  keys = jax.random.split(jax.random.key(1))
  a, b = (dropout(x, 0.5, k) for k in keys)
  np.testing.assert_array_equal(a, dropout(x, 0.5, keys[0]))
  assert 0.3 < float(jnp.mean(((a == 0) != (b == 0)).astype(jnp.float32))) < 0.7
  assert dropout(x, 0.5, None) is x
  assert dropout(x, 0.0, KEY) is x
  narrow = dropout(x.astype(jnp.bfloat16), 0.5, KEY)
  assert narrow.dtype == jnp.bfloat16
