"""A run that ran out of memory: the sentence of the device, and what helps."""

import contextlib
import math
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.plan import memory, programs
from jaxlm.plan.chips import Chip
from jaxlm.plan.make import Generation, Site
from jaxlm.plan.target import Target


@contextlib.contextmanager
def explained(explain: Callable[[], str]) -> Iterator[None]:
  """Runs a block; where memory runs out, raises with `explain`'s words.

  Raises:
    UserError: instead of an error that says that memory ran out.
  """
  try:
    yield
    return
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    if not ran_out(error):
      raise
    said = _first_line(error)
    traceback.clear_frames(error.__traceback__)  # they hold the arrays
  with contextlib.suppress(MemoryError, jax.errors.JaxRuntimeError):
    raise UserError(f"out of memory ({said})\n{explain()}")
  raise UserError(f"out of memory ({said}); a smaller batch_size needs less")


def ran_out(error: Exception) -> bool:
  """True for what devices, compilers and Python say when memory is gone."""
  text = str(error)
  return (
    isinstance(error, MemoryError)
    or "RESOURCE_EXHAUSTED" in text
    or re.search(r"out of memory", text, re.IGNORECASE) is not None
  )


def of_training(config: FrozenConfigDict) -> str:
  """What a training run needs here, and what would save most."""
  model = programs.decoder(config)
  return str(memory.explain(config, model, here(), "train"))


def of_generation(
  config: FrozenConfigDict, model: Decoder, generation: Generation
) -> str:
  """What prefill needs here, and what would save most, in generate's flags."""
  told = str(memory.explain(config, model, here(), "prefill", generation))
  return told.replace("--config.precision=", "--dtype=").replace(
    "--rows=", "--batch="
  )


def here() -> Site:
  """The devices of this process, and the memory each of them may use."""
  devices = jax.devices()
  kind = devices[0].device_kind.lower().replace(" ", "-")
  target = Target(kind, kind, (len(devices),))
  limit = _limit(devices)
  chip = Chip(kind, devices[0].platform, {"float32": 1.0}, limit, 1.0, 1.0, 1.0)
  return Site(target, chip, tuple(devices), limit)


def _limit(devices: list[Any]) -> float:
  """Bytes that each device has: its own figure, or a share of the host's."""
  stats = devices[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return float(stats["bytes_limit"])
  pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
  if sys.platform == "linux" and allowed != resource.RLIM_INFINITY:
    pages = min(pages, allowed)
  return math.floor(pages / len(devices))


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:160]
