"""Rule tables and meshes: what is placed where, and what is refused."""

import itertools

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from jaxlm import recipe
from jaxlm.config import default_config
from jaxlm.errors import UserError
from jaxlm.layers.param import Param, check_mesh
from jaxlm.parallel.mesh import make_mesh, parse_sizes
from jaxlm.parallel.rules import MESH_AXES, PARTS, Rules, preset

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


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("zero3", r"'zero3'; did you mean.*known: dp, zero1, zero2, fsdp, tp"),
    ("fsdp_tpp", r"'fsdp_tpp' has the part 'tpp'; did you mean 'tp'"),
    ("tp_fsdp_tp", "part twice"),
    ("fsdp_zero1", "fsdp and zero1 say different things"),
  ],
)
def test_wrong_presets_are_explained(name: str, message: str):
  """One sentence that lists what is known."""
  with pytest.raises(UserError, match=message):
    preset(name)


def test_rules_about_nothing_are_explained():
  """A mesh axis that there is not at once, a dimension with the model.

  A dimension of the model's own may be spoken of.
  """
  with pytest.raises(UserError, match=r"'embed'.*'fdsp'; did you mean 'fsdp'"):
    Rules(stored=(("embed", ("data", "fdsp")),))
  rules = Rules(stored=(("hats", "fsdp"),))
  mesh = make_mesh(rules)
  with pytest.raises(UserError, match="'hats'; did you mean 'heads'"):
    check_mesh({"w": Param((4, 2), ("heads", "embed"))}, mesh, rules)
  check_mesh({"w": Param((4, 2), ("hats", "embed"))}, mesh, rules)


@pytest.mark.parametrize(
  ("axes", "shape", "rule", "message"),
  [
    (
      ("embed", "heads"),
      (8, 6),
      "tp",
      r"6 heads.*tensor:8.*tensor:2.*8 h",
    ),
    (("embed", "mlp"), (8, 20), "fsdp_tp", None),
    (("embed", "mlp"), (8, 20), "tp", r"20 mlp.*tensor:4.* with 16 or 24 mlp"),
    (
      ("experts", "embed", "mlp"),
      (12, 8, 8),
      "ep",
      r"12 experts.*expert:4.*8 or",
    ),
    (("embed", "kv_heads"), (8, 2), "tp", None),
    (("vocab", "embed"), (33, 7), "fsdp", None),
  ],
)
def test_what_must_divide_is_explained(axes, shape, rule, message):
  """Which parameter, which dimension, the nearest mesh and model that fit.

  Key-value heads are repeated where there are too few, and what is only
  stored may stay whole: both pass.
  """
  tree, rules = {"w": Param(shape, axes)}, preset(rule)
  mesh = make_mesh(rules)
  if message is None:
    check_mesh(tree, mesh, rules)
    return
  with pytest.raises(UserError, match=message):
    check_mesh(tree, mesh, rules)


def test_a_batch_that_does_not_divide_is_explained():
  """Experts' devices cut the batch as well: 2 x 2 x 2 are four groups."""
  config = default_config()
  with config.unlocked():
    config.parallel.preset, config.batch_size = "fsdp_tp_ep", 6
  with pytest.raises(UserError, match=r"batch_size=6.*on 4 groups.*does is 8"):
    recipe.mesh(FrozenConfigDict(config))


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
