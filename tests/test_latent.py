"""Latent attention: two forms of one layer, and a small cache."""

import dataclasses
import functools
import itertools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from jaxlm.errors import UserError
from jaxlm.generate.decode import generate
from jaxlm.layers.at import At
from jaxlm.layers.attention import Attention
from jaxlm.layers.cache import empty
from jaxlm.layers.compute import Compute
from jaxlm.layers.latent import LatentAttention
from jaxlm.layers.mask import Causal, Chunked, Sliding
from jaxlm.layers.mlp import GLU
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import abstract, count, gather, shardings
from jaxlm.layers.position import Rope, Yarn
from jaxlm.models import hub
from jaxlm.models.decoder import Block, Decoder, forward
from jaxlm.models.families import deepseek
from jaxlm.optim import qk_clip
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset

# Every width another, so that none can stand in for another.
PLAIN = LatentAttention(
  20, 3, rank=7, nope_dim=5, rope_dim=4, value_dim=6, eps=1e-3
)
SQUEEZED = dataclasses.replace(
  PLAIN, q_rank=9, scale=0.3, position=Rope(100.0, Yarn(4.0, 8))
)
run = jax.jit(lambda layer, p, x, *more: layer(p, x, *more), static_argnums=0)
LAYERS = {"plain": PLAIN, "squeezed": SQUEEZED}


def random(tree, seed: int = 0):
  """Arrays of a declared tree, none of them zero or one."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32),
    abstract(tree),
  )


def inputs(batch: int = 2, seq: int = 11):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(batch, seq, 20)), jnp.float32)


# --- Against the definition -------------------------------------------------


def turn(x: np.ndarray, m: int, theta: float = 10000.0) -> np.ndarray:
  """Each pair of neighbours as a complex number times exp(i m freq)."""
  freq = theta ** -(np.arange(0, x.shape[-1], 2) / x.shape[-1])
  z = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * m * freq)
  return np.stack([z.real, z.imag], -1).reshape(x.shape)


def rms(x: np.ndarray, scale) -> np.ndarray:
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-3) * scale


def definition(p, x: np.ndarray) -> np.ndarray:
  """Equations 9 to 19 of arXiv:2405.04434 for `PLAIN`, token by token."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
  out = np.zeros(x.shape)
  for t in range(len(x)):
    for n in range(3):
      q = x[t] @ p["q"][:, n]
      q = np.concatenate([q[:5], turn(q[5:], t)])
      scores, values = [], []
      for s in range(t + 1):
        c = rms(x[s] @ p["down"], p["down_norm"]["scale"])
        k = np.concatenate([c @ p["k_up"][:, n], turn(x[s] @ p["rope"], s)])
        scores.append(q @ k / math.sqrt(9))
        values.append(c @ p["v_up"][:, n])
      w = np.exp(scores - np.max(scores))
      out[t] += (w / w.sum()) @ np.array(values) @ p["o"][n]
  return out


def test_equals_the_equations():
  """The paper's sums written out in float64."""
  p, x = random(PLAIN.params()), inputs()
  y, report = run(PLAIN, p, x)
  assert report == {}
  for row, want in zip(y, np.asarray(x, np.float64), strict=True):
    np.testing.assert_allclose(row, definition(p, want), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_are_the_papers(name: str):
  """Counted by hand: down and up again, for queries too where compressed."""
  latent = 20 * (7 + 4) + 7 + 7 * 3 * (5 + 6) + 3 * 6 * 20
  queries = {"plain": 20 * 3 * 9, "squeezed": 20 * 9 + 9 + 9 * 3 * 9}
  assert count(LAYERS[name].params()) == latent + queries[name]


# --- The two forms ----------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "mask"),
  [("plain", Causal()), ("squeezed", Sliding(4)), ("squeezed", Chunked(3))],
)
def test_absorbed_equals_expanded(name: str, mask):
  """The products associate: values and gradients agree to 1e-5."""
  layer = dataclasses.replace(LAYERS[name], mask=mask)
  p, x = random(layer.params()), inputs()
  where, at, compute = jnp.arange(11), At(), Compute(attention="reference")
  weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, 11, 3, 6)))

  @functools.partial(jax.jit, static_argnums=1)
  @functools.partial(jax.value_and_grad, has_aux=True)
  def both(p, absorbed: bool):
    q, c = layer.queries(p, x, where), layer.latents(p, x, where)
    if absorbed:
      y = layer.absorbed(p, q, c, at, at, compute)
    else:
      y, _ = layer.expanded(p, q, c, at, compute)
    return jnp.sum(y * weights.astype(y.dtype)), y

  (_, a), da = both(p, True)
  (_, e), de = both(p, False)
  np.testing.assert_allclose(a, e, rtol=0, atol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), da, de
  )


