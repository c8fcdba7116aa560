"""Encoder-decoders: torch's and transformers' numbers, padding, generation."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import jaxlm
from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.attention import Attention
from jaxlm.layers.cache import empty
from jaxlm.layers.compute import Compute
from jaxlm.layers.mask import Causal, Full
from jaxlm.layers.mlp import MLP, relu
from jaxlm.layers.norm import LayerNorm
from jaxlm.layers.param import abstract, count, init, shardings
from jaxlm.layers.relative import RelativeBias
from jaxlm.models import hub
from jaxlm.models.build import build
from jaxlm.models.decoder import Block, Decoder, hidden
from jaxlm.models.encdec import (
  Cross,
  CrossBlock,
  EncoderDecoder,
  decode,
  encode,
  forward,
  greedy,
  padded,
)
from jaxlm.models.families import t5
from jaxlm.models.names import Names
from jaxlm.objectives import seq2seq
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset
from jaxlm.values import from_json, to_json

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def golden(file: str, name: str) -> dict[str, np.ndarray]:
  """What the judge says: everything under `name/`, and what stands outside."""
  with np.load(GOLDEN / f"{file}.npz") as arrays:
    return {
      key.removeprefix(f"{name}/"): arrays[key]
      for key in arrays
      if key.startswith(f"{name}/") or "/" not in key
    }


def part(arrays: dict, name: str) -> dict[str, np.ndarray]:
  """Those under `name/`, as float32."""
  return {
    k.removeprefix(f"{name}/"): v.astype(np.float32)
    for k, v in arrays.items()
    if k.startswith(f"{name}/")
  }


def random(model, seed: int = 0):
  """Parameters, none of them zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape), jnp.float32),
    abstract(model.params()),
  )


def close(found, want, tol: float = 1e-5, name: str = "") -> None:
  np.testing.assert_allclose(found, want, rtol=tol, atol=tol, err_msg=name)


# --- T5 against transformers ------------------------------------------------

TINY = {"vocab": 61, "dim": 12, "layers": 3, "decoder_layers": 2, "heads": 3}
TINY |= {"head_dim": 5, "mlp_dim": 16, "buckets": 10, "far": 15}
VERSIONS = {
  "v1.0": t5.encoder_decoder(**TINY),
  "v1.1": t5.encoder_decoder(**TINY, gated=True, tied=False),
}
NAMES = t5.HF[0].names


@pytest.mark.parametrize("version", VERSIONS)
def test_t5_equals_transformers(version: str):
  """Logits to 5e-5, the loss, the gradient of every weight to 1e-4."""
  model, g = VERSIONS[version], golden("t5", version)
  params = NAMES.load(model, part(g, "weight"))
  batch = {k: jnp.asarray(g[k], jnp.int32) for k in ("inputs", "targets")}
  batch["inputs_mask"] = jnp.asarray(g["mask"])
  read = jnp.pad(batch["targets"][:, :-1], ((0, 0), (1, 0)))
  logits = jax.jit(forward, static_argnums=0)(
    model, params, batch["inputs"], read, padded(g["mask"])
  )
  assert np.abs(g["logits"]).max() > 1.0
  close(logits, g["logits"], 5e-5)
  loss, grads = jax.jit(
    jax.value_and_grad(lambda p: seq2seq(model, p, batch)[0])
  )(params)
  close(loss, g["loss"], 1e-6)
  theirs, want = NAMES.save(model, grads), part(g, "grad")
  assert theirs.keys() == want.keys()
  for key, value in want.items():
    close(theirs[key], value, 1e-4, key)


@pytest.mark.parametrize("version", VERSIONS)
def test_greedy_equals_transformers(version: str):
  """Nine tokens after padded inputs."""
  model, g = VERSIONS[version], golden("t5", version)
  params = NAMES.load(model, part(g, "weight"))
  found = greedy(model, params, g["inputs"], 9, sources=padded(g["mask"]))
  assert len(np.unique(g["greedy"])) > 1
  np.testing.assert_array_equal(found, g["greedy"])


