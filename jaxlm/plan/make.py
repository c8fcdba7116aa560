"""Making a plan: trace, read, compile, read again."""

import dataclasses
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from jaxlm import recipe
from jaxlm.errors import UserError
from jaxlm.layers.attend import choose
from jaxlm.layers.cache import FULL
from jaxlm.models.decoder import Decoder
from jaxlm.plan import hlo, programs, rl, roofline, target
from jaxlm.plan.chips import Chip
from jaxlm.plan.network import Message, Network, network
from jaxlm.plan.programs import Program
from jaxlm.plan.target import Target
from jaxlm.plan.traced import Reading

PROGRAMS = ("train", "prefill", "decode")
RL = ("rollout", "score", "update")


@dataclass(frozen=True)
class Site:
  """Where a plan is for: a target, its devices, and what they are worth.

  Attributes:
    target: as asked for.
    chip: its figures.
    devices: what is compiled for.
    limit: bytes that a program may use of each.
  """

  target: Target
  chip: Chip
  devices: Any
  limit: float

  def mesh(self, config: FrozenConfigDict) -> jax.sharding.Mesh:
    """The config's mesh over these devices."""
    return recipe.mesh(config, list(self.devices))

  def network(self, mesh: jax.sharding.Mesh) -> Network:
    """The links under a mesh."""
    places = target.coordinates(list(mesh.devices.flat))
    return network(self.chip, mesh, places)


def site(text: str, limit: float | None = None) -> Site:
  """The site of `--target=text`; `limit` bytes instead of the chip's own.

  Raises:
    UserError: for an unknown target, or a compiler that is not installed.
  """
  goal = target.parse(text)
  target.prepare(goal)
  devices = target.devices(goal)
  chip = target.chip(goal)
  return Site(goal, chip, tuple(devices), limit or chip.memory)


@dataclass
class Outcome:
  """What is known of one program.

  Attributes:
    name: one of `PROGRAMS` or `RL`.
    tokens: that one run works on.
    reading: of the traced program.
    times: the roofline's.
    messages: of the compiled program, or else of the traced one.
    memory: the compiler's totals in bytes: arguments, outputs, aliased,
      temporaries, code; empty where it did not compile.
    model_flops: of all chips, without what is computed again.
    seconds: what tracing, lowering and compiling took here.
    refused: what the compiler said if it ran out of the target's memory.
  """

  name: str
  tokens: int
  reading: Reading
  times: roofline.Times
  messages: list[Message]
  memory: dict[str, int]
  model_flops: float
  seconds: dict[str, float] = field(default_factory=dict)
  refused: str = ""

  @property
  def total(self) -> int:
    """Bytes on one device: the compiler's, or else the estimate."""
    if not self.memory:
      return max(self.reading.peak, _said(self.refused))
    m = self.memory
    return m["arguments"] + m["outputs"] - m["aliased"] + m["temporaries"]

  def collectives(self, net: Network) -> list[dict[str, Any]]:
    """By kind and axes: how many, bytes, seconds; the longest first."""
    rows: dict[tuple, dict] = defaultdict(
      lambda: {"count": 0, "bytes": 0, "seconds": 0.0}
    )
    for m in self.messages:
      row = rows[m.kind, m.axes]
      row["count"] += m.times
      row["bytes"] += m.bytes * m.times
      row["seconds"] += net.seconds(m)
    found = [
      {"kind": kind, "axes": list(axes), **row}
      for (kind, axes), row in rows.items()
    ]
    return sorted(found, key=lambda row: -row["seconds"])


@dataclass(frozen=True)
class Plan:
  """A config on a site; the `step` is that of PPO or GRPO."""

  config: FrozenConfigDict
  model: Decoder
  site: Site
  mesh: jax.sharding.Mesh
  outcomes: tuple[Outcome, ...]
  attention: tuple[str, str]
  step: rl.Step | None = None

  @property
  def network(self) -> Network:
    """The links under its mesh."""
    return self.site.network(self.mesh)


@dataclass(frozen=True)
class Generation:
  """What prefill and decode are planned for.

  Attributes:
    rows: texts at once; 0: one for each group of devices that shares rows.
    length: tokens of each, prompt and answer; 0: the config's `seq_len`.
    cache: how they are remembered.
  """

  rows: int = 0
  length: int = 0
  cache: Any = FULL


