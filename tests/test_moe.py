"""Mixtures of experts: published layers, three dispatches, balance, meshes.

`golden/moe.npz` was made in float64 by golden/make_moe.py.
"""

import functools
import math
import pathlib
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import random_params, random_tokens

from jaxlm import optim, values
from jaxlm.errors import UserError
from jaxlm.layers import exchange, mlp, moe, router
from jaxlm.layers.at import At
from jaxlm.layers.cache import empty
from jaxlm.layers.compute import Compute
from jaxlm.layers.kernels import grouped
from jaxlm.layers.mlp import GLU, MLP, gelu
from jaxlm.layers.moe import Capacity, Dense, MoE, Ragged
from jaxlm.layers.param import abstract, count, init, shardings
from jaxlm.layers.router import ExpertChoice, Groups, TopK, sigmoid, softmax
from jaxlm.models.decoder import forward
from jaxlm.models.families import modern
from jaxlm.objectives import next_token
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset
from jaxlm.state import create, make_step

HERE = pathlib.Path(__file__).parent
DISPATCHES = (Dense(), Capacity(8.0), Ragged())


def drawn(model, seed: int = 0):
  """Random arrays for a module, also where it starts at zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32),
    abstract(model.params()),
  )


def close(got, want, tol: float = 1e-5) -> None:
  """Two trees within `tol`, relative and absolute."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=tol, atol=tol
    ),
    got,
    want,
  )


# --- Published layers -------------------------------------------------------

EXPERT, NARROW = GLU(8, 6), {"experts": 8, "top_k": 3}
CLIPPED = GLU(
  8, 6, mlp.ClippedSiLU(0.9), bias=True, up_act=mlp.ClippedShift(0.9)
)
V2, V3 = Groups(4, 2, best=1), Groups(4, 2, best=2)

PUBLISHED: dict[str, MoE] = {
  "mixtral": MoE(EXPERT, **NARROW),
  "qwen3_True": MoE(EXPERT, **NARROW),
  "qwen3_False": MoE(EXPERT, **NARROW, router=TopK(normalise=False)),
  "qwen2": MoE(
    EXPERT,
    **NARROW,
    router=TopK(normalise=False),
    shared=GLU(8, 10),
    shared_gate=True,
  ),
  "deepseek2_greedy": MoE(
    EXPERT,
    **NARROW,
    router=TopK(normalise=False, scale=1.5),
    shared=GLU(8, 12),
  ),
  "deepseek2_group_limited_greedy": MoE(
    EXPERT,
    **NARROW,
    router=TopK(normalise=False, scale=1.5, groups=V2),
    shared=GLU(8, 12),
  ),
  "deepseek3": MoE(
    EXPERT,
    **NARROW,
    router=TopK(sigmoid, scale=2.5, groups=V3, correction=True),
    shared=GLU(8, 6),
  ),
  "gpt_oss": MoE(CLIPPED, **NARROW, router=TopK(bias=True)),
  "llama4": MoE(
    EXPERT,
    8,
    1,
    router=TopK(sigmoid, normalise=False),
    shared=GLU(8, 6),
    weigh_input=True,
  ),
}

with np.load(HERE / "golden/moe.npz") as file:
  GOLDEN = {name: x.astype(np.float32) for name, x in file.items()}


def published(name: str) -> dict:
  """The golden parameters of a layer, nested."""
  tree: dict = {}
  for key, x in GOLDEN.items():
    if key.startswith(f"{name}/p/"):
      *path, last = key.split("/")[2:]
      node = functools.reduce(lambda d, k: d.setdefault(k, {}), path, tree)
      node[last] = jnp.asarray(x)
  return tree


