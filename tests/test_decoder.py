"""The decoder: what must not depend on how it is run.

Packing, caching, unrolling, recomputing and batching change the work, never
the logits; and nothing of the future reaches them.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
  DIM,
  FAMILIES,
  LENGTH,
  MODELS,
  VOCAB,
  random_params,
  random_tokens,
)

from jaxlm.errors import UserError
from jaxlm.layers import cache as kv
from jaxlm.layers.at import At
from jaxlm.layers.attention import Attention
from jaxlm.layers.compute import Compute
from jaxlm.layers.mlp import MLP
from jaxlm.layers.norm import LayerNorm
from jaxlm.layers.param import abstract
from jaxlm.models.decoder import (
  Block,
  Decoder,
  forward,
  hidden,
  layers_apart,
)
from jaxlm.objectives import next_token

run = jax.jit(forward, static_argnames=("model", "compute"))


# --- Packing ----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_as_if_alone(name: str):
  """Three documents in one row: each has the logits it has by itself."""
  model = MODELS[name]
  params = random_params(model)
  lengths = (7, 1, 12)
  docs = [random_tokens(1, n, seed=i) for i, n in enumerate(lengths)]
  at = At(
    positions=jnp.concatenate([jnp.arange(n) for n in lengths])[None],
    segments=jnp.repeat(jnp.arange(3), jnp.array(lengths))[None],
  )
  packed = run(model, params, jnp.concatenate(docs, 1), at)
  alone = jnp.concatenate([run(model, params, d) for d in docs], 1)
  np.testing.assert_allclose(packed, alone, rtol=0, atol=1e-5)
  # And not because documents would not matter:
  plain = run(model, params, jnp.concatenate(docs, 1))
  assert np.abs(plain - alone)[:, 8:].max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_touch(name: str):
  """A row's logits are the same whatever stands beside it."""
  model = MODELS[name]
  params, tokens = random_params(model), random_tokens(3, 9)
  both = run(model, params, tokens)
  one = run(model, params, tokens[1:2])
  np.testing.assert_allclose(both[1:2], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_may_be_given(name: str):
  """Tokens, or the rows of the table they would look up: the same logits."""
  model = MODELS[name]
  params, tokens = random_params(model), random_tokens(1, 9)
  given_rows = params["embed"]["tokens"][tokens]
  np.testing.assert_allclose(
    run(model, params, given_rows), run(model, params, tokens), atol=1e-5
  )


# --- Causality --------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_from_the_future(name: str):
  """D logits[t] / d embedding[s] is exactly zero for s > t, and for s <= t not.

  In "local" two windows of 5 and one of 4 with 2 sinks are followed by full
  layers, so everything is within reach; "chunked" likewise.
  """
  model = MODELS[name]
  params = random_params(model)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 14, DIM)))
  x = x.astype(jnp.float32)
  mix = jnp.asarray(np.random.default_rng(1).normal(size=VOCAB), jnp.float32)

  def outputs(x):
    return forward(model, params, x)[0] @ mix

  size = np.abs(jax.jit(jax.jacrev(outputs))(x)[:, 0]).max(-1)
  future = np.triu(np.ones((14, 14), bool), 1)
  np.testing.assert_array_equal(size[future], 0)
  assert size[~future].min() > 1e-7


def test_a_window_reaches_as_far_as_its_layers_carry_it():
  """Three layers of window 4 see back 3 * (4 - 1) tokens and no further."""
  local = MODELS["local"].layers[0][0][0]
  mixer = replace(local.mixer, mask=replace(local.mixer.mask, window=4))
  model = replace(
    MODELS["local"], layers=(((replace(local, mixer=mixer),), 3),)
  )
  params = random_params(model)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, DIM)))

  def last(x):
    return jnp.sum(forward(model, params, x)[0, -1] ** 2)

  size = np.abs(jax.jit(jax.grad(last))(x.astype(jnp.float32))[0]).max(-1)
  np.testing.assert_array_equal(size > 0, np.arange(16) >= 15 - 9)


# --- Decoding with a cache --------------------------------------------------

T = 20
CHUNKS = st.permutations([1, 1, 1, 3, 7, 7])  # 7 is longer than any window


def decode(model, params, tokens, positions, chunks, apart=False):
  """Logits of `tokens`, given to the cache in chunks of these sizes."""
  declared = model.cache(tokens.shape[0], LENGTH)
  cache = kv.empty(declared)
  if apart:
    cache = layers_apart(model, cache)
    params = params | {"layers": layers_apart(model, params["layers"])}
  outs, start = [], 0
  for n in chunks:
    part = slice(start, start + n)
    at = At(positions=positions[:, part])
    out, cache = run(model, params, tokens[:, part], at, cache)
    outs.append(out)
    start += n
  return jnp.concatenate(outs, axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_is_the_full_forward_pass(name: str):
  """For every order of chunks: rings, chunks longer than rings, one by one."""
  model = MODELS[name]
  params, tokens = random_params(model), random_tokens(2, T)
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
  want = run(model, params, tokens)

  @settings(max_examples=8)
  @given(CHUNKS)
  def check(chunks):
    got = decode(model, params, tokens, positions, chunks)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)

  check()
  ones = decode(model, params, tokens, positions, [1] * T)
  np.testing.assert_allclose(ones, want, rtol=0, atol=1e-5)


