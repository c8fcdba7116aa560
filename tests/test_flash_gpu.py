"""Flash attention's kernels for GPUs, interpreted, against the definition.

The cases are those of tests/test_flash.py. docs/kernels-h100.txt is what the
GPU's own compiler said of the kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from test_flash import MASKS, both, cases, check, draw, runs

from jaxlm.layers.attend import FORMS, At, attend, attend_reference, choose
from jaxlm.layers.attend import visible as sees
from jaxlm.layers.compute import Compute
from jaxlm.layers.kernels import visits
from jaxlm.layers.kernels.flash import GPU, flash_attention
from jaxlm.layers.kernels.tiles import Powers
from jaxlm.layers.mask import Causal, Chunked, PrefixLM, Sliding

on_gpu = functools.partial(both, chip=GPU, tiles=Powers(32, 16, 8))


@pytest.mark.parametrize("mask", [Sliding(4, 2), PrefixLM()], ids=str)
def test_masks(mask):
  """Groups of heads, rows that fill no block; documents and images."""
  at = At(None, runs(2, 21, 5), runs(2, 21, 4, least=-2))
  check(*on_gpu(mask, at))


def test_everything_at_once():
  """Sinks, soft cap, ALiBi, unequal lengths and widths, odd groups."""
  options = {"sinks": True, "slopes": True, "softcap": 2.0}
  check(*on_gpu(Causal(), t=9, s=40, n=6, g=2, h=5, d=12, **options))


@settings(max_examples=2)
@given(cases())
def test_equals_the_definition(case):
  """Any mask, shape and data: what a fast run has time for."""
  mask, at, keys, tiles, size = case
  tiles = Powers(tiles.rows, tiles.keys, tiles.lanes)
  check(*both(mask, at, keys, tiles, chip=GPU, **size))


@pytest.mark.slow
@settings(max_examples=5, derandomize=False)
@given(cases())
def test_equals_the_definition_more_often(case):
  """The same, other cases in every run."""
  test_equals_the_definition.hypothesis.inner_test(case)


@pytest.mark.parametrize("mask", MASKS[2:5], ids=str)
def test_lists_are_the_blocks_with_a_visible_pair(mask):
  """By queries and by keys, exactly these and in order, whether the trace or
  only the device knows them.
  """
  see = np.asarray(sees(mask, At(), At(), 40, 56)[0])
  want = see.reshape(10, 4, 7, 8).any((1, 3))
  for table in (want, want.T):
    forms = (np, table[None]), (jnp, jnp.asarray(table)[None])
    for form, seen in forms:
      inner, count = visits.lists(seen, form)
      for row, blocks, n in zip(table, inner[0], count[0], strict=True):
        assert np.flatnonzero(row).tolist() == np.asarray(blocks[:n]).tolist()


@pytest.mark.parametrize("mask", [Sliding(9, 1), Chunked(16)], ids=str)
def test_excluded_blocks_are_not_read(mask):
  """A block with NaN leaves its mark where it is visited, seen or not."""
  at, tiles = At(), Powers(16, 16, 8)
  q, k, v, do = (draw(1, 64, 1, 8, seed=n) for n in range(4))
  see = np.asarray(sees(mask, at, at, 64, 64)[0])
  want = see.reshape(4, 16, 4, 16).any((1, 3))

  @jax.jit
  def marks(v, do):
    form = functools.partial(flash_attention, scale=0.3, tiles=tiles, chip=GPU)
    y, back = jax.vjp(lambda *x: form(*x, mask, at, at), q, k, v)
    every = jnp.stack([y, *back(do)])
    return jnp.isnan(every).reshape(4, 4, -1).any(2)

  for n in range(4):
    rows = jnp.arange(64)[None, :, None, None] // 16 == n
    y, dq, _, _ = np.asarray(marks(jnp.where(rows, jnp.nan, v), do))
    np.testing.assert_array_equal(y, want[:, n])
    np.testing.assert_array_equal(dq, want[:, n])
    _, _, dk, dv = np.asarray(marks(v, jnp.where(rows, jnp.nan, do)))
    np.testing.assert_array_equal(dk, want[n])
    np.testing.assert_array_equal(dv, want[n])


def test_blocks_fit_the_chip():
  """64 x 64 of usual heads, less of wide ones, none where nothing fits: then
  plain XLA has the same answer.
  """
  sides = {n: GPU.tiles.fit(n).rows for n in (128, 256, 512, 1024, 2048)}
  assert sides == {128: 64, 256: 64, 512: 64, 1024: 32, 2048: 16}
  q, k = draw(1, 4, 2, 576), draw(1, 4, 1, 576)
  more = (Causal(), At(), At())
  np.testing.assert_allclose(
    FORMS["triton"](q, k, k, *more, scale=0.1),
    attend_reference(q, k, k, *more, scale=0.1),
    atol=1e-5,
  )


def test_the_choice_and_its_reason():
  """On a GPU it is the kernel, but for a single query."""
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("fsdp",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert choose(Compute(), 100) == ("triton", "the kernel for GPUs")
    assert choose(Compute(), 1)[0] == "reference"
  assert choose(Compute(attention="cudnn")) == ("cudnn", "asked for")


@pytest.mark.parametrize(
  ("mask", "more"),
  [
    (Causal(), {}),
    (Sliding(5), {}),
    (Sliding(5, 2), {}),
    (Causal(), {"softcap": 2.0}),
  ],
  ids=["causal", "sliding", "sinks", "soft cap"],
)
def test_cudnn_means_the_same(mask, more):
  """What is said to cuDNN is what the mask says, and what it cannot be told
  goes by the kernel; a CPU hears the same from XLA.
  """
  q, k, v = (draw(1, 20, n, 16, seed=n) for n in (4, 2, 3))
  low = [x.astype(jnp.bfloat16) for x in (q, k, v[:, :, :2])]
  want = attend(*low, mask, compute=Compute(attention="reference"), **more)
  found = attend(*low, mask, compute=Compute(attention="cudnn"), **more)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    *(x.astype(jnp.float32) for x in (found, want)), atol=0.03
  )
