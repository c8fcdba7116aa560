"""Muon: equal to optax's, orthogonal, indifferent to layout and sharding."""

import functools
import re
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.errors import UserError
from jaxlm.layers.param import Param, abstract, init, shardings, stack
from jaxlm.optim import Optimizer, make
from jaxlm.optim.muon import (
  JORDAN,
  POLAR_EXPRESS,
  Muon,
  matrices,
  scale_by_muon,
)
from jaxlm.optim.spread import on_whole_matrices, sharded
from jaxlm.parallel import rules as tables
from jaxlm.parallel.mesh import make_mesh

TREE = {
  "q": Param((16, 4, 4), ("embed", "heads", "head_dim")),
  "o": Param((4, 4, 16), ("heads", "head_dim", "embed"), n_in=2),
  "up": Param((3, 16, 40), ("layers", "embed", "mlp")),
  "down": Param((3, 40, 16), ("layers", "mlp", "embed")),
  "moe": Param((2, 3, 8, 12), ("layers", "experts", "embed", "mlp")),
}
AXES = {  # the same, said to optax
  "q": ((0,), (1, 2)),
  "o": ((0, 1), (2,)),
  "up": ((1,), (2,)),
  "down": ((1,), (2,)),
  "moe": ((2,), (3,)),
}


def run(tx, tree=TREE, steps=100):
  """Weights after `steps` steps towards a target, with noisy gradients."""
  start = init(tree, jax.random.key(0))
  target = init(tree, jax.random.key(1))

  def step(carry, t):
    params, state = carry
    noise = init(tree, jax.random.fold_in(jax.random.key(2), t))
    grads = jax.tree.map(lambda w, a, n: w - a + n, params, target, noise)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  carry = (start, tx.init(start))
  return jax.jit(lambda: jax.lax.scan(step, carry, jnp.arange(steps))[0][0])()


def chain(muon: Muon, tree=TREE):
  return optax.chain(
    scale_by_muon(tree, muon),
    optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(0.02),
  )


@pytest.mark.parametrize(
  ("coefficients", "nesterov", "scale"),
  [
    ("jordan", True, "original"),
    ("jordan", False, "match_rms_adamw"),
    ("polar_express", True, "match_rms_adamw"),
  ],
)
def test_hundred_steps_equal_optax(coefficients, nesterov, scale):
  """Every shape and layout ends where `optax.contrib.muon` ends.

  With noise in the gradients and decay. Polar Express starts a little inside
  the unit ball; optax has no such margin, so it is put into its first triple.
  """
  muon = Muon(nesterov=nesterov, coefficients=coefficients, scale=scale)
  if coefficients == "jordan":
    triples = JORDAN.triples[0]
  else:
    (a, b, c), *rest = POLAR_EXPRESS.triples
    triples = ((a / 1.01, b / 1.01**3, c / 1.01**5), *rest)
  numbers = optax.contrib.MuonDimensionNumbers
  with jax.numpy_dtype_promotion("standard"):
    want = run(
      optax.contrib.muon(
        0.02,
        ns_coeffs=triples,
        weight_decay=0.1,
        nesterov=nesterov,
        consistent_rms=0.2 if scale == "match_rms_adamw" else None,
        muon_weight_dimension_numbers={
          n: numbers(*axes) for n, axes in AXES.items()
        },
      )
    )
  got = run(chain(muon))
  for n in TREE:
    np.testing.assert_allclose(got[n], want[n], rtol=0, atol=1e-5)


def test_nesterov_matters():
  """Else the test above could not tell the two forms apart."""
  a, b = run(chain(Muon(nesterov=True))), run(chain(Muon(nesterov=False)))
  assert float(jnp.abs(a["up"] - b["up"]).max()) > 1e-3


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(
  shape=st.sampled_from([(6, 6), (6, 30), (30, 6), (2, 6, 14), (2, 2, 9, 7)]),
  seed=st.integers(0, 1000),
  exact=st.booleans(),
)
def test_singular_values_end_near_one(shape, seed, exact):
  """The result has the input's singular vectors and values near one.

  Jordan's coefficients promise 0.7 to 1.2 for values that begin above 1e-3 of
  the norm, the five of Polar Express within 10 % from 1e-2 on.
  """
  iterate = POLAR_EXPRESS if exact else JORDAN
  x = jax.random.normal(jax.random.key(seed), shape)
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  hypothesis.assume((s[..., -1] > 2e-2 * np.linalg.norm(s, axis=-1)).all())
  y = np.asarray(iterate(x))
  inner = np.swapaxes(u, -1, -2) @ y @ np.swapaxes(vt, -1, -2)
  values = np.diagonal(inner, axis1=-2, axis2=-1)
  low, high = (0.85, 1.15) if exact else (0.65, 1.25)
  assert values.min() > low
  assert values.max() < high
  off = inner - np.eye(inner.shape[-1]) * values[..., None]
  assert np.abs(off).max() < 1e-3


