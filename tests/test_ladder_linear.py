"""Regression equals the solvers of others; the optimizers equal optax."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.ladder import linear, optimizers, toys


def problem(seed=0):
  return linear.line(np.random.default_rng(seed))


def test_least_squares_is_lstsq():
  """Gradients by hand end where the normal equations do."""
  x, y = problem()
  w, _ = linear.fit(x, y, rate=1 / linear.curvature(x))
  np.testing.assert_allclose(w, np.linalg.lstsq(x, y)[0], atol=1e-10)


@pytest.mark.parametrize(("times", "falls"), [(1.95, True), (2.05, False)])
def test_two_over_l_is_the_edge(times, falls):
  """Under it the loss falls to its least, over it without bound."""
  x, y = problem()
  _, seen = linear.fit(x, y, rate=times / linear.curvature(x), steps=800)
  w = np.linalg.lstsq(x, y)[0]
  least = linear.mse(x @ w, y)[0]
  assert (seen[-1] < 1.001 * least) == falls
  assert (seen[-1] > 1e6 * seen[0]) != falls


def test_logistic_regression_is_scikit_learn():
  """The same minimum of the same penalised loss, two classes."""
  judge = pytest.importorskip("sklearn.linear_model").LogisticRegression
  x, z = problem()
  y = np.where(z > 0, 1, -1)
  other = judge(C=1 / (0.1 * len(x)), fit_intercept=False, tol=1e-10).fit(x, y)
  rate = 1 / (linear.curvature(x) / 4 + 0.1)
  w, _ = linear.fit(x, y, linear.logistic, rate, 3000, l2=0.1)
  np.testing.assert_allclose(w, other.coef_[0], atol=1e-6)


def test_softmax_regression_is_scikit_learn():
  """Three classes; the penalty picks one of many equal minima."""
  judge = pytest.importorskip("sklearn.linear_model").LogisticRegression
  x, y = toys.blobs(np.random.default_rng(1), 150, spread=1.5)
  other = judge(C=1 / (0.1 * len(x)), fit_intercept=False, tol=1e-10).fit(x, y)
  w, _ = linear.fit(x, y, linear.cross_entropy, 0.3, 3000, l2=0.1, classes=3)
  np.testing.assert_allclose(w.T, other.coef_, atol=1e-6)


@pytest.mark.parametrize(("name", "l1", "l2"), [("Lasso", 0.5, 0.0)])
def test_proximal_steps_are_scikit_learn(name, l1, l2):
  """The lasso: the same weights, and the same ones exactly zero."""
  judge = getattr(pytest.importorskip("sklearn.linear_model"), name)
  x, y = problem()
  other = judge(alpha=l1, fit_intercept=False, tol=1e-12).fit(x, y)
  rate = 1 / linear.curvature(x)
  w, _ = linear.fit(x, y, rate=rate, l1=l1, l2=l2)
  np.testing.assert_allclose(w, other.coef_, atol=1e-8)
  np.testing.assert_array_equal(w == 0, other.coef_ == 0)
  assert 0 < np.sum(w == 0) < len(w)


def test_l2_is_ridge():
  """(x'x / n + l2) w = x'y / n, the closed form."""
  x, y = problem()
  w, _ = linear.fit(x, y, rate=1 / (linear.curvature(x) + 0.7), l2=0.7)
  exact = np.linalg.solve(x.T @ x / len(x) + 0.7 * np.eye(8), x.T @ y / len(x))
  np.testing.assert_allclose(w, exact, atol=1e-10)


def test_dropout_is_a_penalty_on_average():
  """E mse(drop(x) w) = mse(x w) + rate / (1 - rate) sum (x w)^2 / 2n.

  Srivastava et al., JMLR 2014, section 9.1; each weight is charged by the
  size of its own input.
  """
  rng = np.random.default_rng(0)
  x, y = problem()
  w, rate = rng.normal(size=8), 0.3
  drawn = [
    linear.mse(linear.dropout(rng, x, rate) @ w, y)[0] for _ in range(4000)
  ]
  charge = rate / (1 - rate) * np.mean((x**2) @ w**2) / 2
  expected = linear.mse(x @ w, y)[0] + charge
  error = np.std(drawn) / np.sqrt(len(drawn))
  assert abs(np.mean(drawn) - expected) < 4 * error
  assert charge > 100 * error


@pytest.mark.parametrize("name", ["mse", "hinge", "logistic", "cross_entropy"])
def test_gradients_by_hand_are_jax_grad(name):
  """Value and gradient, where no score sits on the hinge's corner."""
  rng = np.random.default_rng(2)
  z = rng.normal(size=(20, 3) if name == "cross_entropy" else 20) * 3
  y = rng.integers(0, 3, 20) if z.ndim == 2 else rng.choice([-1, 1], 20)
  judges = {
    "mse": lambda z: jnp.mean((z - y.astype(float)) ** 2) / 2,
    "hinge": lambda z: jnp.mean(jax.nn.relu(1 - y.astype(float) * z)),
    "logistic": lambda z: jnp.mean(jax.nn.softplus(-y.astype(float) * z)),
    "cross_entropy": lambda z: optax.softmax_cross_entropy_with_integer_labels(
      z, y
    ).mean(),
  }
  with jax.enable_x64(True):
    loss, dz = jax.value_and_grad(judges[name])(jnp.asarray(z))
  got = getattr(linear, name)(z, y)
  np.testing.assert_allclose(got[0], loss, rtol=1e-12)
  np.testing.assert_allclose(got[1], dz, rtol=1e-10, atol=1e-14)


def test_losses_hold_at_large_scores():
  """No overflow: a hopeless score costs its size, a sure one nothing."""
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    z = np.array([-1e4, 1e4])
    assert linear.logistic(z, np.array([1, 1]))[0] == 5000
    loss, dz = linear.cross_entropy(np.array([[0, 1e4]]), np.array([0]))
  assert loss == 1e4
  np.testing.assert_allclose(dz, [[-1, 1]])


JUDGES = {
  "SGD": optax.sgd,
  "Momentum": lambda r: optax.sgd(r, 0.9),
  "Nesterov": lambda r: optax.sgd(r, 0.9, nesterov=True),
  "RMSProp": optax.rmsprop,
  "Adam": optax.adam,
  "AdamW": lambda r: optax.adamw(r, weight_decay=1e-2),
}


@pytest.mark.parametrize("kind", optimizers.ALL, ids=lambda k: k.__name__)
def test_optimizers_are_optax(kind):
  """Fifty steps down the valley, to 1e-12 in float64."""
  w = np.array([-1.2, 1.0])
  path = optimizers.walk(kind(1e-3), optimizers.valley_gradient, w, 50)
  judge = JUDGES[kind.__name__](1e-3)
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    other = jnp.asarray(w)
    state = judge.init(other)
    for _ in range(50):
      g = jax.grad(lambda w: optimizers.valley(w))(other)
      update, state = judge.update(g, state, other)
      other = other + update
  np.testing.assert_allclose(path[-1], other, rtol=1e-12)
  assert np.abs(path[-1] - path[0]).max() > 1e-3


def test_a_race_finds_each_its_own_rate():
  """Momentum beats plain descent by far; rates differ by their meaning."""
  found = {kind.__name__: optimizers.race(kind) for kind in optimizers.ALL}
  end = {name: optimizers.valley(path[-1]) for name, (_, path) in found.items()}
  assert max(end["Nesterov"], end["Momentum"]) < 1e-3 * end["SGD"]
  assert found["Adam"][0] > 10 * found["SGD"][0]


@pytest.mark.parametrize("module", [linear, optimizers])
def test_the_programs_print_and_draw(module, tmp_path, capsys):
  """What the docs page shows."""
  module.main([f"--out={tmp_path}"])
  name = module.__name__.split(".")[-1]
  assert (tmp_path / f"{name}.png").stat().st_size > 10_000
  said = capsys.readouterr().out
  assert ("moons" if module is linear else "Nesterov") in said