def plan(
  config: FrozenConfigDict,
  where: Site,
  which: Sequence[str] = (),
  generation: Generation = Generation(),
  compiled: bool = True,
  say: Callable[[str], None] = lambda text: None,
) -> Plan:
  """Plans the programs of a config.

  Args:
    config: of the run.
    where: the target.
    which: some of `PROGRAMS`, or for a config of PPO or GRPO of `RL`; none
      means all that the config has.
    generation: sizes of prefill and decode.
    compiled: False stops before the compiler: an estimate in a second.
    say: told what is under way.

  Raises:
    UserError: for programs that do not exist, or a mesh that does not fit.
  """
  mesh = where.mesh(config)
  model = programs.decoder(config)
  which = _which(config, model, which)
  with jax.set_mesh(mesh):
    attention = choose(recipe.compute(config))
  outcomes = []
  for name in which:
    say(f"{name}: {'compiling' if compiled else 'tracing'}")
    outcomes.append(
      outcome(config, model, where, mesh, name, generation, compiled)
    )
  step = rl.step(config, model) if rl.asked(config) else None
  return Plan(config, model, where, mesh, tuple(outcomes), attention, step)


def _which(
  config: FrozenConfigDict, model: Decoder, asked: Sequence[str]
) -> tuple[str, ...]:
  """The programs asked for; all that the config has, if none are."""
  runs = tuple(rl.step(config, model).runs()) if rl.asked(config) else ()
  known = (*PROGRAMS, *runs)
  for name in asked:
    if name not in known:
      raise UserError(
        f"no program {name!r} to plan in this config; known: {', '.join(known)}"
      )
  return tuple(asked) or runs or PROGRAMS


def traced(
  config: FrozenConfigDict,
  model: Decoder,
  mesh: jax.sharding.Mesh,
  name: str,
  generation: Generation = Generation(),
) -> Program:
  """The program of that name."""
  if name in RL:
    return rl.traced(config, model, mesh, name)
  if name == "train":
    return programs.train(config, model, mesh)
  rows = generation.rows or recipe.rules(config).ways("batch", mesh)
  length = generation.length or config.seq_len
  form = {
    "prefill": programs.reading_prompts,
    "decode": programs.writing_tokens,
  }[name]
  return form(config, model, mesh, rows, length, generation.cache)


def outcome(
  config: FrozenConfigDict,
  model: Decoder,
  where: Site,
  mesh: jax.sharding.Mesh,
  name: str,
  generation: Generation = Generation(),
  compiled: bool = True,
) -> Outcome:
  """What is known of one program."""
  clock = _Clock()
  program = traced(config, model, mesh, name, generation)
  clock.tick("trace")
  reading = program.reading(narrow=where.chip.kind == "tpu")
  net = where.network(mesh)
  clock.tick("read")
  length = generation.length or config.seq_len
  length = length if name in ("prefill", "decode") else config.seq_len
  work = program.forwards * program.tokens * model.flops_per_token(length)
  found = Outcome(
    name,
    program.tokens,
    reading,
    roofline.times(reading, None, net),
    reading.messages,
    {},
    program.model_flops or work,
    clock.seconds,
  )
  return _compile(found, program, net, clock) if compiled else found


def _compile(
  found: Outcome, program: Program, net: Network, clock: "_Clock"
) -> Outcome:
  """What the target's compiler makes of it."""
  lowered = program.traced.lower()
  clock.tick("lower")
  try:
    executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    clock.tick("compile")
    return dataclasses.replace(found, refused=str(error))
  clock.tick("compile")
  read = hlo.read(executable.as_text(), net, program.loops)
  clock.tick("read")
  m = executable.memory_analysis()
  memory = {
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes,
    "aliased": m.alias_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "code": m.generated_code_size_in_bytes,
  }
  return dataclasses.replace(
    found,
    times=roofline.times(found.reading, read, net),
    messages=list(read.messages),
    memory=memory,
  )


def _said(refusal: str) -> int:
  """Bytes that a compiler says it would have needed; 0 if it does not.

  >>> _said("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.")
  22011707392
  """
  found = re.search(r"Used ([\d.]+)([KMGT]) of", refusal)
  if not found:
    return 0
  return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


class _Clock:
  """Seconds since the last tick, by name."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def tick(self, name: str) -> None:
    now = time.perf_counter()
    self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
    self._last = now
