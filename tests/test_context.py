"""Rows split over devices: the same attention, the same training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divided import agree, alone, train
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import DIM, VOCAB, block, random_params, random_tokens

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.attend import attend
from jaxlm.layers.compute import Compute, Split
from jaxlm.layers.context import zigzag
from jaxlm.layers.mask import Causal, Chunked, Full, PrefixLM, Sliding
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.position import Alibi
from jaxlm.layers.recurrent import RNN
from jaxlm.layers.rglru import RGLRU
from jaxlm.layers.ring_plan import Setting, plan, stand
from jaxlm.models.decoder import Block, Decoder, forward
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset

WAYS = 4
MASKS = [Causal(), Full(), Sliding(5), Sliding(9, 2), Chunked(6), PrefixLM()]

# --- The plan ---------------------------------------------------------------


def setting(mask, order, each: int, ways: int = WAYS, gather=False) -> Setting:
  """What there is to know of plain attention."""
  return Setting(
    mask, "context", ways, each, each, order, False, gather, 1.0, None
  )


@given(
  st.one_of(
    st.sampled_from(MASKS),
    st.builds(Sliding, st.integers(1, 40), st.integers(0, 3)),
    st.builds(Chunked, st.integers(1, 40)),
  ),
  st.sampled_from(["plain", "zigzag"]),
  st.integers(1, 12),
  st.integers(1, 9),
  st.booleans(),
)
def test_a_plan_has_every_pair_that_sees_each_other_once(
  mask, order, half, ways, gather
):
  """Every mask, any number of devices: no pair is lost and none is double.

  A pair in which nothing is seen is not in the plan, unless a device waits.
  """
  each = 2 * half
  where = stand(order, ways, each)
  assert sorted(where.ravel()) == list(range(ways * each))
  see = mask.allows(where.reshape(-1)[:, None], where.reshape(-1)[None])
  found = np.zeros_like(see, int)
  fixed = setting(mask, order, each, ways, gather)
  n = fixed.cut(each)
  size = each // n
  for run in plan(fixed):
    for step, devices in enumerate(run.pairs, run.first):
      for device, pairs in enumerate(devices):
        from_ = 0 if gather else (device - step) % ways
        for a, b, live in pairs:
          q, k = device * each + a * size, from_ * each + b * size
          found[q : q + size, k : k + size] += live
          assert not live or see[q : q + size, k : k + size].any()
  assert found.max() == 1
  assert not (see & (found == 0)).any()


def pairs(mask, order: str, ways: int) -> int:
  """Pairs of pieces that the slowest device of each step computes, added up."""
  runs = plan(setting(mask, order, 64, ways))
  return sum(run.pairs.shape[0] * run.pairs.shape[2] for run in runs)


def test_a_zigzag_halves_causal_work():
  """Of 4 pairs a step two are seen: 2 n + 1 instead of 4 n - 1."""
  for ways in (2, 4, 8, 16):
    assert pairs(Causal(), "plain", ways) == 4 * ways - 1
    assert pairs(Causal(), "zigzag", ways) == 2 * ways + 1


def test_steps_that_a_window_excludes_are_not_taken():
  """64 tokens a device: a window of 64 reaches one neighbour, of 65 too."""
  steps = [
    [run.first + i for run in found for i in range(len(run.pairs))]
    for window in (1, 64, 66)
    for found in [plan(setting(Sliding(window), "plain", 64, 8))]
  ]
  assert steps == [[0], [0, 1], [0, 1, 2]]


# --- Attention --------------------------------------------------------------

SHAPE = (2, 32, 4, 2, 6)  # rows, tokens, heads, kv heads, features


@functools.cache
def mesh_of(sizes: str = "data:2,context:4"):
  """Two rows, each on four devices."""
  return make_mesh(preset("cp"), sizes)


def differences(
  mask, seed=0, form="ring", shape=SHAPE, fields=(), kernel="auto", **options
):
  """Values and gradients of split rows less those of one device, largest.

  Plain rows where no fields are given; positions as those of a zigzag or of
  packed documents, segments and blocks at random.
  """
  rng = np.random.default_rng(seed)
  b, t, n, g, h = shape
  q, k, v, w = (
    jnp.asarray(rng.normal(size=(b, t, m, h)), jnp.float32)
    for m in (n, g, g, n)
  )
  sinks = jnp.asarray(rng.normal(size=n), jnp.float32)
  at, order = At(), None
  if "zigzag" in fields:
    row = stand("zigzag", WAYS, t // WAYS).reshape(1, -1)
    at, order = At(jnp.asarray(np.tile(row, (b, 1)))), "zigzag"
  if "positions" in fields:
    at = At(jnp.asarray(rng.integers(0, t, (b, t)), jnp.int32))
  if "segments" in fields:
    found = np.sort(rng.integers(0, 3, (b, t)), axis=1)
    at = at.replace(segments=jnp.asarray(found, jnp.int32))
  if "blocks" in fields:
    found = rng.integers(-1, 2, (b, t))
    at = at.replace(blocks=jnp.asarray(found, jnp.int32))

  def both(compute, order=None):
    def loss(q, k, v, sinks):
      place = at.replace(order=order)
      s = sinks if "sinks" in fields else None
      y = attend(
        q, k, v, mask, place, sinks=s, scale=0.4, compute=compute, **options
      )
      return jnp.sum(y * w), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))

  want = both(Compute(attention="reference"))(q, k, v, sinks)
  with jax.sharding.set_mesh(mesh_of()):
    compute = Compute(rules=preset("cp"), split=Split(form), attention=kernel)
    got = both(compute, order)(q, k, v, sinks)
  away = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), got[1], want[1])
  worst = float(np.abs(got[0][1] - want[0][1]).max())
  return max([worst, *jax.tree.leaves(away)])


EVERYTHING = {"softcap": 2.0, "alibi": Alibi()}
CASES = [
  (Causal(), ("zigzag",), {}),
  (Full(), (), {}),
  (Sliding(5), ("zigzag", "segments"), {}),
  (Sliding(9, 2), ("zigzag", "sinks"), {}),
  (Chunked(6), (), {}),
  (PrefixLM(), ("zigzag", "blocks"), {}),
  (Causal(), ("positions", "segments", "sinks"), EVERYTHING),
]


@pytest.mark.parametrize("form", ["ring", "gather"])
@pytest.mark.parametrize(("mask", "fields", "options"), CASES)
def test_split_rows_attend_as_one_device(mask, fields, options, form):
  """Every mask and option, values and gradients of q, k, v and sinks."""
  assert differences(mask, 0, form, fields=fields, **options) < 1e-5


@pytest.mark.parametrize(
  ("mask", "fields", "form", "kernel"),
  [
    (Sliding(9, 2), ("zigzag", "segments", "sinks"), "ring", "flash"),
    (Causal(), ("zigzag",), "gather", "flash"),
    (Chunked(6), ("sinks",), "ring", "triton"),
  ],
)
def test_kernels_work_on_parts(mask, fields, form, kernel):
  """A pair of parts is a kernel's, on a TPU or a GPU; here interpreted."""
  assert differences(mask, 0, form, fields=fields, kernel=kernel) < 1e-5


