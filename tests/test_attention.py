"""Attention: every form against a float64 definition, torch and transformers.

`oracle` is written from the equation, by numpy in float64, with the mask as a
plain Python function of two positions: nothing of the library is in it.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxlm.layers import cache as kv
from jaxlm.layers.at import At
from jaxlm.layers.attend import attend, masked_softmax, visible
from jaxlm.layers.attention import Attention
from jaxlm.layers.compute import Compute
from jaxlm.layers.mask import Causal, Chunked, Full, PrefixLM, Sliding
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import init
from jaxlm.layers.position import Alibi, Rope

KEY = jax.random.key(0)
# What is for GPUs has its own tests: interpreting it twice is slow.
NAMES = ("auto", "reference", "blocks", "flash")
with np.load(pathlib.Path(__file__).parent / "golden/layers.npz") as file:
  GOLDEN = dict(file)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
  """Normal values, float32."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- torch and transformers -------------------------------------------------

TORCH = {
  "causal": (Causal(), {}),
  "full": (Full(), {}),
  "sliding": (Sliding(4), {}),
  "gqa": (Causal(), {}),
  "scaled": (Causal(), {"scale": 0.3}),
  "softcap": (Causal(), {"softcap": 0.8}),
  "alibi": (Causal(), {"alibi": Alibi()}),
  "sinks": (Causal(), {}),
}


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("name", TORCH)
def test_attend_equals_torch(name: str, form: str):
  """Values and the gradients of q, k, v (and sinks), at 2e-6."""
  mask, options = TORCH[name]
  keys = ["q", "k", "v"] + ["sinks"] * (name == "sinks")
  inputs = {k: jnp.asarray(GOLDEN[f"{name}/{k}"], jnp.float32) for k in keys}
  cotangent = jnp.asarray(GOLDEN[f"{name}/cotangent"], jnp.float32)

  def fn(inputs):
    q, k, v = (inputs[name] for name in "qkv")
    return attend(
      q,
      k,
      v,
      mask,
      sinks=inputs.get("sinks"),
      compute=Compute(attention=form),
      **options,
    )

  out, pull = jax.vjp(jax.jit(fn), inputs)
  np.testing.assert_allclose(out, GOLDEN[f"{name}/out"], rtol=0, atol=2e-6)
  for key, got in pull(cotangent)[0].items():
    np.testing.assert_allclose(
      got, GOLDEN[f"{name}/grad/{key}"], rtol=0, atol=4e-6, err_msg=key
    )


# --- The definition ---------------------------------------------------------


def oracle(
  q, k, v, see, scale, softcap=None, sinks=None, bias=0.0
) -> np.ndarray:
  """Softmax over what is seen, in float64, one head at a time.

  `see` is bool [batch, t, s]; `bias` broadcasts to [heads, t, s].
  """
  b, t, n, _ = q.shape
  s, groups = k.shape[1], k.shape[2]
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((b, t, n, v.shape[-1]))
  bias = np.broadcast_to(bias, (n, t, s))
  for row in range(b):
    for head in range(n):
      g = head // (n // groups)
      scores = q[row, :, head] @ k[row, :, g].T * scale
      if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
      weights = np.exp(scores + bias[head]) * see[row]
      total = weights.sum(-1)
      if sinks is not None:
        total = total + np.exp(float(sinks[head]))
      probs = weights / np.where(total == 0, 1, total)[:, None]
      out[row, :, head] = probs @ v[row, :, g]
  return out


def seen(rule, b: int, t: int, s: int) -> np.ndarray:
  """A Python rule of (query, key) as bool [b, t, s]."""
  table = [[rule(i, j) for j in range(s)] for i in range(t)]
  return np.broadcast_to(np.array(table), (b, t, s))


