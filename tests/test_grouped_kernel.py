"""Grouped products for TPUs and GPUs, interpreted, against a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.layers.kernels import grouped_gpu, grouped_tpu

ROWS, GROUPS = 300, 4


def draw(*shape: int, seed: int = 0) -> np.ndarray:
  """Normal values, float32."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def products(chip, x, w, dy, sizes) -> tuple:
  """The product and both its gradients."""
  return (
    chip.times(x, w, sizes, axis=0, interpret=True),
    chip.times(dy, w, sizes, axis=1, interpret=True),
    chip.gradient(x, dy, sizes, interpret=True),
  )


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
  """Results of several tiles, though they are small."""
  monkeypatch.setattr(grouped_tpu, "WIDE", 4)


@pytest.mark.parametrize("chip", [grouped_tpu, grouped_gpu])
@given(
  st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(sorted)
)
def test_equals_a_loop_over_the_groups(chip, cuts: list[int]):
  """Values at 2e-6 and gradients at 1e-5, for groups that are empty, begin
  and end anywhere in a tile of rows, and rows that belong to none.
  """
  ends, starts = np.array(cuts), np.array([0, *cuts[:-1]])
  x, w, dy = draw(ROWS, 6), draw(GROUPS, 6, 5, seed=1), draw(ROWS, 5, seed=2)
  want = np.zeros((ROWS, 5)), np.zeros((ROWS, 6)), np.zeros_like(w)
  for g, (a, b) in enumerate(zip(starts, ends, strict=True)):
    want[0][a:b] = x[a:b] @ w[g]
    want[1][a:b] = dy[a:b] @ w[g].T
    want[2][g] = x[a:b].T @ dy[a:b]
  found = products(chip, x, w, dy, (ends - starts).astype(np.int32))
  for y, expected in zip(found, want, strict=True):
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_contracted_in_parts():
  """A matrix too deep for the chip is read in parts; what hangs over the last
  is nobody's.
  """
  x, w = draw(130, 2500), draw(2, 2500, 4, seed=1)
  sizes = np.array([77, 53], np.int32)
  want = np.concatenate([x[:77] @ w[0], x[77:] @ w[1]])
  for chip in (grouped_tpu, grouped_gpu):
    for axis, matrix in enumerate((w, np.swapaxes(w, 1, 2))):
      found = jax.jit(functools.partial(chip.times, axis=axis, interpret=True))(
        x, matrix, sizes
      )
      np.testing.assert_allclose(found, want, atol=2e-3, rtol=1e-5)


def test_steps_visit_each_pair_once():
  """Tiles and groups that meet, no others; a group without rows only where its
  gradient has to be written.
  """
  sizes = jnp.asarray([100, 0, 200, 0], jnp.int32)
  steps = grouped_tpu.plan(sizes, 384, 128, empty=False)
  n = int(steps.count[0])
  pairs = list(zip(steps.tiles.tolist(), steps.groups.tolist(), strict=True))
  assert pairs[:n] == [(0, 0), (0, 2), (1, 2), (2, 2), (2, 4)]
  steps = grouped_tpu.plan(sizes, 384, 128, empty=True)
  assert steps.groups.tolist()[: int(steps.count[0])] == [0, 1, 2, 2, 2, 3]