@pytest.mark.parametrize("version", VERSIONS)
def test_names_and_configs_round_trip(version: str):
  """The same bits, the same model, by `model_type` alone."""
  model, weights = VERSIONS[version], part(golden("t5", version), "weight")
  back = NAMES.save(model, NAMES.load(model, weights))
  assert back.keys() == weights.keys()
  for key, want in weights.items():
    np.testing.assert_array_equal(back[key], want, err_msg=key)
  kind = t5.HF[0]
  config = json.loads(json.dumps(kind.config(model)))
  assert hub._bare(hub.find(config).read(config)) == hub._bare(model)
  assert hub.recognise(model) == kind
  assert from_json(to_json(model)) == model
  extra = [*weights, "encoder.embed_tokens.weight", "strange.weight"]
  assert NAMES.extra(model, extra) == ["strange.weight"]


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"d_kv": None}, "no 'd_kv'"),
    ({"feed_forward_proj": "gated-silu"}, "gated-silu.*'relu' or 'gated-gelu'"),
  ],
)
def test_configs_that_cannot_be_built(change: dict, words: str):
  """One sentence that names the key."""
  config = t5.HF[0].config(VERSIONS["v1.0"]) | change
  with pytest.raises(UserError, match=words):
    t5.read(config)


# Counted by transformers on the meta device: golden/make_t5.py --counts.
COUNTS = {
  "t5-small": 60_506_624,
  "t5-base": 222_903_552,
  "t5-large": 737_668_096,
  "t5-3b": 2_851_598_336,
  "t5-11b": 11_307_321_344,
  "t5-v1.1-small": 76_961_152,
  "t5-v1.1-base": 247_577_856,
  "t5-v1.1-large": 783_150_080,
  "t5-v1.1-xl": 2_849_757_184,
  "t5-v1.1-xxl": 11_135_332_352,
}


def test_published_sizes_count():
  """Exact at every size; one is traced at full size too."""
  assert {k: m.n_params() for k, m in t5.SIZES.items()} == COUNTS
  model = t5.SIZES["t5-11b"]
  tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  out = jax.eval_shape(
    lambda p, x, y: forward(model, p, x, y),
    abstract(model.params(), jnp.bfloat16),
    tokens,
    tokens,
  )
  assert out.shape == (2, 8, 32128)


def test_t5_is_no_decoder():
  """A config that asks `jaxlm.train` for one gets a sentence."""
  config = ml_collections.ConfigDict({"seq_len": 8, "model": {"family": "t5"}})
  with pytest.raises(UserError, match=r"'t5' has no decoders.*encoder-decoder"):
    build(config, 65)


def test_buckets_are_near_then_logarithmic():
  """By hand, with 8 buckets to distance 16: 4 exact, then 4 ever wider."""
  one = RelativeBias(8, 16)
  away = jnp.asarray([0, 1, 2, 3, 4, 5, 6, 8, 11, 12, 15, 16, 99])
  want = [0, 1, 2, 3, 4, 4, 5, 6, 6, 7, 7, 7, 7]
  np.testing.assert_array_equal(one.bucket(-away), want)
  assert not np.any(one.bucket(away))
  both = RelativeBias(16, 16, both=True)
  np.testing.assert_array_equal(both.bucket(-away), want)
  np.testing.assert_array_equal(both.bucket(away)[1:], np.add(want, 8)[1:])


# --- torch.nn.Transformer ---------------------------------------------------


def transformer(last: bool) -> EncoderDecoder:
  """Blocks as torch has them: LayerNorm, ReLU, biases everywhere."""
  norm = LayerNorm(12)

  def attention(mask) -> Attention:
    return Attention(12, 3, mask=mask, bias=True, out_bias=True)

  ffn = MLP(12, 20, relu, bias=True)
  reads = Block(attention(Full()), ffn, norm, norm_last=last)
  cross = Cross(attention(Full()))
  writes = CrossBlock(
    attention(Causal()), ffn, norm, norm_last=last, cross=cross
  )
  stacks = [
    Decoder(5, 12, (((block,), 2),), norm, 16, tied=True)
    for block in (reads, writes)
  ]
  return EncoderDecoder(*stacks, shared=False)


def torch_names(stack: str) -> Names:
  """Torch's names for the arrays of one stack."""
  first, lines = stack + ".layers.{}.", []
  attentions = {"mixer": "self_attn", "cross": "multihead_attn"}
  norms = {"mixer": "norm1", "ffn": "norm2"}
  if stack == "decoder":
    norms = {"mixer": "norm1", "cross": "norm2", "ffn": "norm3"}
  for ours, theirs in attentions.items():
    qkv = " ".join(f"{ours}/{n}" for n in "qkv")
    biases = " ".join(f"{ours}/{n}_bias" for n in "qkv")
    lines += [
      (qkv, f"{first}{theirs}.in_proj_weight"),
      (biases, f"{first}{theirs}.in_proj_bias"),
      (f"{ours}/o", f"{first}{theirs}.out_proj.weight"),
      (f"{ours}/o_bias", f"{first}{theirs}.out_proj.bias"),
    ]
  for ours, theirs in {"up": "linear1", "down": "linear2"}.items():
    lines.append((f"ffn/{ours}", f"{first}{theirs}.weight"))
    lines.append((f"ffn/{ours}_bias", f"{first}{theirs}.bias"))
  for ours, theirs in {"scale": "weight", "bias": "bias"}.items():
    lines += [
      (f"{k}_norm/{ours}", f"{first}{v}.{theirs}") for k, v in norms.items()
    ]
    lines.append((f"norm/{ours}", f"{stack}.norm.{theirs}"))
  return Names((*lines, ("embed/tokens", "table")))


