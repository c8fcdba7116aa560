"""Eight devices give what one gives, and hold an eighth of it each."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict
from tiny_models import random_params

from jaxlm import recipe
from jaxlm.config import default_config
from jaxlm.layers.attention import Attention
from jaxlm.layers.compute import Compute
from jaxlm.layers.latent import LatentAttention
from jaxlm.layers.mask import Causal, Sliding
from jaxlm.layers.mlp import GLU, MLP, gelu, silu
from jaxlm.layers.moe import MoE
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import (
  abstract,
  move,
  paths,
  shardings,
)
from jaxlm.layers.position import Learned, Rope
from jaxlm.layers.router import TopK
from jaxlm.models.decoder import Block, Decoder, forward
from jaxlm.objectives import next_token
from jaxlm.optim.spread import sharded
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import MESH_AXES, PARTS, Rules, preset
from jaxlm.state import create, make_step

# Eight heads, which eight devices divide, and fewer key-value heads, which they
# do not; an odd vocabulary; eight experts.
WIDTH, LENGTH, ROWS, STEPS = 32, 16, 8, 20


def _decoder(*blocks: Block, **options) -> Decoder:
  return Decoder(33, WIDTH, ((blocks, 2),), RMSNorm(WIDTH), LENGTH, **options)


def _block(mixer, ffn=GLU(WIDTH, 48, silu), **options) -> Block:
  return Block(mixer, ffn, RMSNorm(WIDTH), **options)


def _attention(mask=Causal(), position=Rope(100.0)) -> Attention:
  return Attention(WIDTH, 8, kv_heads=4, mask=mask, position=position)


MODELS: dict[str, Decoder] = {
  "dense": _decoder(_block(_attention(), dropout=0.1), tied=True, softcap=5.0),
  "moe": _decoder(
    _block(
      _attention(),
      MoE(GLU(WIDTH, 16, silu), 8, 2, TopK(balance=0.1), GLU(WIDTH, 24, silu)),
    )
  ),
  "mla": _decoder(
    _block(
      LatentAttention(
        WIDTH, 8, rank=16, q_rank=24, nope_dim=6, rope_dim=4, value_dim=5
      )
    )
  ),
  "hybrid": _decoder(
    _block(_attention(Sliding(4))),
    _block(_attention(position=None), MLP(WIDTH, 64, gelu, bias=True)),
    positions=Learned(LENGTH),
  ),
}
# Tests run for milliseconds and compile for seconds.
QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
}
# Large, so that what is zero but for rounding is not made a step by its sign.
TX = optax.adamw(1e-2, eps=1e-3)


def batches(rows: int = ROWS, parts: int = 1) -> dict[str, np.ndarray]:
  """The same few rows 20 times, under masks that differ."""
  rng = np.random.default_rng(0)
  tokens = np.tile(rng.integers(0, 33, (rows, 6)), (STEPS, 1, 1, 3))
  mask = rng.random((STEPS, 1, rows, LENGTH)) < 0.8
  tokens = tokens[..., : LENGTH + 1].astype(np.int32)
  batch = {
    "inputs": tokens[..., :-1],
    "targets": tokens[..., 1:],
    "mask": mask.astype(np.int32),
  }
  shape = (STEPS, parts, rows // parts, LENGTH)
  return {name: x.reshape(shape) for name, x in batch.items()}


def train(
  name: str, rules: Rules | None, mesh=None, rows: int = ROWS, parts: int = 1
):
  """Twenty steps of AdamW with dropout: the state, and the metrics."""
  model, tx, sums = MODELS[name], TX, None
  tree = model.params()

  def loss_fn(params, batch, key):
    return next_token(model, params, batch, key, Compute(rules=rules))

  if mesh is not None:
    tx = sharded(tx, tree, rules)
    sums = functools.partial(move, tree=tree, spec=rules.gradient_spec)
  step = jax.jit(
    make_step(loss_fn, tx, accumulate=parts, steps=STEPS, sums=sums, jit=False),
    compiler_options=QUICK,
  )
  batch = batches(rows, parts)
  params = random_params(model)
  if mesh is None:
    return step(create(params, tx), batch)
  with jax.sharding.set_mesh(mesh):
    where = shardings(tree, mesh, rules)
    state = create(jax.device_put(params, where), tx)
    axes = (None, None, "batch", None)
    spec = rules.activation_spec(axes, batch["inputs"].shape, mesh)
    batch = jax.device_put(batch, NamedSharding(mesh, spec))
    return step(state, batch)


@functools.cache
def alone(name: str, rows: int = ROWS, parts: int = 1):
  """The same on one device, without a mesh or a rule."""
  return jax.device_get(train(name, None, rows=rows, parts=parts))


@functools.cache
def on_mesh(name: str, rule: str, sizes: str = "", parts: int = 1):
  """The same on eight devices."""
  rules = preset(rule)
  mesh = make_mesh(rules, sizes)
  assert mesh.size == 8
  return train(name, rules, mesh, parts=parts)


def agree(name: str, found: tuple, rows: int = ROWS, parts: int = 1) -> None:
  """Losses and gradients' norms of all steps to 1e-5, and all parameters."""
  (state, metrics), (want_state, want) = found, alone(name, rows, parts)
  assert want["loss"][-1] < want["loss"][0] - 0.3  # it has learned something
  np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], want["grad_norm"], rtol=1e-4)
  for path, x in paths(want_state.params).items():
    got = paths(state.params)[path]
    np.testing.assert_allclose(got, x, atol=1e-4, err_msg=path)


