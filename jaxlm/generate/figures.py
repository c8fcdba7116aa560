"""Figures: what generating has cost, measured as it goes.

The first token of a text comes from reading its prompt, all others from one
step each; so the time up to the first is that of the prefill. What JAX spent
on tracing and compiling in between is told by JAX itself, and taken off.
"""

import functools
import time
from collections import Counter
from dataclasses import asdict, dataclass, field

import jax

from jaxlm import speed


@dataclass
class Figures:
  """Sums over all texts so far; times in seconds, none of them compiling.

  Attributes:
    texts: how many.
    new_tokens: made, of which `decode_tokens` were not the first of their
      text, in `decode_seconds`.
    prefill_tokens: of prompts, read in `prefill_seconds`.
    first_seconds: the wait for a text's first token, compiling included, and
      `firsts`, how often it was measured.
    whole_tokens: made by methods that hand over whole texts, in
      `whole_seconds`, prompts included.
    compile_seconds: tracing and compiling.
    cache_bytes: of the largest cache, as the model declares it.
    notes: what methods count.
  """

  texts: int = 0
  new_tokens: int = 0
  prefill_tokens: int = 0
  prefill_seconds: float = 0.0
  decode_tokens: int = 0
  decode_seconds: float = 0.0
  first_seconds: float = 0.0
  firsts: int = 0
  whole_tokens: int = 0
  whole_seconds: float = 0.0
  compile_seconds: float = 0.0
  cache_bytes: int = 0
  notes: Counter = field(default_factory=Counter)

  def note(self, tokens: int, prompts: int, laps: tuple, whole: bool) -> None:
    """Adds a block of new tokens.

    Args:
      tokens: how many were made.
      prompts: tokens of the prompts, if they were read for this block.
      laps: seconds that ran, and that compiled.
      whole: whether prompts and texts were made in one.
    """
    ran, compiled = laps
    self.new_tokens += tokens
    self.compile_seconds += compiled
    if whole:
      self.whole_tokens += tokens
      self.whole_seconds += ran
    elif prompts:
      self.prefill_tokens += prompts
      self.prefill_seconds += ran
      self.first_seconds += ran + compiled
      self.firsts += 1
    else:
      self.decode_tokens += tokens
      self.decode_seconds += ran

  def report(self) -> dict[str, float]:
    """All figures and the rates that follow from them, for a file."""
    found = {k: v for k, v in asdict(self).items() if k != "notes"}
    if self.prefill_seconds:
      rate = self.prefill_tokens / self.prefill_seconds
      found["prefill_tokens_per_second"] = rate
    if self.decode_seconds:
      rate = self.decode_tokens / self.decode_seconds
      found["decode_tokens_per_second"] = rate
    if self.whole_seconds:
      rate = self.whole_tokens / self.whole_seconds
      found["whole_tokens_per_second"] = rate
    if self.firsts:
      found["time_to_first_token"] = self.first_seconds / self.firsts
    peaks = {f"peak_{k}_bytes": v for k, v in speed.memory().items()}
    return found | peaks | dict(self.notes)

  def __str__(self) -> str:
    """A short block of lines."""
    found = self.report()
    lines = [f"texts    {self.texts:,}, {self.new_tokens:,} new tokens"]
    if self.prefill_seconds:
      rate = speed.short(found["prefill_tokens_per_second"])
      lines.append(f"prefill  {self.prefill_tokens:,} tokens, {rate} tokens/s")
    if self.decode_seconds:
      rate = speed.short(found["decode_tokens_per_second"])
      lines.append(f"decode   {self.decode_tokens:,} tokens, {rate} tokens/s")
    if self.whole_seconds:
      rate = speed.short(found["whole_tokens_per_second"])
      lines.append(f"whole    {self.whole_tokens:,} tokens, {rate} tokens/s")
    if self.firsts:
      first = found["time_to_first_token"]
      lines.append(f"first    token after {first:.2f} s")
    lines.append(f"compile  {self.compile_seconds:.2f} s")
    peaks = [
      f"{name[5:-6]} peak {speed.short(value)}B"
      for name, value in found.items()
      if name.startswith("peak_")
    ]
    cache = f"cache {speed.short(self.cache_bytes)}B"
    lines.append(f"memory   {', '.join([cache, *peaks])}")
    lines += [f"{name}  {count:,}" for name, count in self.notes.items()]
    return "\n".join(lines)


class _Compiling:
  """Adds up what JAX says it spends on tracing and compiling."""

  def __init__(self):
    self.seconds = 0.0
    self._spans: list[tuple[float, float]] = []

  def __call__(self, event: str, seconds: float, **more: object) -> None:
    """Notes an event; of events within others the outer one counts."""
    if not event.startswith("/jax/core/compile/"):
      return
    end = time.perf_counter()
    start = end - seconds
    while self._spans and self._spans[-1][0] >= start:
      inner = self._spans.pop()
      self.seconds -= inner[1] - inner[0]
    self._spans.append((start, end))
    self.seconds += seconds


@functools.cache
def _compiling() -> _Compiling:
  """The one listener of this process."""
  listener = _Compiling()
  jax.monitoring.register_event_duration_secs_listener(listener)
  return listener


class Stopwatch:
  """Tells time spent running from time spent compiling, lap by lap."""

  def __init__(self):
    self.start()

  def start(self) -> None:
    """Begins a lap."""
    self._compiled = _compiling().seconds
    self._began = time.perf_counter()

  def lap(self) -> tuple[float, float]:
    """Seconds of this lap that ran and that compiled; begins the next."""
    took = time.perf_counter() - self._began
    compiled = min(_compiling().seconds - self._compiled, took)
    self.start()
    return took - compiled, compiled
