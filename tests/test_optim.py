"""Optimizers against optax, torch (golden file) and closed forms."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.errors import UserError
from jaxlm.layers.param import Param, stack
from jaxlm.optim import Muon, Optimizer, make

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "optim.npz")
STEPS, LR, DECAY = 100, 0.02, 0.1
KEPT = (0, 1, 9, 49, 99)
NAMES = ("tall", "wide", "square")


def golden(name: str) -> dict[str, np.ndarray]:
  """One array per weight, in our layout: torch's (out, in) transposed."""
  return {
    n: np.swapaxes(GOLDEN[f"{n}/{name}"], -1, -2).astype(np.float64)
    for n in NAMES
  }


def expected(name: str) -> dict[str, np.ndarray]:
  return {n: np.swapaxes(GOLDEN[f"{name}/{n}"], -1, -2) for n in NAMES}


def run(tx, start, target, noise):
  """Weights after every step, with gradient `w - target + noise[t]`."""

  def step(carry, noise_t):
    params, state = carry
    grads = jax.tree.map(lambda w, a, n: w - a + n, params, target, noise_t)
    # optax mixes integers and floats; ours brings its own permission.
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  start, target, noise = jax.tree.map(jnp.asarray, (start, target, noise))
  return jax.jit(
    lambda: jax.lax.scan(step, (start, tx.init(start)), noise)[1]
  )()


def tree_of(arrays) -> dict[str, Param]:
  return {n: Param(a.shape, ("embed", "mlp")) for n, a in arrays.items()}


@pytest.mark.parametrize(
  "name",
  ["sgd", "momentum", "nesterov", "rmsprop", "adagrad", "adam", "adamw"],
)
def test_hundred_steps_equal_torch(name):
  """Same weights as torch after 1, 2, 10, 50 and 100 steps, with decay.

  In float64, so that only a difference of method could show.
  """
  start, target, noise = map(golden, ("start", "target", "noise"))
  eps = 1e-10 if name == "adagrad" else 1e-8  # inside the root in optax
  o = Optimizer(name, weight_decay=DECAY, clip_norm=0, eps=eps)
  with jax.enable_x64():
    got = jax.device_get(run(make(tree_of(start), LR, o), start, target, noise))
  want = expected(name)
  for n in NAMES:
    np.testing.assert_allclose(got[n][np.array(KEPT)], want[n], atol=1e-7)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_is_torch_muon_up_to_bfloat16(scale):
  """PyTorch orthogonalises in bfloat16: within 3 % of the way travelled.

  Without Nesterov's form, which the two libraries define differently.
  """
  start, target, noise = map(golden, ("start", "target", "noise"))
  muon = Muon(nesterov=False, coefficients="jordan", scale=scale)
  o = Optimizer("muon", weight_decay=DECAY, clip_norm=0, muon=muon)
  got = run(make(tree_of(start), LR, o), start, target, noise)
  want = expected(f"muon_{scale}")
  for n in NAMES:
    moved = want[n] - start[n]
    error = np.asarray(got[n])[np.array(KEPT)] - want[n]
    ratio = [
      np.linalg.norm(e) / np.linalg.norm(m)
      for e, m in zip(error, moved, strict=True)
    ]
    assert max(ratio) < 0.03, (n, ratio)


OPTAX = {
  "sgd": optax.sgd(LR),
  "momentum": optax.sgd(LR, momentum=0.9),
  "nesterov": optax.sgd(LR, momentum=0.9, nesterov=True),
  "rmsprop": optax.rmsprop(LR, decay=0.95, eps=1e-8, eps_in_sqrt=False),
  "adagrad": optax.adagrad(LR, initial_accumulator_value=0.0, eps=1e-16),
  "adam": optax.adam(LR, b1=0.9, b2=0.95),
  "adamw": optax.adamw(LR, b1=0.9, b2=0.95, weight_decay=DECAY),
  "lion": optax.lion(LR, b1=0.9, b2=0.95, weight_decay=DECAY),
}


@pytest.mark.parametrize("name", OPTAX)
def test_hundred_steps_equal_optax(name):
  """Each name is optax's optimizer of that name, clipping included."""
  start, target, noise = map(golden, ("start", "target", "noise"))
  decay = DECAY if name in ("adamw", "lion") else 0.0
  o = Optimizer(name, weight_decay=decay, clip_norm=3.0)
  got = run(make(tree_of(start), LR, o), start, target, noise)
  with jax.numpy_dtype_promotion("standard"):
    tx = optax.chain(optax.clip_by_global_norm(3.0), OPTAX[name])
    want = run(tx, start, target, noise)
  for n in NAMES:
    np.testing.assert_allclose(got[n], want[n], rtol=1e-6, atol=1e-6)


def test_decay_spares_norms_and_biases():
  """With zero gradients only matrices shrink, by exactly 1 - lr * decay."""
  tree = {
    "w": Param((4, 3), ("embed", "mlp")),
    "bias": Param((3,), ("mlp",), n_in=0),
    "norm": Param((4,), ("embed",)),
    "embed": Param((5, 4), ("vocab", "embed")),
  }
  params = jax.tree.map(
    lambda p: jnp.ones(p.shape), tree, is_leaf=lambda x: isinstance(x, Param)
  )
  tx = make(tree, 0.5, Optimizer("adamw", weight_decay=0.1))
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  got = optax.apply_updates(params, updates)
  assert {n: float(x.mean()) for n, x in got.items()} == pytest.approx(
    {"w": 0.95, "bias": 1.0, "norm": 1.0, "embed": 0.95}
  )