@pytest.mark.parametrize("dispatch", DISPATCHES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers(name: str, dispatch):
  """Values and gradients of transformers' sparse layers, each dispatch."""
  layer, p = replace(PUBLISHED[name], dispatch=dispatch), published(name)
  x, cotangent, out, grad = (
    jnp.asarray(GOLDEN[f"{name}/{part}"])
    for part in ("x", "cotangent", "out", "grad")
  )
  shapes = jax.tree.map(lambda a: a.shape, p)
  assert shapes == jax.tree.map(lambda s: s.shape, abstract(layer.params()))
  y, back = jax.vjp(jax.jit(lambda x: layer(p, x)[0]), x)
  close(y, out)
  close(back(cotangent)[0], grad)


def test_the_switch_loss_is_the_published_one():
  """Transformers count every choice fully: top_k times ours."""
  logits = jnp.asarray(GOLDEN["switch/logits"])[None]
  one = TopK(balance=1.0)
  for top_k in (1, 2, 4):
    _, means = one({"w": jnp.eye(8)}, logits, top_k)
    got = top_k * one.report(means)["aux"]
    np.testing.assert_allclose(got, GOLDEN[f"switch/top{top_k}"], rtol=1e-5)


def test_the_switch_loss_is_one_when_even_and_largest_when_not():
  """By hand: E sum f P."""
  even, one = jnp.full((4,), 0.25), jnp.array([1.0, 0.0, 0.0, 0.0])
  assert router.switch_loss(even, even) == 1.0
  assert router.switch_loss(one, one) == 4.0
  grad = jax.grad(router.switch_loss, argnums=(0, 1))(even, even)
  close(grad, (jnp.zeros(4), jnp.ones(4)))


# --- Dispatch ---------------------------------------------------------------


ROUTES = {
  "softmax": TopK(balance=0.3, z_loss=0.1),
  "sigmoid": TopK(sigmoid, groups=V3, correction=True, scale=2.0),
  "noisy": TopK(normalise=False, noise=True),
  "choice": ExpertChoice(z_loss=0.1),
}
EXPERTS = [MLP(8, 5, gelu, bias=True), GLU(8, 4), CLIPPED, MLP(8, 5)]


@pytest.mark.parametrize(
  ("route", "expert", "weigh_input"),
  list(zip(ROUTES, EXPERTS, [False, False, True, True], strict=True)),
)
def test_three_dispatches_are_one(route: str, expert, weigh_input: bool):
  """Values, reports and gradients of everything, to 1e-5."""
  rng, key = np.random.default_rng(0), jax.random.key(1)
  x = jnp.asarray(rng.normal(size=(2, 7, 8)), jnp.float32)

  def run(dispatch):
    m = MoE(expert, 8, 2, ROUTES[route], None, False, weigh_input, dispatch)

    def loss(p, x):
      y, report = m(p, x, key=key)
      return jnp.sum(jnp.sin(y)) + report["aux"], report["load"]

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(drawn(m), x)

  want = run(Dense())
  for dispatch in DISPATCHES[1:]:
    close(run(dispatch), want)


@jax.jit
def every_product(x, w, dy, sizes) -> list:
  """By tiles and by the primitive: forward, and both gradients."""
  return [
    (
      getattr(grouped, f"_{form}")(x, w, sizes),
      getattr(grouped, f"_{form}_back")(dy, w, sizes),
      getattr(grouped, f"_{form}_weight")(x, dy, sizes),
    )
    for form in ("tiles", "ragged")
  ]


@given(st.lists(st.integers(0, 40), min_size=3, max_size=3).map(sorted))
def test_tiles_are_the_primitive(cuts: list[int]):
  """A grouped product and both its gradients, against a loop too.

  Empty groups, a single one, and groups that do not fill their tiles.
  """
  sizes, rng = np.diff([0, *cuts, 40]), np.random.default_rng(0)
  x, w, dy = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((40, 6), (4, 6, 5), (40, 5))
  )
  tiles, ragged = every_product(x, w, dy, sizes.astype(np.int32))
  close(tiles, ragged)
  hand = np.einsum("ri,rio->ro", x, w[np.repeat(np.arange(4), sizes)])
  close(tiles[0], hand)


