"""The training step: what it must equal, and what it must survive.

Most tests train a linear model whose loss is written out here, so that the
step is alone under test; the rest train a decoder of two small layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import dynamic_scale
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MODELS, random_params, random_tokens

from jaxlm.layers.compute import Compute
from jaxlm.losses import weighted_mean
from jaxlm.objectives import next_token
from jaxlm.state import LossScale, TrainState, create, make_step

ROWS, IN, OUT = 8, 5, 3
RNG = np.random.default_rng(0)
PARAMS = {
  "w": RNG.normal(size=(IN, OUT)).astype(np.float32),
  "b": RNG.normal(size=(OUT,)).astype(np.float32),
}


def start(tx, params=None, **options) -> TrainState:
  """A fresh state; donation must not eat the arrays of other tests."""
  params = PARAMS if params is None else params
  return create(jax.tree.map(jnp.array, params), tx, **options)


def regression(params, batch, key):
  """Masked mean of squared errors, with a weight."""
  del key
  y = batch["x"] @ params["w"] + params["b"][None]
  error = jnp.sum((y - batch["y"]) ** 2, -1)
  loss, weight = weighted_mean(error, batch["mask"])
  return loss, {"loss": loss, "weight": weight, "size": jnp.mean(y**2)}


def data(*lead: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Batches with leading dimensions `lead`, and masks that differ."""
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(*lead, ROWS, IN)).astype(np.float32),
    "y": rng.normal(size=(*lead, ROWS, OUT)).astype(np.float32),
    "mask": (rng.random(size=(*lead, ROWS)) < 0.6).astype(np.float32),
  }


def same(a, b, rtol=1e-6, atol=1e-6) -> None:
  """Two trees agree, leaf by leaf."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
  )


# --- Accumulation and several steps -----------------------------------------


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("k", [2, 4])
def test_accumulation_equals_one_big_batch(k: int, empty: bool):
  """Microbatches with unequal masks, one of them all padding.

  Adam after three steps: a gradient off by a factor would not show in its
  first step, so SGD is checked as well.
  """
  for tx in (optax.sgd(0.1), optax.adam(0.1)):
    one, many = (
      make_step(regression, tx),
      make_step(regression, tx, accumulate=k),
    )
    a, b = start(tx), start(tx)
    for step in range(3):
      parts = data(1, k, seed=step)
      if empty:
        parts["mask"][0, 1] = 0
      whole = {
        name: x.reshape(1, 1, k * ROWS, *x.shape[3:])
        for name, x in parts.items()
      }
      a, mine = one(a, whole)
      b, theirs = many(b, parts)
      for name in ("loss", "weight", "grad_norm"):
        np.testing.assert_allclose(
          theirs[name], mine[name], rtol=1e-6, err_msg=name
        )
    same(b.params, a.params)
    same(b.opt_state, a.opt_state)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_steps_a_call_equal_as_many_calls(accumulate: int):
  """State and every metric of every step, with an average along."""
  tx = optax.adam(0.1)
  options = {"accumulate": accumulate, "ema_decay": 0.9}
  one = make_step(regression, tx, **options)
  three = make_step(regression, tx, steps=3, **options)
  batches = data(3, accumulate)
  a, b = start(tx, ema=True), start(tx, ema=True)
  metrics = []
  for i in range(3):
    a, m = one(a, {k: x[i : i + 1] for k, x in batches.items()})
    metrics.append(m)
  b, together = three(b, batches)
  assert int(b.step) == int(a.step) == 3
  same(b, a)
  same(together, jax.tree.map(lambda *x: jnp.concatenate(x), *metrics))


def test_a_batch_of_other_dimensions_is_refused():
  """Else microbatches or steps beyond the first would be dropped in silence."""
  tx = optax.sgd(0.1)
  for lead in ((2, 1), (1, 2), (1,)):
    with pytest.raises(AssertionError, match="shape"):
      make_step(regression, tx)(start(tx), data(*lead))


def test_metrics_are_means_over_what_counts():
  """A metric of the loss is joined by weight; the weight itself is a sum."""
  tx = optax.sgd(0.0)
  batch = data(1, 3)
  parts = [
    regression(PARAMS, {k: x[0, i] for k, x in batch.items()}, None)[1]
    for i in range(3)
  ]
  weights = np.array([float(p["weight"]) for p in parts])
  _, metrics = make_step(regression, tx, accumulate=3)(start(tx), batch)
  assert float(metrics["weight"][0]) == weights.sum()
  for name in ("loss", "size"):
    values = np.array([float(p[name]) for p in parts])
    np.testing.assert_allclose(
      metrics[name][0], (values * weights).sum() / weights.sum(), rtol=1e-6
    )


def test_the_gradient_norm_is_that_before_clipping():
  """And clipping bounds what is applied: with SGD, the step's length."""
  tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
  batch = data(1, 1)
  grads = jax.grad(
    lambda p: regression(p, {k: x[0, 0] for k, x in batch.items()}, None)[0]
  )(PARAMS)
  state, metrics = make_step(regression, tx)(start(tx), batch)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  assert norm > 1
  np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-5)
  moved = jax.tree.map(lambda a, b: a - b, state.params, PARAMS)
  np.testing.assert_allclose(optax.tree.norm(moved), 0.5, rtol=1e-5)


