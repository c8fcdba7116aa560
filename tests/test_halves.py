"""bfloat16 weights that a CPU reads as integers; how often decoding compiles.

The trick must be exact to rounding, share its memory with the weight, and be
invisible to whatever else reads a weight.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MODELS

import jaxlm
from jaxlm.generate import decode, loop
from jaxlm.generate.step import prefill, step
from jaxlm.layers import param
from jaxlm.layers.kernels.halves import Halves, halves, widen
from jaxlm.layers.linear import dot
from jaxlm.models.decoder import logits

BF16 = jaxlm.Compute(dtype="bfloat16", unroll=True)


def matrix(n_in: int, n_out: int) -> jax.Array:
  """Normal numbers in bfloat16."""
  x = jax.random.normal(jax.random.key(n_in), (n_in, n_out), jnp.float32)
  return x.astype(jnp.bfloat16)


def test_widen_is_exact():
  """All 65,536 patterns, infinities and NaN among them."""
  bits = jnp.arange(2**16, dtype=jnp.int32).astype(jnp.uint16)
  want = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(np.asarray(widen(bits)), np.asarray(want))


def test_no_copy():
  """Numbers and integers are the same bytes."""
  pair = halves(matrix(64, 96))
  assert pair.w.unsafe_buffer_pointer() == pair.bits.unsafe_buffer_pointer()


@pytest.mark.parametrize("turned", [False, True])
@hypothesis.settings(max_examples=2, deadline=None)
@hypothesis.example(n_in=256, n_out=5)
@hypothesis.example(n_in=7, n_out=5)
@hypothesis.given(n_in=st.integers(1, 80), n_out=st.integers(1, 50))
def test_row_is_the_product(turned, n_in, n_out):
  """One row as by float32, whatever the shape; odd ones by the usual way."""
  w = matrix(n_in, n_out)
  pair = halves(jnp.asarray(np.asarray(w).T.copy())).T if turned else halves(w)
  x = matrix(n_in, 1).T
  assert (pair.row(x) is not None) or n_in != 256
  y = dot(x, pair, "bi,io->bo", dtype=jnp.float32)
  want = np.asarray(x, np.float32) @ np.asarray(w, np.float32)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_heads_and_several_rows():
  """Weights of three axes, and batches, which are multiplied as ever."""
  w = jnp.reshape(matrix(48, 24), (48, 4, 6))
  for rows in (1, 3):
    x = jnp.reshape(matrix(48, rows).T, (rows, 1, 48))
    y = dot(x, halves(w), "btd,dnh->btnh", dtype=jnp.float32)
    want = dot(x, w, "btd,dnh->btnh", dtype=jnp.float32)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "local"])
def test_decoding_says_the_same(name):
  """Logits of a step with and without it: heads apart, tied, capped; biases."""
  model = MODELS[name]
  params = param.init(model.params(), jax.random.key(0))
  plain = decode._ready(model, params, BF16)
  ready = decode.ready(model, params, BF16)
  found = jax.tree.leaves(ready, is_leaf=lambda x: isinstance(x, Halves))
  assert any(isinstance(x, Halves) for x in found)
  prompt = jnp.arange(1, 9, dtype=jnp.int32)[None]
  length = jnp.array([8], jnp.int32)
  said = []
  for p in (plain, ready):
    _, cache = prefill(model, p, prompt, length, 16, BF16)
    x, _ = step(model, p, prompt[:, :1], length, cache, BF16)
    said.append(logits(model, p, x, BF16))
  np.testing.assert_allclose(*said, rtol=0.03, atol=0.03)


def test_float32_stays_as_it_is():
  """There the compiler's own product reaches the memory's speed."""
  model = MODELS["llama"]
  params = param.init(model.params(), jax.random.key(0))
  ready = decode.ready(model, params)
  found = jax.tree.leaves(ready, is_leaf=lambda x: isinstance(x, Halves))
  assert not any(isinstance(x, Halves) for x in found)


def test_lengths_do_not_compile():
  """Prompts and amounts of one rounded size share one program."""
  model = MODELS["llama"]
  params = decode.ready(
    model, param.init(model.params(), jax.random.key(0)), BF16
  )
  sizes = ()
  for seq, n in ((9, 5), (9, 5), (1, 2), (4, 7), (13, 3), (16, 1)):
    jaxlm.generate(model, params, np.ones((1, seq), int), n, compute=BF16)
    now = loop.begin._cache_size(), loop.extend._cache_size()
    assert sizes in ((), now)
    sizes = now
