"""Generation with every kind of cache: endless, paged, on a mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MODELS, VOCAB, block, random_params

from jaxlm.errors import UserError
from jaxlm.generate import loop
from jaxlm.generate.decode import generate, scored, stream
from jaxlm.generate.filters import Repetition
from jaxlm.generate.prompts import pad_left, pad_right
from jaxlm.generate.samplers import Sample
from jaxlm.generate.step import new_cache
from jaxlm.layers import cache as kv
from jaxlm.layers.at import At
from jaxlm.layers.cache import Quantised, Ring
from jaxlm.layers.compute import Compute
from jaxlm.layers.latent import LatentAttention
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.paged import Paged
from jaxlm.layers.param import shardings
from jaxlm.models.decoder import Decoder, forward
from jaxlm.models.families import llama, recurrent
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset

MODEL = MODELS["llama"]  # 32 positions
RING = Ring(12, 4)

run = jax.jit(forward, static_argnums=0)


def prompts(rows: int, length: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def greedy_by_steps(tokens, n: int, kind) -> np.ndarray:
  """The likeliest tokens, each from a forward pass with the cache."""
  params = random_params(MODEL)
  cache = kv.empty(MODEL.cache(len(tokens), 64, kind))
  text, out = jnp.asarray(tokens, jnp.int32), []
  for i in range(tokens.shape[1] + n - 1):
    at = At(positions=jnp.full((len(tokens), 1), i, jnp.int32))
    scores, cache = run(MODEL, params, text[:, i : i + 1], at, cache)
    if i >= tokens.shape[1] - 1:
      out.append(jnp.argmax(scores[:, 0], axis=-1))
      text = jnp.concatenate([text, out[-1].astype(jnp.int32)[:, None]], axis=1)
  return np.stack(out, axis=1)


# --- Texts without an end ---------------------------------------------------


def test_a_ring_goes_on_past_the_context():
  """Sixty tokens of a model of 32 positions, as one step after another.

  Prompts longer than the ring and than the model are read in its chunks.
  """
  params = random_params(MODEL)
  for length in (5, 50):
    tokens = prompts(2, length)
    want = greedy_by_steps(tokens, 60, RING)
    found = generate(MODEL, params, tokens, 60, cache=RING)
    np.testing.assert_array_equal(found[:, length:], want)
  with pytest.raises(UserError, match="made for 32"):
    generate(MODEL, params, tokens, 60)


def test_a_stream_makes_room_and_compiles_once(monkeypatch):
  """Legs of 16 tokens: the same tokens, one program, buffers of one size."""
  params, tokens = random_params(MODEL), prompts(2, 5)
  sampler, key = Sample(filters=(Repetition(1.2),)), jax.random.key(0)
  whole = generate(MODEL, params, tokens, 90, Sample(), key, cache=RING)
  monkeypatch.setattr("jaxlm.generate.decode.LEG", 32)
  parts = [*stream(MODEL, params, tokens, 90, Sample(), key, cache=RING)]
  np.testing.assert_array_equal(np.stack(parts, axis=1), whole[:, 5:])
  [*stream(MODEL, params, tokens, 40, sampler, key, cache=RING)]
  sizes = loop.extend._cache_size(), loop.make_room._cache_size()
  [*stream(MODEL, params, tokens, 300, sampler, key, cache=RING)]
  assert (loop.extend._cache_size(), loop.make_room._cache_size()) == sizes


def buffers() -> int:
  """Bytes of all arrays that are alive."""
  return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.slow
def test_a_hundred_thousand_tokens_in_constant_memory():
  """Counted in live arrays, every thousand tokens; numbers stay numbers."""
  model = llama.decoder(
    VOCAB, 8, 1, 2, kv_heads=1, head_dim=4, mlp_dim=8, max_positions=64
  )
  params = random_params(model)
  tokens = prompts(1, 5)
  sampler, sizes, seen = Sample(), set(), set()
  found = stream(
    model, params, tokens, 100_000, sampler, cache=Ring(32, 4), pace=0.1
  )
  for i, token in enumerate(found):
    if i % 1000 == 999:
      sizes.add(buffers())
      seen.add(int(token[0]))
  assert i == 99_999
  assert len(seen) > 5
  assert max(sizes) - min(sizes) < 20_000


def test_learned_positions_end():
  """A ring does not help where a table of positions has an end."""
  model = MODELS["gpt2"]
  with pytest.raises(UserError, match="learned 32"):
    generate(model, random_params(model), prompts(1, 5), 60, cache=RING)


# --- Other kinds, and how prompts are read ----------------------------------

KINDS = {
  "full": kv.FULL,
  "paged": Paged(4),
  "int8": Quantised(),
  "paged int8": Quantised(inner=Paged(4)),
  "ring": RING,
}


@pytest.mark.parametrize("name", KINDS)
def test_prompts_may_be_read_in_chunks(name: str):
  """Unequal prompts, chunks that do not divide them: the same tokens."""
  params, kind = random_params(MODEL), KINDS[name]
  tokens, lengths = pad_left([prompts(1, n, n)[0] for n in (13, 4)])
  args = (MODEL, params, tokens, 12)
  want = generate(*args, lengths=lengths, cache=kind)
  found = generate(*args, lengths=lengths, cache=kind, prefill_chunk=5)
  np.testing.assert_array_equal(found, want)
  if name in ("full", "paged"):
    plain = generate(*args, lengths=lengths)
    np.testing.assert_array_equal(want, plain)


@pytest.mark.slow
def test_chunks_of_prompts_in_every_kind_of_layer():
  """States and windows as well; layers in a scan or written out."""
  models = [MODELS["local"], MODELS["alibi"]]
  models += [recurrent.decoder(VOCAB, 16, 3, 2, window=4, max_positions=32)]
  for model in models:
    params, tokens = random_params(model), prompts(2, 13)
    want = generate(model, params, tokens, 6)
    for unroll in (True, False):
      found = generate(
        *(model, params, tokens, 6),
        prefill_chunk=4,
        compute=Compute(unroll=unroll),
      )
      np.testing.assert_array_equal(found, want)


def test_prompts_may_be_padded_on_the_right():
  """The result is that of the same prompts padded on the left."""
  params = random_params(MODEL)
  rows = [prompts(1, n, n)[0] for n in (1, 9, 4)]
  left, lengths = pad_left(rows, pad=3)
  right, again = pad_right(rows, pad=3)
  np.testing.assert_array_equal(lengths, again)
  want = generate(MODEL, params, left, 8, lengths=lengths)
  found = generate(MODEL, params, right, 8, lengths=lengths, side="right")
  np.testing.assert_array_equal(found, want)
  with pytest.raises(UserError, match=r"'up'; .* left or right"):
    generate(MODEL, params, left, 8, side="up")


def test_scores_come_from_any_cache():
  """`scored` takes the same options; pages give the same numbers."""
  params, tokens = random_params(MODEL), prompts(2, 6)
  want = scored(MODEL, params, tokens, 9)
  found = scored(MODEL, params, tokens, 9, cache=Paged(4), prefill_chunk=4)
  np.testing.assert_allclose(found.logprobs, want.logprobs, rtol=0, atol=1e-5)


def test_options_that_make_no_sense():
  """One sentence each."""
  params, tokens = random_params(MODEL), prompts(1, 5)
  with pytest.raises(UserError, match="prefill_chunk=0"):
    generate(MODEL, params, tokens, 3, prefill_chunk=0)
  with pytest.raises(UserError, match="paged cache cannot be copied"):
    generate(MODEL, params, tokens, 3, samples=2, cache=Paged(4))


# --- On a mesh --------------------------------------------------------------

ONE = replace(block(), mixer=LatentAttention(16, 2, 8, None, 6, 4, 6))
LATENT = Decoder(VOCAB, 16, (((ONE,), 2),), RMSNorm(16), 32)
MIXED = {
  "llama": MODEL,
  "local": MODELS["local"],
  "hybrid": recurrent.decoder(
    VOCAB, 16, 3, 2, window=4, mlp_dim=24, max_positions=32
  ),
  "latent": LATENT,
}


@pytest.mark.parametrize(
  ("name", "kind", "rule", "samples"),
  [
    ("llama", RING, "fsdp_tp", 1),
    ("llama", Paged(4), "tp", 1),
    pytest.param(
      *("latent", Quantised(inner=RING), "fsdp_tp", 2), marks=pytest.mark.slow
    ),
    pytest.param(*("hybrid", kv.FULL, "fsdp_tp", 2), marks=pytest.mark.slow),
    pytest.param(*("local", Quantised(), "fsdp", 2), marks=pytest.mark.slow),
    pytest.param(*("llama", Paged(4), "fsdp_tp", 1), marks=pytest.mark.slow),
  ],
)
def test_eight_devices_say_what_one_says(name, kind, rule, samples):
  """Parameters on a mesh, the cache cut by the same rules."""
  model, tokens, rules = MIXED[name], prompts(8, 5), preset(rule)
  params, mesh = random_params(model), make_mesh(rules)
  options = {"cache": kind, "prefill_chunk": 4, "samples": samples}
  want = generate(model, params, tokens, 10, Sample(), **options)
  with jax.sharding.set_mesh(mesh):
    params = jax.device_put(params, shardings(model.params(), mesh, rules))
    compute = Compute(unroll=True, rules=rules)
    found = generate(
      model, params, tokens, 10, Sample(), compute=compute, **options
    )
  np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
  ("rule", "kind", "share"),
  [
    ("tp", kv.FULL, 8),
    ("fsdp_tp", RING, 8),
    ("fsdp_tp", Quantised(), 8),
    ("tp", Paged(4), 8),
    ("fsdp_tp", Paged(4), 2),  # a pool belongs to all rows: cut by heads alone
  ],
)
def test_each_device_holds_its_share_of_the_cache(rule, kind, share: int):
  """Rows are cut along the data axes, heads along the tensor's."""
  rules = preset(rule)
  model = llama.decoder(
    VOCAB, 16, 1, 8, kv_heads=8, head_dim=4, mlp_dim=8, max_positions=32
  )
  compute = Compute(unroll=True, rules=rules)
  with jax.sharding.set_mesh(make_mesh(rules)):
    cache = new_cache(model, 8, 32, compute, kind)
  keys = cache["0"][0]["0"]["k"]
  sizes = {s.data.nbytes for s in keys.addressable_shards}
  assert sizes == {keys.nbytes // share}