RULES = {
  "causal": (Causal(), lambda i, j: j <= i),
  "full": (Full(), lambda i, j: True),
  "sliding": (Sliding(17), lambda i, j: i - 17 < j <= i),
  "sliding one": (Sliding(1), lambda i, j: i == j),
  "sliding wide": (Sliding(1000), lambda i, j: j <= i),
  "window and sinks": (
    Sliding(9, sinks=3),
    lambda i, j: j <= i and (j > i - 9 or j < 3),
  ),
  "chunked": (Chunked(24), lambda i, j: j <= i and i // 24 == j // 24),
  "prefix": (PrefixLM(), lambda i, j: j <= i),
}


def run(form: str, q, k, v, mask, at=None, keys=None, **options):
  """`attend`, jitted, by one form."""

  def fn(q, k, v, at, keys):
    return attend(
      q, k, v, mask, at, keys, compute=Compute(attention=form), **options
    )

  return jax.jit(fn)(q, k, v, at, keys)


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("name", RULES)
def test_every_mask_in_every_form(name: str, form: str):
  """130 tokens divide by no block; four heads share two."""
  mask, rule = RULES[name]
  q, k, v = draw(2, 130, 4, 8), draw(2, 130, 2, 8, seed=1), draw(2, 130, 2, 6)
  out = run(form, q, k, v, mask)
  want = oracle(q, k, v, seen(rule, 2, 130, 130), 8**-0.5)
  np.testing.assert_allclose(out, want, rtol=0, atol=2e-6)


OPTIONS = {
  "plain": {},
  "scale": {"scale": 0.05},
  "softcap": {"softcap": 0.7},
  "alibi": {"alibi": Alibi()},
  "sinks": {"sinks": np.array([0.0, 2.0, -1.0, 4.0], np.float32)},
}


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_every_form(name: str, form: str):
  """Under a window, so that blocks start late: distances must stay right."""
  q, k, v = draw(1, 200, 4, 8), draw(1, 200, 1, 8, seed=1), draw(1, 200, 1, 6)
  mask, rule = RULES["sliding"]
  options = dict(OPTIONS[name])
  out = run(form, q, k, v, mask, **options)
  if options.pop("alibi", None):
    away = np.arange(200)[None] - np.arange(200)[:, None]
    slopes = np.array([2**-2, 2**-4, 2**-6, 2**-8])
    options["bias"] = slopes[:, None, None] * away
  options = {"scale": 8**-0.5} | options
  want = oracle(q, k, v, seen(rule, 1, 200, 200), **options)
  np.testing.assert_allclose(out, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_query_of_several_rows(name: str, groups: int):
  """A CPU takes all key heads as one then: the numbers are the same."""
  q, k = draw(3, 1, 4, 8), draw(3, 20, groups, 8, seed=1)
  v, options = draw(3, 20, groups, 6, seed=2), OPTIONS[name]
  at = At(positions=np.array([[19], [7], [12]]))
  keys = At(positions=np.tile(np.arange(20), (3, 1)))
  by = [
    run(form, q, k, v, Sliding(9), at, keys, **options)
    for form in ("blocks", "reference")
  ]
  np.testing.assert_allclose(*by, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["blocks"])  # flash: its own tests
@pytest.mark.parametrize("t", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("name", ["causal", "sliding", "chunked", "full"])
def test_gradients_of_every_form(name: str, t: int, form: str):
  """Equal to the reference's, at lengths around the size of a block."""
  mask, _ = RULES[name]
  q, k, v = draw(2, t, 4, 8), draw(2, t, 2, 8, seed=1), draw(2, t, 2, 6)
  weight = draw(2, t, 4, 6, seed=2)

  def grads(form):
    def loss(q, k, v):
      return jnp.sum(
        attend(q, k, v, mask, compute=Compute(attention=form)) * weight
      )

    return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

  for got, want in zip(grads(form), grads("reference"), strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize(("t", "s"), [(130, 70), (70, 130), (3, 130)])
def test_queries_and_keys_of_different_number(t: int, s: int, form: str):
  """Cross-attention: positions count from zero on both sides."""
  q, k, v = draw(1, t, 2, 8), draw(1, s, 2, 8, seed=1), draw(1, s, 2, 8)
  for name in ("full", "causal", "sliding"):
    mask, rule = RULES[name]
    out = run(form, q, k, v, mask, At(), At())
    want = oracle(q, k, v, seen(rule, 1, t, s), 8**-0.5)
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-6, err_msg=name)


# --- Positions and segments that come with the data -------------------------

B, T = 2, 70
PLACES = hnp.arrays(np.int32, (B, T), elements=st.integers(-2, 90))
DOCUMENTS = hnp.arrays(np.int32, (B, T), elements=st.integers(0, 2))


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("name", ["causal", "sliding", "window and sinks"])
def test_any_positions_and_segments(name: str, form: str):
  """Whatever positions and documents are: empty slots, repeats, disorder.

  A query that sees nothing gets zeros, and no gradient is NaN.
  """
  mask, rule = RULES[name]
  q, k, v = draw(B, T, 2, 4), draw(B, T, 1, 4, seed=1), draw(B, T, 1, 4)

  @jax.jit
  def value_and_grads(at, keys):
    def loss(q, k, v):
      out = attend(q, k, v, mask, at, keys, compute=Compute(attention=form))
      return jnp.sum(out * out), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

  @given(PLACES, PLACES, DOCUMENTS, DOCUMENTS)
  def check(here, there, mine, yours):
    (_, out), grads = value_and_grads(
      At(positions=here, segments=mine), At(positions=there, segments=yours)
    )
    see = np.array(
      [
        [
          [
            there[b, j] >= 0
            and mine[b, i] == yours[b, j]
            and rule(here[b, i], there[b, j])
            for j in range(T)
          ]
          for i in range(T)
        ]
        for b in range(B)
      ]
    )
    want = oracle(q, k, v, see, 0.5)
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(out)[~see.any(-1)], 0)
    assert all(np.isfinite(g).all() for g in grads)

  check()


@pytest.mark.parametrize("form", NAMES)
def test_prefix_blocks_see_both_ways(form: str):
  """Tokens of one non-negative block see each other; others are causal."""
  blocks = np.array([[-1, 0, 0, 0, -1, 1, 1, -1]], np.int32)
  q, k, v = draw(1, 8, 2, 4), draw(1, 8, 2, 4, seed=1), draw(1, 8, 2, 4)
  at = At(blocks=jnp.asarray(blocks))
  out = run(form, q, k, v, PrefixLM(), at)
  same = {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}
  same |= {(i, j) for i in (5, 6) for j in (5, 6)}
  see = seen(lambda i, j: j <= i or (i, j) in same, 1, 8, 8)
  np.testing.assert_array_equal(visible(PrefixLM(), at, at, 8, 8), see)
  np.testing.assert_allclose(out, oracle(q, k, v, see, 0.5), rtol=0, atol=2e-6)


# --- Softmax at its edges ---------------------------------------------------


@pytest.mark.parametrize("sinks", [None, 1.5])
def test_a_row_that_sees_nothing_is_zero(sinks):
  """Zero, never NaN; and its gradient is zero, not NaN."""
  see = jnp.array([[True, False, True], [False] * 3])
  extra = None if sinks is None else jnp.full((1, 1), sinks)

  def fn(scores):
    return masked_softmax(scores, see, extra)

  scores = jnp.array([[1.0, 9.0, 2.0], [3.0, 4.0, 5.0]])
  probs = fn(scores)
  np.testing.assert_array_equal(probs[1], 0)
  assert probs[0, 1] == 0
  if sinks is None:
    np.testing.assert_allclose(probs[0].sum(), 1, rtol=1e-6)
  jacobian = jax.jacobian(fn)(scores)
  assert np.isfinite(jacobian).all()
  np.testing.assert_array_equal(jacobian[1], 0)
  np.testing.assert_array_equal(jacobian[..., 1, :], 0)


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("size", [1e4, 1e-4, -1e4])
def test_scores_of_any_size_stay_finite(size: float, form: str):
  """Scores of 1e8 take no exponential to infinity; gradients stay finite."""
  q, k, v = (
    size * draw(1, 66, 1, 4),
    abs(size) * draw(1, 66, 1, 4),
    draw(1, 66, 1, 4),
  )

  def loss(q, k, v):
    out = attend(q, k, v, Causal(), compute=Compute(attention=form))
    return jnp.sum(out)

  grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
  assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("form", NAMES)
def test_narrow_inputs_have_float32_softmax(form: str, dtype):
  """The result is narrow, and as near to float64 as one rounding allows."""
  q, k, v = (jnp.asarray(draw(2, 130, 2, 8, seed=i), dtype) for i in range(3))
  out = run(form, q, k, v, Causal())
  assert out.dtype == dtype
  wide = (np.asarray(x, np.float32) for x in (q, k, v))
  want = oracle(*wide, seen(RULES["causal"][1], 2, 130, 130), 8**-0.5)
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    np.asarray(out, np.float32), want, rtol=2 * eps, atol=2 * eps
  )


# --- The layer --------------------------------------------------------------

LAYERS = {
  "multi-head": {},
  "grouped": {"kv_heads": 2},
  "multi-query": {"kv_heads": 1},
  "wide heads": {"head_dim": 10},
  "biases": {"bias": True, "out_bias": True, "kv_heads": 2},
  "rope": {"position": Rope(100.0)},
  "alibi": {"position": Alibi()},
  "qk norm": {"position": Rope(100.0), "qk_norm": RMSNorm(6)},
  "qk norm last": {
    "position": Rope(100.0),
    "qk_norm": RMSNorm(6),
    "norm_after_rope": True,
  },
  "scale and cap": {"scale": 0.2, "softcap": 1.0, "mask": Sliding(3)},
}


def layer_oracle(layer: Attention, p: dict, x: np.ndarray) -> np.ndarray:
  """The layer's equations in float64, rotations as complex numbers."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
  t = x.shape[1]
  q, k, v = (
    np.einsum("btd,dnh->btnh", x, p[name]) + p.get(f"{name}_bias", 0.0)
    for name in "qkv"
  )

  def norm(y, scale):
    square = np.mean(y**2, -1, keepdims=True)
    return y / np.sqrt(square + layer.qk_norm.eps) * scale

  def turn(y):
    half = y.shape[-1] // 2
    freq = layer.position.theta ** -(np.arange(half) / half)
    z = y[..., :half] + 1j * y[..., half:]
    z = z * np.exp(1j * np.outer(np.arange(t), freq))[:, None]
    return np.concatenate([z.real, z.imag], -1)

  steps = [turn] if isinstance(layer.position, Rope) else []
  if layer.qk_norm is not None:
    steps.insert(len(steps) if layer.norm_after_rope else 0, norm)
  for step in steps:
    q, k = (
      step(y, p[f"{name}_norm"]["scale"]) if step is norm else step(y)
      for name, y in (("q", q), ("k", k))
    )
  bias = 0.0
  if isinstance(layer.position, Alibi):
    away = np.arange(t)[None] - np.arange(t)[:, None]
    bias = np.array([2**-2, 2**-4, 2**-6, 2**-8])[:, None, None] * away
  window = layer.mask.reach or t
  see = seen(lambda i, j: i - window < j <= i, x.shape[0], t, t)
  scale = layer.scale or layer.width**-0.5
  y = oracle(q, k, v, see, scale, layer.softcap, bias=bias)
  return np.einsum("btnh,nhd->btd", y, p["o"]) + p.get("o_bias", 0.0)


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_its_equations(name: str):
  """Every parameter random, so that one left out is felt."""
  layer = Attention(24, 4, **LAYERS[name])
  tree = layer.params()
  p = init(tree, KEY)
  leaves, structure = jax.tree.flatten(p)
  p = structure.unflatten(
    [x + 0.3 * draw(*x.shape, seed=i) for i, x in enumerate(leaves)]
  )
  x = draw(2, 7, 24)
  y, report = jax.jit(layer)(p, x)
  assert report == {}
  np.testing.assert_allclose(y, layer_oracle(layer, p, x), rtol=0, atol=5e-5)


def test_layer_flops_count_what_the_mask_lets_through():
  """2 products of 2 operations for each seen key: exact on a plain row."""
  seq, heads, width = 32, 4, 6
  for mask, rule in (RULES["causal"], RULES["full"]):
    layer = Attention(24, heads, mask=mask)
    pairs = seen(rule, 1, seq, seq).sum() / seq
    assert layer.flops(seq) == 4 * heads * width * pairs
  local = Attention(24, heads, mask=Sliding(4))
  assert local.flops(seq) == 4 * heads * width * 4


# --- What a cache remembers -------------------------------------------------


def written(length: int, *chunks: list[int]) -> np.ndarray:
  """The positions a one-row cache holds after these chunks, sorted."""
  token = kv.heads(1, 1, 1, Causal())
  cache = kv.empty(kv.FULL.declare(token, 1, length, Causal()))
  for chunk in chunks:
    where = jnp.array([chunk], jnp.int32)
    values = where.astype(jnp.float32)[..., None, None]
    cache = kv.write(cache, {"k": values, "v": 10 * values}, where)
  kept = np.asarray(cache["positions"][0])
  for name, times in (("k", 1), ("v", 10)):
    np.testing.assert_array_equal(
      cache[name][0, :, 0, 0][kept >= 0], times * kept[kept >= 0]
    )
  return sorted(kept[kept >= 0].tolist())


def test_a_cache_keeps_the_last_positions():
  """A ring holds the latest; a chunk longer than it, its end."""
  assert written(4, [0, 1, 2]) == [0, 1, 2]
  assert written(4, [0, 1, 2], [3], [4], [5]) == [2, 3, 4, 5]
  assert written(4, [0, 1, 2, 3, 4, 5]) == [2, 3, 4, 5]
  assert written(4, [0, 1], [2, 3, 4, 5, 6, 7, 8]) == [5, 6, 7, 8]
  assert written(4, [8, 7, 6, 5, 4, 3, 2]) == [5, 6, 7, 8]  # in any order


def test_a_cache_skips_padding_on_either_side():
  """Negative positions are not written, nor do they push others out."""
  assert written(4, [-1, -1, 0, 1]) == [0, 1]
  assert written(4, [-1, -1, -1, -1, 0, 1]) == [0, 1]
  assert written(4, [0, 1, -1, -1]) == [0, 1]
  assert written(4, [0, 1, -1, -1, -1, -1]) == [0, 1]
  assert written(4, [0, 1, 2, 3, 4, 5, -1, -1, -1]) == [2, 3, 4, 5]


def test_a_window_bounds_its_cache():
  """The length is the reach where the mask has one, else what was asked."""
  for mask, length in (
    (Causal(), 100),
    (Sliding(8), 8),
    (Sliding(200), 100),
    (Sliding(8, sinks=2), 100),
    (Chunked(16), 16),
  ):
    layer = Attention(24, 4, kv_heads=2, mask=mask)
    cache = layer.cache(3, 100)
    assert cache["k"].shape == (3, length, 2, 6)
    assert cache["positions"].shape == (3, length)


def test_masks_are_values():
  """Equal masks are equal and hash alike: one compilation for both."""
  for mask, _ in RULES.values():
    copy = dataclasses.replace(mask)
    assert copy == mask
    assert hash(copy) == hash(mask)