def test_a_full_expert_drops_second_choices_last():
  """Room for one of two: the first token stays, and the report says so.

  With two experts and top_k 2 every token is everyone's. The first choices of
  tokens 0, 1 are expert 0, so expert 1 meets only second choices.
  """
  m = MoE(MLP(2, 2, mlp.linear), 2, 2, dispatch=Capacity(0.5))
  p = {
    "router": {"w": jnp.array([[1.0, -1.0], [0.0, 0.0]])},
    "experts": {
      "up": jnp.stack([jnp.eye(2)] * 2),
      "down": jnp.stack([jnp.eye(2), 10 * jnp.eye(2)]),
    },
  }
  x = jnp.array([[[1.0, 0.0], [2.0, 0.0]]])
  y, report = m(p, x)
  w = jax.nn.softmax(jnp.array([1.0, -1.0]))
  close(y, [[[w[0] + 10 * w[1], 0.0], [0.0, 0.0]]])
  assert report["dropped"] == 0.5
  x = x[:, ::-1] * jnp.array([[[-1.0, 1.0], [1.0, 1.0]]])
  y, _ = m(p, x)  # token 0 prefers expert 1, token 1 expert 0: both keep it
  w = [jax.nn.softmax(a * jnp.array([1.0, -1.0])) for a in (-2.0, 1.0)]
  close(y, [[[-2.0 * 10 * w[0][1], 0.0], [w[1][0], 0.0]]])


def test_low_precision():
  """Operands in bfloat16, router and sums in float32."""
  m = MoE(GLU(16, 24), 8, 2, shared=GLU(16, 8), shared_gate=True)
  p, rng = drawn(m), np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 9, 16)), jnp.bfloat16)

  @jax.jit
  def run(p):
    return m(p, x, Compute("bfloat16"))[0]

  want = jax.jit(lambda p: m(p, x.astype(jnp.float32))[0])(p)
  assert run(p).dtype == jnp.float32
  np.testing.assert_allclose(run(p), want, atol=0.05 * float(want.std()))
  grads = jax.jit(jax.grad(lambda p: run(p).sum()))(p)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.float32.dtype}


# --- Routers ----------------------------------------------------------------

LOGITS = st.permutations(range(8)).map(lambda x: np.float32(x) / 3)


@given(LOGITS, st.sampled_from([1, 3]))
@settings(max_examples=10)
def test_normalised_softmax_is_the_softmax_of_the_chosen(logits, top_k: int):
  """So 'top-k then softmax' needs no router of its own."""
  weights, experts = TopK().choose(logits, top_k)
  tops, places = jax.lax.top_k(logits, top_k)
  close(weights, jax.nn.softmax(tops))
  assert set(experts.tolist()) == set(places.tolist())


@given(LOGITS, st.sampled_from([1, 3]), st.integers(1, 2))
@settings(max_examples=20)
def test_groups_limit_the_choice(logits, top_k: int, best: int):
  """Against a loop: the best two of four groups of two, then the best."""
  one = TopK(softmax, False, groups=Groups(4, 2, best))
  weights, experts = one.choose(logits, top_k)
  scores = np.asarray(jax.nn.softmax(logits))
  marks = [sorted(scores[2 * g : 2 * g + 2])[-best:] for g in range(4)]
  kept = sorted(range(4), key=lambda g: -sum(marks[g]))[:2]
  allowed = [e for g in kept for e in (2 * g, 2 * g + 1)]
  want = sorted(allowed, key=lambda e: -scores[e])[:top_k]
  np.testing.assert_allclose(weights, scores[want], rtol=1e-5)
  assert {int(e) // 2 for e in experts} <= set(kept)


def test_a_correction_moves_the_choice_and_nothing_else():
  """The weight of the newly chosen is its own score; no gradient comes."""
  one, logits = TopK(sigmoid, False), jnp.array([2.0, 1.0, 0.0, -1.0])
  bias = jnp.array([0.0, 0.0, 0.0, 9.0])
  weights, experts = one.choose(logits, 2, bias)
  assert experts.tolist() == [3, 0]
  close(weights, jax.nn.sigmoid(jnp.array([-1.0, 2.0])))
  assert not jax.grad(lambda b: one.choose(logits, 2, b)[0].sum())(bias).any()


def test_noise_needs_a_key():
  """None in evaluation; while training it changes who is chosen."""
  m = MoE(MLP(6, 5), 8, 2, TopK(noise=True))
  p, rng = drawn(m), np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 9, 6)), jnp.float32)
  quiet = MoE(MLP(6, 5), 8, 2)
  close(m(p, x)[0], quiet(p, x)[0], 0)
  a, b = (m(p, x, key=jax.random.key(i))[1]["load"] for i in (0, 1))
  assert (a != b).any()
  np.testing.assert_allclose(a.sum(), 1.0, rtol=1e-6)