# --- Training ---------------------------------------------------------------

RULES = ["dp", "zero1", "fsdp", "tp", "sp", "fsdp_sp", "fsdp_tp_ep"]
CASES = [(name, rule) for name in MODELS for rule in RULES]
CASES += [("moe", rule) for rule in ("ep", "fsdp_ep", "zero1_sp_ep")]
QUICKEST = [(name, "fsdp_tp_ep") for name in MODELS] + [("dense", "sp")]


@pytest.mark.parametrize(
  ("name", "rule"),
  [
    case if case in QUICKEST else pytest.param(*case, marks=pytest.mark.slow)
    for case in CASES
  ],
)
def test_eight_devices_train_as_one(name: str, rule: str):
  """Every preset, every kind of model: forward, gradients, optimizer.

  Each program is compiled anew, hence slow.
  """
  agree(name, on_mesh(name, rule))


@pytest.mark.parametrize("rule", ["zero2", "fsdp_tp"])
def test_microbatches_on_a_mesh(rule: str):
  """Two of eight rows: gradients are summed in what the rules say."""
  rules = preset(rule)
  found = train("dense", rules, make_mesh(rules), rows=16, parts=2)
  agree("dense", found, rows=16, parts=2)


def test_rows_that_do_not_divide_are_replicated():
  """Six rows on eight devices: wasteful, and right."""
  rules = preset("dp")
  agree("dense", train("dense", rules, make_mesh(rules), rows=6), rows=6)


def test_a_mesh_of_one_device_is_a_mesh():
  """The same code on a laptop: every preset fits one device."""
  for name in [*PARTS, "fsdp_tp_ep"]:
    mesh = make_mesh(preset(name), devices=jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1)
  model, rules = MODELS["moe"], preset("fsdp_sp_ep")
  params = random_params(model)
  tokens = jnp.asarray(batches()["inputs"][0, 0])

  def run(params, tokens, compute):
    return forward(model, params, tokens, compute=compute)

  run = jax.jit(run, static_argnums=2, compiler_options=QUICK)
  want = run(params, tokens, Compute())
  with jax.sharding.set_mesh(mesh):
    where = shardings(model.params(), mesh, rules)
    got = run(jax.device_put(params, where), tokens, Compute(rules=rules))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# --- What each device holds -------------------------------------------------

# By preset: into how many parts dimensions are cut, in parameters at rest and
# in the optimizer's state. A mesh axis serves the first of these that divides.
CUT = {"embed": 8, "latent": 8}
SPLIT = {"experts": 2, "heads": 2, "kv_heads": 2, "mlp": 2, "embed": 4}
PREDICTED = {
  ("mla", "dp"): ({}, {}),
  ("mla", "zero1"): ({}, CUT),
  ("mla", "fsdp"): (CUT, CUT),
  ("dense", "tp"): ({"heads": 8, "mlp": 8}, {"heads": 8, "mlp": 8}),
  ("moe", "ep"): ({"experts": 8}, {"experts": 8}),
  ("moe", "fsdp_tp_ep"): (SPLIT, SPLIT),
}


