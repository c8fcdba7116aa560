"""Kinds of caches: what each remembers, and that decoding is the forward pass.

Every published family decodes as it reads: whatever the chunks, however the
rows are padded, past windows and chunks of attention.
"""

import functools
import json
import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, SMALL, block, random_params

from jaxlm.errors import UserError
from jaxlm.layers import cache as kv
from jaxlm.layers.at import At
from jaxlm.layers.attention import Attention
from jaxlm.layers.cache import Full, Quantised, Ring
from jaxlm.layers.compute import Compute
from jaxlm.layers.latent import LatentAttention
from jaxlm.layers.mask import Causal, Chunked, PrefixLM, Sliding
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.paged import Paged
from jaxlm.layers.param import init
from jaxlm.layers.position import Alibi, Dynamic, Linear, Rope, Yarn
from jaxlm.models import hub
from jaxlm.models.decoder import Decoder, forward
from jaxlm.models.families import recurrent

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = sorted(p.stem[9:] for p in GOLDEN.glob("families_*.npz"))
VOCAB, DIM = SMALL["vocab"], SMALL["dim"]
ROWS, T = 2, 26

# One program for each model and number of tokens, shared by all tests.
run = jax.jit(forward, static_argnums=(0, 5))


def decoder(mixer, layers: int = 1, **more) -> Decoder:
  """Layers with this mixer, as small as the others."""
  layers = (((replace(block(), mixer=mixer),), layers),)
  return Decoder(VOCAB, DIM, layers, RMSNorm(DIM), 512, **more)


RECURRENT = {
  mixer: recurrent.decoder(
    VOCAB, DIM, 3, 2, mixer, window=4, mlp_dim=24, max_positions=64
  )
  for mixer in ("rnn", "lstm", "gru", "rglru", "hybrid")
}


@functools.cache
def published(name: str) -> tuple[Decoder, dict]:
  """The tiny model of a golden file, with its weights."""
  with np.load(GOLDEN / f"families_{name}.npz") as file:
    arrays = dict(file)
  config = json.loads(str(arrays["config"]))
  family = hub.find(config)
  model = family.read(config)
  weights = {
    k.removeprefix("weight/"): v.astype(np.float32)
    for k, v in arrays.items()
    if k.startswith("weight/")
  }
  return model, family.names.load(model, weights)


def model_of(name: str) -> tuple[Decoder, dict]:
  """Any of the models, and its parameters."""
  if name in FAMILIES:
    return published(name)
  model = (MODELS | RECURRENT)[name]
  return model, random_params(model)


def tokens_of(model: Decoder, rows: int = ROWS, length: int = T) -> np.ndarray:
  """Tokens at random."""
  rng = np.random.default_rng(0)
  return rng.integers(0, model.vocab, (rows, length)).astype(np.int32)


def decode(model, params, tokens, chunks, kind=kv.FULL, pad=0, length=T, at=At):
  """Logits of tokens that a cache is given in chunks of these sizes.

  The last row begins `pad` tokens later than the others: it is padded on the
  left, and loses its last tokens.
  """
  tokens, shift = np.array(tokens), np.zeros((len(tokens), 1), int)
  if pad:
    shift[-1] = pad
    tokens[-1, pad:] = tokens[-1, :-pad]
  where = (np.arange(tokens.shape[1])[None] - shift).astype(np.int32)
  cache = kv.empty(model.cache(len(tokens), length, kind))
  outs, start = [], 0
  for n in chunks:
    part = slice(start, start + n)
    here = at(positions=jnp.asarray(where[:, part]))
    out, cache = run(model, params, jnp.asarray(tokens[:, part]), here, cache)
    outs.append(np.asarray(out))
    start += n
  out = np.concatenate(outs, axis=1)
  if pad:
    out[-1, :-pad] = out[-1, pad:]
    out[-1, -pad:] = 0.0
  return out


def agree(got, want, pad: int = 0, atol: float = 1e-5) -> None:
  """All logits, but for those that a padded row has not come to.

  To 1e-5, of the largest logit where that is larger than 1.
  """
  want = np.array(want)
  atol *= max(1.0, np.abs(want).max())
  if pad:
    want[-1, -pad:] = 0.0
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# --- Every family -----------------------------------------------------------

# 9 is longer than any window or chunk among them, and 26 goes far past it.
ORDERS = st.permutations([1] * 8 + [9, 9])