def test_experts_that_choose_are_even():
  """Each takes seq * top_k / experts tokens of each row, its best."""
  route = ExpertChoice()
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 4)), jnp.float32)
  found, means = route({"w": jnp.eye(4)}, x, 2)
  close(means["load"], jnp.full((4,), 0.25), 0)
  scores = np.asarray(jax.nn.softmax(x))
  for row in range(3):
    for expert in range(4):
      here = (found.experts == expert) & (found.tokens // 8 == row)
      want = np.argsort(-scores[row, :, expert])[:4]
      assert set((found.tokens[here] % 8).tolist()) == set(want.tolist())
      np.testing.assert_allclose(
        np.sort(found.weights[here]), np.sort(scores[row, want, expert])
      )


@pytest.mark.parametrize(
  ("message", "build"),
  [
    ("top_k=9 of 8 experts", lambda: MoE(EXPERT, 8, 9)),
    ("top_k=0", lambda: MoE(EXPERT, 8, 0, ExpertChoice())),
    ("8 experts do not .* 3 groups", lambda: grouped_by(Groups(3, 1))),
    ("top_k=3 .* 1 groups of 2", lambda: grouped_by(Groups(4, 1))),
    ("5 of 4 groups", lambda: Groups(4, 5)),
    ("factor of 0", lambda: MoE(EXPERT, 8, dispatch=Capacity(0))),
    ("room=0", lambda: MoE(EXPERT, 8, dispatch=Ragged(0))),
    ("model.balance is 'luck'", lambda: tiny(balance="luck")),
    ("top_k=9", lambda: tiny(top_k=9)),
  ],
)
def test_what_does_not_fit_is_told(message: str, build):
  """Before any array is made."""
  with pytest.raises(UserError, match=message):
    build()


def grouped_by(groups: Groups) -> MoE:
  return MoE(EXPERT, 8, 3, TopK(groups=groups))


# --- In a model -------------------------------------------------------------


def tiny(**options):
  """A decoder with eight experts."""
  sizes = {"vocab": 33, "dim": 16, "layers": 2, "heads": 2, "experts": 8}
  return modern.decoder(**sizes | {"max_positions": 16} | options)


def test_a_mixture_is_a_value():
  """Equal, hashable, and back from JSON."""
  for layer in PUBLISHED.values():
    assert values.from_json(values.to_json(layer)) == layer
    assert hash(replace(layer)) == hash(layer)


def test_active_counts():
  """Two of eight experts, half as wide each: a token's work is the dense one's.

  Besides, there is only the router.
  """
  sparse, dense = tiny(), tiny(experts=0)
  scores = 2 * 16 * 8
  assert sparse.n_active() == dense.n_params() + scores
  assert sparse.flops_per_token(8) == dense.flops_per_token(8) + 2 * scores
  assert sparse.n_params() - scores == dense.n_params() + 2 * 6 * 2 * 16 * 32


def test_a_cache_changes_nothing():
  """Token by token as at once: routing looks at one token."""
  model = tiny(ffn="glu", balance="bias")
  params, tokens = random_params(model), random_tokens(2, 6)
  step = jax.jit(functools.partial(forward, model))
  want = step(params, tokens)
  cache, parts = empty(model.cache(2, 6)), []
  for i in range(6):
    at = At(positions=jnp.full((2, 1), i, jnp.int32))
    y, cache = step(params, tokens[:, i : i + 1], at, cache)
    parts.append(y)
  close(jnp.concatenate(parts, 1), want, 1e-4)


def batch_of(tokens: jax.Array) -> dict:
  return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


def test_losses_of_routers_join_the_loss():
  """Summed over layers, and left out of what is reported as `loss`."""
  model = tiny(balance="loss")
  params, batch = random_params(model), batch_of(random_tokens(2, 9))
  loss, metrics = next_token(model, params, batch)
  assert metrics["aux"] > 0.02  # one layer's Switch loss is one at least
  close(loss, metrics["loss"] + metrics["aux"])
  load = metrics["load"]["layers/0/0/ffn"]
  assert load.shape == (2, 8)
  close(load.sum(-1), jnp.ones(2))
  close(metrics["load_cv"], (load.std(-1) * 8).mean())
  _, dense = next_token(tiny(experts=0), random_params(tiny(experts=0)), batch)
  assert dense.keys() == {"loss", "weight"}


def test_the_z_loss_is_its_formula():
  """Mean of the squared log-sum-exp of the router's logits."""
  one = TopK(z_loss=2.0)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
  _, means = one({"w": jnp.eye(4)}, x, 2)
  want = 2 * np.log(np.exp(np.asarray(x)).sum(-1)) ** 2
  close(one.report(means)["aux"], want.mean())


@pytest.mark.parametrize(
  "name",
  [
    "adamw",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("muon", "lion")),
  ],
)
def test_the_bias_moves_by_its_rate_alone(name: str):
  """Against the load, by `balance`; no decay, no gradient, no learning rate.

  Two microbatches of different weight: their loads are joined.
  """
  model = tiny(balance="bias")
  every = optim.Optimizer(
    name, weight_decay=0.5, balance=0.01, decay_table=((".*", 1.0),)
  )
  tx = optim.make(model.params(), 0.1, every)
  params = random_params(model)
  batch = batch_of(random_tokens(1, 2, 4, 9))
  mask = np.ones((1, 2, 4, 8), np.int32)
  mask[:, 0, 2:] = 0
  parts = [
    next_token(model, params, {k: v[0, i] for k, v in batch.items()})[1]
    for i in (0, 1)
  ]
  load = sum(
    w * part["load"]["layers/0/0/ffn"]
    for w, part in zip((1 / 3, 2 / 3), parts, strict=True)
  )

  def loss_fn(params, batch, key):
    return next_token(model, params, batch, key)

  step = make_step(loss_fn, tx, accumulate=2)
  before = correction(params)
  params = jax.tree.map(jnp.copy, params)  # a step takes what it is given
  state, metrics = step(create(params, tx), batch | {"mask": mask})
  moved = correction(state.params) - before
  np.testing.assert_allclose(moved, 0.01 * np.sign(1 / 8 - load), atol=1e-6)
  assert moved.any()
  assert metrics["load_cv"].shape == (1,)
  assert "load" not in metrics