@pytest.mark.parametrize("order", ["pre", "post"])
def test_stacks_equal_torch(order: str):
  """Values and all gradients of torch.nn.Transformer, inputs padded."""
  model, g = transformer(order == "post"), golden("transformer", order)
  weights = part(g, "weight") | {"table": np.zeros((5, 12), np.float32)}
  src, tgt = (jnp.asarray(weights.pop(k)) for k in ("src", "tgt"))
  stacks = ("encoder", "decoder")
  params = {
    name: torch_names(name).load(getattr(model, name), weights)
    for name in stacks
  }
  at = padded(jnp.arange(9)[None] < jnp.asarray([[9], [6]]))

  def fn(params, src, tgt):
    context = hidden(model.encoder, params["encoder"], src, at)[0]
    here = At(context=context, sources=at)
    y = hidden(model.decoder, params["decoder"], tgt, here)[0]
    return jnp.sum(y * g["cotangent"]), y

  grad = jax.jit(jax.value_and_grad(fn, (0, 1, 2), has_aux=True))
  (_, y), grads = grad(params, src, tgt)
  close(y, g["out"])
  want = part(g, "grad")
  close(grads[1], want.pop("src"))
  close(grads[2], want.pop("tgt"))
  theirs = {}
  for name in stacks:
    theirs |= torch_names(name).save(getattr(model, name), grads[0][name])
  assert theirs.keys() - {"table"} == want.keys()
  for key, value in want.items():
    close(theirs[key], value, 2e-5, key)


# --- One result, however it is reached --------------------------------------

MODELS = {"t5": VERSIONS["v1.1"], "pre": transformer(False)}


def tokens(*shape: int, seed: int = 0, vocab: int = 5):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, vocab, shape), jnp.int32)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_the_full_pass(name: str):
  """Step by step from a cache, the context given once, to 1e-5."""
  model = MODELS[name]
  params, inputs, targets = random(model), tokens(2, 7), tokens(2, 6)
  sources = padded(jnp.arange(7)[None] < jnp.asarray([[7], [4]]))
  full = forward(model, params, inputs, targets, sources)
  context = encode(model, params, inputs, sources)
  cache, out = empty(model.cache(2, 6, 7)), []
  for i in range(6):
    at = At(positions=jnp.full((2, 1), i, jnp.int32))
    read = (context, sources) if i == 0 else ()
    y, cache = decode(
      model, params, targets[:, i : i + 1], *read, at=at, cache=cache
    )
    out.append(y)
  close(jnp.concatenate(out, axis=1), full)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_inputs_changes_nothing(name: str, side: str):
  """A row says what it says alone, wherever its padding stands."""
  model = MODELS[name]
  params, inputs, targets = random(model), tokens(1, 5), tokens(1, 6)
  pad = (3, 0) if side == "left" else (0, 3)
  wide = jnp.pad(inputs, ((0, 0), pad), constant_values=1)
  mask = jnp.pad(jnp.ones((1, 5), bool), ((0, 0), pad))
  close(
    forward(model, params, wide, targets, padded(mask)),
    forward(model, params, inputs, targets),
  )


@pytest.mark.parametrize("name", MODELS)
def test_packed_pairs_do_not_meet(name: str):
  """Segments on both sides: each pair in a row is as if alone."""
  model = MODELS[name]
  params = random(model)
  pairs = [
    (tokens(1, n, seed=n), tokens(1, m, seed=m)) for n, m in [(4, 3), (6, 5)]
  ]
  alone = [forward(model, params, x, y) for x, y in pairs]

  def at(side: int) -> At:
    sizes = [pair[side].shape[1] for pair in pairs]
    where = np.concatenate([np.arange(n) for n in sizes])[None]
    which = np.repeat([1, 2], sizes)[None]
    return At(jnp.asarray(where, jnp.int32), jnp.asarray(which, jnp.int32))

  x, y = (jnp.concatenate(side, axis=1) for side in zip(*pairs, strict=True))
  found = forward(model, params, x, y, at(0), at(1))
  close(found, jnp.concatenate(alone, axis=1))