@pytest.mark.parametrize("name", [*FAMILIES, *MODELS, *RECURRENT])
def test_decoding_is_the_full_forward_pass(name: str):
  """One by one and in chunks of any order, with prompts of unequal lengths.

  The judge is one pass over plain rows, without cache or positions.
  """
  model, params = model_of(name)
  tokens = tokens_of(model)
  want = run(model, params, tokens)

  @settings(max_examples=3)
  @given(ORDERS)
  def check(chunks):
    agree(decode(model, params, tokens, chunks, pad=5), want, pad=5)

  check()


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["gemma3", "llama4", "deepseek_v3", "gpt_oss", "hybrid"]
)
def test_chunks_of_any_size(name: str):
  """Windows, chunks, latents, sinks, recurrences: every partition is right."""
  model, params = model_of(name)
  tokens = tokens_of(model)
  want = run(model, params, tokens)
  rng = np.random.default_rng(1)
  for _ in range(4):
    cuts = np.sort(rng.choice(np.arange(1, T), rng.integers(1, 8), False))
    chunks = np.diff([0, *cuts, T]).tolist()
    agree(decode(model, params, tokens, chunks, pad=3), want, pad=3)


def test_positions_of_one_row_serve_all():
  """`[1, seq]` beside a batch: full caches, rings, latents, states."""
  for name in ("local", "chunked", "deepseek_v2", "hybrid", "lstm"):
    model, params = model_of(name)
    tokens = tokens_of(model)
    cache = kv.empty(model.cache(ROWS, T))
    outs, start = [], 0
    for n in [9, *[1] * 17]:
      here = At(positions=jnp.arange(start, start + n, dtype=jnp.int32)[None])
      part = jnp.asarray(tokens[:, start : start + n])
      out, cache = run(model, params, part, here, cache)
      outs.append(out)
      start += n
    agree(np.concatenate(outs, axis=1), run(model, params, tokens))


# --- Rings ------------------------------------------------------------------

POSITIONS = {
  "rope": Rope(100.0),
  "half": Rope(100.0, fraction=0.5, interleaved=True),
  "linear": Rope(100.0, Linear(2.0), reverse=True),
  "yarn": Rope(100.0, Yarn(4.0, 16)),
  "alibi": Alibi(),
  "nope": None,
}


def attention(position, **more) -> Attention:
  """Grouped heads whose features a half of can turn."""
  return Attention(DIM, 4, kv_heads=2, head_dim=8, position=position, **more)


def latents(**more) -> LatentAttention:
  """A small latent layer."""
  return LatentAttention(DIM, 2, 8, None, 6, 4, 6, **more)


def ring_judge(model, params, tokens, ring: Ring) -> np.ndarray:
  """Each logit from a new text: the sinks, then the window, side by side.

  That is StreamingLLM's own description, and what a ring has to equal in a
  model of one layer, whose keys know nothing of other tokens.
  """
  full, out = ring.size, []
  for end in range(1, tokens.shape[1] + 1):
    text = tokens[:, :end]
    if end > full:
      parts = text[:, : ring.sinks], text[:, end - ring.window :]
      text = np.concatenate(parts, axis=1)
    fill = np.zeros((len(tokens), full - text.shape[1]), np.int32)
    whole = np.concatenate([text, fill], axis=1)
    out.append(run(model, params, whole)[:, text.shape[1] - 1])
  return np.stack(out, axis=1)


RINGS = {n: attention(position) for n, position in POSITIONS.items()}
RINGS |= {
  "latent": latents(),
  "norm after": attention(
    Rope(100.0),
    qk_norm=RMSNorm(8, scale=False),
    norm_after_rope=True,
    softcap=3.0,
  ),
  "learned sinks": attention(Rope(100.0), sinks=True),
}


@pytest.mark.parametrize("name", RINGS)
def test_a_ring_reads_sinks_and_window_as_one_text(name: str):
  """For every kind of position, past the ring, one by one and in chunks."""
  model, ring = decoder(RINGS[name]), Ring(6, 3)
  params, tokens = random_params(model), tokens_of(model)
  want = ring_judge(model, params, tokens, ring)
  for chunks in ([1] * T, [9, *[1] * 8, 9], [9, 9, *[1] * 8]):
    agree(decode(model, params, tokens, chunks, ring, pad=5), want, pad=5)