@pytest.mark.slow
@settings(max_examples=10)
@given(
  st.sampled_from(MASKS),
  st.integers(1, 5),
  st.sampled_from([(4, 4), (4, 1), (6, 2)]),
  st.sets(st.sampled_from(["zigzag", "segments", "blocks", "sinks"])),
  st.sampled_from(["ring", "gather"]),
  st.sampled_from([{}, EVERYTHING]),
)
def test_any_length_that_divides(mask, half, heads, fields, form, options):
  """Any combination, at lengths down to one token of each half."""
  shape = (2, 2 * half * WAYS, *heads, 6)
  assert differences(mask, half, form, shape, fields, **options) < 1e-5


def test_memory_grows_with_the_length():
  """Twice the tokens, twice the memory of the backward pass, not four times.

  At most a dozen arrays as large as a device's queries; its scores for the
  whole row would be sixty.
  """
  rules = preset("cp")

  def temporary(t: int) -> int:
    mesh = make_mesh(rules)
    with jax.sharding.set_mesh(mesh):
      place = NamedSharding(mesh, PartitionSpec(None, "context", None, None))
      x = jax.ShapeDtypeStruct((1, t, 1, 64), jnp.float32, sharding=place)

      def loss(q, k, v):
        y = attend(q, k, v, Causal(), compute=Compute(rules=rules))
        return jnp.sum(y**2)

      program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    return program.memory_analysis().temp_size_in_bytes

  small, large = temporary(8192), temporary(32768)
  queries = 32768 // 8 * 64 * 4
  assert large < 5 * small
  assert large < 16 * queries < 4 * (32768 // 8) * 32768 / 8


# --- Layout -----------------------------------------------------------------


def test_a_zigzag_there_and_back():
  """What moves lies as the plan supposes, and comes home."""
  rules = preset("cp")
  with jax.sharding.set_mesh(make_mesh(rules, "data:2,context:4")):
    compute = Compute(rules=rules)
    x = jnp.tile(jnp.arange(24, dtype=jnp.int32)[None], (2, 1))
    there = zigzag(x, compute)
    back = zigzag(there, compute, back=True)
  np.testing.assert_array_equal(
    np.asarray(there)[0], stand("zigzag", 4, 6).ravel()
  )
  np.testing.assert_array_equal(back, x)


def test_a_length_that_does_not_divide_is_explained():
  """Thirty tokens on eight devices: 32 would do."""
  compute = Compute(rules=preset("cp"))
  model = Decoder(VOCAB, DIM, (((block(),), 1),), RMSNorm(DIM), 64)
  params, tokens = random_params(model), jnp.zeros((1, 30), jnp.int32)
  said = r"30 tokens.* 8 devices.*nearest.* 32"
  mesh = make_mesh(preset("cp"))
  with jax.sharding.set_mesh(mesh), pytest.raises(UserError, match=said):
    forward(model, params, tokens, compute=compute)


def test_an_unknown_form_is_explained():
  """The known ones are named."""
  compute = Compute(rules=preset("cp"), split=Split("tree"))
  q = jnp.zeros((2, 8, 2, 4))
  said = r"'tree'; known: ring, gather"
  with jax.sharding.set_mesh(mesh_of()), pytest.raises(UserError, match=said):
    attend(q, q, q, Causal(), compute=compute)


# --- Training ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "rule", "sizes", "form"),
  [
    ("dense", "fsdp_cp", "fsdp:2,context:4", "ring"),
    ("balanced", "cp", "data:2,context:4", "ring"),
    ("latent", "cp", "context:8", "gather"),
  ],
)
def test_split_rows_train_as_one_device(name, rule, sizes, form):
  """Forward, gradients, optimizer; every kind of layer that attends."""
  agree(train(name, rule, sizes, split=Split(form)), alone(name))


def test_recurrences_read_whole_rows():
  """They ask who comes before: rows stay in order, and are gathered."""
  rules = preset("cp")
  blocks = tuple(
    Block(mixer, GLU(DIM, 24, silu), RMSNorm(DIM))
    for mixer in (RNN(DIM, hidden=DIM), RGLRU(DIM, DIM))
  )
  model = Decoder(VOCAB, DIM, ((blocks, 1),), RMSNorm(DIM), 64)
  params, tokens = random_params(model), random_tokens(2, 16)

  def run(compute):
    return jax.jit(lambda p, t: forward(model, p, t, compute=compute))(
      params, tokens
    )

  want = run(Compute())
  with jax.sharding.set_mesh(make_mesh(rules, "data:2,context:4")):
    got = run(Compute(rules=rules))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_packed_rows_in_chunks_under_watch():
  """Own positions, segments, a chunked loss, remat and the largest logits."""
  options = {"packed": True, "chunk": 8, "remat": "full", "watch": True}
  got = train("windows", "fsdp_tp_cp", **options)
  want = train("windows", **options)
  agree(got, want)
  np.testing.assert_allclose(
    got[1]["max_logit"], want[1]["max_logit"], rtol=1e-4
  )
