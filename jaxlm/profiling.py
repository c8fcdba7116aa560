"""A trace of a few steps, for Perfetto and TensorBoard.

The phases of a step have names in it (`jax.named_scope`): embed, mixer, ffn,
head, loss, optimizer. docs/how-to-go-fast.md reads one.
"""

import contextlib
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

PHASES = ("embed", "mixer", "ffn", "head", "loss", "optimizer")


class Profile:
  """Traces some calls of a loop, after the first one, which compiles.

  Example:
    with Profile(folder, calls=3) as profile:
      while True:
        with profile.call():
          result = step()
  """

  def __init__(self, folder: Path, calls: int):
    """Args: where the trace goes; how many calls are in it, 0 for none."""
    self._folder, self._calls = folder, calls
    self._seen, self._running = 0, False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *error: Any) -> None:
    self._stop()

  @contextlib.contextmanager
  def call(self, before: Any = None) -> Iterator[None]:
    """One call; `before`, what the last one gave, is waited for at both ends.

    So the trace begins and ends where a step does.
    """
    self._seen += 1
    if self._calls and self._seen in (2, 2 + self._calls):
      jax.block_until_ready(before)
      if self._running:
        self._stop()
      else:
        self._folder.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        self._running = True
    with jax.profiler.StepTraceAnnotation("step", step_num=self._seen):
      yield

  def _stop(self) -> None:
    if not self._running:
      return
    self._running = False
    jax.profiler.stop_trace()
    print(f"profile  {self._folder}: tensorboard --logdir, or ui.perfetto.dev")
    shares = phases(self._folder)
    if shares:
      text = ", ".join(f"{k} {v:.0%}" for k, v in shares.items())
      print(f"phases   {text}")


def phases(folder: Path) -> dict[str, float]:
  """The share of the newest trace's time in each phase, the longest first.

  Operations are joined with the names of their scopes, which the program
  beside the trace holds. Empty where the device's trace does not name them.
  """
  traces = sorted(folder.rglob("perfetto_trace.json.gz"))
  planes = sorted(folder.rglob("*.xplane.pb"))
  if not traces or not planes:
    return {}
  with gzip.open(traces[-1]) as file:
    events = json.load(file)["traceEvents"]
  program, spent = planes[-1].read_bytes(), Counter()
  found: dict[str, str] = {}
  for event in events:
    name = event.get("args", {}).get("hlo_op")
    if name and event.get("ph") == "X":
      if name not in found:
        found[name] = _phase(name, program)
      spent[found[name]] += event["dur"]
  total = sum(spent.values())
  return {k: v / total for k, v in spent.most_common()} if total else {}


def _phase(name: str, program: bytes) -> str:
  """The phase of an operation: the innermost of its scopes that is one.

  An instruction's record begins with its name, behind the length of it, and
  holds its scopes as one text.
  """
  key = b"\n" + bytes([len(name) % 128]) + name.encode()
  start = program.find(key)
  record = program[start : start + 1500] if start >= 0 else b""
  path = re.search(rb"jit\(\w+\)[\w/()\-.,>]*", record)
  words = re.split(r"[/()]", path[0].decode()) if path else []
  return next((w for w in reversed(words) if w in PHASES), "other")
