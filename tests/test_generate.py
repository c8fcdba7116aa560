"""Decoding: greedy equals the full forward pass, however it is called."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm.generate
from jaxlm.errors import UserError
from jaxlm.generate import loop
from jaxlm.generate.decode import generate, ready, stream
from jaxlm.generate.prompts import pad_left, row_keys
from jaxlm.generate.samplers import Greedy, Sample
from jaxlm.layers.attention import Attention
from jaxlm.layers.compute import Compute
from jaxlm.layers.mask import Sliding
from jaxlm.layers.mlp import MLP
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import init
from jaxlm.layers.position import Rope
from jaxlm.models.decoder import Block, Decoder, forward
from jaxlm.models.families import gpt2, llama, modern, qwen3

VOCAB, WINDOW = 31, 48
SIZES = {"vocab": VOCAB, "dim": 32, "layers": 2, "heads": 4}
SIZES |= {"max_positions": WINDOW}


def sliding() -> Decoder:
  """A local layer and a full one: a ring cache beside a plain one."""
  norm = RMSNorm(32)
  local, full = (
    Block(Attention(32, 4, 2, position=Rope(), **more), MLP(32, 64), norm=norm)
    for more in ({"mask": Sliding(5)}, {})
  )
  layers = (((local, full), 2),)
  return Decoder(VOCAB, 32, layers, norm=norm, max_positions=WINDOW)


MODELS = {
  "gpt2": gpt2.decoder(**SIZES),
  "llama": llama.decoder(**SIZES, kv_heads=2, mlp_dim=64),
  "qwen3": qwen3.decoder(**SIZES, kv_heads=2, head_dim=8, mlp_dim=64),
  "modern": modern.decoder(**SIZES),
  "sliding": sliding(),
}


def make(name: str):
  """A model with random parameters, none of them zero, so that all count."""
  model = MODELS[name]
  params = init(model.params(), jax.random.key(1))
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  moved = [
    x + 0.2 * jax.random.normal(k, x.shape, x.dtype)
    for x, k in zip(leaves, keys, strict=True)
  ]
  return model, structure.unflatten(moved)


# Most tests use 3 rows, prompts of up to 16 tokens and room for 48: the sizes
# of one compiled program for each model.


def prompts(batch: int, seq: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, VOCAB, (batch, seq))


def by_forward(model, params, tokens, n: int) -> np.ndarray:
  """Greedy decoding without a cache: the definition."""
  full = jax.jit(lambda p, t: forward(model, p, t))
  for _ in range(n):
    # Causality lets the row be padded on the right: one shape, one compile.
    room = np.zeros((len(tokens), WINDOW - tokens.shape[1]), int)
    scores = full(params, np.concatenate([tokens, room], axis=1))
    new = np.argmax(scores[:, tokens.shape[1] - 1], axis=-1)
    tokens = np.concatenate([tokens, new[:, None]], axis=1)
  return tokens


# --- Exactness --------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_repeated_forward(name: str):
  """The cache changes nothing, up to the last position of the model."""
  model, params = make(name)
  tokens = prompts(3, 7)
  n = WINDOW + 1 - 7
  found = generate(model, params, tokens, n)
  assert found.shape == (3, 7 + n)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, by_forward(model, params, tokens, n))


@pytest.mark.parametrize("name", MODELS)
def test_scanned_layers_give_the_same(name: str):
  """`unroll` is a matter of speed, not of results."""
  model, params = make(name)
  tokens = prompts(3, 5)
  np.testing.assert_array_equal(
    generate(model, params, tokens, 40),
    generate(model, params, tokens, 40, compute=Compute(unroll=False)),
  )


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_unequal_lengths_do_not_disturb_each_other(name: str):
  """Padding on the left is as if it were not there."""
  model, params = make(name)
  rows = [prompts(1, n, seed=n)[0] for n in (1, 9, 4)]
  tokens, lengths = pad_left(rows, pad=7)
  found = generate(model, params, tokens, 40, lengths=lengths)
  for row, prompt in zip(found, rows, strict=True):
    alike = generate(model, params, np.stack([prompt] * 3), 40)
    np.testing.assert_array_equal(row[-40:], alike[0, -40:])


@pytest.mark.parametrize("sampler", [Greedy(), Sample(0.9, top_k=9)])
@pytest.mark.parametrize("pace", [0.0, 0.02, 10.0])
def test_stream_yields_what_generate_returns(sampler, pace: float):
  """One at a time, or in blocks: the same tokens."""
  model, params = make("llama")
  tokens, key = prompts(3, 6), jax.random.key(3)
  whole = generate(model, params, tokens, 40, sampler, key)
  parts = [*stream(model, params, tokens, 40, sampler, key, pace=pace)]
  assert len(parts) == 40
  np.testing.assert_array_equal(np.stack(parts, axis=1), whole[:, 6:])


def test_a_sampled_row_depends_on_its_key_alone():
  """Neighbours in the batch and other lengths change nothing."""
  model, params = make("qwen3")
  key, sampler, tokens = jax.random.key(5), Sample(), prompts(3, 6)
  batch = generate(model, params, tokens, 40, sampler, key)
  assert len({tuple(row[6:].tolist()) for row in batch}) == 3
  keys = row_keys(key, 3)
  for i in range(3):
    row = slice(i, i + 1)
    alone = generate(model, params, tokens[row], 9, sampler, keys[row])
    np.testing.assert_array_equal(alone, batch[row, : 6 + 9])


def test_half_precision_runs():
  """bfloat16 weights and caches; the tokens may differ, the shape may not."""
  model, params = make("llama")
  compute = Compute(dtype="bfloat16", unroll=True)
  weights = ready(model, params, compute)
  assert weights["layers"]["0"][1]["0"]["mixer"]["q"].dtype == jnp.bfloat16
  found = generate(model, weights, prompts(2, 4), 5, compute=compute)
  assert found.shape == (2, 9)


# --- Ends -------------------------------------------------------------------


def test_a_row_ends_with_eot_and_is_filled_with_it():
  """The others go on, and `stream` stops when all have ended."""
  model, params = make("gpt2")
  tokens = prompts(3, 5)
  free = np.asarray(generate(model, params, tokens, 40))[:, 5:]
  eot = int(free[0, 6])
  ends = [[*row, eot].index(eot) for row in free.tolist()]
  found = np.asarray(generate(model, params, tokens, 40, eot=eot))[:, 5:]
  for row, plain, end in zip(found, free, ends, strict=True):
    np.testing.assert_array_equal(row[: end + 1], plain[: end + 1])
    assert (row[end:] == eot).all()
  assert len([*stream(model, params, tokens, 40, eot=eot)]) == min(
    max(ends) + 1, 40
  )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sliding_rereads_the_last_half(name: str):
  """Beyond the positions each window is as a prompt of its own."""
  model, params = make(name)
  tokens = prompts(3, 40)
  n = 9 + 25 + 6
  found = np.asarray(generate(model, params, tokens, n, slide=True))
  text = by_forward(model, params, tokens, 9)  # 49 tokens: 48 positions used
  for more in (25, 6):
    half = text[:, -WINDOW // 2 :]
    new = by_forward(model, params, half, more)[:, WINDOW // 2 :]
    text = np.concatenate([text, new], axis=1)
  np.testing.assert_array_equal(found, text)
  parts = [*stream(model, params, tokens, n, slide=True)]
  np.testing.assert_array_equal(np.stack(parts, axis=1), found[:, 40:])


def test_sampling_goes_on_across_windows():
  """No key is used twice when a window ends, and a longer prompt is cut."""
  model, params = make("gpt2")
  tokens = prompts(1, 3 * WINDOW)
  args = (Sample(), jax.random.key(0))
  found = generate(model, params, tokens, 60, *args, slide=True)
  short = generate(model, params, tokens, 7, *args, slide=True)
  np.testing.assert_array_equal(short, found[:, : 3 * WINDOW + 7])


def test_no_new_tokens_is_the_prompt():
  """Zero is a number too."""
  model, params = make("gpt2")
  tokens = prompts(2, 4)
  np.testing.assert_array_equal(generate(model, params, tokens, 0), tokens)
  assert [*stream(model, params, tokens, 0)] == []


# --- Compilation ------------------------------------------------------------


def test_lengths_compile_once_per_size():
  """The number of new tokens and of the prompt's are data, up to rounding."""
  model, params = make("modern")
  generate(model, params, prompts(1, 17), 15)
  sizes = loop.begin._cache_size(), loop.extend._cache_size()
  for seq in range(17, 25):
    generate(model, params, prompts(1, seq), 33 - seq)
  [*stream(model, params, prompts(1, 17), 10)]
  assert (loop.begin._cache_size(), loop.extend._cache_size()) == sizes


