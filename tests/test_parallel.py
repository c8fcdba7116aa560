"""Eight devices give what one gives, and hold an eighth of it each."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import random_params

from jaxlm.errors import UserError
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import abstract, paths, shardings
from jaxlm.models.decoder import Decoder, forward
from jaxlm.models.families import gpt2, llama, modern, qwen3
from jaxlm.objectives import next_token
from jaxlm.parallel.mesh import make_mesh, parse_sizes
from jaxlm.parallel.rules import MESH_AXES, PARTS, Rules, preset
from jaxlm.state import create, make_step

# Heads that eight devices divide, kv heads that they do not, an odd vocabulary.
SMALL = {"vocab": 33, "dim": 32, "layers": 2, "heads": 8, "dropout": 0.1}
GROUPED = {"kv_heads": 4, "head_dim": 6, "mlp_dim": 48}
MODELS: dict[str, Decoder] = {
  "gpt2": gpt2.decoder(**SMALL, max_positions=16),
  "llama": llama.decoder(**SMALL, **GROUPED),
  "qwen3": qwen3.decoder(**SMALL, **GROUPED),
  "modern": modern.decoder(**SMALL, kv_heads=4),
}
ROWS, LENGTH, STEPS = 8, 12, 20


def batches(rows: int = ROWS) -> dict[str, np.ndarray]:
  """The same few rows 20 times, under masks that differ."""
  rng = np.random.default_rng(0)
  tokens = np.tile(rng.integers(0, 33, (rows, 5)), (STEPS, 1, 1, 3))
  mask = rng.random((STEPS, 1, rows, LENGTH)) < 0.8
  tokens = tokens[..., : LENGTH + 1].astype(np.int32)
  return {
    "inputs": tokens[..., :-1],
    "targets": tokens[..., 1:],
    "mask": mask.astype(np.int32),
  }


def train(
  name: str, rules: Rules | None, mesh=None, rows: int = ROWS, parts: int = 1
):
  """Twenty steps of AdamW with dropout: the state, and the metrics."""
  model, tx = MODELS[name], optax.adamw(1e-2)

  def loss_fn(params, batch, key):
    return next_token(model, params, batch, key, Compute(rules=rules))

  step = make_step(loss_fn, tx, accumulate=parts, steps=STEPS)
  params = random_params(model)
  batch = {
    k: x.reshape(STEPS, parts, rows // parts, *x.shape[3:])
    for k, x in batches(rows).items()
  }
  params = jax.tree.map(lambda x: 0.3 * x, params)
  if mesh is None:
    state, metrics = step(create(params, tx), batch)
    return state, metrics
  with jax.sharding.set_mesh(mesh):
    where = shardings(model.params(), mesh, rules)
    state = create(jax.device_put(params, where), tx)
    spec = rules.activation_spec(
      (None, None, "batch", None), batch["inputs"].shape, mesh
    )
    batch = jax.device_put(batch, NamedSharding(mesh, spec))
    state, metrics = step(state, batch)
  return state, metrics


@functools.cache
def alone(name: str, rows: int = ROWS):
  """The same on one device, without a mesh or a rule."""
  return train(name, None, rows=rows)


def agree(name: str, metrics, rows: int = ROWS) -> None:
  """Losses of all steps to 1e-5, and the norms of the gradients.

  Parameters are not compared: where a gradient is zero but for rounding (the
  bias of keys), Adam makes a step of the rounding's sign.
  """
  want = alone(name, rows)[1]
  loss = want["loss"]
  assert loss[-1] < loss[0] - 0.3  # it has learned something
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], want["grad_norm"], rtol=1e-4)


# --- Training ---------------------------------------------------------------


@functools.cache
def on_mesh(name: str, rule: str, sizes: str = ""):
  """The same on eight devices."""
  rules = preset(rule)
  mesh = make_mesh(rules, sizes)
  assert mesh.size == 8
  return train(name, rules, mesh)


@pytest.mark.parametrize("rule", ["fsdp", "tp"])
def test_microbatches_on_a_mesh(rule: str):
  """Two of eight rows: what gradients are summed in lies as they do."""
  rules = preset(rule)
  one = train("qwen3", None, rows=16, parts=2)[1]
  mesh = train("qwen3", rules, make_mesh(rules, ""), rows=16, parts=2)[1]
  np.testing.assert_allclose(mesh["loss"], one["loss"], rtol=1e-5)
  np.testing.assert_allclose(mesh["grad_norm"], one["grad_norm"], rtol=1e-4)


# Each is compiled anew, so that most are slow on the first run. One family
# meets every preset and every family the preset that has it all.
ALL = [
  (name, rule) for name in MODELS for rule in ("dp", "fsdp", "tp", "fsdp_tp")
]
FEW = [(name, rule) for name, rule in ALL if name == "qwen3" or "_" in rule]


@pytest.mark.parametrize(
  ("name", "rule"),
  [
    pair if pair in FEW else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in ALL
  ],
)
def test_eight_devices_train_as_one(name: str, rule: str):
  """Every preset, every family: forward, gradients, dropout, optimizer."""
  agree(name, on_mesh(name, rule)[1])


@pytest.mark.parametrize(
  ("rule", "sizes"),
  [
    ("fsdp_tp", "data:2,fsdp:2,tensor:2"),
    pytest.param("fsdp", "data:4,fsdp:2", marks=pytest.mark.slow),
    pytest.param("tp", "data:2,tensor:4", marks=pytest.mark.slow),
  ],
)
def test_meshes_of_other_shapes(rule: str, sizes: str):
  """A preset is a table of names: it holds on any grid."""
  agree("qwen3", on_mesh("qwen3", rule, sizes)[1])


def test_rows_that_do_not_divide_are_replicated():
  """Six rows on eight devices: wasteful, and right."""
  rules = preset("dp")
  _, metrics = train("gpt2", rules, make_mesh(rules), rows=6)
  agree("gpt2", metrics, rows=6)


@pytest.mark.parametrize("rule", [*PARTS, "fsdp_tp_ep"])
def test_a_mesh_of_one_device_is_a_mesh(rule: str):
  """The same code on a laptop: every preset fits one device."""
  rules = preset(rule)
  mesh = make_mesh(rules, devices=jax.devices()[:1])
  assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1)
  model = MODELS["llama"]
  params = random_params(model)
  tokens = jnp.asarray(batches()["inputs"][0, 0])
  with jax.sharding.set_mesh(mesh):
    where = shardings(model.params(), mesh, rules)
    got = jax.jit(
      lambda p, t: forward(model, p, t, compute=Compute(rules=rules))
    )(jax.device_put(params, where), tokens)
  want = jax.jit(lambda p, t: forward(model, p, t))(params, tokens)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# --- What each device holds -------------------------------------------------


@pytest.mark.parametrize(
  "name", ["qwen3", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_fsdp_holds_an_eighth_of_parameters_and_state(name: str):
  """Counted in the arrays of the trained state, both moments of AdamW too.

  Every parameter with an 'embed' dimension is cut; what is left whole is the
  few vectors without one.
  """
  state, _ = on_mesh(name, "fsdp")
  tree = paths(MODELS[name].params())
  moments = state.opt_state[0]
  held = whole = 0
  for part in (state.params, moments.mu, moments.nu):
    for path, x in paths(part).items():
      cut = "embed" in tree[path].axes
      shards = x.addressable_shards
      assert len(shards) == 8
      assert {s.data.nbytes for s in shards} == {x.nbytes // (8 if cut else 1)}
      held, whole = held + shards[0].data.nbytes, whole + x.nbytes
  assert held < whole / 8 * 1.15


@pytest.mark.parametrize("rule", ["dp", "tp", "fsdp_tp"])
def test_other_presets_hold_what_they_say(rule: str):
  """dp: everything; tp: an eighth of the matrices; both: an eighth as well."""
  rules = preset(rule)
  mesh = make_mesh(rules)
  tree = MODELS["gpt2"].params()
  shapes = abstract(tree, mesh=mesh, rules=rules)
  block = shapes["layers"]["0"]["0"]
  for name in ("q", "o"):
    x = block["mixer"][name]
    share = math.prod(x.sharding.shard_shape(x.shape)) / x.size
    assert share == {"dp": 1, "tp": 1 / 8, "fsdp_tp": 1 / 8}[rule]
  table = shapes["embed"]["tokens"]
  share = math.prod(table.sharding.shard_shape(table.shape)) / table.size
  assert share == {"dp": 1, "tp": 1, "fsdp_tp": 1 / 4}[rule]


def test_data_parallel_only_reduces_and_fsdp_gathers_by_layer():
  """Read from the compiled program: which collectives there are.

  No gathered array is as large as a whole stack of layers: one layer at a time
  is whole.
  """
  model = MODELS["llama"]
  stacked = model.params()["layers"]["0"]["0"]["ffn"]["up"].size

  def gathered(rule: str) -> list[int]:
    rules = preset(rule)
    mesh = make_mesh(rules)

    def loss_fn(params, batch):
      return next_token(model, params, batch, None, Compute(rules=rules))[0]

    with jax.sharding.set_mesh(mesh):
      shape = (ROWS, LENGTH)
      spec = rules.activation_spec(("batch", None), shape, mesh)
      place = NamedSharding(mesh, spec)
      row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
      batch = {"inputs": row, "targets": row}
      params = abstract(model.params(), mesh=mesh, rules=rules)
      text = jax.jit(jax.grad(loss_fn)).lower(params, batch).compile().as_text()
    sizes = []
    for line in text.splitlines():
      if " all-gather(" in line or " all-gather-start(" in line:
        shapes = re.findall(r"\w+\[([\d,]+)\]", line.split(" all-gather")[0])
        sizes += [math.prod(map(int, s.split(","))) for s in shapes]
    assert "all-reduce" in text
    return sizes

  assert gathered("dp") == []
  found = gathered("fsdp")
  assert len(found) >= 9  # the matrices of a layer, the two tables
  layer = [n for n in found if n >= stacked]
  assert all(n == 33 * 32 for n in layer) or stacked > 33 * 32


# --- Rules ------------------------------------------------------------------


def test_what_does_not_divide_stays_whole():
  """A vocabulary of 65 on eight devices is replicated, its rows still cut."""
  rules = Rules(stored=(("vocab", "fsdp"), ("embed", "tensor")))
  mesh = make_mesh(rules, "fsdp:4,tensor:2")

  def spec(*shape: int):
    return rules.stored_spec(("vocab", "embed"), shape, mesh)

  assert spec(64, 6) == PartitionSpec("fsdp", "tensor")
  assert spec(65, 6) == PartitionSpec(None, "tensor")
  assert spec(65, 7) == PartitionSpec(None, None)


def test_a_mesh_axis_serves_one_dimension():
  """Two dimensions named alike cannot lie along the same devices."""
  rules = Rules(stored=(("embed", "fsdp"),))
  mesh = make_mesh(rules, "fsdp:8")
  spec = rules.stored_spec(("embed", "embed", None), (16, 16, 16), mesh)
  assert spec == PartitionSpec("fsdp", None, None)


AXES = ["embed", "heads", "kv_heads", "mlp", "vocab", "batch", "other", None]


@given(
  st.sampled_from([*PARTS, "fsdp_tp", "fsdp_sp_ep", "zero1_tp"]),
  st.lists(
    st.tuples(st.sampled_from(AXES), st.integers(1, 24)), min_size=1, max_size=4
  ),
)
def test_every_spec_can_be_placed(rule: str, dims: list):
  """Any axes, any shape: no mesh axis twice, every cut dimension divides."""
  rules, (axes, shape) = preset(rule), zip(*dims, strict=True)
  mesh = make_mesh(rules)
  for spec in (
    rules.stored_spec(axes, shape, mesh),
    rules.computed_spec(axes, shape, mesh),
    rules.activation_spec(axes, shape, mesh),
  ):
    NamedSharding(mesh, spec).shard_shape(shape)  # raises if it cannot be
    names = [n if isinstance(n, tuple) else (n,) for n in spec if n]
    names = list(itertools.chain(*names))
    assert len(names) == len(set(names))


def test_an_unknown_preset_is_named():
  """One sentence that lists what is known."""
  with pytest.raises(UserError, match=r"'zero3'; did you mean.*known: dp, z"):
    preset("zero3")


# --- The mesh ---------------------------------------------------------------


def test_sizes_are_read():
  """Spaces, -1, nothing at all."""
  assert parse_sizes("fsdp:4, tensor:2") == {"fsdp": 4, "tensor": 2}
  assert parse_sizes("data:-1") == {"data": -1}
  assert parse_sizes("") == {}


def test_minus_one_takes_what_is_left():
  """And a preset's default shrinks on a smaller machine."""
  mesh = make_mesh(preset("fsdp_tp"), "fsdp:-1,tensor:2")
  ones = dict.fromkeys(MESH_AXES, 1)
  assert dict(mesh.shape) == ones | {"fsdp": 4, "tensor": 2}
  mesh = make_mesh(preset("fsdp_tp"), devices=jax.devices()[:1])
  assert mesh.size == 1


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ("fsdp:3", r"fsdp:3.*needs 3 devices and there are 8"),
    ("fsdp:4,tensor:4", r"needs 16 devices and there are 8"),
    ("fsdp:-1,tensor:3", r"tensor:3.*a multiple of 3.*there are 8"),
    ("data:2,data:4", r"data.*twice"),
    ("model:8", r"'model'.*data, fsdp, tensor"),
    ("fsdp=8", r"'fsdp=8'.*data, fsdp, tensor"),
    ("fsdp:", r"'fsdp:'.*'fsdp:4'"),
    ("fsdp:two", r"'fsdp:two'.*'fsdp:4'"),
    ("fsdp:0", r"sizes are positive"),
    ("fsdp:-2", r"sizes are positive"),
    ("fsdp:-1,data:-1", r"one may be -1"),
  ],
)
def test_wrong_meshes_are_explained(sizes: str, message: str):
  """One sentence each: what is wrong, what there is, no negative numbers."""
  with pytest.raises(UserError, match=message) as error:
    make_mesh(preset("fsdp"), sizes)
  assert "needs -" not in str(error.value)


def test_a_preset_that_does_not_fit_is_explained():
  """Three devices cannot be groups of two."""
  with pytest.raises(UserError, match=r"a multiple of 2.*there are 3"):
    make_mesh(preset("fsdp_tp"), devices=jax.devices()[:3])
