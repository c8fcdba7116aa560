"""The fastest way to run a config on a target: mesh, preset, parts, remat.

Three sieves, each finer and dearer than the one before. First what cannot be:
batches that do not divide, parameters and optimizer state that alone are too
large. Then the traced program of what is left: its memory, its work, its
messages, in about a second each. The best few are compiled, and the fastest of
those that fit by the compiler's word is the winner.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
from ml_collections import FrozenConfigDict

from jaxlm import keys, recipe
from jaxlm.errors import UserError
from jaxlm.layers import param
from jaxlm.models.decoder import Decoder
from jaxlm.plan import make, programs
from jaxlm.plan.make import Outcome, Site
from jaxlm.plan.memory import changed
from jaxlm.plan.roofline import mfu
from jaxlm.speed import short

PRESETS = ("dp", "zero1", "fsdp", "fsdp_tp", "fsdp_sp", "fsdp_ep")
REMATS = ("full", "dots", "none")  # from the least memory to the most
PARTS = (1, 2, 4, 8, 16)
ROOM = 1.15  # estimates may be so much above the limit and still be compiled
CALM = 0.5  # the least a step is taken to wait for its messages


@dataclass(frozen=True)
class Candidate:
  """One way to run a config.

  Attributes:
    config: with its way.
    outcome: what is known of its training step.
    compiled: whether its compiler was asked.
  """

  config: FrozenConfigDict
  outcome: Outcome | None = None
  compiled: bool = False

  @property
  def way(self) -> tuple[str, str, int, int, str]:
    """Preset, mesh, batch, parts, remat."""
    c = self.config
    p = c.parallel
    return p.preset, p.mesh, c.batch_size, c.accumulate, c.remat

  @property
  def tokens_per_second(self) -> float:
    """Half way between messages beside the work and after it."""
    t = self.outcome.times
    return self.outcome.tokens / (CALM * t.most + (1 - CALM) * t.least)


@dataclass(frozen=True)
class Search:
  """What was found.

  Attributes:
    asked: how many ways there are.
    traced: those that were read, the fastest first.
    compiled: those that were compiled, the fastest that fits first.
    winner: the fastest that fits, if any does.
  """

  asked: int
  traced: tuple[Candidate, ...]
  compiled: tuple[Candidate, ...]
  winner: Candidate | None


def search(
  config: FrozenConfigDict,
  where: Site,
  batches: Sequence[int] = (),
  traces: int = 32,
  compiles: int = 3,
  say: Callable[[str], None] = lambda text: None,
) -> Search:
  """Searches the ways to train a config on a site.

  Args:
    config: what is to be trained; its own way does not matter.
    where: the target.
    batches: batch sizes to try; none: the config's.
    traces: how many ways are traced, at most.
    compiles: how many of them are compiled.
    say: told what is under way.

  Raises:
    UserError: if no way passes even the first sieve.
  """
  model = programs.decoder(config)
  possible = list(ways(config, model, where, batches or (config.batch_size,)))
  if not possible:
    raise UserError(
      f"no mesh of {where.target.text} can hold this model and divide "
      f"batch_size={config.batch_size}; take more devices or another batch"
    )
  traced = _traced(possible, model, where, traces, say)
  compiled = []
  for i, candidate in enumerate(traced[:compiles]):
    say(f"search: compiling {i + 1} of {min(compiles, len(traced))}")
    found = _known(candidate.config, model, where, compiled=True)
    compiled += [] if found is None else [found]
  compiled.sort(key=lambda c: (not fits(c, where), -c.tokens_per_second))
  asked = len(possible) * len(REMATS) * len(PARTS)
  winner = next((c for c in compiled if fits(c, where)), None)
  return Search(asked, tuple(traced), tuple(compiled), winner)


def _traced(
  possible: Sequence[FrozenConfigDict],
  model: Decoder,
  where: Site,
  traces: int,
  say: Callable[[str], None],
) -> list[Candidate]:
  """Those that may fit, the fastest first.

  Each mesh is first tried with everything computed again, in as few parts as
  fit; then the best of them with less computed again.
  """
  left = iter(range(traces))
  found: list[Candidate] = []

  def look(way: FrozenConfigDict) -> bool:
    """Traces one way; True if it may fit. False, too, where none are left."""
    number = next(left, None)
    if number is None or _mesh(way, where) is None:
      return False
    say(f"search: tracing {number + 1} of at most {traces}")
    made = _known(way, model, where, compiled=False)
    if made is None or made.outcome.reading.peak > ROOM * where.limit:
      return False
    found.append(made)
    return True

  for way in possible:
    for parts in PARTS:
      if look(changed(way, accumulate=parts)):
        break
  found.sort(key=lambda c: -c.tokens_per_second)
  for best in found[:4]:
    for remat in REMATS[1:]:
      if not look(changed(best.config, remat=remat)):
        break
  return sorted(found, key=lambda c: -c.tokens_per_second)


def fits(candidate: Candidate, where: Site) -> bool:
  """Whether its compiler took it, and it is within the limit."""
  o = candidate.outcome
  return not o.refused and o.total <= where.limit


def ways(
  config: FrozenConfigDict, model: Decoder, where: Site, batches: Sequence[int]
) -> Iterator[FrozenConfigDict]:
  """Configs that pass the first sieve, everything computed again."""
  n = where.target.size
  for preset, mesh in meshes(model, n):
    for batch in batches:
      other = changed(
        config,
        parallel__preset=preset,
        parallel__mesh=mesh,
        batch_size=batch,
        accumulate=1,
        remat=REMATS[0],
      )
      rests = _rests(other, model, where)
      if rests is not None and rests < where.limit:
        yield other


def meshes(model: Decoder, n: int) -> Iterator[tuple[str, str]]:
  """`(preset, mesh)` over `n` devices; second axes of up to sixteen."""
  experts = {getattr(block.ffn, "experts", 0) for block in model.blocks}
  for preset in PRESETS:
    first, _, second = preset.partition("_")
    if second == "ep" and experts == {0}:
      continue
    main = {"dp": "data"}.get(first, "fsdp")
    other = {"tp": "tensor", "sp": "tensor", "ep": "expert"}.get(second)
    if other is None:
      yield preset, f"{main}:{n}"
      if main == "fsdp":
        for data in (2, 4, 8):
          if n % data == 0 and n > data:
            yield preset, f"data:{data},fsdp:{n // data}"
      continue
    size = 2
    while size <= min(n, 16):
      if n % size == 0:
        yield preset, f"{main}:{n // size},{other}:{size}"
      size *= 2


def _mesh(config: FrozenConfigDict, where: Site) -> jax.sharding.Mesh | None:
  """The mesh, or None where the config does not divide over it."""
  try:
    return where.mesh(config)
  except UserError:
    return None


def _rests(
  config: FrozenConfigDict, model: Decoder, where: Site
) -> float | None:
  """Bytes of parameters and optimizer state at rest, on one device."""
  mesh = _mesh(config, where)
  if mesh is None:
    return None
  tree, rules = model.params(), recipe.rules(config)
  total = 0
  for spec, times in ((rules.stored_spec, 1), (rules.state_spec, 2)):
    for p in param.paths(tree).values():
      cut = spec(p.axes, p.shape, mesh)
      names = [(e,) if isinstance(e, str) else e or () for e in cut]
      ways = math.prod(mesh.shape[a] for entry in names for a in entry)
      total += times * 4 * p.size // ways
  return total


def _known(
  config: FrozenConfigDict, model: Decoder, where: Site, compiled: bool
) -> Candidate | None:
  """A candidate with its outcome; None where it cannot be traced."""
  try:
    mesh = where.mesh(config)
    found = make.outcome(config, model, where, mesh, "train", compiled=compiled)
  except (UserError, ValueError, TypeError, NotImplementedError):
    return None
  return Candidate(config, found, compiled)


# --- Pages ------------------------------------------------------------------


def table(found: Search, where: Site, most: int = 10) -> str:
  """What was compiled, and beside it the alternatives that were not."""
  head = ("preset", "mesh", "batch", "parts", "remat", "memory", "step", "MFU")
  rows = [(*head, "by")]
  ways = {c.way for c in found.compiled}
  others = [c for c in found.traced if c.way not in ways]
  for c in [*found.compiled, *others[:most]]:
    rows.append(_row(c, where))
  widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
  lines = [
    "  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip()
    for r in rows
  ]
  read = f"{found.asked} ways, {len(found.traced)} traced that may fit"
  return "\n".join([read, *lines])


def _row(c: Candidate, where: Site) -> tuple[str, ...]:
  o = c.outcome
  peak = where.chip.peak(c.config.precision)
  low, high = (
    mfu(o.model_flops, s, where.target.size, peak)
    for s in (o.times.most, o.times.least)
  )
  by = "the compiler" if c.compiled else "estimate"
  if c.compiled and not fits(c, where):
    by = "the compiler: does NOT fit"
  return (
    *map(str, c.way),
    f"{short(o.total)}B",
    f"{o.times.least:.3g} to {o.times.most:.3g} s",
    f"{low:.1%} to {high:.1%}",
    by,
  )


def config_file(winner: Candidate, where: Site) -> str:
  """The winner as a config file."""
  flat = keys.flatten(winner.config)
  usual = keys.defaults()
  lines = [
    f"  config.{name} = {value!r}"
    for name, value in flat.items()
    if name not in usual or usual[name] != value
  ]
  t = winner.outcome.times
  return (
    f'"""The fastest way found for {where.target.text}.\n\n'
    f"A step is planned to take {t.least:.3g} to {t.most:.3g} s and "
    f'{short(winner.outcome.total)}B.\n"""\n\n'
    "from jaxlm.config import default_config\n\n\n"
    'def get_config():\n  """As found by `python -m jaxlm.plan --search`."""\n'
    "  config = default_config()\n"
    + "\n".join(lines).replace("'", '"')
    + "\n  return config\n"
  )