# --- Tables -----------------------------------------------------------------

MODEL = {
  "embed": Param((7, 4), ("vocab", "embed")),
  "layers": (
    stack(
      {
        "q": Param((4, 2, 2), ("embed", "heads", "head_dim")),
        "norm": Param((4,), ("embed",), n_in=0),
      },
      3,
    ),
  ),
}


def model_params():
  is_param = lambda x: isinstance(x, Param)  # noqa: E731
  return jax.tree.map(
    lambda p: jax.random.normal(jax.random.key(p.size), p.shape),
    MODEL,
    is_leaf=is_param,
  )


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon"])
def test_lr_table_multiplies_updates(name):
  """A factor of 3 on one path trebles its update and no other."""
  params = model_params()
  grads = jax.tree.map(jnp.cos, params)
  plain = make(MODEL, 0.1, Optimizer(name))
  table = ((r"layers/0/q", 3.0), (r".*", 1.0))
  tabled = make(MODEL, 0.1, Optimizer(name, lr_table=table))
  a, _ = plain.update(grads, plain.init(params), params)
  b, _ = tabled.update(grads, tabled.init(params), params)
  np.testing.assert_allclose(
    b["layers"][0]["q"], 3 * a["layers"][0]["q"], rtol=1e-6
  )
  np.testing.assert_array_equal(b["embed"], a["embed"])
  np.testing.assert_array_equal(b["layers"][0]["norm"], a["layers"][0]["norm"])


def test_first_match_wins_in_decay_table():
  """The row on top decides, also where a later one matches."""
  params = jax.tree.map(jnp.ones_like, model_params())
  zeros = jax.tree.map(jnp.zeros_like, params)
  table = ((r".*norm", 2.0), (r"layers/.*", 0.0), (r".*", 1.0))
  tx = make(MODEL, 1.0, Optimizer("adamw", weight_decay=0.1, decay_table=table))
  updates, _ = tx.update(zeros, tx.init(params), params)
  assert float(updates["layers"][0]["norm"][0, 0]) == pytest.approx(-0.2)
  assert float(updates["layers"][0]["q"].max()) == 0.0
  assert float(updates["embed"][0, 0]) == pytest.approx(-0.1)


def test_muon_has_its_own_learning_rate():
  """`lr_ratio` multiplies Muon's matrices, their decay too, and no other."""
  params = model_params()
  grads = jax.tree.map(jnp.cos, params)
  plain = make(MODEL, 0.1, Optimizer("muon"))
  faster = make(MODEL, 0.1, Optimizer("muon", muon=Muon(lr_ratio=20.0)))
  a, _ = plain.update(grads, plain.init(params), params)
  b, _ = faster.update(grads, faster.init(params), params)
  np.testing.assert_allclose(
    b["layers"][0]["q"], 20 * a["layers"][0]["q"], rtol=1e-6
  )
  np.testing.assert_array_equal(b["embed"], a["embed"])


@pytest.mark.parametrize("name", ["momentum", "adamw", "muon"])
def test_frozen_parameters_do_not_move_and_have_no_state(name):
  """Exactly zero update, and nothing of their shape in the state."""
  params = model_params()
  grads = jax.tree.map(jnp.sin, params)
  table = ((r"embed", True), (r".*", False))
  tx = make(MODEL, 0.1, Optimizer(name, freeze_table=table))
  state = tx.init(params)
  shapes = [x.shape for x in jax.tree.leaves(state)]
  assert params["embed"].shape not in shapes
  assert params["layers"][0]["q"].shape in shapes
  updates, _ = tx.update(grads, state, params)
  assert not updates["embed"].any()
  assert updates["layers"][0]["q"].all()


def test_frozen_gradients_do_not_count_in_the_norm():
  """A huge gradient of a frozen embedding must not clip the others."""
  params = model_params()
  grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
  grads["embed"] = 1e6 * grads["embed"]
  table = ((r"embed", True), (r".*", False))
  o = Optimizer("sgd", weight_decay=0, clip_norm=1.0, freeze_table=table)
  tx = make(MODEL, 1.0, o)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates["layers"][0]["q"], -1e-3, rtol=1e-6)


@pytest.mark.parametrize(
  ("table", "message"),
  [
    (((r"layer/.*", 1.0), (r".*", 1.0)), r"'layer/\.\*' matches no param"),
    (((r"layers/.*", 1.0),), r"no pattern matches the parameter 'embed'"),
    (((r"(", 1.0), (r".*", 1.0)), r"no regular expression"),
  ],
)
def test_wrong_tables_are_named(table, message):
  """A typing error in a pattern, or a parameter left out, stops the run."""
  with pytest.raises(UserError, match=message):
    make(MODEL, 0.1, Optimizer(lr_table=table))


def test_unknown_names_give_the_nearest():
  """What a user mistypes comes back with what was probably meant."""
  with pytest.raises(UserError, match="did you mean 'adamw'"):
    Optimizer("adam_w")
  with pytest.raises(UserError, match="unknown Muon scale"):
    Muon(scale="rms")