def test_rows_end_with_eot():
  """And are filled up with it; the others go on."""
  model = VERSIONS["v1.1"]
  params, inputs = random(model), tokens(3, 7, vocab=61)
  free = np.asarray(greedy(model, params, inputs, 8))
  eot = int(free[0, 2])
  found = np.asarray(greedy(model, params, inputs, 8, eot=eot))
  for row, plain in zip(found, free, strict=True):
    end = [*plain.tolist(), eot].index(eot)
    np.testing.assert_array_equal(row[:end], plain[:end])
    assert (row[end:] == eot).all()


def test_wrong_calls_are_one_sentence():
  """No context, no room."""
  model = VERSIONS["v1.0"]
  params = random(model)
  with pytest.raises(UserError, match="needs the context"):
    decode(model, params, tokens(1, 2))
  with pytest.raises(UserError, match=r"max_new_tokens is 0; .* 1 to 512"):
    greedy(model, params, tokens(1, 2), 0)
  with pytest.raises(UserError, match="token 99 is outside"):
    encode(model, params, jnp.full((1, 2), 99, jnp.int32))


def test_eight_devices_say_what_one_says():
  """Loss and gradients; biases are split by head."""
  model = t5.encoder_decoder(
    vocab=32, dim=16, layers=1, heads=4, head_dim=4, mlp_dim=16, buckets=8
  )
  params = random(model)
  batch = {"inputs": tokens(8, 7), "targets": tokens(8, 6)}
  batch["inputs_mask"] = jnp.arange(7)[None] < 3 + jnp.arange(8)[:, None] % 5

  def loss(params, batch, compute):
    return seq2seq(model, params, batch, None, compute)[0]

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
  want, table = grad(params, batch, Compute()), preset("fsdp_tp")
  mesh = make_mesh(table)
  with jax.set_mesh(mesh):
    put = jax.device_put(params, shardings(model.params(), mesh, table))
    spec = table.activation_spec(("batch", None), (8, 7), mesh)
    here = jax.sharding.NamedSharding(mesh, spec)
    rows = jax.tree.map(lambda x: jax.device_put(x, here), batch)
    found = grad(put, rows, Compute(rules=table))
  jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b)), found, want)


def test_it_learns_to_reverse():
  """Strings it has not seen come out backwards."""
  model = t5.encoder_decoder(
    vocab=9, dim=32, layers=1, heads=4, head_dim=8, mlp_dim=64, buckets=16
  )
  params = init(model.params(), jax.random.key(0))
  assert count(model.params()) < 40_000

  def rows(key):
    x = jax.random.randint(key, (64, 4), 1, 9)
    return {"inputs": x, "targets": x[:, ::-1]}

  tx = optax.adam(5e-3)

  @jax.jit
  def train(params):
    def step(carry, key):
      params, opt = carry
      loss, grad = jax.value_and_grad(
        lambda p: seq2seq(model, p, rows(key))[0]
      )(params)
      with jax.numpy_dtype_promotion("standard"):
        change, opt = tx.update(grad, opt)
      return (optax.apply_updates(params, change), opt), loss

    keys = jax.random.split(jax.random.key(1), 400)
    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params, losses

  params, losses = train(params)
  assert losses[-1] < 0.2 < losses[0]
  new = rows(jax.random.key(2))
  found = greedy(model, params, new["inputs"], 4)
  assert np.mean(found == new["targets"]) > 0.95


def test_the_page_runs():
  """Every example of docs/encoder-decoder.md, in order."""
  page = pathlib.Path(__file__).parents[1] / "docs" / "encoder-decoder.md"
  blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
  names: dict = {}
  exec("\n".join(blocks), names)
  assert names["logits"].shape == (2, 3, 16)
  np.testing.assert_array_equal(names["token"][:, 0], names["out"][:, 0])


def test_a_directory_loads_and_saves(tmp_path):
  """`jaxlm.save` in the hub's format, and `jaxlm.load` gives the same bits."""
  model = VERSIONS["v1.1"]
  params = random(model)
  jaxlm.save(tmp_path / "t5", model, params, format="hf")
  found, back = jaxlm.load(tmp_path / "t5")
  assert hub._bare(found) == hub._bare(model)
  jax.tree.map(np.testing.assert_array_equal, back, params)
