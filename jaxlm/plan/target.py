"""The target: a chip, how many, and devices for its compiler without it."""

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import speed
from jaxlm.errors import UserError
from jaxlm.plan.chips import CHIPS, Chip

FORMS = "v5e:16x16, v5p:8x8x8, v6e:16x16, h100:64 or cpu:8"


@dataclass(frozen=True)
class Target:
  """So many chips of a kind.

  Attributes:
    text: as it was asked for, e.g. 'v5e:16x16'.
    chip: its name in `CHIPS`, or 'cpu'.
    shape: of the slice: one number for GPUs and CPUs.
  """

  text: str
  chip: str
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of devices."""
    return math.prod(self.shape)


def parse(text: str) -> Target:
  """The target that a text such as 'v5e:16x16' names.

  >>> parse("v5p:4x4x8").size
  128

  Raises:
    UserError: for a chip not in the table, or a shape that is none of its.
  """
  name, _, rest = text.partition(":")
  if name not in CHIPS and name != "cpu":
    raise UserError(
      f"unknown target {text!r}; chips: {', '.join(CHIPS)}, cpu; write it like "
      + FORMS
    )
  numbers = rest.split("x")
  if not all(n.isdecimal() and int(n) > 0 for n in numbers):
    raise UserError(f"target {text!r} has no size; write it like {FORMS}")
  shape = tuple(map(int, numbers))
  rank = CHIPS[name].torus or 1 if name in CHIPS else 1
  if len(shape) != rank:
    raise UserError(
      f"target {text!r}: {name} comes in {rank} dimension{'s' * (rank > 1)}; "
      f"write it like {FORMS}"
    )
  return Target(text, name, shape)


def chip(target: Target) -> Chip:
  """The chip's figures; those of a CPU are measured here and now."""
  return CHIPS[target.chip] if target.chip in CHIPS else host(target.size)


@functools.cache
def host(devices: int) -> Chip:
  """This machine's CPU as `devices` chips that share its cores and memory."""
  one = jax.devices("cpu")[:1]
  peaks = {
    dtype: speed.matmul_peak(dtype, one, 0.2) / devices
    for dtype in ("float32", "bfloat16")
  }
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  rate = speed.copy_rate() / devices
  return Chip(
    "cpu",
    "cpu",
    peaks,
    memory / devices,
    rate,
    links=rate,
    network=rate,
    group=devices,
    sources=("measured on this machine: best square matmul, best copy",),
  )


def devices(target: Target) -> list[Any]:
  """Devices to compile for; none of them has to exist.

  Raises:
    UserError: where the compiler of the target is not installed, or does not
      know the shape; for CPUs, where JAX has started with fewer.
  """
  if target.chip == "cpu":
    return _cpus(target)
  kind = CHIPS[target.chip].kind
  return _tpus(target) if kind == "tpu" else _gpus(target)


def prepare(target: Target) -> None:
  """Settings that must be made before JAX starts; call it first."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no cloud to be asked
  # No TPU is opened, so plans may be made side by side.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  jax.config.update("jax_platforms", "cpu")
  if target.chip == "cpu":
    with contextlib.suppress(RuntimeError):  # has started: `_cpus` will tell
      jax.config.update("jax_num_cpu_devices", target.size)


def _cpus(target: Target) -> list[Any]:
  found = jax.devices("cpu")
  if len(found) < target.size:
    raise UserError(
      f"{target.text}: JAX has started with {len(found)} CPU devices; plan in "
      "a process of its own, python -m jaxlm.plan"
    )
  return found[: target.size]


def _tpus(target: Target) -> list[Any]:
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"planning for {target.text} needs the TPU's compiler: pip install "
      "'jaxlm[tpu]' (no TPU is needed)"
    )
  with _quiet(), _refused(target):
    return list(_topology(target.text, "tpu").devices)


def _gpus(target: Target) -> list[Any]:
  if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
    raise UserError(
      f"planning for {target.text} needs the GPU's compiler: pip install "
      "'jaxlm[cuda12]' (no GPU is needed)"
    )
  group = min(CHIPS[target.chip].group, target.size)
  if target.size % group:
    raise UserError(
      f"{target.text}: beyond {group} GPUs they come in nodes of {group}; ask "
      f"for {-(-target.size // group) * group}"
    )
  text = Path(__file__).with_name(f"{target.chip}.txtpb").read_text("utf-8")
  shape = f"1x{target.size // group}x{group}"
  with _refused(target):
    return list(
      _topology("", "cuda", target_config=text, topology=shape).devices
    )


@contextlib.contextmanager
def _refused(target: Target) -> Iterator[None]:
  """What a compiler says of a shape it does not know, as one sentence."""
  try:
    yield
  except (RuntimeError, ValueError, NotImplementedError) as error:
    said = str(error).strip().splitlines()[0][:200]
    raise UserError(
      f"no devices of target {target.text!r} ({said}); write it like {FORMS}"
    ) from error


def _topology(name: str, platform: str, **options: str) -> Any:
  from jax.experimental import topologies

  return topologies.get_topology_desc(name, platform, **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Nothing on stderr: libtpu warns that it is on no TPU machine."""
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


def coordinates(found: list[Any]) -> np.ndarray:
  """Where each device stands: TPUs in their torus, others by (node, place)."""
  coords = getattr(found[0], "coords", None)
  if coords is not None and found[0].platform == "tpu":
    return np.array([d.coords for d in found])
  return np.array([(d.process_index, d.id) for d in found])
