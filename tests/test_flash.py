"""Flash attention's kernels, interpreted, against the definition.

Interpretation runs the same grid, blocks and sums as a TPU would, on the CPU;
tests/test_tpu_compile.py hands them to the TPU's compiler.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.layers.attend import At, attend, attend_reference, choose, visible
from jaxlm.layers.compute import Compute
from jaxlm.layers.kernels import visits
from jaxlm.layers.kernels.flash import flash_attention, plan_steps
from jaxlm.layers.kernels.flash_forward import Setting
from jaxlm.layers.kernels.tiles import Tiles
from jaxlm.layers.mask import Causal, Chunked, Full, PrefixLM, Sliding
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset

SMALL = Tiles(rows=32, keys=16, lanes=8)
MASKS = (Causal(), Full(), Sliding(5), Sliding(4, 2), Chunked(8), PrefixLM())


def draw(*shape: int, seed: int = 0) -> jax.Array:
  """Normal values, float32."""
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


def both(mask, at=None, keys=None, tiles=SMALL, chip=None, **shape):
  """Values and gradients of the kernels and of the definition."""
  size = {"b": 2, "t": 21, "s": 21, "n": 4, "g": 2, "h": 8, "d": 8} | shape
  b, t, s, n, g, h, d = (size[name] for name in "btsnghd")
  at, options = at or At(), {}
  args = {"q": draw(b, t, n, h), "k": draw(b, s, g, h, seed=1)}
  args["v"] = draw(b, s, g, d, seed=2)
  if shape.get("sinks"):
    args["sinks"] = draw(n, seed=3)
  if shape.get("slopes"):
    options["slopes"] = jnp.linspace(0.1, 0.5, n)
  options |= {"softcap": shape.get("softcap"), "scale": h**-0.5}
  weights = draw(b, t, n, d, seed=4)

  def run(form, **more):
    def loss(args):
      q, k, v = args["q"], args["k"], args["v"]
      y = form(
        q,
        k,
        v,
        mask,
        at,
        keys or at,
        sinks=args.get("sinks"),
        **options,
        **more,
      )
      return jnp.sum(y * weights), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(args)
    return y, grads

  found = run(flash_attention, tiles=tiles, chip=chip)
  return found, run(attend_reference)


def check(found, expected):
  """The kernels' promise: values at 2e-6, gradients at 1e-5."""
  np.testing.assert_allclose(found[0], expected[0], atol=2e-6, rtol=2e-6)
  for name, grad in expected[1].items():
    np.testing.assert_allclose(
      found[1][name], grad, atol=1e-5, rtol=1e-5, err_msg=name
    )


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(mask):
  """One kernel, every mask, groups of heads, rows that fill no block."""
  check(*both(mask))


def test_everything_at_once():
  """Sinks, soft cap, ALiBi, unequal lengths and widths, odd groups."""
  options = {"sinks": True, "slopes": True, "softcap": 2.0}
  check(*both(Causal(), t=9, s=40, n=6, g=2, d=12, **options))


def scattered(b: int, n: int, seed: int) -> jax.Array:
  """Positions in any order, some of them empty, as a ring buffer has them."""
  places = np.random.default_rng(seed).integers(-1, n, (b, n))
  return jnp.asarray(places, jnp.int32)


def runs(b: int, n: int, seed: int, least: int = 0) -> jax.Array:
  """Ids that stay the same for a while: documents, or images."""
  rng = np.random.default_rng(seed)
  ids = [np.cumsum(rng.random(n) < 0.2) + least for _ in range(b)]
  return jnp.asarray(np.stack(ids), jnp.int32)


def test_data_of_each_kind():
  """Explicit positions with empty slots, documents, and prefix blocks."""
  at = At(scattered(2, 5, 0), runs(2, 5, 1))
  keys = At(scattered(2, 37, 2), runs(2, 37, 3) % 5)
  check(*both(Sliding(7, 2), at, keys, t=5, s=37, sinks=True, slopes=True))
  pictures = At(None, runs(2, 21, 5), runs(2, 21, 4, least=-2))
  check(*both(PrefixLM(), pictures))