def _predicted(model: Decoder, cut: dict[str, int]) -> int:
  """Bytes of float32 on each device, by what is cut into how many parts."""
  total = 0
  for p in paths(model.params()).values():
    ways, left = 1, 8
    for axis in cut:
      if axis in p.axes:
        n = min(cut[axis], left)
        if axis == "embed" and "experts" in p.axes:  # its axis is taken
          n = 2
        ways, left = ways * n, left // n
    total += 4 * p.size // ways
  return total


@pytest.mark.parametrize(("name", "rule"), PREDICTED)
def test_devices_hold_what_the_table_says(name: str, rule: str):
  """Counted in the arrays of a state, both moments of AdamW and the average.

  Under ZeRO-1 everything but the parameters falls to an eighth, under FSDP
  they do as well; what has no dimension to cut is a few vectors.
  """
  model, rules = MODELS[name], preset(rule)
  tree, mesh = model.params(), make_mesh(rules)
  with jax.sharding.set_mesh(mesh):
    params = jax.device_put(random_params(model), shardings(tree, mesh, rules))
    state = create(params, sharded(TX, tree, rules))
  held = functools.partial(sum_bytes, jax.devices()[3])
  at_rest, remembered = (
    _predicted(model, cut) for cut in PREDICTED[name, rule]
  )
  assert held(state.params) == at_rest
  assert held(state.opt_state[0].mu) == remembered
  assert held(state.opt_state[0].nu) == remembered
  if rule == "fsdp":
    assert remembered < sum_bytes(None, state.params) / 8 * 1.15


def sum_bytes(device, tree) -> int:
  """Bytes of all arrays on one device, or in all."""
  if device is None:
    return sum(x.nbytes for x in jax.tree.leaves(tree))
  return sum(
    shard.data.nbytes
    for x in jax.tree.leaves(tree)
    for shard in x.addressable_shards
    if shard.device == device
  )


def test_data_parallel_only_reduces_and_fsdp_gathers_by_layer():
  """Read from the compiled program: which collectives there are.

  No gathered array is as large as a whole stack of layers: one layer at a time
  is whole.
  """
  model = MODELS["dense"]
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
      text = jax.jit(jax.grad(loss_fn)).lower(params, batch)
      text = text.compile(QUICK).as_text()
    sizes = []
    for line in text.splitlines():
      if " all-gather(" in line or " all-gather-start(" in line:
        shapes = re.findall(r"\w+\[([\d,]+)\]", line.split(" all-gather")[0])
        sizes += [math.prod(map(int, s.split(","))) for s in shapes]
    assert "all-reduce" in text
    return sizes

  assert gathered("dp") == []
  found = gathered("fsdp")
  assert len(found) >= 8  # the matrices of a layer, the table
  layer = [n for n in found if n >= stacked]
  assert all(n == 33 * 32 for n in layer) or stacked > 33 * 32


def test_the_average_lies_with_the_optimizer_s_state():
  """What the training program makes under ZeRO-1: an eighth of both."""
  config = default_config()
  with config.unlocked():
    config.parallel.preset, config.ema, config.batch_size = "zero1", 0.99, 8
  config, model = FrozenConfigDict(config), MODELS["dense"]
  tx = recipe.optimizer(config, model.params(), recipe.schedule(config))
  mesh = recipe.mesh(config)
  with jax.sharding.set_mesh(mesh):
    state = recipe.fresh_state(config, model, tx, mesh)
  held = functools.partial(sum_bytes, jax.devices()[3])
  assert held(state.params) == sum_bytes(None, state.params)
  assert held(state.ema) == _predicted(model, CUT)
  assert held(state.opt_state) < 0.15 * sum_bytes(None, state.opt_state)


def test_the_page_s_examples_run(capsys):
  """Each block in a namespace of its own; eight devices say what one does."""
  page = pathlib.Path(__file__).parent.parent / "docs" / "parallelism.md"
  blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
  first, second = found = [{}, {}]
  for block, names in zip(blocks, found, strict=True):
    exec(compile(block, str(page), "exec"), names)
  np.testing.assert_allclose(first["logits"], first["alone"], atol=1e-6)
  table = first["params"]["embed"]["tokens"].sharding.spec
  assert table == PartitionSpec("tensor", ("fsdp", "expert"))
  assert second["mesh"].shape["pipe"] == 2  # the last of its two
  *_, rows, stages = capsys.readouterr().out.splitlines()
  assert max(float(line.split()[1]) for line in (rows, stages)) <= 1e-6
