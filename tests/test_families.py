"""Families against the published models they claim to be.

Golden files hold tiny random models of transformers (see
golden/make_families.py): weights, tokens, logits, and gradients of the loss.
"""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.layers.param import abstract, count, init
from jaxlm.layers.position import Llama3
from jaxlm.models.build import build
from jaxlm.models.decoder import Decoder, forward
from jaxlm.models.families import gpt2, llama, modern, qwen3
from jaxlm.models.names import Names
from jaxlm.objectives import next_token

GOLDEN = pathlib.Path(__file__).parent / "golden"

# Heads 10 wide on a stream of 24, two kv heads for four, an odd vocabulary.
SIZES = {
  "vocab": 67,
  "dim": 24,
  "layers": 3,
  "heads": 4,
  "kv_heads": 2,
  "head_dim": 10,
  "mlp_dim": 28,
  "theta": 100.0,
  "max_positions": 64,
}
LLAMA3 = Llama3(factor=8.0, low=1.0, high=4.0, original=32)

FAMILIES: dict[str, tuple[Decoder, Names]] = {
  "gpt2": (
    gpt2.decoder(vocab=61, dim=24, layers=2, heads=3, max_positions=19),
    gpt2.HF,
  ),
  "llama": (llama.decoder(**SIZES), llama.HF),
  "llama3": (llama.decoder(**SIZES, scaling=LLAMA3), llama.HF),
  "qwen3": (qwen3.decoder(**SIZES, tied=True), qwen3.HF),
}