@st.composite
def cases(draw):
  """A mask, shapes that divide nothing, and what may come with the data."""
  size = {"b": draw(st.integers(1, 2)), "g": draw(st.integers(1, 2))}
  size["n"] = size["g"] * draw(st.integers(1, 3))
  size["t"], size["s"] = draw(st.integers(1, 40)), draw(st.integers(1, 40))
  size["h"], size["d"] = draw(st.integers(1, 9)), draw(st.integers(1, 9))
  size["softcap"] = draw(st.sampled_from([None, 1.5]))
  size |= {name: draw(st.booleans()) for name in ("sinks", "slopes")}
  kinds = {name: draw(st.booleans()) for name in ("positions", "segments")}
  kinds["blocks"] = draw(st.booleans())
  fields = []
  for n, seed in ((size["t"], 0), (size["s"], 9)):
    fields.append(
      At(
        scattered(size["b"], n, seed) if kinds["positions"] else None,
        runs(size["b"], n, seed + 1) if kinds["segments"] else None,
        runs(size["b"], n, seed + 2, -1) if kinds["blocks"] else None,
      )
    )
  mask = draw(st.sampled_from(MASKS))
  tiles = Tiles(draw(st.sampled_from([8, 32])), draw(st.sampled_from([8, 16])))
  tiles = dataclasses.replace(tiles, lanes=8)
  return mask, *fields, tiles, size


@settings(max_examples=6)
@given(cases())
def test_equals_the_definition(case):
  """Any mask, shape and data: what a fast run has time for."""
  mask, at, keys, tiles, size = case
  check(*both(mask, at, keys, tiles, **size))


@pytest.mark.slow
@settings(max_examples=60, derandomize=False)
@given(cases())
def test_equals_the_definition_more_often(case):
  """The same, other cases in every run."""
  mask, at, keys, tiles, size = case
  check(*both(mask, at, keys, tiles, **size))


def test_half_precision():
  """In bfloat16 the kernel rounds what the definition rounds, and sums in
  float32: both are as near to the float32 answer.
  """
  q, k, v = (draw(2, 40, 4, 16, seed=n) for n in range(3))
  low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  more = (Causal(), At(), At())
  found = flash_attention(*low, *more, scale=0.25, tiles=SMALL)
  assert found.dtype == jnp.bfloat16
  want = attend_reference(
    *(x.astype(jnp.float32) for x in low), *more, scale=0.25
  )
  np.testing.assert_allclose(found.astype(jnp.float32), want, atol=0.02)


# --- Blocks that a mask excludes --------------------------------------------


def setting(mask, t, s, queries, keys) -> Setting:
  """Blocks of `queries` x `keys` of one head."""
  return Setting(mask, queries, queries, keys, s, 1.0, None, (), False, False)


def pairs(words) -> list[tuple[int, int]]:
  """The blocks of a row of steps, in order, without idle ones."""
  live = [w for w in np.asarray(words).tolist() if w & visits.LIVE]
  return [(w >> 16, (w >> 4) & (visits.INNER - 1)) for w in live]


SIZES = st.sampled_from([1, 2, 4, 8, 16])


