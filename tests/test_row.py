"""How a CPU multiplies one row by a weight; how often decoding compiles.

It must be exact to rounding, share its memory with the weight, and be invisible
to whatever else reads a weight.
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
from jaxlm.layers.kernels.row import Rowwise, rowwise, widen
from jaxlm.layers.linear import dot, lookup
from jaxlm.models.decoder import logits

BF16 = jaxlm.Compute(dtype="bfloat16", unroll=True)


def matrix(n_in: int, n_out: int, dtype: str = "bfloat16") -> jax.Array:
  """Normal numbers."""
  x = jax.random.normal(jax.random.key(n_in), (n_in, n_out), jnp.float32)
  return x.astype(dtype)


def transposed(w: jax.Array) -> Rowwise:
  """The weight `w` as a tied head is: the transpose of what is stored."""
  return rowwise(jnp.asarray(np.asarray(w).T.copy())).T


def test_widen_is_exact():
  """All 65,536 patterns, infinities and NaN among them."""
  bits = jnp.arange(2**16, dtype=jnp.int32).astype(jnp.uint16)
  want = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(np.asarray(widen(bits)), np.asarray(want))


def test_no_copy():
  """Numbers and integers are the same bytes."""
  both = rowwise(matrix(64, 96))
  assert both.w.unsafe_buffer_pointer() == both.bits.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("turned", [False, True])
@hypothesis.settings(max_examples=2, deadline=None)
@hypothesis.example(n_in=256, n_out=6)
@hypothesis.example(n_in=7, n_out=5)
@hypothesis.given(n_in=st.integers(1, 80), n_out=st.integers(1, 50))
def test_row_is_the_product(turned, dtype, n_in, n_out):
  """One row as by float32, whatever the shape; odd ones by the usual way."""
  w = matrix(n_in, n_out, dtype)
  weight = transposed(w) if turned else rowwise(w)
  x = matrix(n_in, 1, dtype).T
  assert (weight.times(x) is not None) or n_in != 256
  y = dot(x, weight, "bi,io->bo", dtype=jnp.float32)
  want = np.asarray(x, np.float32) @ np.asarray(w, np.float32)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 16, 17])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_rows_meet_a_transposed_weight(dtype, rows):
  """As it lies, by stretches where rows are few."""
  w, x = matrix(48, 20, dtype), matrix(48, rows, dtype).T
  y = dot(x, transposed(w), "bi,io->bo", dtype=jnp.float32)
  want = np.asarray(x, np.float32) @ np.asarray(w, np.float32)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_heads_and_several_rows():
  """Weights of three axes, and batches, which are multiplied as ever."""
  w = jnp.reshape(matrix(48, 24), (48, 4, 6))
  for rows in (1, 3):
    x = jnp.reshape(matrix(48, rows).T, (rows, 1, 48))
    y = dot(x, rowwise(w), "btd,dnh->btnh", dtype=jnp.float32)
    want = dot(x, w, "btd,dnh->btnh", dtype=jnp.float32)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_a_row_of_another_dtype_is_multiplied_as_ever():
  """The dtype of the activations says how much is rounded."""
  x = matrix(16, 1).T
  assert rowwise(matrix(16, 8, "float32")).times(x) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lookup(dtype):
  """The same rows, the nearest for an index outside."""
  table, index = matrix(9, 4, dtype), jnp.array([[0, 8, 30]], jnp.int32)
  found = lookup(rowwise(table), index)
  assert found.dtype == table.dtype
  np.testing.assert_array_equal(found, lookup(table, index))
  np.testing.assert_array_equal(found[0, 2], table[8])


def loops(text: str) -> str:
  """What an HLO program hands to its loops: the lines of `while`."""
  return "\n".join(x for x in text.splitlines() if " while(" in x)


def test_weights_are_not_widened_before_the_loop():
  """A loop over tokens reads bfloat16, and not a float32 copy of it."""
  weight = rowwise(matrix(64, 96))

  def run(x: jax.Array, w: Rowwise) -> jax.Array:
    def step(i, x):
      del i
      return dot(x, w, "bi,io->bo")[:, :64]

    return jax.lax.fori_loop(0, 5, step, x)

  x = jnp.ones((1, 64), jnp.bfloat16)
  text = jax.jit(run).lower(x, weight).compile().as_text()
  assert "u16[64,96]" in loops(text)
  assert "f32[64,96]" not in loops(text)
  assert "f32[8,8,96]" not in loops(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "local"])
def test_decoding_says_the_same(name, dtype):
  """Logits of a step with and without it: heads apart, tied, capped; biases."""
  model = MODELS[name]
  compute = jaxlm.Compute(dtype=dtype, unroll=True)
  params = param.init(model.params(), jax.random.key(0))
  plain = decode._ready(model, params, compute)
  ready = decode.ready(model, params, compute)
  found = jax.tree.leaves(ready, is_leaf=lambda x: isinstance(x, Rowwise))
  assert any(isinstance(x, Rowwise) for x in found)
  prompt = jnp.arange(1, 9, dtype=jnp.int32)[None]
  length = jnp.array([8], jnp.int32)
  said = []
  for p in (plain, ready):
    _, cache = prefill(model, p, prompt, length, 16, compute)
    x, _ = step(model, p, prompt[:, :1], length, cache, compute)
    said.append(logits(model, p, x, compute))
  near = 1e-5 if dtype == "float32" else 0.03
  np.testing.assert_allclose(*said, rtol=near, atol=near)


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