def test_a_text_that_slides_compiles_once():
  """The second window has the shapes of the first, and is as quick to begin."""
  model, params = make("modern")
  params = jax.device_put(params, jax.devices()[0])  # as `load` leaves them
  sizes = loop.begin._cache_size(), loop.extend._cache_size()
  generate(model, params, prompts(2, 3), 120, slide=True)
  after = loop.begin._cache_size(), loop.extend._cache_size()
  assert after == (sizes[0] + 1, sizes[1] + 1)


# --- Errors -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("tokens", "n", "more", "words"),
  [
    (np.zeros((1, 0), int), 3, {}, "prompt is empty"),
    ([], 3, {}, "one row per prompt"),
    ([1, 2], 3, {}, "one row per prompt"),
    ([[1, 2], [3]], 3, {}, "pad_left"),
    ([[0.5]], 3, {}, "must be integers"),
    ([[VOCAB]], 3, {}, f"token {VOCAB} is outside the vocabulary of {VOCAB}"),
    ([[-1, 3]], 3, {}, "token -1 is outside"),
    ([[1, 2]], -1, {}, "negative"),
    ([[1, 2]], 48, {}, "need 49 positions.*learned 48.*at most 47"),
    ([[0] * 60], 1, {}, "at most 0 new tokens, or pass slide=True"),
    ([[1, 2]], 3, {"lengths": [3]}, "from 1 to 2"),
    ([[1, 2]], 3, {"lengths": [1, 2]}, "one number"),
  ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_input_is_one_sentence(function, tokens, n, more, words):
  """At the call, also where a generator is returned."""
  model, params = make("gpt2")
  with pytest.raises(UserError, match=words):
    function(model, params, tokens, n, **more)


def test_keys_must_fit_the_rows():
  """Keys of another batch are a mistake, not broadcast."""
  model, params = make("gpt2")
  keys = jax.random.split(jax.random.key(0), 3)
  with pytest.raises(UserError, match="do not fit 2 prompts"):
    generate(model, params, prompts(2, 3), 1, Sample(), keys)


def test_too_long_for_rotary_positions_is_said_in_other_words():
  """Those are not learned, but the model was made for so many."""
  model, params = make("llama")
  with pytest.raises(UserError, match="been made for 48"):
    generate(model, params, prompts(1, 40), 20)


# --- The name ---------------------------------------------------------------


def test_the_package_is_the_function():
  """`jaxlm.generate(...)` works whatever has been imported before it."""
  model, params = make("gpt2")
  tokens = prompts(1, 3)
  found = jaxlm.generate(model, params, tokens, 4)
  np.testing.assert_array_equal(found, generate(model, params, tokens, 4))
  assert inspect.signature(jaxlm.generate) == inspect.signature(generate)


@pytest.mark.parametrize(
  "imports",
  ["import jaxlm", "import jaxlm; import jaxlm.generate.decode"],
)
def test_the_name_in_a_new_process(imports: str):
  """Before and after a submodule is imported; `import jaxlm` stays light."""
  code = f"""{imports}
import sys
assert "jaxlm.generate.decode" in sys.modules or "jax" not in sys.modules
assert callable(jaxlm.generate)
assert "max_new_tokens" in str(__import__("inspect").signature(jaxlm.generate))
"""
  subprocess.run([sys.executable, "-c", code], check=True)