@pytest.mark.parametrize("name", LAYERS)
def test_segments_are_apart(name: str):
  """Two documents packed in a row are as two rows."""
  layer = LAYERS[name]
  p, x = random(layer.params()), inputs()
  at = At(
    jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]] * 2),
    jnp.asarray([[0] * 4 + [1] * 7] * 2),
  )
  packed, _ = run(layer, p, x, at)
  parts = [run(layer, p, part)[0] for part in (x[:, :4], x[:, 4:])]
  np.testing.assert_allclose(
    packed, jnp.concatenate(parts, axis=1), rtol=0, atol=1e-5
  )


def test_reports_the_largest_logit():
  """What QK clip watches, of each head; the forward pass is untouched."""
  p, x = random(PLAIN.params()), inputs()
  y, report = PLAIN(p, x, compute=Compute(watch=True))
  np.testing.assert_array_equal(y, PLAIN(p, x)[0])
  doubled = p | {"q": 2 * p["q"]}
  twice = PLAIN(doubled, x, compute=Compute(watch=True))[1]
  assert report["max_logits"].shape == (3,)
  np.testing.assert_allclose(
    twice["max_logits"], 2 * report["max_logits"], rtol=1e-5
  )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_qk_clip_bounds_the_logits(name: str, alpha: float):
  """Heads above tau come down to it, others stay; the shared key is whole."""
  layer = LAYERS[name]
  p, x = random(layer.params()), inputs()
  watch = Compute(watch=True)
  old = layer(p, x, compute=watch)[1]["max_logits"]
  tau = float(jnp.median(old))
  assert (old > tau).any()
  tx = qk_clip({"mixer": layer.params()}, tau, alpha)
  params = {"mixer": p}
  updates, _ = tx.update(
    jax.tree.map(jnp.zeros_like, params),
    tx.init(params),
    params,
    max_logits={"mixer": old},
  )
  moved = optax.apply_updates(params, updates)["mixer"]
  new = layer(moved, x, compute=watch)[1]["max_logits"]
  np.testing.assert_allclose(new, jnp.minimum(old, tau), rtol=1e-4)
  assert not updates["mixer"]["rope"].any()


# --- The cache --------------------------------------------------------------


def test_cache_is_small():
  """Rank + rope numbers per token, whatever the number of heads.

  DeepSeek-V2's own figure (arXiv:2405.04434, table 1): (4 + 1/2) head widths
  a layer, as much as grouped queries with 2.25 groups.
  """
  layer = LatentAttention(5120, 128, rank=512, q_rank=1536)
  declared = layer.cache(2, 10)
  assert count(declared["latent"]) == 2 * 10 * (512 + 64)
  assert declared.keys() == {"latent", "positions"}
  assert 512 + 64 == 4.5 * 128
  heads = Attention(5120, 128, head_dim=128).cache(2, 10)
  assert count(heads["k"]) + count(heads["v"]) == 2 * 10 * 2 * 128 * 128


@pytest.mark.parametrize("cuts", [(5, 6), (1, 6)])
@pytest.mark.parametrize("mask", [Causal(), Sliding(4), Chunked(3)])
def test_chunks_equal_the_whole(mask, cuts: tuple[int, ...]):
  """However a row is cut, the cache gives what one pass gives.

  Chunks are longer than the rings here, and a step follows or leads one.
  """
  layer = dataclasses.replace(SQUEEZED, mask=mask)
  p, x = random(layer.params()), inputs()
  want, _ = run(layer, p, x)
  cache, found = empty(layer.cache(2, 11)), []
  for lo, hi in itertools.pairwise((0, *cuts, 11)):
    where = jnp.broadcast_to(jnp.arange(lo, hi), (2, hi - lo))
    y, cache = run(layer, p, x[:, lo:hi], At(where), cache)
    found.append(y)
  np.testing.assert_allclose(
    jnp.concatenate(found, axis=1), want, rtol=0, atol=1e-5
  )


def model(name: str) -> Decoder:
  """Two layers of latent attention."""
  block = Block(LAYERS[name], GLU(20, 24), RMSNorm(20))
  return Decoder(31, 20, (((block,), 2),), RMSNorm(20), 24)


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_equals_the_full_forward(name: str):
  """Token by token through the cache: the logits of one pass, to 1e-5."""
  decoder = model(name)
  params = random(decoder.params())
  tokens = jnp.asarray(np.random.default_rng(3).integers(0, 31, (2, 12)))
  want = jax.jit(forward, static_argnums=0)(decoder, params, tokens)
  step = jax.jit(lambda p, t, at, c: forward(decoder, p, t, at, c))
  cache = empty(decoder.cache(2, 12))
  for i in range(12):
    at = At(jnp.full((2, 1), i, jnp.int32))
    logits, cache = step(params, tokens[:, i : i + 1], at, cache)
    np.testing.assert_allclose(logits[:, 0], want[:, i], rtol=0, atol=1e-5)


