"""The kernel that follows a table of pages, interpreted, against its twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_streaming import prompts
from tiny_models import VOCAB, random_params

from jaxlm.generate.decode import generate
from jaxlm.layers.at import At
from jaxlm.layers.attend import attend_reference
from jaxlm.layers.cache import Quantised
from jaxlm.layers.compute import Compute
from jaxlm.layers.in_place import in_place
from jaxlm.layers.kernels.paged import paged_attention
from jaxlm.layers.mask import Causal, Chunked, Sliding
from jaxlm.layers.paged import Paged
from jaxlm.models.families import llama
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset

MASKS = (Causal(), Sliding(6), Sliding(5, 2), Chunked(7))


def draw(*shape: int, seed: int = 0) -> jax.Array:
  """Normal values, float32."""
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


def pool(batch, columns, block, groups, dims, seed=0):
  """Keys, values, and a table into them, some entries of which are none."""
  rng, spare = np.random.default_rng(seed), 2
  table = rng.permutation(batch * columns + spare)[: batch * columns]
  table = table.reshape(batch, columns)
  table[-1, rng.integers(columns)] = -1
  k, v = (
    draw(batch * columns + spare, block, groups, d, seed=seed + i)
    for i, d in enumerate(dims)
  )
  return k, v, jnp.asarray(table, jnp.int32)


def twin(q, k, v, table, at, mask, **options):
  """Every page is read into one array first, as `Paged` does."""
  cache = {"k": k, "v": v, "table": table}
  none = {
    name: cache[name][:0].reshape(len(q), 0, *cache[name].shape[2:])
    for name in "kv"
  }
  nowhere = jnp.zeros((len(q), 0), jnp.int32)
  kind = Paged(k.shape[1])
  seen, _ = kind.extend(cache, none, nowhere, mask)
  keys = At(seen["positions"])
  y = attend_reference(
    q[:, None], seen["k"], seen["v"], mask, At(at[:, None]), keys, **options
  )
  return y[:, 0]


@st.composite
def cases(draw):
  """Sizes that divide nothing, a mask, and what belongs to heads."""
  size = {name: draw(st.integers(1, 3)) for name in ("batch", "groups")}
  size |= {"columns": draw(st.integers(1, 7)), "block": draw(st.integers(1, 5))}
  size["dims"] = draw(st.integers(1, 9)), draw(st.integers(1, 9))
  heads = size["groups"] * draw(st.integers(1, 3))
  options = {"softcap": draw(st.sampled_from([None, 1.5])), "scale": 0.4}
  names = [n for n in ("sinks", "slopes") if draw(st.booleans())]
  return size, heads, draw(st.sampled_from(MASKS)), options, names


@settings(max_examples=3)
@given(cases(), st.integers(0, 99))
def test_equals_the_twin(case, seed):
  """Values at 2e-6 for any page size, table, mask and position."""
  compare(case, seed, gpu=False)


@settings(max_examples=3)
@given(cases(), st.integers(0, 99))
def test_equals_the_twin_on_a_gpu(case, seed):
  """The same of the kernel for GPUs."""
  compare(case, seed, gpu=True)


def compare(case, seed: int, gpu: bool) -> None:
  """A kernel beside the twin."""
  size, heads, mask, options, names = case
  k, v, table = pool(**size, seed=seed)
  b, length = size["batch"], size["columns"] * size["block"]
  q = draw(b, heads, size["dims"][0], seed=seed)
  at = np.random.default_rng(seed).integers(-1, length, b)
  at = jnp.asarray(at, jnp.int32)
  options |= {name: draw_of(name, heads) for name in names}
  args = (q, k, v, table, at, mask)
  found = jax.jit(lambda: paged_attention(*args, **options, pages=2, gpu=gpu))()
  np.testing.assert_allclose(found, twin(*args, **options), atol=2e-6)


def draw_of(name: str, heads: int) -> jax.Array:
  """Sinks, or slopes as ALiBi has them."""
  return (
    draw(heads, seed=7)
    if name == "sinks"
    else 0.5 ** jnp.arange(1.0, heads + 1)
  )


def test_pages_that_are_not_seen_are_not_read():
  """NaN in a page leaves its mark if and only if the mask lets a query see some
  of it, whichever other page lies in the same step.
  """
  block, columns, at = 4, 6, jnp.asarray([21], jnp.int32)
  k, v, table = pool(1, columns, block, 1, (8, 8), seed=3)
  table = jnp.abs(table)
  q = draw(1, 2, 8)
  for mask in (Sliding(6, 2), Chunked(16)):
    run = jax.jit(
      lambda v, mask=mask: paged_attention(
        q, k, v, table, at, mask, scale=0.3, pages=1
      )
    )
    places = np.arange(columns * block).reshape(columns, block)
    want = np.asarray(mask.allows(21, places)).any(1)
    found = [
      bool(jnp.isnan(run(v.at[table[0, c]].set(jnp.nan))).any())
      for c in range(columns)
    ]
    assert found == want.tolist()


@pytest.mark.parametrize("rule", [None, "tp"])
def test_generation_through_the_kernel(rule):
  """Tokens are those of the twin; on a mesh a device has heads of its own."""
  model = llama.decoder(
    VOCAB, 16, 1, 8, kv_heads=8, head_dim=4, mlp_dim=16, max_positions=32
  )
  params, tokens = random_params(model), prompts(2, 5)
  want = generate(model, params, tokens, 6, cache=Paged(4))
  rules = rule and preset(rule)
  compute = Compute(unroll=True, attention="flash", rules=rules)
  kinds = {"cache": Paged(4), "compute": compute}
  if rule is None:
    found = generate(model, params, tokens, 6, **kinds)
  else:
    with jax.sharding.set_mesh(make_mesh(rules)):
      found = generate(model, params, tokens, 6, **kinds)
  np.testing.assert_array_equal(found, want)


def test_where_it_runs():
  """One query, a pool of numbers, and heads as the chip wants them."""
  one, two = jnp.zeros((1, 1, 2, 128)), jnp.zeros((1, 2, 2, 128))
  narrow, odd, auto = one[..., :64], one[..., :96], Compute()

  def on(platform: str, kind, *queries) -> list[bool]:
    device = jax.sharding.AbstractDevice(platform, 1, platform)
    mesh = jax.sharding.AbstractMesh((1,), ("fsdp",), abstract_device=device)
    cache = {"k": jnp.zeros((4, getattr(kind, "block", 16), 2, 8))}
    cache |= {"kind": kind} if kind else {}
    with jax.sharding.use_abstract_mesh(mesh):
      return [in_place(cache, q, auto) for q in queries]

  queries = one, two, narrow, odd
  assert on("cpu", Paged(), *queries) == [False] * 4
  assert on("tpu", Paged(), *queries) == [True, False, False, False]
  assert on("gpu", Paged(), *queries) == [True, False, True, False]
  assert on("gpu", Paged(5), one) == [False]
  assert on("tpu", None, one) == on("tpu", Quantised(inner=Paged()), one)
  assert on("tpu", None, one) == [False]
