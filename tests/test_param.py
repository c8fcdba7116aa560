"""Param: one declaration, and views of it that agree with each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlm.layers.param import (
  ONES,
  ZEROS,
  Constant,
  FanIn,
  MatrixDims,
  Normal,
  Param,
  abstract,
  count,
  decay_mask,
  describe,
  flops,
  gather,
  init,
  muon_dims,
  paths,
  shardings,
  stack,
)
from jaxlm.models.decoder import forward
from jaxlm.models.families import gpt2, llama, modern, qwen3
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset

KEY = jax.random.key(0)

# One of each kind: what it is, and how the views should see it.
KINDS = {
  "matrix": Param((8, 6), ("embed", "mlp")),
  "heads": Param((8, 3, 2), ("embed", "heads", "head_dim"), 1),
  "joined": Param((3, 2, 8), ("heads", "head_dim", "embed"), 2),
  "experts": Param((4, 8, 6), ("experts", "embed", "mlp"), 1),
  "bias": Param((6,), ("mlp",), 0, ZEROS),
  "head_bias": Param((3, 2), ("heads", "head_dim"), 0, ZEROS),
  "scale": Param((8,), ("embed",), 0, ONES, jnp.float32),
  "table": Param((50, 8), ("vocab", "embed"), 1, Normal(0.02)),
  "places": Param((9, 8), ("positions", "embed"), 1, Normal(0.02)),
  "head": Param((8, 50), ("embed", "vocab"), 1),
}


# --- Initialization ---------------------------------------------------------


def test_a_new_parameter_leaves_its_siblings_as_they_were():
  """Keys come from paths, so a seed means the same after a model grows."""
  tree = {"a": KINDS["matrix"], "b": {"c": KINDS["heads"]}}
  before = init(tree, KEY)
  tree = {"0": KINDS["table"], "a": KINDS["matrix"], "z": KINDS["head"]}
  tree["b"] = {"a": KINDS["matrix"], "c": KINDS["heads"]}
  after = init(tree, KEY)
  np.testing.assert_array_equal(before["a"], after["a"])
  np.testing.assert_array_equal(before["b"]["c"], after["b"]["c"])


def test_equal_declarations_start_differently():
  """Two places, two draws; and the layers of a stack are draws too."""
  tree = stack({"a": KINDS["matrix"], "b": KINDS["matrix"]}, 3)
  x = init(tree, KEY)
  rows = np.concatenate([x["a"], x["b"]]).reshape(6, -1)
  assert np.abs(np.corrcoef(rows) - np.eye(6)).max() < 0.6
  assert not np.array_equal(x["a"], init(tree, jax.random.key(1))["a"])
  np.testing.assert_array_equal(x["a"], init(tree, KEY)["a"])


def test_init_is_the_same_under_jit():
  """A run that starts under jit starts at the same point, to rounding."""
  tree = stack({"a": KINDS["matrix"], "b": KINDS["joined"]}, 2)
  plain, jitted = init(tree, KEY), jax.jit(lambda key: init(tree, key))(KEY)
  for name, x in plain.items():
    np.testing.assert_allclose(jitted[name], x, rtol=3e-7)


@pytest.mark.parametrize(
  ("param", "std"),
  [
    (Param((64, 90), ("embed", "mlp")), 1 / 8),
    (Param((64, 10, 9), ("embed", "heads", "head_dim"), 1), 1 / 8),
    (Param((8, 8, 90), ("heads", "head_dim", "embed"), 2), 1 / 8),
    (Param((5, 64, 20), ("experts", "embed", "mlp")), 1 / 8),
    (Param((3, 2, 64, 20), ("layers", "experts", "embed", "mlp")), 1 / 8),
    (Param((64, 90), ("embed", "mlp"), 1, FanIn(0.5)), 1 / 16),
    (Param((64, 90), ("embed", "mlp"), 1, Normal(0.3)), 0.3),
  ],
)
def test_std_is_as_declared(param: Param, std: float):
  """Stacked dimensions are never fan-in; every input one is."""
  x = init({"x": param}, KEY)["x"]
  error = std / math.sqrt(2 * x.size)  # of a sample's standard deviation
  assert abs(float(x.std()) - std) < 4 * error
  assert abs(float(x.mean())) < 4 * std / math.sqrt(x.size)


def test_constants_and_dtypes():
  """Constants fill; the dtype asked for is the dtype given."""
  tree = {"a": Param((3,), ("embed",), 0, Constant(2.5)), **KINDS}
  x = init(tree, KEY, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.bfloat16.dtype}
  np.testing.assert_array_equal(x["a"].astype(jnp.float32), [2.5] * 3)
  assert not np.any(x["bias"])
  assert np.all(x["scale"] == 1)


def test_fan_in_keeps_the_variance():
  """That is what it is for: outputs vary as much as inputs, at any shape."""
  param = Param((2, 16, 8, 40), ("layers", "heads", "head_dim", "embed"), 2)
  w = init({"w": param}, KEY)["w"]
  x = jax.random.normal(jax.random.key(1), (2, 500, 16, 8))
  y = jnp.einsum("lbnh,lnhd->lbd", x, w)
  assert abs(float(y.var()) - 1.0) < 0.1


# --- Views ------------------------------------------------------------------


def test_every_view_speaks_of_the_same_leaves():
  """Arrays, abstract shapes, masks: one structure, one set of shapes."""
  tree = {"outer": stack(KINDS, 3), "alone": KINDS["head"]}
  arrays, shapes = init(tree, KEY), abstract(tree)
  same = jax.tree.map(
    lambda a, s: a.shape == s.shape and a.dtype == s.dtype, arrays, shapes
  )
  assert all(jax.tree.leaves(same))
  assert count(tree) == sum(x.size for x in jax.tree.leaves(arrays))
  assert len(jax.tree.leaves(decay_mask(tree))) == len(paths(tree)) == 11


def test_what_decays_and_what_muon_takes():
  """Matrices decay, tables among them; Muon takes those inside the network."""
  decays = {k for k, v in decay_mask(KINDS).items() if v}
  assert decays == KINDS.keys() - {"bias", "head_bias", "scale"}
  hidden = {k: v for k, v in muon_dims(KINDS).items() if v is not None}
  assert hidden == {
    "matrix": MatrixDims(0, 1),
    "heads": MatrixDims(0, 1),
    "joined": MatrixDims(0, 2),
    "experts": MatrixDims(1, 1),
  }


def test_stacking_changes_no_judgement():
  """A stacked bias is still a bias: two dimensions do not make a matrix."""
  stacked = stack(KINDS, 5)
  for name, p in KINDS.items():
    q = stacked[name]
    assert q.shape == (5, *p.shape)
    assert q.axes == ("layers", *p.axes)
    assert (q.fan_in, q.size) == (p.fan_in, 5 * p.size)
    assert (q.is_matrix, q.is_hidden) == (p.is_matrix, p.is_hidden)
    assert q.n_stacked == p.n_stacked + 1


def test_flops_count_what_multiplies():
  """Two per element of a hidden matrix; what is looked up or added is free."""
  assert flops({"a": KINDS["matrix"]}) == 2 * 8 * 6
  assert flops(stack({"a": KINDS["joined"]}, 4)) == 4 * 2 * 3 * 2 * 8
  assert flops({k: KINDS[k] for k in ("table", "places", "bias")}) == 0


def test_paths_read_like_directories():
  """Tables of patterns for learning rates and freezing match these names."""
  names = paths(gpt2.decoder(vocab=10, dim=8, layers=2, heads=2).params())
  assert "layers/0/0/mixer/q" in names
  assert "embed/positions/table" in names
  assert names["layers/0/0/mixer/q"].shape == (2, 8, 2, 4)


def test_describe_lists_and_adds_up():
  """A table for people: every path, its axes, the total."""
  text = describe({"outer": stack(KINDS, 3)})
  assert len(text.splitlines()) == len(KINDS) + 2
  assert "outer/joined" in text
  assert "layers heads head_dim embed" in text
  assert text.splitlines()[-1].split() == ["total", f"{3 * count(KINDS):,}"]


def test_gather_casts_what_travels():
  """On a mesh matrices travel narrow, norm scales float32; gradients wide.

  On one device there is nothing to do: `dot` casts where it multiplies.
  """
  x = init(KINDS, KEY)
  rules = preset("fsdp")
  alone = gather(x, KINDS, rules, jnp.bfloat16)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, alone, x)))
  mesh = make_mesh(rules)
  with jax.sharding.set_mesh(mesh):
    spread = jax.device_put(x, shardings(KINDS, mesh, rules))
    y = gather(spread, KINDS, rules, jnp.bfloat16)
    assert spread["matrix"].sharding.spec == PartitionSpec("fsdp", None)
    assert y["matrix"].sharding.is_fully_replicated
    assert y.pop("scale").dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(y)} == {jnp.bfloat16.dtype}
    grad = jax.grad(
      lambda x: gather(x, KINDS, rules, jnp.bfloat16)["matrix"].sum()
    )(spread)["matrix"]
    assert grad.dtype == jnp.float32
    assert grad.sharding == spread["matrix"].sharding


def test_a_param_names_every_dimension():
  """A shape whose axes are not all named is a mistake, found at once."""
  with pytest.raises(ValueError, match="differ in rank"):
    Param((3, 4), ("embed",))


# --- Values that are equal --------------------------------------------------

MAKERS = {
  "gpt2": lambda: gpt2.decoder(vocab=40, dim=16, layers=2, heads=2),
  "llama": lambda: llama.decoder(
    vocab=40, dim=16, layers=2, heads=4, kv_heads=2, mlp_dim=24
  ),
  "qwen3": lambda: qwen3.decoder(
    vocab=40, dim=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_dim=24
  ),
  "modern": lambda: modern.decoder(vocab=40, dim=16, layers=2, heads=2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_equal_decoders_are_equal_and_compile_once(name: str):
  """Built twice, a model is one value: jit must not trace it again."""
  one, two = MAKERS[name](), MAKERS[name]()
  assert one is not two
  assert one == two
  assert hash(one) == hash(two)
  assert one.params() == two.params()
  traces = []

  def counted(model, params, tokens):
    traces.append(model)
    return forward(model, params, tokens)

  run = jax.jit(counted, static_argnums=0)
  shapes = abstract(one.params())
  params = jax.tree.map(lambda s: np.full(s.shape, 0.1, s.dtype), shapes)
  tokens = jnp.zeros((1, 4), jnp.int32)
  run(one, params, tokens)
  run(two, params, tokens)
  assert len(traces) == 1
  assert len({MAKERS[n]() for n in MAKERS}) == len(MAKERS)