def test_generates_what_the_full_forward_says():
  """`generate` with prompts padded on the left: the argmax of every prefix."""
  decoder = model("squeezed")
  params = random(decoder.params())
  prompt = np.random.default_rng(4).integers(1, 31, (2, 6))
  prompt[1, :2] = 0
  out = generate(decoder, params, prompt, 9, lengths=np.array([6, 4]))
  full = jax.jit(forward, static_argnums=0)
  for row, start in ((out[0], 0), (out[1], 2)):
    text = row[start:]
    room = np.zeros((1, 15 - len(text)), int)  # causality: padding is unseen
    text = np.concatenate([text[None], room], axis=1)
    logits = full(decoder, params, text)[0]
    said = np.argmax(logits, axis=-1)[5 - start : 14 - start]
    np.testing.assert_array_equal(row[-9:], said)


# --- On a mesh --------------------------------------------------------------

WIDE = dataclasses.replace(SQUEEZED, dim=16, heads=8, rank=8, q_rank=16)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "rule",
  ["fsdp_tp", *(pytest.param(r, marks=SLOW) for r in ("dp", "fsdp", "tp"))],
)
def test_eight_devices_equal_one(rule: str):
  """Both forms, and gradients of the one that trains, under every preset."""
  rules = preset(rule)
  mesh = make_mesh(rules)
  tree, compute = WIDE.params(), Compute(rules=rules)
  p = random(tree)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6, 16)), jnp.float32)
  at, where = At(), jnp.arange(6)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def both(p, x):
    p = gather(p, tree, rules, jnp.float32)
    y, _ = WIDE(p, x, compute=compute)
    q, c = WIDE.queries(p, x, where), WIDE.latents(p, x, where)
    return jnp.sum(y * y), (y, WIDE.absorbed(p, q, c, at, at, compute))

  (_, want), grads = both(p, x)
  with jax.sharding.set_mesh(mesh):
    spec = rules.activation_spec(("batch", None, None), x.shape, mesh)
    placed = jax.device_put(p, shardings(tree, mesh, rules))
    (_, found), moved = both(
      placed, jax.device_put(x, NamedSharding(mesh, spec))
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    (found, moved),
    (want, grads),
  )


# --- Bad sizes --------------------------------------------------------------


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"rank": 0}, r"rank=0.* at least 1"),
    ({"q_rank": 0}, r"q_rank=0.*None leaves queries uncompressed"),
    ({"rope_dim": 5}, r"heads of 5 features.* in pairs"),
  ],
)
def test_sizes_that_could_not_be_meant(sizes: dict, message: str):
  """Said when the layer is made, not deep inside a trace."""
  with pytest.raises(UserError, match=message):
    dataclasses.replace(PLAIN, **sizes)


V2 = {
  "model_type": "deepseek_v2",
  "vocab_size": 11,
  "hidden_size": 12,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 16,
  "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ({"num_experts_per_tok": None}, "no 'num_experts_per_tok'"),
    ({"norm_topk_prob": True}, "norm_topk_prob=True"),
    ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    ({"num_key_value_heads": 1}, "num_key_value_heads=1"),
    ({"attention_bias": True}, "attention_bias=True"),
  ],
)
def test_configs_that_are_not_built(said: dict, message: str):
  """Refused, never read as something else."""
  hub.find(V2).read(V2)
  with pytest.raises(UserError, match=message):
    hub.find(V2).read(V2 | said)


def test_scores_are_softmax_or_sigmoid():
  """One sentence with what is known."""
  with pytest.raises(UserError, match="'tanh' is neither 'softmax' nor 'sig"):
    deepseek.decoder(score="tanh")


# --- The page ---------------------------------------------------------------


def test_examples_of_the_page(capsys):
  """Each block of docs/latent-attention.md runs and prints what it says."""
  page = pathlib.Path(__file__).parents[1] / "docs" / "latent-attention.md"
  blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(page), "exec"), names)
  printed = capsys.readouterr().out.splitlines()
  said = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(blocks), re.M)
  assert len(said) == 5
  assert printed == said
  table = page.read_text("utf-8")
  for name in ("llama2-7b", "llama3-70b", "deepseek-v2-lite", "deepseek-v3"):
    size = 2 * names["per_token"](name)
    assert f"| {size:,} | {size * 2**17 / 2**30:.1f} GiB |" in table
