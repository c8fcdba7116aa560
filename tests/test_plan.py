"""Plans: reading programs before and after a compiler, chips, memory, words.

The parsers are fed planted text whose answer is counted by hand; the readings
are held to the compiler's own figures on the eight CPU devices of the tests.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import keys
from jaxlm.config import freeze, from_file
from jaxlm.errors import UserError
from jaxlm.parallel.mesh import parse_sizes
from jaxlm.plan import hlo, make, memory, report, roofline, search, target
from jaxlm.plan.chips import CHIPS
from jaxlm.plan.network import Message, Network
from jaxlm.plan.traced import Reading, read

# --- Targets ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("v9:2x2", "unknown target 'v9:2x2'; chips: v5e, v5p, v6e, h100, cpu"),
    ("v5e", "no size"),
    ("v5e:4x0", "no size"),
    ("v5p:4x4", "3 dimensions"),
    ("h100:2x2", "1 dimension;"),
    ("h100:12", "come in nodes of 8; ask for 16"),
    ("cpu:4096", "started with 8 CPU devices"),
  ],
)
def test_a_target_that_is_none_is_told(monkeypatch, text, words):
  """Each says what would be right."""
  monkeypatch.setattr(target, "prepare", lambda goal: None)
  monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: name)
  with pytest.raises(UserError, match=words):
    make.site(text)


@pytest.mark.parametrize(
  ("text", "extra"), [("v5e:2x2", "jaxlm.tpu."), ("h100:8", "jaxlm.cuda12.")]
)
def test_a_compiler_that_is_missing_is_named(monkeypatch, text, extra):
  """With the extra that brings it."""
  monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=extra):
    target.devices(target.parse(text))


def test_every_chip_has_its_sources():
  """And a peak for what models are computed in."""
  for chip in CHIPS.values():
    assert all("https://" in source for source in chip.sources[:1])
    assert chip.peak("bfloat16") >= chip.peak("float32") > 0


# --- The network ------------------------------------------------------------


def torus(names=("fsdp", "tensor"), sizes=(16, 2), chip="v5e") -> Network:
  """A mesh laid along the dimensions of a torus."""
  grid = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1)
  return Network(CHIPS[chip], names, sizes, grid)


def test_the_rate_of_an_axis_of_a_torus():
  """A v5e sends 100 GB/s along each dimension that closes to a ring, half of
  it where that is open, and both together where an axis spans both.
  """
  net = torus()
  assert net.rate(["fsdp"]) == 100e9
  assert net.rate(["tensor"]) == 50e9
  assert net.rate(["fsdp", "tensor"]) == 150e9


def test_the_rate_among_gpus():
  """NVLink within a node; between nodes all adapters that the group has."""
  places = np.array([(i // 8, i) for i in range(32)])
  net = Network(
    CHIPS["h100"], ("fsdp", "tensor"), (4, 8), places.reshape(4, 8, 2)
  )
  assert net.rate(["tensor"]) == 450e9
  assert net.rate(["fsdp"]) == 50e9
  assert net.rate(["fsdp", "tensor"]) == 400e9


def test_how_long_messages_take():
  """An all-reduce is a reduce-scatter and an all-gather; by hand."""
  net = torus()
  gather = net.seconds(Message("all-gather", ("fsdp",), 1600, 3))
  assert gather == pytest.approx(3 * 1600 * 15 / 16 / 100e9)
  both = net.seconds(Message("all-reduce", ("fsdp",), 1600, 3))
  assert both == pytest.approx(2 * gather)
  assert net.seconds(Message("all-gather", (), 1600)) == 0


def test_how_long_rows_take_to_everyone():
  """All-to-all: a node's share by fast links, the rest by a chip's adapter.

  On a torus half of each half crosses the middle, over the two links of a ring.
  """
  places = np.stack(np.unravel_index(np.arange(16), (2, 8)), -1)
  net = Network(CHIPS["h100"], ("expert",), (16,), places)
  spread = Message("all-to-all", ("expert",), 1600)
  assert math.isclose(net.seconds(spread), 800 / 50e9)
  net = Network(CHIPS["h100"], ("expert",), (8,), places[:8])
  assert math.isclose(net.seconds(spread), 1400 / 450e9)
  ring = np.stack([np.arange(16), np.zeros(16, int)], -1)
  net = Network(CHIPS["v5e"], ("expert",), (16,), ring)
  assert math.isclose(net.seconds(spread), 4 * 1600 / 100e9)


# --- Compiled programs ------------------------------------------------------

RAGGED = """\
ENTRY %main (x: bf16[8,4], y: f32[8]) -> bf16[12,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %room = bf16[12,4]{1,0} broadcast(%zero), dimensions={}
  %less = f32[12]{0} broadcast(%zero), dimensions={}
  %a = ((bf16[8,4]{1,0}, bf16[12,4]{1,0}), bf16[12,4]{1,0}) \
ragged-all-to-all-start(%x, %room), channel_id=1, replica_groups=[16,2]<=[32]
  %b = ((f32[8]{0}, f32[12]{0}), f32[12]{0}) \
ragged-all-to-all-start(%y, %less), channel_id=1, replica_groups=[16,2]<=[32]
  ROOT %c = bf16[12,4]{1,0} ragged-all-to-all-done(%a), \
backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
}
"""


def test_rows_travel_and_not_the_room_for_them():
  """Each exchange of rows counts, though all of them share a channel.

  Nobody knows how many cycles one takes.
  """
  found = hlo.read(RAGGED, torus())
  assert found.cycles == 0
  sizes = {(m.kind, m.axes, m.bytes) for m in found.messages}
  assert sizes == {
    ("all-to-all", ("tensor",), 8 * 4 * 2),
    ("all-to-all", ("tensor",), 8 * 4),
  }


PLANTED = """\
HloModule jit_call, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused_slice (p0: f32[6,128], p1: s32[]) -> f32[128] {
  %p0 = f32[6,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %cut = f32[1,128]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,128}
  ROOT %flat = f32[128]{0} bitcast(%cut)
}