@pytest.mark.parametrize("iterate", [JORDAN, POLAR_EXPRESS])
@pytest.mark.parametrize("shape", [(2, 8, 32), (2, 32, 8), (64, 4)])
@pytest.mark.parametrize("rank", [2, None])
def test_gram_form_equals_direct_form(iterate, shape, rank):
  """The shortcut on the Gram matrix is the same polynomial.

  Also for matrices of low rank, whose small singular values are pure rounding.
  """
  x = jax.random.normal(jax.random.key(0), shape)
  if rank:
    left = jax.random.normal(jax.random.key(1), (*shape[:-1], rank))
    right = jax.random.normal(jax.random.key(2), (*shape[:-2], rank, shape[-1]))
    x = left @ right
  direct = replace(iterate, gram=float("inf"))(x)
  short = replace(iterate, gram=1.0)(x)
  np.testing.assert_allclose(short, direct, atol=2e-3 if rank else 2e-5)


def test_transposed_input_gives_transposed_result():
  """Which side is multiplied from must not be seen."""
  x = jax.random.normal(jax.random.key(3), (5, 12))
  np.testing.assert_allclose(JORDAN(x.T), JORDAN(x).T, atol=1e-5)


def test_numbers_of_the_iteration():
  """Fewer steps are a prefix of the same polynomials; nonsense is refused."""
  assert Muon(steps=4).iterate.triples == POLAR_EXPRESS.triples[:4]
  assert Muon(dtype=jnp.bfloat16).iterate.dtype == jnp.bfloat16
  for wrong in ({"steps": 0}, {"steps": 6}, {"momentum": 1.0}):
    with pytest.raises(UserError):
      Muon(**wrong)


def test_bfloat16_operands_stay_within_three_per_cent():
  """The precision that torch and the GPU versions work in."""
  x = jax.random.normal(jax.random.key(0), (3, 16, 16))
  want, got = JORDAN(x), replace(JORDAN, dtype=jnp.bfloat16)(x)
  assert got.dtype == jnp.float32
  error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
  assert 1e-4 < float(error) < 0.03


def test_zero_gradient_gives_zero_update():
  """No division by a zero norm."""
  assert not jnp.any(JORDAN(jnp.zeros((2, 4, 4))))


def test_layers_and_experts_are_separate_matrices():
  """A stacked update is the stack of the single ones."""
  one = Param((6, 10), ("embed", "mlp"))
  grads = jax.random.normal(jax.random.key(0), (3, 6, 10))
  stacked = scale_by_muon(stack({"w": one}, 3))
  single = scale_by_muon({"w": one})
  whole, _ = stacked.update({"w": grads}, stacked.init({"w": grads}))
  for i in range(3):
    g = {"w": grads[i]}
    part, _ = single.update(g, single.init(g))
    np.testing.assert_allclose(whole["w"][i], part["w"], atol=1e-5)


@pytest.mark.parametrize("name", ["q", "o"])
def test_per_head_splits_projections(name):
  """With `per_head`, each head's slice is orthogonalised by itself."""
  p = TREE[name]
  g = jax.random.normal(jax.random.key(0), p.shape)
  tx = scale_by_muon({name: p}, Muon(per_head=True, scale="original"))
  updates, _ = tx.update({name: g}, tx.init({name: g}))
  for h in range(4):
    head = g[:, h] if name == "q" else g[h]
    want = POLAR_EXPRESS(head) * max(1, head.shape[1] / head.shape[0]) ** 0.5
    got = updates[name][:, h] if name == "q" else updates[name][h]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_reading_and_writing_matrices_are_inverse():
  """Nothing moves on the way through the matrix form."""
  for p in TREE.values():
    for per_head in (False, True):
      view = matrices(p, per_head)
      x = jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape)
      y = on_whole_matrices(lambda x: x + 1, x, view.stacked)
      np.testing.assert_array_equal(y, x + 1)


def test_embedding_head_and_vectors_are_not_muons():
  """Only hidden matrices are; the rest is AdamW's."""
  assert matrices(Param((7, 4), ("vocab", "embed"))) is None
  assert matrices(Param((4, 7), ("embed", "vocab"))) is None
  assert matrices(Param((4,), ("embed",))) is None
  assert matrices(Param((2, 4), ("heads", "head_dim"), n_in=0)) is None


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize(
  "spec",
  [
    {"up": (None, "a", "b"), "down": (None, "b", "a"), "q": ("a", "b")},
    {"up": (None, ("a", "b")), "down": (None, ("b", "a")), "o": ("b",)},
    {"moe": (None, None, "a", "b")},
  ],
)
def test_sharded_equals_single_device(axis_type, spec):
  """Parameters on a 4 x 2 mesh get the updates they get on one device."""
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
  grads = init(TREE, jax.random.key(0))
  tx = scale_by_muon(TREE)
  want, _ = tx.update(grads, tx.init(grads))
  where = {
    n: NamedSharding(mesh, PartitionSpec(*spec.get(n, ()))) for n in TREE
  }
  with jax.set_mesh(mesh):
    sharded = jax.tree.map(jax.device_put, grads, where)
    update = jax.jit(lambda g: tx.update(g, tx.init(g)))
    got, state = update(sharded)
  for n in TREE:
    np.testing.assert_allclose(got[n], want[n], atol=2e-5)
    if axis_type == AxisType.Explicit:
      assert got[n].sharding.is_equivalent_to(where[n], got[n].ndim)
      assert state.mu[n].sharding.is_equivalent_to(where[n], got[n].ndim)


