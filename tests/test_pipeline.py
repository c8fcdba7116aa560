"""Layers divided into stages: the same training, and no idle step too many."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divided import MODELS, agree, alone, train
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import DIM, VOCAB, block, random_params

from jaxlm import config, recipe
from jaxlm.errors import UserError
from jaxlm.layers.cache import empty
from jaxlm.layers.compute import Compute, Split
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import abstract, paths
from jaxlm.models.decoder import Decoder, forward
from jaxlm.models.pipeline import Schedule, _regrouped
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset

# --- The schedule -----------------------------------------------------------

SCHEDULES = st.builds(
  lambda p, groups, v: Schedule(p, p * groups, v),
  st.integers(1, 6),
  st.integers(1, 4),
  st.integers(1, 4),
)


@given(SCHEDULES)
def test_every_visit_happens_once_and_in_time(plan: Schedule):
  """Each micro-batch meets each layer once, just after the layer before it.

  What is not a visit is the bubble: counted, it is what the formula says.
  """
  visits = {}
  for step in range(plan.steps):
    for stage in range(plan.stages):
      turn, micro, live = plan.work(step, stage)
      if live:
        assert (turn, micro, stage) not in visits
        visits[turn, micro, stage] = step
  p, m, v = plan.stages, plan.microbatches, plan.rounds
  assert len(visits) == v * m * p
  for (turn, micro, stage), step in visits.items():
    if (turn, stage) != (0, 0):
      before = (turn, stage - 1) if stage else (turn - 1, p - 1)
      assert visits[before[0], micro, before[1]] == step - 1
  idle = 1 - len(visits) / (plan.steps * p)
  assert math.isclose(idle, (p - 1) / (v * m + p - 1), abs_tol=1e-9)
  assert math.isclose(idle, plan.bubble, abs_tol=1e-9)


@pytest.mark.parametrize(("p", "v"), [(4, 2), (2, 4), (6, 4), (3, 5)])
def test_groups_of_layers_find_their_stage(p: int, v: int):
  """Round r of stage s has group p r + s, for any two numbers."""
  layers = jnp.arange(p * v * 2, dtype=jnp.int32).reshape(p, -1)
  stages = jnp.arange(p, dtype=jnp.int32)
  got = jax.vmap(
    lambda s, x: _regrouped(Schedule(p, p, v), s, x), axis_name="pipe"
  )(stages, layers)
  want = np.arange(p * v * 2).reshape(v, p, 2).swapaxes(0, 1)
  np.testing.assert_array_equal(got, want)


# --- Training ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "rule", "sizes", "split"),
  [
    ("mixture", "pp", "data:4,pipe:2", Split()),
    ("latent", "fsdp_tp_pp", "fsdp:2,tensor:2,pipe:2", Split()),
    ("dense", "cp_pp", "context:4,pipe:2", Split(microbatches=8, rounds=2)),
  ],
)
def test_stages_train_as_one_device(name, rule, sizes, split):
  """GPipe and interleaved, beside every other way to divide a step."""
  agree(train(name, rule, sizes, split=split), alone(name))


def test_interleaved_stages_report_as_one_device():
  """Packed rows under watch, rematerialised: reports are joined by layer."""
  split = Split(microbatches=2, rounds=2)
  options = {"packed": True, "watch": True}
  got = train("windows", "pp", "data:4,pipe:2", split=split, **options)
  want = train("windows", **options)
  agree(got, want)
  np.testing.assert_allclose(
    got[1]["max_logit"], want[1]["max_logit"], rtol=1e-4
  )


# --- What lies where --------------------------------------------------------


@pytest.mark.parametrize(
  ("rule", "sizes", "layers", "table"),
  [("pp", "data:2,pipe:4", 4, 4), ("fsdp_pp", "fsdp:4,pipe:2", 8, 8)],
)
def test_a_device_has_its_stage(rule, sizes, layers, table):
  """Bytes by the rule table: layers by stages, and by FSDP inside of one."""
  model = Decoder(32, 16, (((block(),), 4),), RMSNorm(16), 64)
  rules = preset(rule)
  mesh = make_mesh(rules, sizes)
  places = abstract(model.params(), mesh=mesh, rules=rules)
  for path, x in paths(places).items():
    share = x.size / math.prod(x.sharding.shard_shape(x.shape))
    if path in ("embed/tokens", "head"):
      assert share == table
    elif path.startswith("layers") and "norm" not in path:
      assert share == layers


def scans(jaxpr, without: str = "not left out") -> list:
  """The loops of a program, those inside of others too."""
  found = []
  for equation in jaxpr.eqns:
    if without in str(equation.source_info.name_stack):
      continue
    if equation.primitive.name == "scan":
      found.append(equation)
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += scans(inner, without)
  return found


def lengths(jaxpr) -> set[int]:
  """How often the loops of a program go around."""
  return {loop.params["length"] for loop in scans(jaxpr)}


def program(model: Decoder, rows: int, compute: Compute):
  """A forward pass of rows of eight tokens, traced and not compiled."""
  params = abstract(model.params())
  tokens = jax.ShapeDtypeStruct((rows, 8), jnp.int32)
  return jax.make_jaxpr(lambda p, t: forward(model, p, t, compute=compute))(
    params, tokens
  ).jaxpr


def test_the_program_takes_the_steps_of_its_schedule():
  """Of 4 stages and 8 micro-batches: 11 steps, or 19 in two rounds."""
  rules = preset("pp")
  model = Decoder(VOCAB, DIM, (((block(),), 8),), RMSNorm(DIM), 64)
  for rounds, steps in ((1, 11), (2, 19)):
    compute = Compute(rules=rules, split=Split(microbatches=8, rounds=rounds))
    with jax.sharding.set_mesh(make_mesh(rules, "data:2,pipe:4")):
      assert steps in lengths(program(model, 16, compute))


def test_a_step_keeps_what_it_worked_on_and_no_parameters():
  """What 11 steps, or the two layers of each, leave for the backward pass are
  inputs of layers: nothing is as large as a matrix.
  """
  rules = preset("fsdp_pp")
  model = Decoder(VOCAB, DIM, (((block(),), 8),), RMSNorm(DIM), 64)
  compute = Compute(rules=rules, remat="full", split=Split(microbatches=8))
  tokens = jax.ShapeDtypeStruct((16, 2), jnp.int32)

  def loss(params, tokens):
    return jnp.sum(forward(model, params, tokens, compute=compute))

  mesh = make_mesh(rules, "fsdp:2,pipe:4")
  with jax.sharding.set_mesh(mesh):
    params = abstract(model.params(), mesh=mesh, rules=rules)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr
  kept = [
    v.aval.shape
    for loop in scans(jaxpr, without="transpose")
    for v in loop.outvars[loop.params["num_carry"] :]
  ]
  assert (11, 2, 2, 2, DIM) in kept  # steps, layers, rows, tokens, width
  matrix = min(p.size for p in paths(block().params()).values() if p.is_matrix)
  sizes = [s[2:] if s[0] == 11 else s[1:] for s in kept if s[0] in (2, 11)]
  assert max(map(math.prod, sizes)) < matrix


# --- Bad input --------------------------------------------------------------


@pytest.mark.parametrize(
  ("split", "rows", "message"),
  [
    (Split(), 6, r"6 rows.* 4 micro-batches on 2 groups.*nearest.* 8 "),
    (Split(microbatches=6), 8, r"microbatches=6.* 4 stages.* is 8"),
    (Split(rounds=0), 8, r"rounds=0; it is at least 1"),
    (Split(rounds=3), 8, r"4 layers.* 4 stages in parallel.rounds=3.* is 12"),
  ],
)
def test_what_does_not_divide_is_explained(split, rows, message):
  """What does not, among how many, and the nearest that would."""
  model, rules = MODELS["dense"], preset("pp")
  mesh = make_mesh(rules, "data:2,pipe:4")
  compute = Compute(rules=rules, split=split)
  with jax.sharding.set_mesh(mesh), pytest.raises(UserError, match=message):
    program(model, rows, compute)


def test_layers_that_do_not_divide_are_explained():
  """Four layers on eight stages."""
  model, rules = MODELS["dense"], preset("pp")
  compute, mesh = Compute(rules=rules), make_mesh(rules)
  said = r"4 layers.* 8 stages.*nearest.* 8"
  with jax.sharding.set_mesh(mesh), pytest.raises(UserError, match=said):
    program(model, 8, compute)


def test_a_cache_is_declined():
  """Stages remember nothing yet; the sentence says what does."""
  model, rules = MODELS["dense"], preset("pp")
  compute, cache = Compute(rules=rules), empty(model.cache(8, 8))
  tokens = jnp.zeros((8, 1), jnp.int32)
  mesh, params = make_mesh(rules, "data:2,pipe:4"), random_params(model)
  with (
    jax.sharding.set_mesh(mesh),
    pytest.raises(UserError, match="fsdp or tp"),
  ):
    forward(model, params, tokens, cache=cache, compute=compute)


def test_keys_are_read():
  """`parallel` takes the fields of `Split`, and nothing else."""
  keys = {"preset": "pp", "context": "gather", "microbatches": 4, "rounds": 2}
  found = config.freeze({f"parallel.{k}": v for k, v in keys.items()})
  assert recipe.compute(found).split == Split("gather", 4, 2)
  wrong = config.freeze({"parallel.round": 2})
  with pytest.raises(UserError, match=r"parallel.round; did you mean"):
    recipe.compute(wrong)
