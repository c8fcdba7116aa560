"""The page of autograd equals JAX on random graphs; so do einsum's strings."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.ladder import autograd, einsum_grad, tensor
from jaxlm.ladder.tensor import Tensor

JAX = types.SimpleNamespace(
  exp=jnp.exp, log=jnp.log, tanh=jnp.tanh, relu=jax.nn.relu, einsum=jnp.einsum
)


def one_step(rng, pool, ops):
  """A random operation on random members of the pool, all [3, 4] or so.

  Every branch draws the same numbers for both libraries, so both build the
  same graph.
  """
  a, b = (pool[i] for i in rng.integers(0, len(pool), 2))
  turn = rng.integers(0, 16)
  row, column = b.sum(0, keepdims=True), b.sum(1, keepdims=True)
  rows = rng.integers(0, 3, 3)  # some twice
  return [
    lambda: a + row,
    lambda: column - a,
    lambda: a * b,
    lambda: a / (1.5 + ops.tanh(column)),
    lambda: 2.0 / (1.5 + ops.tanh(b)),
    lambda: ops.exp(ops.tanh(a)) * row,
    lambda: ops.log(1.0 + b**2),
    lambda: ops.relu(a) - b,
    lambda: ops.tanh(a @ b.transpose(1, 0)) @ b,
    lambda: a[rows] + b[:, ::-1],
    lambda: a[0] + b[rows, 1:3].max(1)[:, None],
    lambda: a.reshape(2, 6).max(0, keepdims=True).reshape(3, 2)[:, :1] * b,
    lambda: ops.einsum("ij,kj,kl->il", a, b, b) / 8.0,
    lambda: a.mean() + ops.tanh(b).mean(1)[:, None] * a,
    lambda: (a.reshape(3, 2, 2) @ b.reshape(3, 2, 2)).reshape(3, 4),
    lambda: (a @ b[0])[:, None] * np.linspace(0.5, 1.0, 4)[None] + a,
  ][turn]()


def graph(seed, leaves, ops):
  """Eight operations, each on what is there so far; a number in the end."""
  rng, pool = np.random.default_rng(seed), list(leaves)
  for _ in range(8):
    pool.append(ops.tanh(one_step(rng, pool, ops)))
  return (pool[-1] * pool[-2] + pool[-3]).sum()


@pytest.mark.parametrize(
  "block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))]
)
def test_two_hundred_random_graphs(block):
  """Broadcasting, matmul, reductions, indexing: as `jax.grad`, to 1e-10."""
  for seed in range(20 * block, 20 * block + 20):
    leaves = np.random.default_rng(1000 + seed).normal(size=(3, 3, 4))
    xs = [Tensor(x) for x in leaves]
    y = graph(seed, xs, tensor)
    got = autograd.grad(y, xs)
    # Not compiled: two hundred programs would be, each used once.
    with jax.enable_x64(True), jax.disable_jit():
      judge = jax.value_and_grad(functools.partial(graph, seed, ops=JAX))
      with jax.numpy_rank_promotion("allow"):  # broadcasting is on trial
        exact, slopes = judge([jnp.asarray(x) for x in leaves])
    np.testing.assert_allclose(y.value, exact, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(got, slopes, rtol=1e-10, atol=1e-10)


def test_the_graphs_reach_every_operation():
  """Two hundred seeds take each of the sixteen turns."""
  seen = set()

  class Spy:
    def __init__(self, rng):
      self.rng = rng

    def integers(self, low, high, size=None):
      value = self.rng.integers(low, high, size)
      if high == 16:
        seen.add(int(value))
      return value

  pool = [Tensor(np.ones((3, 4)))]
  for seed in range(200):
    one_step(Spy(np.random.default_rng(seed)), pool, tensor)
  assert seen == set(range(16))


def test_a_weight_used_twice_is_paid_twice():
  """And an entry taken twice, and one not used at all."""
  a, b, c = Tensor([1.0, 2.0]), Tensor(3.0), Tensor([5.0])
  got = autograd.grad((a * b + a[[0, 0]]).sum(), [a, b, c])
  np.testing.assert_array_equal(got[0], [5.0, 3.0])
  np.testing.assert_array_equal(got[1], 3.0)
  np.testing.assert_array_equal(got[2], [0.0])


def test_equals_share_the_largest():
  """As JAX has it: half each."""
  a = Tensor([2.0, 2.0, 1.0])
  np.testing.assert_array_equal(autograd.grad(a.max(), [a])[0], [0.5, 0.5, 0])


def test_only_a_number_has_a_gradient():
  """A vector would need a direction."""
  with pytest.raises(ValueError, match="shape"):
    autograd.grad(Tensor([1.0]), [])


def test_a_long_chain_is_walked():
  """Deeper than Python's stack."""
  x = Tensor(1.0)
  y = x
  for _ in range(3000):
    y = y + 0.001
  assert autograd.grad(y, [x])[0] == 1.0


def test_one_network_two_libraries_one_curve():
  """Three hundred steps of the rung's network, to 1e-10."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(40, 2)), np.eye(2)[rng.integers(0, 2, 40)]
  first = autograd.start(rng, (2, 8, 2))
  with jax.enable_x64(True):
    _, judge = autograd.descend(autograd.by_jax(x, y), first, 300)
  _, seen = autograd.descend(autograd.by_hand(x, y), first, 300)
  np.testing.assert_allclose(seen, judge, atol=1e-10)
  assert seen[-1] < 0.9 * seen[0]


@st.composite
def specs(draw):
  """One to three operands of up to three letters, some met twice."""
  word = st.text("abcd", min_size=0, max_size=3)
  inner = draw(st.lists(word, min_size=1, max_size=3))
  letters = sorted(set("".join(inner)))
  kept = [c for c in letters if draw(st.booleans())]
  return ",".join(inner) + "->" + "".join(draw(st.permutations(kept)))


@given(specs(), st.integers(0, 99))
def test_the_gradient_of_any_einsum(spec, seed):
  """Traces, diagonals, sums and outer products included."""
  rng, sizes = np.random.default_rng(seed), {"a": 2, "b": 3, "c": 4, "d": 1}
  inner, out = einsum_grad.parse(spec)
  xs = [rng.normal(size=[sizes[c] for c in letters]) for letters in inner]
  dy = rng.normal(size=[sizes[c] for c in out])
  with jax.enable_x64(True), jax.disable_jit():
    pull = jax.vjp(lambda *xs: jnp.einsum(spec, *xs), *map(jnp.asarray, xs))[1]
    exact = pull(jnp.asarray(dy))
  for i, judge in enumerate(exact):
    got = einsum_grad.gradient(spec, xs, i, dy)
    np.testing.assert_allclose(got, judge, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", ["ab,bc", "a...->a", "a->b", "ab->aa", "1->"])
def test_a_wrong_string_is_one_sentence(spec):
  """It names the string."""
  with pytest.raises(UserError, match="einsum"):
    einsum_grad.main([f"--spec={spec}"])


def test_the_programs_print_and_draw(tmp_path, capsys):
  """What the docs page shows."""
  autograd.main([f"--out={tmp_path}", "--steps=20"])
  einsum_grad.main([])
  said = capsys.readouterr().out
  assert "largest difference" in said
  assert "bqk,bkd->bqd" in said
  assert (tmp_path / "autograd.png").stat().st_size > 10_000