@pytest.mark.parametrize(
  ("spec", "stacked", "want"),
  [
    ((None, "a", "b"), (0,), (1, 8, 16)),
    ((None, ("a", "b"), None), (0,), (1, 8, 16)),
    ((), (0,), (1, 8, 16)),
    (("b", "a"), (0,), (1, 8, 16)),
    (("b", None, "a"), (0, 1), (6, 16)),
  ],
)
def test_no_matrix_is_computed_twice(spec, stacked, want):
  """On eight devices, six stacked matrices become one each, not six each.

  However they were cut before; and they come back as they were.
  """
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
  seen = []

  def record(x):
    seen.append(x.shape)
    return x + jnp.sum(x, axis=range(1, x.ndim), keepdims=True)

  x = jnp.arange(6 * 8 * 16.0).reshape(6, 8, 16)
  rest = tuple(range(len(stacked), 3))
  with jax.set_mesh(mesh):
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    y = jax.jit(lambda x: on_whole_matrices(record, x, stacked))(placed)
  assert seen == [want]
  assert y.sharding.is_equivalent_to(placed.sharding, 3)
  np.testing.assert_allclose(y, x + x.sum(rest, keepdims=True), rtol=1e-6)


def test_newton_schulz_is_sharded_in_the_compiled_program():
  """Floating point operations of a device, and what travels, by XLA itself.

  Eight layers on eight devices cost each an eighth of what they cost one,
  however parameters and state lie; and no device ever holds them all, but to
  receive the updates of parameters that it holds whole.
  """
  tree = {"w": Param((8, 32, 64), ("layers", "embed", "mlp"))}
  tx = scale_by_muon(tree)

  def program(tx, tree):
    update = jax.jit(lambda g: tx.update(g, tx.init(g))[0])
    found = update.lower(tree).compile()
    return found.cost_analysis()["flops"], found.as_text()

  alone, _ = program(tx, abstract(tree))
  for name in ("dp", "zero1", "fsdp", "fsdp_tp", "fsdp_tp_ep"):
    rules = tables.preset(name)
    mesh = make_mesh(rules)
    with jax.set_mesh(mesh):
      like = abstract(tree, mesh=mesh, rules=rules)
      work, text = program(sharded(tx, tree, rules), like)
    assert alone / 8 < work < alone / 8 * 1.2, name
    gathers = len(re.findall(r" all-gather(-start)?\(", text))
    assert gathers == (name in ("dp", "zero1")), name


def test_updates_trace_once():
  """Equal values hash alike: two equal Muons do not compile twice."""
  assert Muon() == Muon()
  assert hash(Muon()) == hash(Muon())
  traces = []

  @functools.partial(jax.jit, static_argnums=0)
  def step(muon, g):
    traces.append(1)
    tx = scale_by_muon({"w": Param(g.shape, ("embed", "mlp"))}, muon)
    return tx.update({"w": g}, tx.init({"w": g}))[0]

  step(Muon(), jnp.ones((4, 4)))
  step(Muon(), jnp.ones((4, 4)))
  assert len(traces) == 1


@pytest.mark.parametrize("name", ["muon", "adamw", "lion"])
@pytest.mark.parametrize("preset", ["fsdp", "fsdp_tp"])
def test_whole_optimizer_runs_on_sharded_parameters(name, preset):
  """Two steps on eight devices equal two on one; the state is sharded too."""
  tree = {
    "embed": Param((32, 16), ("vocab", "embed")),
    "norm": Param((16,), ("embed",), 0),
    "q": Param((3, 16, 4, 4), ("layers", "embed", "heads", "head_dim")),
    "down": Param((3, 32, 16), ("layers", "mlp", "embed")),
  }
  rules = tables.preset(preset)
  mesh = make_mesh(rules, "")
  o = Optimizer(name, muon=Muon(lr_ratio=2.0))
  tx = make(tree, 0.1, o)

  @jax.jit
  def two_steps(params):
    state = tx.init(params)
    for _ in range(2):
      grads = jax.tree.map(jnp.sin, params)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params, state

  params = init(tree, jax.random.key(0))
  want, _ = two_steps(params)
  where = shardings(tree, mesh, rules)
  with jax.set_mesh(mesh):
    got, state = two_steps(jax.tree.map(jax.device_put, params, where))
  for n in tree:
    np.testing.assert_allclose(got[n], want[n], atol=1e-5)
    assert got[n].sharding.is_equivalent_to(where[n], got[n].ndim)
  places = {tree[n].shape: where[n] for n in tree}
  for leaf in jax.tree.leaves(state):
    if leaf.ndim:
      assert leaf.sharding.is_equivalent_to(places[leaf.shape], leaf.ndim)