def test_a_ring_without_sinks_is_a_window():
  """And with sinks that are not moved, a window with sinks; several layers."""
  for ring in (Ring(6), Ring(6, 3, move=False)):
    model = decoder(attention(Rope(100.0)), layers=3)
    params, tokens = random_params(model), tokens_of(model)
    mask = Sliding(ring.window, ring.sinks)
    judge = decoder(attention(Rope(100.0), mask=mask), layers=3)
    want = run(judge, params, tokens)
    for chunks in ([9, *[1] * 8, 9], [1] * T):
      agree(decode(model, params, tokens, chunks, ring, pad=5), want, pad=5)


@pytest.mark.parametrize("name", ["local", "chunked", "gemma3", "hybrid"])
def test_a_ring_keeps_masks_that_are_bounded(name: str):
  """Until it is full nothing changes, whatever else is in the model."""
  model, params = model_of(name)
  tokens = tokens_of(model)
  got = decode(model, params, tokens, [9, *[1] * 8, 9], Ring(22, 4), pad=5)
  agree(got, run(model, params, tokens), pad=5)


def test_a_ring_says_how_much_it_holds():
  """Whatever the length; windows of their own stay, chunks as well."""
  for mask, slots in (
    (Causal(), 10),
    (Sliding(5), 5),
    (Sliding(5, sinks=2), 7),
    (Chunked(6), 6),
  ):
    cache = attention(None, mask=mask).cache(2, 10**9, Ring(8, 2))
    assert cache["k"].shape == (2, slots, 2, 8)
    assert cache["positions"].shape == (2, slots)


def test_far_positions_cost_precision_and_no_more():
  """Past 100,000 tokens angles are float32: products move by under 1 percent.

  The same text read from position 0 and from 100,000 on: rotations are
  relative, so only the rounding of angles differs.
  """
  model = decoder(attention(Rope(10000.0)))
  params, tokens = random_params(model), tokens_of(model)
  want = run(model, params, tokens)
  start = 100_000 + np.arange(T, dtype=np.int32)[None]
  got = run(model, params, tokens, At(positions=jnp.asarray(start)))
  scale = float(jnp.std(want))
  assert 0 < np.abs(got - want).max() < 0.01 * scale


@pytest.mark.parametrize(
  ("what", "words"),
  [
    (lambda: Ring(0), "at least 1"),
    (lambda: Ring(4, -1), "0 sinks or more"),
    (
      lambda: attention(None, mask=PrefixLM()).cache(1, 8, Ring(4)),
      "sees more.*full cache",
    ),
    (
      lambda: attention(Rope(10.0, Dynamic(2.0, 8))).cache(1, 8, Ring(4)),
      r"Dynamic follow.*fixed\(length\)",
    ),
    (lambda: Quantised("int3"), "'int3'; known: int8, float8_e4m3fn"),
    (lambda: Quantised(inner=Quantised()), "once"),
    (lambda: Paged(0), "at least 1"),
    (
      lambda: attention(None).cache(2, 33, Paged(16, 4)),
      "2 rows of 33 positions fill 6 blocks of 16.*has 4",
    ),
    (
      lambda: attention(None, mask=PrefixLM()).cache(1, 8, Paged()),
      "causal mask",
    ),
  ],
)
def test_wrong_kinds_are_explained(what, words: str):
  """One sentence each, with what to do."""
  with pytest.raises(UserError, match=words):
    what()


# --- Bytes instead of numbers -----------------------------------------------


@pytest.mark.parametrize(
  ("dtype", "error", "inner"),
  [
    ("int8", 0.02, Full()),
    ("int8", 0.02, Ring(22, 4)),
    ("int8", 0.02, Paged(4)),
    ("float8_e4m3fn", 0.1, Full()),
    ("float8_e5m2", 0.2, Full()),
  ],
)
def test_quantised_decoding_is_close(dtype: str, error: float, inner):
  """Within `error` standard deviations of the logits, root mean square.

  And every chunking gives the same: a token reads its own key rounded too.
  No experts here: where a router chooses, rounding can tip the choice.
  """
  kind, small = Quantised(dtype, inner), decoder(latents(), layers=2)
  for model, params in (model_of("llama3"), (small, random_params(small))):
    tokens = tokens_of(model)
    want = np.asarray(run(model, params, tokens))
    got = decode(model, params, tokens, [9, *[1] * 8, 9], kind)
    assert 0 < np.sqrt(np.mean((got - want) ** 2)) < error * want.std()
    agree(decode(model, params, tokens, [1] * T, kind), got, atol=1e-4)


