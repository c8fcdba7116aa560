"""A trace of a few steps, for Perfetto and TensorBoard.

The phases of a step have names in it (`jax.named_scope`): embed, mixer, ffn,
head, loss, optimizer. docs/how-to-go-fast.md reads one.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


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