def test_layers_apart_decode_alike():
  """Parameters and cache as one tree per layer, as generation holds them."""
  model = MODELS["local"]
  params, tokens = random_params(model), random_tokens(2, T)
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
  stacked, apart = (
    decode(model, params, tokens, positions, [7] + [1] * (T - 7), way)
    for way in (False, True)
  )
  np.testing.assert_allclose(apart, stacked, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name: str, side: str):
  """Rows of 7 and 2 tokens in one batch, padded by negative positions.

  Both go on for some tokens after the prompt, each at its own position.
  """
  model = MODELS[name]
  params = random_params(model)
  lengths, prompt, more = (7, 2), 7, 8
  rows = [random_tokens(1, n + more, seed=n) for n in lengths]
  tokens = np.zeros((2, prompt + more), np.int32)
  positions = np.full((2, prompt + more), -1, np.int32)
  for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
    start = prompt - n if side == "left" else 0
    tokens[i, start : start + n] = row[0, :n]
    positions[i, start : start + n] = np.arange(n)
    tokens[i, prompt:] = row[0, n:]
    positions[i, prompt:] = np.arange(n, n + more)
  got = decode(
    model,
    params,
    jnp.asarray(tokens),
    jnp.asarray(positions),
    [prompt] + [1] * more,
  )
  for i, row in enumerate(rows):
    want = run(model, params, row)[0]
    np.testing.assert_allclose(
      got[i][positions[i] >= 0], want, rtol=0, atol=1e-5
    )


def test_a_cache_may_be_narrow():
  """A bfloat16 cache under a float32 model costs rounding and nothing else."""
  model = MODELS["llama"]
  params, tokens = random_params(model), random_tokens(1, 6)
  cache = kv.empty(model.cache(1, LENGTH), jnp.bfloat16)
  got, cache = run(model, params, tokens, None, cache)
  assert {x.dtype for x in jax.tree.leaves(cache)} == {
    jnp.bfloat16.dtype,
    jnp.int32.dtype,
  }
  np.testing.assert_allclose(got, run(model, params, tokens), atol=0.1)


# --- How it is run ----------------------------------------------------------

WAYS = {
  "unrolled": Compute(unroll=True),
  "dots": Compute(remat="dots"),
  "full": Compute(remat="full"),
  "full, unrolled": Compute(remat="full", unroll=True),
  "reference": Compute(attention="reference"),
}


@functools.cache
def value_and_grad(name: str, compute: Compute):
  """The loss with dropout everywhere, and its gradients."""
  model = MODELS[name]
  layers = tuple(
    (tuple(replace(b, dropout=0.2) for b in pattern), n)
    for pattern, n in model.layers
  )
  model = replace(model, layers=layers, dropout=0.1)
  tokens = random_tokens(2, 12)
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

  def loss(params):
    return next_token(model, params, batch, jax.random.key(3), compute)[0]

  return jax.jit(jax.value_and_grad(loss))(random_params(model))


@pytest.mark.parametrize(
  ("name", "way"),
  [*(("gpt2", way) for way in WAYS), ("local", "full, unrolled")],
)
def test_loss_and_gradients_do_not_depend_on_the_way(name: str, way: str):
  """Scanned or written out, kept or recomputed; dropout's keys as well."""
  value, grads = value_and_grad(name, WAYS[way])
  want, plain = value_and_grad(name, Compute())
  np.testing.assert_allclose(value, want, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    grads,
    plain,
  )


def test_an_unknown_remat_is_named():
  """One sentence that lists what is known."""
  model = MODELS["gpt2"]
  with pytest.raises(UserError, match=r"'most'.*none, dots"):
    forward(
      model,
      random_params(model),
      random_tokens(1, 4),
      compute=Compute(remat="most"),
    )


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("gpt2", "bfloat16"),
    ("qwen3", "bfloat16"),
    ("local", "bfloat16"),
    ("alibi", "bfloat16"),
    ("local", "float16"),
  ],
)
def test_narrow_compute_stays_near_and_narrow(name: str, dtype: str):
  """Under strict promotion, so no layer may widen; logits are float32."""
  model = MODELS[name]
  params, tokens = random_params(model), random_tokens(1, 12)
  compute = Compute(dtype=dtype)
  x, _ = jax.jit(lambda p, t: hidden(model, p, t, compute=compute))(
    params, tokens
  )
  assert x.dtype == dtype
  narrow = run(model, params, tokens, compute=compute)
  wide = run(model, params, tokens)
  assert narrow.dtype == jnp.float32
  spread = float(wide.std())
  np.testing.assert_allclose(narrow, wide, rtol=0, atol=0.25 * spread)
  grads = jax.jit(
    jax.grad(lambda p: forward(model, p, tokens, compute=compute).sum())
  )(params)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.float32.dtype}