@given(
  st.one_of(
    st.sampled_from([Causal(), Full(), PrefixLM()]),
    st.builds(Sliding, st.integers(1, 30), st.integers(0, 20)),
    st.builds(Chunked, st.integers(1, 30)),
  ),
  *(st.integers(1, 70), st.integers(1, 70), SIZES, SIZES),
)
def test_steps_are_the_blocks_with_a_visible_pair(mask, t, s, queries, keys):
  """Exactly these, however the mask and the blocks lie to each other; and one
  for a block of queries that sees nothing, whose output is still written.
  """
  see = np.asarray(mask.allows(np.arange(t)[:, None], np.arange(s)[None]))
  want = {
    (i // queries, j // keys) for i, j in zip(*np.nonzero(see), strict=True)
  }
  by_query, by_key = plan_steps(setting(mask, t, s, queries, keys), {}, t)
  blocks, found = range(-(-t // queries)), pairs(by_query.words[0])
  lone = {(i, 0) for i in blocks} - {(i, 0) for i, _ in want}
  assert found == sorted(want | lone)
  other = {(j, i) for i, j in want}
  lone = {(j, 0) for j in range(-(-s // keys))} - {(j, 0) for j, _ in other}
  assert pairs(by_key.words[0]) == sorted(other | lone)


def test_steps_of_data_are_the_blocks_that_can_meet():
  """Documents of 16 in blocks of 8: two by two, causal, of each row's own;
  the shorter row idles, and its first and last steps are marked.
  """
  first, second = np.arange(64) // 16, np.arange(64) // 32
  ids = jnp.asarray(np.stack([first, second]), jnp.int32)
  data = {"segments": (ids, ids)}
  fixed = dataclasses.replace(
    setting(Causal(), 64, 64, 8, 8), fields=("segments",)
  )
  steps, _ = plan_steps(fixed, data, 64)
  want = [
    sorted((i, j) for i in range(8) for j in range(i + 1) if i // n == j // n)
    for n in (2, 4)
  ]
  assert [pairs(words) for words in steps.words] == want
  assert int(steps.count) == max(map(len, want)) == 20
  for words in np.asarray(steps.words):
    assert np.sum(words & visits.FIRST > 0) == 8
    assert np.sum(words & visits.LAST > 0) == 4 * 2


@pytest.mark.parametrize(
  ("mask", "at"),
  [
    (Causal(), At()),
    (Sliding(9), At()),
    (Sliding(9, 1), At()),
    (Chunked(16), At()),
    (Causal(), At(segments=(jnp.arange(64, dtype=jnp.int32) // 16)[None])),
  ],
  ids=["causal", "sliding", "sinks", "chunked", "documents"],
)
def test_excluded_blocks_are_not_read(mask, at):
  """A block with NaN leaves its mark where it is visited, seen or not: the
  marks of a run, forward and backward, are the visible blocks and no more.
  """
  blocks = 4
  q, k, v, do = (draw(1, 64, 1, 8, seed=n) for n in range(4))
  see = visible(mask, at, at, 64, 64)[0]
  want = np.asarray(see).reshape(blocks, 16, blocks, 16).any((1, 3))
  tiles = Tiles(rows=16, keys=16, lanes=8)

  @jax.jit
  def run(q, k, v, do):
    def form(q, k, v):
      return flash_attention(q, k, v, mask, at, at, scale=0.3, tiles=tiles)

    y, back = jax.vjp(form, q, k, v)
    return y, *back(do)

  def marks(x: jax.Array) -> np.ndarray:
    return np.isnan(np.asarray(x)).reshape(blocks, -1).any(1)

  for n in range(blocks):
    rows = jnp.arange(64)[None, :, None, None] // 16 == n
    y, dq, _, _ = run(q, k, jnp.where(rows, jnp.nan, v), do)
    np.testing.assert_array_equal(marks(y), want[:, n])
    np.testing.assert_array_equal(marks(dq), want[:, n])
    _, _, dk, dv = run(q, k, v, jnp.where(rows, jnp.nan, do))
    np.testing.assert_array_equal(marks(dk), want[n])
    np.testing.assert_array_equal(marks(dv), want[n])


# --- The choice -------------------------------------------------------------


def test_the_choice_and_its_reason():
  """On a CPU it is plain XLA unless asked; for a TPU the kernel, but for a
  single query.
  """
  assert choose(Compute())[0] == "blocks"
  assert choose(Compute(attention="flash")) == ("flash", "asked for")
  device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("fsdp",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert choose(Compute(), 100)[0] == "flash"
    assert choose(Compute(), 1)[0] == "reference"
    assert "cpu" not in choose(Compute())[1]


def test_on_a_mesh():
  """Each device runs it on its own rows and heads."""
  rules = preset("fsdp")
  q, k, v = (draw(8, 12, n, 8, seed=n) for n in (4, 2, 3))
  v = v[:, :, :2]
  at = At(segments=runs(8, 12, 0))

  def run(compute):
    def loss(q, k, v):
      return jnp.sum(attend(q, k, v, Causal(), at, compute=compute) ** 2)

    return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

  want = run(Compute(attention="reference"))
  with jax.set_mesh(make_mesh(rules)):
    found = run(Compute(attention="flash", rules=rules))
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(np.asarray(a), b, atol=1e-5)


def test_heads_that_cannot_be_shared():
  """Three query heads have no way to share two key heads."""
  q, k = draw(1, 4, 3, 8), draw(1, 4, 2, 8)
  with pytest.raises(UserError, match="3 query heads"):
    attend(q, k, k, Causal(), compute=Compute(attention="flash"))