# --- Randomness -------------------------------------------------------------


def noise(params, batch, key):
  """A loss whose gradient by `w` is the noise of its key."""
  loss = jnp.sum(params["w"] * jax.random.normal(key, params["w"].shape))
  return loss, {"loss": loss, "weight": jnp.float32(1)}


def test_randomness_is_a_function_of_seed_and_step():
  """Fresh at every step and microbatch; resumed at step n, that of step n."""
  tx = optax.sgd(1.0)

  def gradient(seed: int, step: int, accumulate: int = 1) -> np.ndarray:
    fn = make_step(noise, tx, seed=seed, accumulate=accumulate, jit=False)
    state = start(tx).replace(step=jnp.int32(step))
    batch = {"x": np.zeros((1, accumulate, 1), np.float32)}
    state, _ = fn(state, batch)
    return np.asarray(PARAMS["w"] - state.params["w"])

  first = gradient(0, 0)
  np.testing.assert_array_equal(gradient(0, 0), first)
  for other in (gradient(0, 1), gradient(1, 0), gradient(0, 0, 2)):
    assert np.abs(other - first).min() > 1e-4
  # Two equal draws would have the deviation of one; two fresh ones, 1/sqrt(2).
  state = start(tx)
  fn = make_step(noise, tx, seed=0, steps=2)
  state, _ = fn(state, {"x": np.zeros((2, 1, 1), np.float32)})
  both = np.asarray(PARAMS["w"] - state.params["w"])
  np.testing.assert_allclose(both, first + gradient(0, 1), atol=1e-6)


# --- What the state holds ---------------------------------------------------


def test_the_step_traces_once():
  """Ten steps, one trace; a new batch is no reason for another."""
  traces = []

  def counted(params, batch, key):
    traces.append(1)
    return regression(params, batch, key)

  tx = optax.adamw(0.1)
  step = make_step(counted, tx, ema_decay=0.99)
  state = start(tx, ema=True, float16=True)
  for i in range(10):
    state, _ = step(state, data(1, 1, seed=i))
  assert len(traces) == 1
  assert int(state.step) == 10


def test_donation_frees_the_old_state():
  """Every array of the state that went in is gone: memory is held once."""
  tx = optax.adam(0.1)
  old = start(tx, ema=True)
  new, _ = make_step(regression, tx, ema_decay=0.9)(old, data(1, 1))
  for name in ("params", "opt_state", "ema"):
    leaves = jax.tree.leaves(getattr(old, name))
    big = [x for x in leaves if x.size > 1]
    assert len(big) >= 2
    assert all(x.is_deleted() for x in big), name
  assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_the_state_is_arrays_only():
  """So that it can be saved, sharded and donated without a second thought."""
  state = start(optax.adamw(0.1), ema=True, float16=True)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
  assert {f.name for f in dataclasses.fields(state)} == {
    "step",
    "params",
    "opt_state",
    "ema",
    "scale",
  }
  plain = start(optax.sgd(0.1))
  assert plain.ema is None
  assert plain.scale is None


@pytest.mark.parametrize("decay", [0.2, 0.95])
def test_the_average_in_closed_form(decay: float):
  """The mean e += (1 - d) (p - e), d = min(decay, (1 + n) / (10 + n)), by hand.

  Whatever the decay, equal parameters must average to themselves.
  """
  tx = optax.sgd(0.1)
  step = make_step(regression, tx, ema_decay=decay)
  state = start(tx, ema=True)
  want = {k: v.astype(np.float64) for k, v in PARAMS.items()}
  for n in range(25):
    state, _ = step(state, data(1, 1, seed=n))
    d = min(decay, (1 + n) / (10 + n))
    for k in want:
      want[k] = d * want[k] + (1 - d) * np.float64(state.params[k])
  same(state.ema, want, rtol=1e-5, atol=1e-6)
  still = make_step(regression, optax.sgd(0.0), ema_decay=decay)
  state, _ = still(start(optax.sgd(0.0), ema=True), data(1, 1))
  same(state.ema, PARAMS, rtol=0, atol=0)


# --- Precision --------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_loss_scale_follows_torch(finite: list):
  """GradScaler's rules: halve and start again, or double after n good steps.

  The rules are written out as `torch.amp.GradScaler.update` has them. Values
  are powers of two, so equality is exact.
  """
  patience = 5
  scale = LossScale.create(2.0**10)
  want, tracker = 2.0**10, 0
  old, LossScale.PATIENCE = LossScale.PATIENCE, patience
  try:
    for ok in finite:
      scale = scale.update(jnp.asarray(ok))
      if not ok:
        want, tracker = want * 0.5, 0
      else:
        tracker += 1
        if tracker == patience:
          want, tracker = want * 2.0, 0
      want = min(max(want, 1.0), 2.0**24)  # ours stays in a sane range
      assert (float(scale.value), int(scale.good)) == (want, tracker)
  finally:
    LossScale.PATIENCE = old