class Golden:
  """One golden file: what transformers computed."""

  def __init__(self, name: str):
    with np.load(GOLDEN / f"families_{name}.npz") as file:
      arrays = dict(file)
    self.tokens = jnp.asarray(arrays.pop("tokens"), jnp.int32)
    self.logits, self.loss = arrays.pop("logits"), arrays.pop("loss")
    self.weights = {
      k.removeprefix("weight/"): v.astype(np.float32)
      for k, v in arrays.items()
      if k.startswith("weight/")
    }
    self.grads = {
      k.removeprefix("grad/"): v
      for k, v in arrays.items()
      if k.startswith("grad/")
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name: str):
  """Logits of order 5 agree to 2e-5; the mission's bound is 1e-4."""
  model, names = FAMILIES[name]
  golden = Golden(name)
  params = names.load(model, golden.weights)
  logits = jax.jit(forward, static_argnums=0)(model, params, golden.tokens)
  assert logits.dtype == jnp.float32
  assert np.abs(golden.logits).max() > 1.0  # there is something to compare
  np.testing.assert_allclose(logits, golden.logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_transformers(name: str):
  """The gradient of every single weight, fused and tied ones included."""
  model, names = FAMILIES[name]
  golden = Golden(name)
  params = names.load(model, golden.weights)
  batch = {
    "inputs": golden.tokens[:, :-1],
    "targets": golden.tokens[:, 1:],
  }

  def loss_fn(params):
    return next_token(model, params, batch)[0]

  loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
  np.testing.assert_allclose(loss, golden.loss, rtol=1e-6)
  theirs = names.save(model, grads)
  assert theirs.keys() == golden.grads.keys()
  for key, want in golden.grads.items():
    np.testing.assert_allclose(
      theirs[key], want, rtol=1e-5, atol=1e-6, err_msg=key
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_names_round_trip_is_bit_equal(name: str):
  """Load, save: every tensor comes back, the same bits, none invented."""
  model, names = FAMILIES[name]
  weights = Golden(name).weights
  back = names.save(model, names.load(model, weights))
  assert back.keys() == weights.keys()
  for key, want in weights.items():
    np.testing.assert_array_equal(back[key], want, err_msg=key)


def test_names_load_what_is_declared():
  """A loaded tree has the declared structure and shapes, so jit takes it."""
  model, names = FAMILIES["qwen3"]
  params = names.load(model, Golden("qwen3").weights)
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == jax.tree.map(lambda s: s.shape, abstract(model.params()))


def test_names_number_the_layers_of_a_pattern():
  """With two blocks in a pattern, layer 3 is the second block's second."""
  block = FAMILIES["llama"][0].layers[0][0][0]
  model = llama.decoder(**{**SIZES, "layers": 1})
  model = Decoder(
    **{
      **{f: getattr(model, f) for f in model.__dataclass_fields__},
      "layers": (((block,), 1), ((block, block), 2)),
    }
  )
  params = jax.tree.map(lambda s: np.zeros(s.shape), abstract(model.params()))
  params["layers"]["1"]["1"]["mixer_norm"]["scale"][0] += 2
  params["layers"]["1"]["0"]["mixer_norm"]["scale"][1] += 3
  theirs = llama.HF.save(model, params)
  marks = [
    theirs[f"model.layers.{n}.input_layernorm.weight"][0] for n in range(5)
  ]
  assert marks == [0, 0, 2, 3, 0]
  back = llama.HF.load(model, theirs)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_names_reject_wrong_files():
  """A missing tensor and a wrong shape are named, with what was wanted."""
  model, names = FAMILIES["llama"]
  weights = Golden("llama").weights
  key = "model.layers.1.self_attn.k_proj.weight"
  with pytest.raises(UserError, match=key):
    names.load(model, {k: v for k, v in weights.items() if k != key})
  with pytest.raises(UserError, match=r"k_proj.*\(24, 20\)"):
    names.load(model, weights | {key: weights[key][:10]})


# Counted by transformers on the meta device from the published configs:
# `python tests/golden/make_families.py --counts`.
COUNTS = {
  "gpt2": 124_439_808,
  "gpt2-medium": 354_823_168,
  "gpt2-large": 774_030_080,
  "gpt2-xl": 1_557_611_200,
  "llama2-7b": 6_738_415_616,
  "llama3-8b": 8_030_261_248,
  "llama3-70b": 70_553_706_496,
  "llama3.1-405b": 405_853_388_800,
  "llama3.2-1b": 1_235_814_400,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
}
PUBLISHED = gpt2.PUBLISHED | llama.PUBLISHED | qwen3.PUBLISHED


def test_every_published_size_has_a_count():
  """A size added without a count would go unchecked."""
  assert PUBLISHED.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_count_and_trace(name: str):
  """Exact parameter counts, and a forward pass traced at full size."""
  model = PUBLISHED[name]
  assert model.n_params() == COUNTS[name]
  params = abstract(model.params(), jnp.bfloat16)
  assert sum(x.size for x in jax.tree.leaves(params)) == COUNTS[name]
  tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  out = jax.eval_shape(lambda p, t: forward(model, p, t), params, tokens)
  assert (out.shape, out.dtype) == ((2, 8, model.vocab), jnp.float32)


def test_flops_are_twice_the_weights_and_the_scores():
  """GPT-2's forward FLOPs by hand: 2 per weight, 4 * dim per seen key."""
  model, seq = PUBLISHED["gpt2"], 1024
  weights = 12 * 12 * 768 * 768 + 768 * 50257
  mixing = 12 * 4 * 768 * (seq + 1) / 2
  assert model.flops_per_token(seq) == 2 * weights + mixing


def test_modern_starts_as_the_identity():
  """Output projections and the head start at zero: the first loss is log V.

  The count by hand: 4 matrices of attention, 2 of the MLP, two tables.
  """
  model = modern.decoder(vocab=50, dim=32, layers=2, heads=2, mlp_dim=96)
  tree = model.params()
  assert count(tree) == 2 * (4 * 32 * 32 + 2 * 32 * 96) + 2 * 50 * 32
  params = init(tree, jax.random.key(0))
  tokens = jnp.arange(8, dtype=jnp.int32)[None]
  logits = forward(model, params, tokens)
  np.testing.assert_array_equal(logits, np.zeros((1, 8, 50)))
  assert not np.any(params["layers"]["0"]["0"]["mixer"]["o"])
  assert not np.any(params["layers"]["0"]["0"]["ffn"]["down"])


@pytest.mark.parametrize("ffn", ["relu2", "glu"])
def test_modern_feed_forwards_have_equal_size(ffn: str):
  """The gated unit's hidden width makes its three matrices cost as two."""
  model = modern.decoder(vocab=50, dim=384, layers=1, heads=3, ffn=ffn)
  ffn_size = count(model.params()["layers"]["0"]["0"]["ffn"])
  assert abs(ffn_size - 8 * 384 * 384) <= 0.03 * 8 * 384 * 384


def test_modern_rejects_an_unknown_ffn():
  """One sentence that lists what is known."""
  with pytest.raises(UserError, match=r"swiglu.*relu2, glu"):
    modern.decoder(ffn="swiglu")


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("heads", 5, r"model.dim=128 does not divide into .*heads=5"),
    ("kv_heads", 3, r"heads=4 does not divide into .*kv_heads=3"),
    ("dropout", 1.0, r"dropout=1.0 is not a share"),
    ("dropout", -0.1, r"dropout=-0.1 is not a share"),
    ("vocab", 9, r"vocab=9 is less than the tokenizer's 65"),
    ("max_positions", 8, r"seq_len=64 is more than .*max_positions=8"),
  ],
)
def test_sizes_that_could_not_be_meant(key: str, value, message: str):
  """A config whose sizes do not fit together: one sentence, in its words."""
  model = {"family": "llama", "dim": 128, "layers": 2, "heads": 4}
  model |= {"kv_heads": 2, "mlp_dim": 64, key: value}
  config = ml_collections.ConfigDict({"seq_len": 64, "model": model})
  with pytest.raises(UserError, match=message):
    build(config, 65)
