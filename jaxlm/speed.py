"""How fast a run is, and how fast it could be.

The measure is the machine's own matmul peak, taken here and now: a data
sheet's number says nothing of a shared or throttled machine.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Size of the first square matmul to try, and how long one run should take
# before a larger size is not worth trying.
_FIRST_SIZE = {"cpu": 1024}
_LONG_ENOUGH = 0.008  # seconds


def matmul_peak(
  dtype: Any = "float32",
  devices: Sequence[Any] | None = None,
  seconds: float = 0.3,
) -> float:
  """FLOP/s of the best plain matmul on `devices` (default: all), measured now.

  Square [n, n] products with float32 output, best of as many runs as fit into
  `seconds`; n is doubled until one run takes long enough to reach the peak.
  Accelerators are taken to be alike: one is measured and multiplied by their
  number. CPU devices share one set of cores, so there the number does not
  matter.
  """
  import jax
  import jax.numpy as jnp

  devices = list(devices or jax.devices())
  local = next(d for d in devices if d.process_index == jax.process_index())

  @jax.jit
  def product(x):
    return jnp.matmul(x, x, preferred_element_type=jnp.float32)

  # Noise, since a chip multiplies constants faster than weights: it heats less.
  noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
  deadline = time.perf_counter() + seconds
  n = _FIRST_SIZE.get(local.platform, 4096)
  alone = jax.make_mesh((1,), ("one",), devices=[local])
  with jax.set_mesh(alone):  # the run's own mesh would want all devices
    best = _climb(product, noise, n, local, dtype, deadline)
  alike = 1 if local.platform == "cpu" else len(devices)
  return best * alike


def _climb(product, noise, n: int, device, dtype, deadline: float) -> float:
  """The best FLOP/s over growing sizes, until one takes long enough."""
  import jax

  best = 0.0
  while True:
    x = jax.device_put(np.resize(noise, (n, n)).astype(dtype), device)
    product(x).block_until_ready()  # compiles
    best, last = _best_rate(product, x, best, deadline)
    if last > _LONG_ENOUGH or time.perf_counter() > deadline or n >= 16384:
      return best
    n *= 2


def _best_rate(product, x, best: float, deadline: float) -> tuple[float, float]:
  """The best FLOP/s so far after some runs at this size, and seconds a run."""
  flops = 2.0 * x.shape[0] ** 3
  shortest = math.inf
  for run in range(1000):
    start = time.perf_counter()
    product(x).block_until_ready()
    shortest = min(shortest, time.perf_counter() - start)
    long_enough = shortest > _LONG_ENOUGH
    if time.perf_counter() > deadline or (run >= 3 and not long_enough):
      break
  return max(best, flops / shortest), shortest


class Throughput:
  """Tokens per second of training alone, without what interrupts it.

  The clock starts at the first `tick`, when the first step (and with it the
  compilation) is over.

  Example:
    >>> speed = Throughput(tokens_per_step=512)
    >>> speed.tick(1)
    >>> with speed.paused():
    ...   pass  # evaluate, save, sample
    >>> speed.tick(2)
    >>> speed.tokens_per_sec() > 0
    True
  """

  def __init__(self, tokens_per_step: float):
    self._tokens_per_step = tokens_per_step
    self._first: tuple[int, float] | None = None  # step, its training time
    self._last: tuple[int, float] | None = None
    self._window: tuple[int, float] | None = None
    self._out = 0.0  # seconds spent in `paused`
    self._out_first = 0.0

  def tick(self, step: int) -> None:
    """Says that all steps up to `step` are done (their metrics were read)."""
    self._last = (step, time.perf_counter() - self._out)
    if self._first is None:
      self._first = self._window = self._last
      self._out_first = self._out

  @contextlib.contextmanager
  def paused(self, after: Any = None) -> Iterator[None]:
    """Does not count the time inside.

    Args:
      after: arrays to wait for first, so that a step still under way on the
        device is counted as training and not as part of the pause.
    """
    if after is not None:
      import jax

      jax.block_until_ready(after)
    start = time.perf_counter()
    try:
      yield
    finally:
      self._out += time.perf_counter() - start

  def tokens_per_sec(self) -> float:
    """Over the steps since it was last asked; nan before two ticks."""
    if self._window is None or self._last[0] == self._window[0]:
      return math.nan
    rate = self._rate(self._window)
    self._window = self._last
    return rate

  def mean(self) -> float:
    """Tokens per second over the whole run; nan before two ticks."""
    if self._first is None or self._last[0] == self._first[0]:
      return math.nan
    return self._rate(self._first)

  def seconds_left(self, steps: int) -> float:
    """Until `steps` are done, pauses included; nan before two ticks."""
    if self._first is None or self._last[0] == self._first[0]:
      return math.nan
    spent = self._last[1] - self._first[1] + self._out - self._out_first
    each = spent / (self._last[0] - self._first[0])
    return each * max(0, steps - self._last[0])

  def _rate(self, since: tuple[int, float]) -> float:
    steps, seconds = (b - a for a, b in zip(since, self._last, strict=True))
    return steps * self._tokens_per_step / max(seconds, 1e-9)


def progress(
  step: int,
  steps: int,
  loss: float,
  tokens_per_sec: float = math.nan,
  peak_share: float = math.nan,
  seconds_left: float = math.nan,
  **more: float,
) -> str:
  """One line about the run; what is not known (nan) is left out.

  Args:
    step: steps done.
    steps: steps to do.
    loss: of this step.
    tokens_per_sec: of late.
    peak_share: model FLOP/s over `matmul_peak`, 0..1.
    seconds_left: until all steps are done.
    more: further numbers, shown by their names.

  Example:
    >>> progress(1200, 2000, 1.7312, 41_200, 0.61, 34)
    'step 1200/2000 | loss 1.731 | 41.2k tok/s | 61% of matmul peak | 0:34 left'
  """
  parts = [f"step {step:>{len(str(steps))}}/{steps}", f"loss {loss:.3f}"]
  parts += [f"{name} {value:.4g}" for name, value in more.items()]
  if math.isfinite(tokens_per_sec):
    parts.append(f"{short(tokens_per_sec)} tok/s")
  if math.isfinite(peak_share):
    parts.append(f"{peak_share:.0%} of matmul peak")
  if math.isfinite(seconds_left):
    parts.append(f"{clock(seconds_left)} left")
  return " | ".join(parts)


def short(number: float) -> str:
  """Three digits and a unit: 41200 -> '41.2k', 2.1e11 -> '210G'."""
  units = iter(" kMGTP")
  unit = next(units)
  while abs(number) >= 999.5 and unit != "P":
    number, unit = number / 1000, next(units)
  digits = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
  return f"{number:.{digits}f}{unit}".strip()


def clock(seconds: float) -> str:
  """34 -> '0:34', 3725 -> '1:02:05'."""
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def memory() -> dict[str, int]:
  """Peak bytes so far: 'host' (this process), 'device' where it is known.

  'device' is the fullest of this process's devices.
  """
  import resource

  import jax

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  found = {"host": peak if sys.platform == "darwin" else peak * 1024}
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  if peaks:
    found["device"] = max(peaks)
  return found


def copy_rate(megabytes: int = 64, seconds: float = 0.2) -> float:
  """Bytes a second that this machine's memory reads and writes, measured now.

  The best of as many copies of an array as fit into `seconds`; each byte is
  read once and written once.
  """
  source = np.ones(megabytes << 17, np.float64)
  target = source.copy()  # touched, so that no page has to be found later
  shortest, deadline = math.inf, time.perf_counter() + seconds
  while shortest == math.inf or time.perf_counter() < deadline:
    start = time.perf_counter()
    np.copyto(target, source)
    shortest = min(shortest, time.perf_counter() - start)
  return 2 * source.nbytes / shortest