# --- Blocks -----------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("post", [False, True])
def test_a_block_is_its_equation(parallel: bool, post: bool):
  """X += mixer(norm(x)); x += ffn(norm(x)), with what each option changes."""
  norm = LayerNorm(DIM)
  one = Block(
    Attention(DIM, 2),
    MLP(DIM, 24),
    norm,
    norm if post else None,
    parallel,
  )
  rng = np.random.default_rng(0)
  p = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32),
    abstract(one.params()),
  )
  x = jnp.asarray(rng.normal(size=(2, 5, DIM)), jnp.float32)
  got, _ = one(p, x, At(), None, Compute())

  def after(name, y):
    return norm(p[f"{name}_post_norm"], y) if post else y

  mixed = x + after("mixer", one.mixer(p["mixer"], norm(p["mixer_norm"], x))[0])
  source = x if parallel else mixed
  fed, _ = one.ffn(p["ffn"], norm(p["ffn_norm"], source))
  want = mixed + after("ffn", fed)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# --- Dropout in its places --------------------------------------------------


@dataclass(frozen=True)
class Identity:
  """A norm that does nothing, so that the residual stream can be read."""

  def params(self):
    return {}

  def __call__(self, p, x):
    return x


@pytest.mark.parametrize("unroll", [False, True])
def test_every_place_of_dropout_has_its_own_mask(unroll: bool):
  """Branches that add 1, 2, 4, ... : the sum tells which were dropped where.

  All weights are zero and the output biases powers of two, so the residual
  stream is a binary number of the survivors, times 1 / (1 - rate).
  """
  rate, rows = 0.25, (40, 10)
  one = Block(
    Attention(DIM, 2, out_bias=True),
    MLP(DIM, 4, bias=True),
    Identity(),
    dropout=rate,
  )
  model = Decoder(
    VOCAB, DIM, (((one, one), 2), ((one,), 1)), Identity(), 16, dropout=rate
  )
  params = jax.tree.map(lambda s: jnp.zeros(s.shape), abstract(model.params()))
  params["embed"]["tokens"] += 2.0**10
  power = 0
  for i, (pattern, n) in enumerate(model.layers):
    for layer in range(n):
      for j in range(len(pattern)):
        p = params["layers"][str(i)][str(j)]
        for part, name in (("mixer", "o_bias"), ("ffn", "down_bias")):
          p[part][name] = p[part][name].at[layer].set(2.0**power)
          power += 1
  assert power == 10
  tokens = jnp.zeros(rows, jnp.int32)

  @jax.jit
  def stream(at):
    compute = Compute(unroll=unroll)
    return hidden(model, params, tokens, at, compute=compute)[0]

  np.testing.assert_array_equal(stream(At()), 2**11 - 1)
  x = np.asarray(stream(At(key=jax.random.key(0)))) * (1 - rate)
  number = np.rint(x).astype(int)
  np.testing.assert_allclose(x, number, atol=1e-2)
  kept = (number[..., None] >> np.arange(11)) & 1  # one bit for each place
  size = number.size
  sigma = (rate * (1 - rate) / size) ** 0.5
  assert np.abs(kept.reshape(size, 11).mean(0) - (1 - rate)).max() < 4 * sigma
  same = np.corrcoef(kept.reshape(size, 11).T) - np.eye(11)
  assert np.abs(same).max() < 5 / size**0.5
  again = np.asarray(stream(At(key=jax.random.key(0)))) * (1 - rate)
  np.testing.assert_array_equal(again, x)


# --- Bad input --------------------------------------------------------------


def test_wrong_tokens_are_named():
  """Outside jit values are known, and each mistake gets its sentence."""
  model = FAMILIES["gpt2"]
  params = random_params(model)
  for tokens, message in (
    ([[0, VOCAB]], f"token {VOCAB} is outside the vocabulary of {VOCAB}"),
    ([[0, -1]], "token -1 is outside"),
    ([[]], "no tokens"),
    ([[0] * (LENGTH + 1)], f"{LENGTH + 1} tokens is longer than the {LENGTH}"),
  ):
    with pytest.raises(UserError, match=message):
      forward(model, params, jnp.array(tokens, jnp.int32))
  long = jnp.zeros((1, LENGTH + 1), jnp.int32)
  with pytest.raises(UserError, match="is longer than"):
    jax.eval_shape(lambda t: forward(model, params, t), long)


def test_known_tokens_inside_a_jit():
  """Tokens that a jitted function closes over are checked like any others."""
  model = FAMILIES["llama"]
  params = random_params(model)
  tokens = random_tokens(1, 5)
  got = jax.jit(lambda p: forward(model, p, tokens))(params)
  np.testing.assert_allclose(got, run(model, params, tokens), atol=1e-6)
  wrong = tokens + VOCAB
  with pytest.raises(UserError, match="outside the vocabulary"):
    jax.jit(lambda p: forward(model, p, wrong))(params)


def test_tokens_outside_the_vocabulary_are_clipped_under_jit():
  """Where values are unknown nothing can be raised, and no NaN appears."""
  model = FAMILIES["llama"]
  logits = run(model, random_params(model), jnp.array([[0, VOCAB + 5, -3]]))
  assert np.isfinite(logits).all()
