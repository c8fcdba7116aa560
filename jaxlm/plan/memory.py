"""Too little memory: which arrays are the largest, and what would save most.

Savings are differences between two readings of traced programs, one of the
config as it is and one of the config with a single change.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from jaxlm import keys, recipe
from jaxlm.config import freeze
from jaxlm.errors import UserError
from jaxlm.layers.cache import FULL, Quantised
from jaxlm.models.decoder import Decoder
from jaxlm.plan import make, rl
from jaxlm.plan.make import Generation, Site
from jaxlm.plan.traced import Live
from jaxlm.speed import short


@dataclass(frozen=True)
class Saving:
  """A change, and the bytes it saves on each device (an estimate)."""

  change: str
  bytes: int


@dataclass(frozen=True)
class Explanation:
  """Why a program does not fit.

  Attributes:
    name: of the program.
    total: bytes on the fullest device.
    limit: bytes there are.
    largest: arrays at the fullest moment.
    savings: the changes that save most.
  """

  name: str
  total: int
  limit: float
  largest: tuple[Live, ...]
  savings: tuple[Saving, ...]

  def __str__(self) -> str:
    over = f"{short(self.total)}B of {short(self.limit)}B"
    lines = [f"{self.name} needs {over} on each device; the largest arrays:"]
    lines += [f"  {short(a.bytes):>6}B  {a}" for a in self.largest]
    lines += ["what would save most (estimates):"]
    lines += [f"  {short(s.bytes):>6}B  {s.change}" for s in self.savings]
    if not self.savings:
      lines += ["  nothing here; take more or larger devices"]
    return "\n".join(lines)


def changed(config: FrozenConfigDict, **changes: Any) -> FrozenConfigDict:
  """The config with other values; `a__b` stands for the key `a.b`."""
  flat = keys.flatten(config)
  return freeze(flat | {k.replace("__", "."): v for k, v in changes.items()})


def alternatives(
  config: FrozenConfigDict, name: str, generation: Generation
) -> Iterator[tuple[str, FrozenConfigDict, Generation]]:
  """Single changes that may save memory: (what to type, config, generation)."""
  where = "--config."
  if name in make.RL:
    for text, new in rl.alternatives(config, name):
      yield text, changed(config, **new), generation
  if name in ("train", "update"):
    order = ("none", "dots", "full")
    kind = config.remat if config.remat in order else "dots"
    for remat in order[order.index(kind) + 1 :]:
      yield f"{where}remat={remat}", changed(config, remat=remat), generation
    parts = 2 * config.accumulate
    yield (
      f"{where}accumulate={parts}",
      changed(config, accumulate=parts),
      generation,
    )
    chunk = config.loss_chunk or config.seq_len
    for new in (512, 128) if name == "train" else ():
      if new < chunk:
        text = f"{where}loss_chunk={new}"
        yield text, changed(config, loss_chunk=new), generation
        break
    if config.ema:
      yield f"{where}ema=0", changed(config, ema=0.0), generation
    half = config.batch_size // 2
    if half:
      text = f"{where}batch_size={half}"
      yield text, changed(config, batch_size=half), generation
  if config.precision == "float32":
    text = f"{where}precision=bfloat16"
    yield text, changed(config, precision="bfloat16"), generation
  for preset in ("zero1", "fsdp", "fsdp_tp", "fsdp_sp", "fsdp_ep"):
    if preset != config.parallel.preset:
      text = f"{where}parallel.preset={preset}"
      other = {"parallel__preset": preset, "parallel__mesh": ""}
      yield text, changed(config, **other), generation
  if name not in ("prefill", "decode"):
    return
  if generation.cache == FULL:
    small = Generation(generation.rows, generation.length, Quantised("int8"))
    yield "--cache=int8", config, small
  if generation.rows > 1:
    fewer = Generation(
      generation.rows // 2, generation.length, generation.cache
    )
    yield f"--rows={fewer.rows}", config, fewer


def explain(
  config: FrozenConfigDict,
  model: Decoder,
  where: Site,
  name: str,
  generation: Generation = Generation(),
  total: int = 0,
  most: int = 3,
) -> Explanation:
  """Why a program does not fit, and what would help.

  Args:
    config: of the run.
    model: of the config.
    where: the site, with its limit.
    name: of the program.
    generation: sizes of prefill and decode.
    total: bytes the compiler asked for; 0: the estimate of the traced program.
    most: how many changes to name.
  """
  mesh = where.mesh(config)
  if name in ("prefill", "decode") and not generation.rows:
    rows = recipe.rules(config).ways("batch", mesh)
    generation = Generation(rows, generation.length, generation.cache)
  now = make.traced(config, model, mesh, name, generation).reading()
  found = []
  for text, other, sizes in alternatives(config, name, generation):
    peak = _peak(other, model, where, name, sizes)
    if peak is not None and peak < now.peak:
      found.append(Saving(text, now.peak - peak))
  found.sort(key=lambda s: -s.bytes)
  return Explanation(
    name,
    total or now.peak,
    where.limit,
    now.live[:8],
    tuple(found[:most]),
  )


def _peak(
  config: FrozenConfigDict,
  model: Decoder,
  where: Site,
  name: str,
  generation: Generation,
) -> int | None:
  """Bytes with a change; None where it cannot be made."""
  try:
    mesh = where.mesh(config)
    return make.traced(config, model, mesh, name, generation).reading().peak
  except (UserError, ValueError, TypeError, jax.errors.JAXTypeError):
    return None