def correction(params) -> np.ndarray:
  return np.asarray(params["layers"]["0"]["0"]["ffn"]["router"]["correction"])


def test_balancing_wants_the_load():
  """A step that does not pass it would silently never balance."""
  model = tiny(balance="bias")
  tx = optim.balance_experts(model.params(), 0.1)
  params = random_params(model)
  with pytest.raises(ValueError, match="load"):
    tx.update(params, tx.init(params), params)


# --- Meshes -----------------------------------------------------------------


def train(balance: str, rules=None, steps: int = 5, devices=None):
  """A few steps of AdamW on eight rows: losses, loads, the last state."""
  model = tiny(balance=balance, ffn="glu")
  tx = optim.make(model.params(), 1e-2, optim.Optimizer(balance=0.01))

  def loss_fn(params, batch, key):
    return next_token(model, params, batch, key, Compute(rules=rules))

  step = make_step(loss_fn, tx, steps=steps)
  params = jax.tree.map(lambda x: 0.3 * x, random_params(model))
  batch = batch_of(random_tokens(steps, 1, 8, 9))
  if rules is None:
    return step(create(params, tx), batch)
  mesh = make_mesh(rules, devices=devices)
  with jax.sharding.set_mesh(mesh):
    where = shardings(model.params(), mesh, rules)
    state = create(jax.device_put(params, where), tx)
    spec = rules.activation_spec(
      (None, None, "batch", None), batch["inputs"].shape, mesh
    )
    return step(state, jax.device_put(batch, NamedSharding(mesh, spec)))