%part (p: bf16[8,4]) -> bf16[128,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[128,4]{1,0} all-gather(%p), channel_id=5, \
replica_groups=mesh['a'=16,'b'=2] {'a'}, dimensions={0}
}

%rest (p: bf16[8,4]) -> bf16[128,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.10 = bf16[128,4]{1,0} all-gather(%p), channel_id=5, \
replica_groups=mesh['a'=16,'b'=2] {'a'}, dimensions={0}
}

%body (t: (s32[], f32[6,128])) -> (s32[], f32[6,128]) {
  %t = (s32[], f32[6,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[6,128]{1,0} get-tuple-element(%t), index=1
  %slice = f32[128]{0} fusion(%x, %i), kind=kLoop, calls=%fused_slice, \
backend_config={"window_config":{"estimated_cycles":"500"}}
  %w = bf16[8,4]{1,0:T(8,128)S(1)} convert(%slice)
  %early = bf16[128,4]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%part
  %late = bf16[128,4]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%rest
  %sum = f32[128]{0} all-reduce(%slice), channel_id=6, \
replica_groups=[16,2]<=[32], to_apply=%add
  ROOT %out = (s32[], f32[6,128]{1,0}) tuple(%i, %x)
}

%condition (t: (s32[], f32[6,128])) -> pred[] {
  %t = (s32[], f32[6,128]{1,0}) parameter(0)
  %n = s32[] constant(6)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[6,128]) -> f32[6,128] {
  %x = f32[6,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[6,128]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[6,128]{1,0}) while(%start), condition=%condition, \
body=%body
  ROOT %y = f32[6,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_compiled_program_by_hand():
  """Loops by the constant they compare with, one message for each channel,
  a slice's traffic for what is only sliced, nothing for on-chip memory.
  """
  found = hlo.read(PLANTED, torus())
  assert set(found.messages) == {
    Message("all-gather", ("fsdp",), 128 * 4 * 2, 6),
    Message("all-reduce", ("tensor",), 128 * 4, 6),
  }
  assert found.cycles == 6 * 500
  cut = 128 * 4 + 4  # a row, and its number
  reads = cut + 128 * 4  # the convert's operand
  assert found.traffic >= 6 * (reads + cut)
  assert found.traffic < 6 * 6 * 128 * 4  # never all six rows


@pytest.mark.parametrize(
  ("text", "group"),
  [
    ("replica_groups={{0,1,2},{3,4,5}}", [0, 1, 2]),
    ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
    ("channel_id=1", list(range(8))),
  ],
)
def test_groups_in_every_spelling(text, group):
  """XLA writes them in three ways."""
  assert hlo.first_group(text, 8) == group


# --- Traced programs --------------------------------------------------------


def test_work_is_counted_in_loops_and_again():
  """Two products of 8 x 16 x 16, each in a scan of 5; twice in the backward
  pass, and once more where it is computed again.
  """

  def f(w, x):
    def body(x, w):
      return jnp.tanh(x @ w), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, w)[0])

  w, x = jnp.ones((5, 16, 16)), jnp.ones((8, 16))
  once = 5 * 2 * 8 * 16 * 16
  forward = read(jax.jit(f).trace(w, x).jaxpr, [("parameters", "w"), ("", "x")])
  assert forward.flops == {"float32": once}
  traced = jax.jit(jax.grad(f)).trace(w, x)
  both = read(traced.jaxpr, [("parameters", "w"), ("", "x")])
  assert both.flops == {"float32": 4 * once}
  assert both.saved == {"input float32[5x8x16]": 5 * 8 * 16 * 4}


def tiny(**changes) -> dict:
  """A small decoder that is planned, not trained."""
  flat = keys.defaults() | {
    "model.family": "llama",
    "model.vocab": 512,
    "model.dim": 64,
    "model.layers": 4,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.mlp_dim": 256,
    "batch_size": 16,
    "seq_len": 128,
    "parallel.preset": "fsdp",
  }
  return freeze(flat | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(scope="module")
def site() -> make.Site:
  """Eight CPU devices, with figures that need no measuring."""
  return make.Site(
    target.parse("cpu:8"), CHIPS["h100"], tuple(jax.devices()), 80e9
  )


@pytest.fixture(scope="module")
def planned(site) -> make.Plan:
  """One plan for all tests that read one."""
  return make.plan(tiny(), site, ("train", "decode"))


def test_memory_adds_up_to_the_compilers(planned):
  """Arguments to a hundredth, all in all within a factor of two."""
  for o in planned.outcomes:
    assert 0.5 < o.reading.peak / o.total < 2.0
  train = planned.outcomes[0]
  each = planned.model.n_params() * 4 * 3 / 8  # and Adam's two, over eight
  assert train.memory["arguments"] == pytest.approx(each, rel=0.05)


def test_messages_agree_with_the_compiled_program(planned, site):
  """What FSDP gathers is all weights, forward and, without remat, no more."""
  train = planned.outcomes[0]
  gathered = sum(
    m.bytes * m.times for m in train.messages if m.kind == "all-gather"
  )
  told = sum(
    m.bytes * m.times for m in train.reading.messages if m.kind == "all-gather"
  )
  assert gathered == pytest.approx(told, rel=0.25)
  assert gathered >= 0.9 * planned.model.n_params() * 4


def test_work_agrees_with_the_compiled_program(site):
  """XLA's own count of a program whose layers are written out."""
  config = tiny(unroll=True, parallel__preset="dp", optimizer__name="sgd")
  mesh = site.mesh(config)
  model = make.programs.decoder(config)
  program = make.traced(config, model, mesh, "train")
  counted = program.traced.lower().compile().cost_analysis()["flops"]
  told = sum(program.reading().flops.values())
  assert told == pytest.approx(counted, rel=0.2)


def test_times_by_hand(site):
  """Each part over its rate; the longest, and their sum."""
  mesh = site.mesh(tiny())
  net = site.network(mesh)
  done = Reading()
  done.flops["bfloat16"] = 989.4e12
  compiled = hlo.Compiled(
    (Message("all-gather", ("fsdp",), int(450e9 * 8 / 7)),), 2 * 3352e9, 0, 0
  )
  t = roofline.times(done, compiled, net)
  assert (t.compute, t.memory) == (pytest.approx(1), pytest.approx(2))
  assert t.network == pytest.approx(1)
  assert (t.least, t.most, t.bound) == (2, pytest.approx(3), "memory")
  assert roofline.mfu(989.4e12 * 8, 2.0, 8, 989.4e12) == 0.5


# --- Too little memory ------------------------------------------------------


def test_what_does_not_fit_is_explained(site):
  """The largest array comes first, and the three changes that save most do."""
  config, limit = tiny(seq_len=256), make.dataclasses.replace(site, limit=1e6)
  model = make.programs.decoder(config)
  told = memory.explain(config, model, limit, "train")
  sizes = [a.bytes for a in told.largest]
  assert sizes == sorted(sizes, reverse=True)
  assert sizes[0] > 100_000
  saved = [s.bytes for s in told.savings]
  assert len(saved) == 3
  assert saved == sorted(saved, reverse=True)
  changes = " ".join(s.change for s in told.savings)
  assert "remat=full" in changes
  assert all(x in str(told) for x in ("1.00MB", "float32[", "save most"))


def test_a_saving_is_what_the_change_saves(site):
  """The estimate of the changed config is smaller by as much."""
  config = tiny(seq_len=256)
  model = make.programs.decoder(config)
  told = memory.explain(config, model, site, "train", most=10)
  saving = next(s for s in told.savings if "remat=full" in s.change)
  before, after = (
    make.outcome(
      c, model, site, site.mesh(c), "train", compiled=False
    ).reading.peak
    for c in (config, tiny(seq_len=256, remat="full"))
  )
  assert before - after == saving.bytes


# --- Search -----------------------------------------------------------------


def test_the_search_finds_what_fits(site, tmp_path):
  """The winner is compiled, within the limit, and no slower than what it beat;
  its config file is the same config again.
  """
  config = tiny(model__layers=2, model__dim=32, seq_len=64, batch_size=8)
  tight = make.dataclasses.replace(site, limit=2.5e6)
  found = search.search(config, tight, traces=4, compiles=1)
  winner = found.winner
  assert winner.compiled
  assert winner.outcome.total <= 2.5e6
  speeds = [c.tokens_per_second for c in found.traced]
  assert speeds == sorted(speeds, reverse=True)
  assert winner.way == found.traced[0].way
  assert "the compiler" in search.table(found, tight).splitlines()[2]
  path = tmp_path / "best.py"
  path.write_text(search.config_file(winner, tight))
  assert freeze(from_file(path, {})[0]) == winner.config


def test_meshes_of_a_search():
  """Every mesh multiplies to the devices; experts only where there are some."""
  model = make.programs.decoder(tiny())
  for preset, mesh in search.meshes(model, 32):
    assert math.prod(parse_sizes(mesh).values()) == 32
    assert "ep" not in preset


# --- Pages ------------------------------------------------------------------


def test_pages(planned, tmp_path):
  """Text, JSON and HTML say the same; a budget becomes days and dollars."""
  found = report.facts(planned, tokens=1e9, price=2.0)
  train = found["programs"]["train"]
  seconds = train["seconds"]["serial"]
  days = 1e9 / (16 * 128) * seconds / 86400
  assert train["budget"]["days"]["serial"] == pytest.approx(days)
  cost = train["budget"]["cost"]["serial"]
  assert cost == pytest.approx(days * 24 * 8 * 2.0)
  assert math.isclose(
    train["mfu"]["serial"],
    train["flops"]["model"] / (seconds * 8 * planned.site.chip.peak("float32")),
  )
  paths = report.save(found, tmp_path)
  assert json.loads(paths[0].read_text()) == found
  page = paths[1].read_text()
  assert page.count("data:image/png;base64,") == 2
  assert "memory per device" in page


# --- Reinforcement learning -------------------------------------------------

RL = {
  "model.layers": 2,
  "batch_size": 64,
  "seq_len": 48,
  "remat": "full",
}


def learning(section: str, **changes) -> dict:
  """A small step of GRPO or PPO, 128 responses of 32 tokens."""
  shape = {"prompts": 16, "samples": 8, "tokens": 32, "kl": 0.1}
  own = {f"{section}.{k}": v for k, v in shape.items()}
  flat = keys.flatten(tiny()) | RL | own
  return freeze(flat | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(scope="module")
def stepped(site) -> make.Plan:
  """A step of GRPO whose rollout was compiled; the rest is traced."""
  config = learning("grpo")
  compiled = make.plan(config, site, ("rollout",)).outcomes
  rest = make.plan(config, site, compiled=False)
  return make.dataclasses.replace(
    rest, outcomes=(*compiled, *rest.outcomes[1:])
  )


def test_a_step_is_its_programs(stepped):
  """Each with all that lies on the devices, by name; their times add up."""
  assert [o.name for o in stepped.outcomes] == ["rollout", "score", "update"]
  each = stepped.model.n_params() * 4 / 8
  for o in stepped.outcomes:
    parts = o.reading.parts()
    for name in ("policy", "frozen reference"):
      assert parts[name] == pytest.approx(each, rel=0.05)
    assert parts["optimizer state"] == pytest.approx(2 * each, rel=0.05)
  rollout = stepped.outcomes[0]
  assert rollout.memory["arguments"] == pytest.approx(4 * each, rel=0.05)
  assert "cache" in rollout.reading.parts()
  assert rollout.reading.parts()["gathered weights"] > 7 * each
  assert 0.4 < rollout.reading.peak / rollout.total < 2.5
  found = report.facts(stepped)
  step = found["step"]
  assert step["runs"] == {"rollout": 1, "score": 1, "update": 1}
  most = sum(p["seconds"]["serial"] for p in found["programs"].values())
  assert step["samples_per_second"]["serial"] == pytest.approx(128 / most)
  assert "128 responses of 32 tokens" in report.text(found)


def test_the_work_of_a_rollout_is_that_of_all_its_tokens(stepped):
  """The loop over tokens counts as often as there are tokens, in the traced
  program and in the compiled one.
  """
  o = stepped.outcomes[0]
  worked = 8 * sum(o.reading.flops.values())
  assert worked == pytest.approx(o.model_flops, rel=0.15)
  joins = [m for m in o.messages if m.kind == "all-reduce"]
  assert max(m.times for m in joins) in (31, 32)  # have all rows ended?
  gathers = [m for m in o.messages if m.kind == "all-gather"]
  assert max(m.times for m in gathers) < 31  # weights, once for all


def test_weights_may_be_gathered_for_every_token(site, stepped):
  """Then they take no room, and travel again and again; and that is what is
  proposed where a rollout does not fit.
  """
  config = learning("grpo", grpo__gathered=False)
  other = make.plan(config, site, ("rollout",), compiled=False).outcomes[0]
  assert "gathered weights" not in other.reading.parts()
  sent = [
    sum(m.bytes * m.times for m in o.reading.messages if m.axes == ("fsdp",))
    for o in (stepped.outcomes[0], other)
  ]
  assert sent[1] > 20 * sent[0]
  tight = make.dataclasses.replace(site, limit=1e6)
  model = stepped.model
  told = memory.explain(learning("grpo"), model, tight, "rollout", most=9)
  assert "--config.grpo.gathered=false" in str(told)


def test_a_step_of_ppo_has_a_critic(site):
  """Of its own, it is one more model, trained, too."""
  config = learning("ppo", ppo__critic="separate", ppo__epochs=3)
  made = make.plan(config, site, ("rollout",), compiled=False)
  parts = made.outcomes[0].reading.parts()
  assert parts["critic"] == pytest.approx(parts["policy"], rel=0.25)
  assert made.step.runs()["update"] == 3
  with pytest.raises(UserError, match=r"no program 'tune'.*known: .*rollout"):
    make.plan(config, site, ("tune",))
  with pytest.raises(UserError, match="leave out cp"):
    make.plan(learning("ppo", parallel__preset="fsdp_cp"), site, ("rollout",))