@given(st.integers(0, 1000), st.sampled_from(sorted(kv.LARGEST)))
@settings(max_examples=20)
def test_codes_are_within_half_a_step(seed: int, dtype: str):
  """Of the largest for int8; of themselves, or the smallest, for floats."""
  rng = np.random.default_rng(seed)
  x = (rng.normal(size=(3, 5, 8)) * 10.0 ** rng.integers(-6, 6)).astype("f4")
  x[0, 0] = 0.0
  codes, scale = Quantised(dtype).encode(jnp.asarray(x))
  back = np.asarray(codes.astype(jnp.float32) * scale[..., None])
  top = np.abs(x).max(-1, keepdims=True)
  step = {"int8": 1 / 254, "float8_e4m3fn": 1 / 16, "float8_e5m2": 1 / 8}[dtype]
  bound = top if dtype == "int8" else np.maximum(np.abs(x), top * 2.0**-14)
  assert (np.abs(back - x) <= 1.001 * step * bound).all()
  np.testing.assert_array_equal(back[0, 0], 0.0)


def test_bytes_are_as_declared():
  """A quarter of float32 and half of bfloat16, and four bytes a head's scale.

  The arrays that are made have the bytes that were declared.
  """
  layer = Attention(512, 8, kv_heads=2, head_dim=64)
  plain, small = (layer.cache(3, 100, kind) for kind in (Full(), Quantised()))
  tokens, heads = 3 * 100, 3 * 100 * 2 * 2
  assert kv.n_bytes(plain) == heads * 64 * 4 + tokens * 4
  assert kv.n_bytes(plain, jnp.bfloat16) == heads * 64 * 2 + tokens * 4
  assert kv.n_bytes(small) == heads * (64 + 4) + tokens * 4
  for tree in (plain, small):
    made = sum(x.nbytes for x in jax.tree.leaves(kv.empty(tree)))
    assert made == kv.n_bytes(tree)


# --- Pages ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "bloom", "deepseek_v3"])
def test_pages_decode_like_a_full_cache(name: str):
  """In blocks of 4, which divide neither chunks nor length; padded as well."""
  model, params = model_of(name)
  tokens = tokens_of(model)
  want = run(model, params, tokens)
  for chunks in ([9, *[1] * 8, 9], [1] * T):
    agree(decode(model, params, tokens, chunks, Paged(4), pad=5), want, pad=5)


# --- Prefixes and packed rows -----------------------------------------------


def test_a_prefix_is_remembered_with_its_block():
  """Tokens of one block see each other, later ones see them all.

  With a cache the block has to come in one chunk; what follows may come one
  by one, and may open another block.
  """
  model = decoder(attention(Rope(100.0), mask=PrefixLM()), layers=2)
  params, tokens = random_params(model), tokens_of(model)
  blocks = np.full((ROWS, T), -1, np.int32)
  blocks[:, :9], blocks[0, 11:17] = 0, 1
  where = np.broadcast_to(np.arange(T, dtype=np.int32), (ROWS, T))
  want = run(model, params, tokens, At(blocks=jnp.asarray(blocks)))
  plain = run(model, params, tokens)
  assert np.abs(want - plain)[:, :8].max() > 0.1  # blocks do matter
  for kind in (Full(), Quantised("int8")):
    cache, outs, start = kv.empty(model.cache(ROWS, T, kind)), [], 0
    for n in [9, 1, 1, 9, *[1] * 6]:
      part = slice(start, start + n)
      here = At(jnp.asarray(where[:, part]), None, jnp.asarray(blocks[:, part]))
      out, cache = run(model, params, tokens[:, part], here, cache)
      outs.append(out)
      start += n
    out = np.concatenate(outs, axis=1)
    agree(out, want, atol=1e-5 if kind == Full() else 0.2)
  agree(decode(model, params, tokens, [9, *[1] * 17]), plain)  # no blocks


def test_packed_rows_are_refused():
  """A cache knows one text a row; segments used to be ignored."""
  model, params = model_of("llama")
  cache = kv.empty(model.cache(ROWS, T))
  here = At(segments=jnp.zeros((ROWS, 9), jnp.int32))
  with pytest.raises(UserError, match=r"packed.*a row of its own"):
    forward(model, params, tokens_of(model)[:, :9], here, cache)


def test_an_unknown_attention_is_named():
  """It used to be a KeyError."""
  layer = attention(None)
  p = init(layer.params(), jax.random.key(0))
  x = jnp.zeros((1, 2, DIM))
  with pytest.raises(
    UserError, match="'flesh'; known: auto, reference, blocks"
  ):
    layer(p, x, compute=Compute(attention="flesh"))