def test_loss_scale_follows_flax():
  """DynamicScale grows one step later, and otherwise agrees."""
  finite = [True] * 7 + [False] + [True] * 3 + [False, False] + [True] * 12
  theirs = dynamic_scale.DynamicScale(growth_interval=5, scale=2.0**10)
  ours = LossScale.create(2.0**10)
  old, LossScale.PATIENCE = LossScale.PATIENCE, 6
  try:
    for ok in finite:
      bad = jnp.float32(1.0 if ok else jnp.inf)
      grad = theirs.value_and_grad(lambda x, bad=bad: x * bad)
      theirs, is_finite, *_ = grad(jnp.float32(1.0))
      assert bool(is_finite) == ok
      ours = ours.update(jnp.asarray(ok))
      assert float(ours.value) == float(theirs.scale)
  finally:
    LossScale.PATIENCE = old


def test_float16_skips_an_overflow_and_recovers():
  """A step with infinite gradients changes nothing but the scale and count."""
  tx = optax.adam(0.1)
  step = make_step(regression, tx, ema_decay=0.9)
  state = start(tx, ema=True, float16=True)
  state, metrics = step(state, data(1, 1))
  scale = float(state.scale.value)
  assert float(metrics["loss_scale"][0]) == scale
  before = jax.tree.map(np.asarray, state)
  bad = data(1, 1, seed=1)
  bad["y"][0, 0, 0, 0] = np.inf
  bad["mask"][:] = 1
  state, metrics = step(state, bad)
  assert not np.isfinite(metrics["grad_norm"][0])
  for name in ("params", "opt_state", "ema"):
    same(getattr(state, name), getattr(before, name), rtol=0, atol=0)
  assert int(state.step) == 2
  assert float(state.scale.value) == scale / 2
  state, metrics = step(state, data(1, 1, seed=2))
  assert np.isfinite(metrics["grad_norm"][0])
  assert np.abs(state.params["w"] - before.params["w"]).min() > 0


def test_scaling_changes_no_gradient():
  """What is applied is unscaled: float32 with and without scaling agree."""
  tx = optax.sgd(0.1)
  step = make_step(regression, tx)
  a, mine = step(start(tx), data(1, 1))
  b, theirs = step(start(tx, float16=True), data(1, 1))
  same(b.params, a.params, rtol=1e-6, atol=0)
  np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-6)
  np.testing.assert_allclose(mine["grad_norm"], theirs["grad_norm"], rtol=1e-6)


@functools.cache
def train(dtype: str) -> np.ndarray:
  """40 losses of a small decoder on rows that repeat, in one precision."""
  model = MODELS["gpt2"]
  tx = optax.adam(1e-2)
  tokens = jnp.tile(random_tokens(4, 8), (1, 3))
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
  batch = jax.tree.map(lambda x: jnp.tile(x, (40, 1, 1, 1)), batch)

  def loss_fn(params, batch, key):
    return next_token(model, params, batch, key, Compute(dtype=dtype))

  params = jax.tree.map(lambda x: 0.3 * x, random_params(model))
  state = start(tx, params, float16=dtype == "float16")
  state, metrics = make_step(loss_fn, tx, steps=40)(state, batch)
  wide = np.dtype(np.float32)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {wide}
  return np.asarray(metrics["loss"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_training_follows_float32(dtype: str):
  """The loss falls by half, and stays within 1 % of float32 all the way.

  One percent of the loss at the start, as losses near zero differ by nature.
  """
  wide, narrow = train("float32"), train(dtype)
  assert wide[-1] < 0.5 * wide[0]
  np.testing.assert_allclose(narrow, wide, rtol=0.01, atol=0.01)


def test_float16_starts_by_finding_its_scale():
  """From a scale far too high: steps are skipped until gradients fit."""
  model = MODELS["gpt2"]
  tx = optax.adam(3e-3)
  tokens = random_tokens(2, 9)
  batch = {
    "inputs": tokens[None, None, :, :-1],
    "targets": tokens[None, None, :, 1:],
  }

  def loss_fn(params, batch, key):
    return next_token(model, params, batch, key, Compute(dtype="float16"))

  step = make_step(loss_fn, tx)
  state = start(tx, random_params(model), float16=True)
  state = state.replace(scale=LossScale.create(2.0**24))
  first = jax.tree.map(np.asarray, state.params)
  state, metrics = step(state, batch)
  assert not np.isfinite(metrics["grad_norm"][0])
  same(state.params, first, rtol=0, atol=0)
  for _ in range(20):
    state, metrics = step(state, batch)
  assert np.isfinite(metrics["grad_norm"][0])
  assert 1.0 <= float(state.scale.value) < 2.0**24