@functools.cache
def alone(balance: str):
  return train(balance)


# test_parallel.py has the other presets.
PAIRS = [("loss", "fsdp_tp"), ("bias", "fsdp_tp"), ("bias", "ep")]


@pytest.mark.parametrize(
  ("balance", "rule"),
  [
    pair
    if pair == ("bias", "fsdp_tp")
    else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in PAIRS
  ],
)
def test_eight_devices_train_as_one(balance: str, rule: str):
  """Losses, router losses and loads of each step, and the moved biases."""
  state, metrics = train(balance, preset(rule))
  want_state, want = alone(balance)
  for name in ("loss", "aux", "load_cv"):
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(metrics["grad_norm"], want["grad_norm"], rtol=1e-3)
  if balance == "bias":
    close(correction(state.params), correction(want_state.params))


def test_a_mesh_of_one_device_is_a_mesh():
  """What the training program makes on a laptop."""
  _, metrics = train("bias", preset("dp"), devices=jax.devices()[:1])
  np.testing.assert_allclose(metrics["loss"], alone("bias")[1]["loss"], 1e-5)


@pytest.mark.parametrize(
  ("dispatch", "rule"),
  [
    (Ragged(), "fsdp_tp_ep"),
    (Ragged(0.3), "ep"),
    (Dense(), "fsdp_tp_ep"),
    (Capacity(8.0), "fsdp_tp_ep"),
    pytest.param(Ragged(), "tp", marks=pytest.mark.slow),
  ],
)
def test_split_experts_add_up(monkeypatch, dispatch, rule: str):
  """Experts, and their hidden units, on several devices: they say the same.

  Biases are added once, noise is that of one device, tokens come back; those
  that find no room in one round do in another.
  """
  monkeypatch.setattr(exchange, "LEAST", 1)
  route = TopK(bias=True, noise=True, balance=0.1)
  m = MoE(MLP(8, 16, bias=True), 4, 2, route, dispatch=dispatch)
  p, rules, key = drawn(m), preset(rule), jax.random.key(0)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 8)), jnp.float32)

  def loss(p, x, compute):
    y, report = m(p, x, compute, key)
    return jnp.sum(jnp.sin(y)) + report["aux"]

  run = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
  want = run(p, x, Compute())
  mesh = make_mesh(rules)
  with jax.sharding.set_mesh(mesh):
    axes = ("batch", None, None)
    place = NamedSharding(mesh, rules.activation_spec(axes, x.shape, mesh))
    computed = jax.tree.map(
      lambda p: NamedSharding(mesh, rules.computed_spec(p.axes, p.shape, mesh)),
      m.params(),
      is_leaf=lambda p: hasattr(p, "axes"),
    )
    got = run(
      jax.device_put(p, computed),
      jax.device_put(x, place),
      Compute(rules=rules),
    )
  close(got, want)


def sent_ragged(x, out, starts, sizes, places, arriving, *, axis_name):
  """What the documentation of `ragged_all_to_all` says, by a gather of all."""
  del arriving
  everything = jax.lax.all_gather((x, starts, sizes, places), axis_name)
  here, i = jax.lax.axis_index(axis_name), jnp.arange(len(x))
  for sender in range(len(sizes)):
    rows, *numbers = (a[sender] for a in everything)
    start, size, place = (n[here] for n in numbers)
    meant = (i >= start) & (i < start + size)
    to = jnp.where(meant, i - start + place, len(out))
    out = out.at[to].set(rows, mode="drop")
  return out


