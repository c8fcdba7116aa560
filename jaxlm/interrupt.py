"""Ctrl-C and SIGTERM as a flag: end the step, save, then exit."""

import os
import signal
import threading
from typing import Any


class Interrupt:
  """Turns Ctrl-C and SIGTERM into a flag that the training loop reads.

  The first signal only sets the flag, so that the loop ends its step and
  saves; a second one ends the process at once (the last finished checkpoint
  stays usable). Outside the main thread, where Python takes no signals, the
  flag is simply never set.

  Example:
    with Interrupt() as interrupted:
      while step < steps and not interrupted:
        ...
  """

  def __init__(self):
    self.signal: int | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Interrupt":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *exc) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __bool__(self) -> bool:
    return self.signal is not None

  def _receive(self, number: int, frame) -> None:
    if self.signal is not None:
      os._exit(128 + number)
    self.signal = number
    # print() may not be called again inside itself; write() may.
    os.write(2, b"\nstopping: saving first (again to exit at once)\n")
