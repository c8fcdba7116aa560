"""Families against the published models they claim to be.

Golden files hold tiny random models of transformers (see
golden/make_families.py): weights, tokens, logits, and gradients of the loss.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.layers.param import abstract, count, init
from jaxlm.models import hub
from jaxlm.models.build import build
from jaxlm.models.decoder import forward
from jaxlm.models.families import modern
from jaxlm.objectives import next_token

GOLDEN = pathlib.Path(__file__).parent / "golden"

NAMES = sorted(
  path.stem.removeprefix("families_") for path in GOLDEN.glob("families_*.npz")
)


class Golden:
  """One golden file: what transformers computed."""

  def __init__(self, name: str):
    with np.load(GOLDEN / f"families_{name}.npz") as file:
      arrays = dict(file)
    self.config = json.loads(str(arrays.pop("config")))
    self.counts = json.loads(str(arrays.pop("counts")))
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
    self.hub = hub.find(self.config)
    self.model = self.hub.read(self.config)
    self.names = self.hub.names


@functools.cache
def golden(name: str) -> Golden:
  """Read once; nobody changes it."""
  return Golden(name)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name: str):
  """Logits of order 5 agree to 5e-5; the mission's bound is 1e-4."""
  g = golden(name)
  params = g.names.load(g.model, g.weights)
  logits = jax.jit(forward, static_argnums=0)(g.model, params, g.tokens)
  assert logits.dtype == jnp.float32
  assert np.abs(g.logits).max() > 1.0  # there is something to compare
  np.testing.assert_allclose(logits, g.logits, rtol=0, atol=5e-5)


GRADIENTS = ["gpt2", "llama3", "qwen3"]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_transformers(name: str):
  """The gradient of every single weight, fused and tied ones included."""
  g = golden(name)
  params = g.names.load(g.model, g.weights)
  batch = {"inputs": g.tokens[:, :-1], "targets": g.tokens[:, 1:]}

  def loss_fn(params):
    return next_token(g.model, params, batch)[0]

  loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
  np.testing.assert_allclose(loss, g.loss, rtol=1e-6)
  theirs = g.names.save(g.model, grads)
  assert theirs.keys() == g.grads.keys()
  for key, want in g.grads.items():
    np.testing.assert_allclose(
      theirs[key], want, rtol=1e-4, atol=1e-6, err_msg=key
    )


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip_is_bit_equal(name: str):
  """Load, save: every tensor comes back, the same bits, none invented."""
  g = golden(name)
  back = g.names.save(g.model, g.names.load(g.model, g.weights))
  extra = g.names.extra(g.model, list(g.weights))
  assert extra == []
  for key, want in back.items():
    np.testing.assert_array_equal(g.weights[key], want, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trip(name: str):
  """Read, write, read: the same model, recognised as of its own family."""
  g = golden(name)
  written = json.loads(json.dumps(g.hub.config(g.model)))
  assert g.hub.read(written) == g.model
  family = sys.modules[g.hub.read.__module__]
  assert hub.recognise(g.model, family.HF) == g.hub
  assert hub.recognise(g.model).read(hub.recognise(g.model).config(g.model))


@pytest.mark.parametrize("name", ["gemma3", "llama4"])
def test_text_models_in_files_that_see_images(name: str):
  """Read without what sees images; written as text, never as more."""
  g = golden(name)
  whole = {"text_config": g.config, "vision_config": {}}
  whole["model_type"] = g.hub.type.removesuffix("_text")
  family = hub.find(whole)
  assert family.read(whole) == g.model
  images = "vision_tower.x", "vision_model.y", "multi_modal_projector.z"
  weights = {f"language_model.{k}": v for k, v in g.weights.items()}
  weights |= dict.fromkeys(images, np.zeros(1))
  assert family.names.extra(g.model, list(weights)) == []
  params = family.names.load(g.model, weights)
  want = g.names.load(g.model, g.weights)
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert hub.recognise(g.model) == g.hub
  with pytest.raises(UserError, match=f"write it as {g.hub.type}"):
    family.config(g.model)
  with pytest.raises(UserError, match="text_config"):
    family.read({"model_type": family.type})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gone", ["absent", "null"])
def test_configs_with_a_key_less(name: str, gone: str):
  """What a config.json lacks is a default or one sentence, never a crash."""
  g = golden(name)
  for key in g.config:
    config = {k: v for k, v in g.config.items() if k != key}
    if gone == "null":
      config[key] = None
    with contextlib.suppress(UserError):
      g.hub.read(config)


def test_layer_types_must_fit():
  """One kind for each layer, of those the family builds."""
  g = golden("gemma2")
  kinds = g.config["layer_types"]
  for wrong in (kinds[:-1], [*kinds[:-1], "chunked_attention"]):
    with pytest.raises(UserError, match=r"layer_types names .* it needs 5"):
      g.hub.read(g.config | {"layer_types": wrong})
  g = golden("llama4")
  wrong = g.config["layer_types"][::-1]
  with pytest.raises(UserError, match="no_rope_layers disagree"):
    g.hub.read(g.config | {"layer_types": wrong})


def test_names_load_what_is_declared():
  """A loaded tree has the declared structure and shapes, so jit takes it."""
  g = golden("qwen3")
  model, params = g.model, g.names.load(g.model, g.weights)
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == jax.tree.map(lambda s: s.shape, abstract(model.params()))


def test_names_number_the_layers_of_a_pattern():
  """With two blocks in a pattern, layer 3 is the second block's second."""
  g = golden("llama")
  block = g.model.blocks[0]
  model = dataclasses.replace(
    g.model, layers=(((block,), 1), ((block, block), 2))
  )
  params = jax.tree.map(lambda s: np.zeros(s.shape), abstract(model.params()))
  params["layers"]["1"]["1"]["mixer_norm"]["scale"][0] += 2
  params["layers"]["1"]["0"]["mixer_norm"]["scale"][1] += 3
  theirs = g.names.save(model, params)
  marks = [
    theirs[f"model.layers.{n}.input_layernorm.weight"][0] for n in range(5)
  ]
  assert marks == [0, 0, 2, 3, 0]
  back = g.names.load(model, theirs)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_names_reject_wrong_files():
  """A missing tensor and a wrong shape are named, with what was wanted."""
  g = golden("llama")
  model, names, weights = g.model, g.names, g.weights
  key = "model.layers.1.self_attn.k_proj.weight"
  with pytest.raises(UserError, match=key):
    names.load(model, {k: v for k, v in weights.items() if k != key})
  with pytest.raises(UserError, match=r"k_proj.*\(20, 24\)"):
    names.load(model, weights | {key: weights[key][:10]})


PUBLISHED = hub.published()


@functools.cache
def counts() -> dict[str, dict[str, int]]:
  """By transformers, from the config.json we write (make_families.py)."""
  found = {}
  for name in NAMES:
    found |= golden(name).counts
  return found


def test_every_published_size_has_a_count():
  """A size added without a count would go unchecked."""
  assert PUBLISHED.keys() == counts().keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_count_and_trace(name: str):
  """Exact parameter counts, and a forward pass traced at full size."""
  model, want = PUBLISHED[name], counts()[name]
  assert {"total": model.n_params(), "active": model.n_active()} == want
  params = abstract(model.params(), jnp.bfloat16)
  assert sum(x.size for x in jax.tree.leaves(params)) == want["total"]
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