@pytest.mark.parametrize("most", [24, 7])
def test_rows_travel_alike_on_every_platform(monkeypatch, most: int):
  """Ragged as accelerators send them, or with their room as CPUs do.

  In one round, or in as many as the fullest device needs: the same rows in the
  same places, sorted by group, and all are back home. CPUs have no ragged
  exchange, so one is made of its definition.
  """
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", sent_ragged)
  mesh = make_mesh(preset("ep"), "data:2,expert:4")
  rng = np.random.default_rng(0)
  spec = PartitionSpec(("data", "expert"), None)
  place = NamedSharding(mesh, spec)
  cuts = np.sort(rng.integers(0, 7, (8, 7)), 1)
  sizes = np.diff(cuts, axis=1, prepend=0, append=6).astype(np.int32)
  x = rng.normal(size=(8 * 6, 5)).astype(np.float32)

  def local(x, sizes):
    plan = exchange.plan(sizes.reshape(4, 2), "expert")
    zeros, seen = jnp.zeros((most, 5)), []
    homes = [jnp.zeros_like(x)] * 2
    for i in range(-(-24 // most)):
      part = plan.round(jnp.int32(i), most)
      one = exchange._ragged(x, zeros, part)
      other = exchange._padded(x, zeros, part)
      homes = [
        exchange._ragged(2.0 * one, homes[0], part.back),
        exchange._padded(2.0 * other, homes[1], part.back),
      ]
      seen += [one, other]
    return *homes, *seen

  with jax.sharding.set_mesh(mesh):
    run = jax.shard_map(local, out_specs=spec, check_vma=False)
    found = jax.jit(run)(jax.device_put(x, place), jax.device_put(sizes, place))
  one, other, *seen = map(np.asarray, found)
  np.testing.assert_array_equal(one, 2.0 * x)
  np.testing.assert_array_equal(other, 2.0 * x)
  for a, b in zip(seen[::2], seen[1::2], strict=True):
    np.testing.assert_array_equal(a, b)
  assert sum(np.count_nonzero(a.any(-1)) for a in seen[::2]) == len(x)


# --- Balance while learning -------------------------------------------------


@pytest.mark.slow
def test_load_becomes_even():
  """After 500 steps the load's coefficient of variation is below 0.3.

  With the Switch loss and with the moving bias, three seeds each on English
  text by its bytes; without either it stays clearly larger.
  """
  import pydoc_data.topics

  text = "\n".join(pydoc_data.topics.topics.values()).encode()
  text = np.frombuffer(text, np.uint8).astype(np.int32)

  def after(balance: str, seed: int) -> float:
    rng = np.random.default_rng(seed)
    model = modern.decoder(
      256, 32, 2, 2, max_positions=32, experts=8, balance=balance, mlp_dim=32
    )
    tx = optim.make(model.params(), 3e-3, optim.Optimizer(balance=0.001))
    step = stepper(model, tx)
    state = create(init(model.params(), jax.random.key(seed)), tx)
    for _ in range(10):
      at = rng.integers(0, len(text) - 33, (50, 1, 16, 1))
      state, seen = step(state, batch_of(jnp.asarray(text[at + np.arange(33)])))
    assert seen["loss"][-10:].mean() < 2.4  # and it has learned
    return float(seen["load_cv"][-10:].mean())

  even = [after(b, seed) for b in ("loss", "bias") for seed in range(3)]
  uneven = [after("none", seed) for seed in range(3)]
  assert max(even) < 0.3
  assert min(uneven) > 1.5 * max(even)


@functools.cache
def stepper(model, tx):
  """Fifty steps a call, compiled once for all seeds."""
  compute = Compute(unroll=True)
  return make_step(
    lambda p, b, k: next_token(model, p, b, k, compute), tx, steps=50
  )


# --- The page ---------------------------------------------------------------


def test_the_page_runs():
  """Each block of docs/moe.md in order; what it prints is what it says."""
  page = HERE.parent / "docs" / "moe.md"
  blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
  assert len(blocks) == 2
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(page), "exec"), names)
  assert names["y"].shape == names["x"].shape
  assert math.isfinite(names["metrics"]["loss"][-1])
  assert count(names["layer"].params()) > names["layer"].active()
  assert isinstance(names["layer"], moe.MoE)
