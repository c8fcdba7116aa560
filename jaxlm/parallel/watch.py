"""Seeing that another process has died, and agreeing on when to stop.

A collective that waits for a dead process waits for ever on most networks, so
a thread of each process keeps asking JAX's coordination service who is alive.
That question is itself a meeting: the service answers all living processes at
once, which makes every round of the threads common to all. What one process
writes into the service's key-value store is known to all one round later.

Only the service's own heartbeats say that a process is dead; they come from a
thread of C++ that no Python code can hold up.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

LOST = 75  # exit status, EX_TEMPFAIL of sysexits.h: try again
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds

_FAILED, _STOP, _CALLS, _ROUNDS, _LEFT = (
  f"jaxlm/{name}/" for name in ("failed", "stop", "calls", "rounds", "left")
)


class Watch:
  """The thread that looks after the other processes, and its letter box.

  Args:
    client: JAX's client of the coordination service.
    hosts: the machine of each process.
    process: which one this is.
    heartbeat: seconds of silence after which the service calls one dead.
    interval: seconds between two rounds; None suits the number of processes.
  """

  def __init__(
    self,
    client: Any,
    hosts: Sequence[str],
    process: int,
    heartbeat: float,
    interval: float | None = None,
  ):
    self.hosts, self.process = list(hosts), process
    self._client, self._heartbeat = client, heartbeat
    # Process 0 answers everybody: 0.2 s for a few, 2.2 s for a thousand.
    self._interval = interval or 0.2 + len(hosts) / 500
    self._all = list(range(len(hosts)))
    self._lives: dict[int, int] = {}  # which life of it each process is in
    self._changed = threading.Condition()
    self._rounds, self._ending = 0, False
    self._note: tuple[int, str] | None = None  # why this process fails
    self._told, self._said_by_first = False, []
    self._calls, self._asked, self._last = 0, 0, None
    self._signal: int | None = None  # received here, not told yet
    self._hurry = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  # --- Called by the program -------------------------------------------------

  def stop_together(self, signal: int | None) -> int | None:
    """The signal for which all stop after this very call, if they do.

    All processes call it once per step. It costs a lock and an addition as
    long as nobody has received a signal. Then one call waits (two rounds of
    the threads) until all know how far each has come; the call after the
    furthest is the last one of everybody.
    """
    with self._changed:
      self._calls += 1
      if signal is not None and self._signal is None:
        self._signal = signal
        self._hurry.set()
      while self._asked and self._last is None:
        self._changed.wait()
      done = self._last is not None and self._calls >= self._last
      return self._asked if done else None

  def fail(self, status: int, text: str) -> bool:
    """Tells the others that this process ends by an error, and why.

    Returns:
      True if process 0 has ended in the same words, so once is enough.
    """
    with self._changed:
      self._note = (status, text)
      self._hurry.set()
      self._changed.wait_for(
        lambda: self._told, 2 + 2 * self._interval
      )  # or somebody has died, and there are no rounds any more
    return (status, text) in self._said_by_first and self.process != 0

  def left(self) -> None:
    """Says that this process ends now; process 0 first waits for all others.

    Its end would abort them.
    """
    self._last_out([])

  def await_verdict(self) -> None:
    """Waits for the thread to find out who is gone: it ends the process."""
    self._hurry.set()
    self._thread.join(2 * self._heartbeat + 10)

  def end(self) -> None:
    """Waits until all have finished, and ends the threads together.

    They can only end after the same round: one more would wait for those
    that are gone.
    """
    self._client.wait_at_barrier("jaxlm/end", FOREVER)
    with self._changed:
      self._ending = True
      mine = self._rounds
    self._hurry.set()
    self._client.key_value_set(f"{_ROUNDS}{self.process}", str(mine))
    self._client.wait_at_barrier("jaxlm/rounds", 60_000)
    rounds = [int(r) for _, r in self._client.key_value_dir_get(_ROUNDS)]
    if mine < max(rounds):
      self._client.get_live_nodes(self._all)
    self._thread.join()

  def alone(self) -> None:
    """Waits until all others have left; for process 0, which leaves last."""
    while len(self._client.get_live_nodes(self._all)) > 1:
      time.sleep(0.05)

  # --- The thread ------------------------------------------------------------

  def _run(self) -> None:
    while True:
      with self._changed:
        if self._ending:
          return
        self._rounds += 1
        note = self._note
      try:
        if note and not self._told:  # all know it when this round is over
          text = json.dumps([self._rounds, *note])
          self._client.key_value_set(f"{_FAILED}{self.process}", text)
        alive = self._client.get_live_nodes(self._all)
        failures = self._failures()
        self._agree()
      except Exception:
        self._lost([0])
        return
      self._judge(alive, failures)
      with self._changed:
        self._told = note is not None
        self._changed.notify_all()
      deciding = self._asked and self._last is None
      self._hurry.wait(0.02 if deciding else self._interval)
      self._hurry.clear()

  def _judge(
    self, alive: dict[int, int], failures: list[tuple[int, int, str]]
  ) -> None:
    """Ends this process if another one has ended."""
    self._said_by_first = [tuple(f[1:]) for f in failures if f[0] == 0]
    for process, status, text in failures:
      if not self._note and not self._ending:
        self._last_out([])
        leave(f"{self.name(process)}: {text}", status)
    lives = self._lives = self._lives or dict(alive)
    gone = [i for i in self._all if i not in alive or alive[i] != lives.get(i)]
    if gone:
      self._lost(gone)

  def _lost(self, processes: list[int]) -> None:
    if not self._note and not self._ending:
      self._last_out(processes)
      leave(lost(", ".join(map(self.name, processes))), LOST)

  def _last_out(self, gone: list[int]) -> None:
    """Process 0 waits for the others to leave: its end would abort them."""
    if 0 in gone and self.process != 0:
      return
    if self.process != 0:
      self._client.key_value_set(f"{_LEFT}{self.process}", "", True)
      return
    deadline = time.monotonic() + 2 + self._interval
    while time.monotonic() < deadline:
      left = len(self._client.key_value_dir_get(_LEFT))
      if left + len({*gone, 0}) >= len(self._all):
        break
      time.sleep(0.05)
    time.sleep(0.2)  # from their note to their exit

  def _failures(self) -> list[tuple[int, int, str]]:
    """(process, its exit status, why) of those that ended by an error.

    A note counts from the round on after which all are sure to see it, so that
    all end after the same round and nobody waits for another one.
    """
    notes = self._client.key_value_dir_get(_FAILED)
    found = [(int(k.split("/")[-1]), *json.loads(note)) for k, note in notes]
    return [(i, *why) for i, since, *why in found if since <= self._rounds]

  def _agree(self) -> None:
    """Goes on with the agreement on the last call, where one is asked for."""
    if self._last is not None:
      return
    if self._signal is not None and not self._asked:
      self._client.key_value_set(f"{_STOP}{self.process}", str(self._signal))
    if not self._asked:
      asked = [int(s) for _, s in self._client.key_value_dir_get(_STOP)]
      if not asked:
        return
      with self._changed:  # from here on no call returns before `last` is known
        self._asked, calls = max(asked), self._calls
      self._client.key_value_set(f"{_CALLS}{self.process}", str(calls))
    calls = [int(c) for _, c in self._client.key_value_dir_get(_CALLS)]
    if len(calls) == len(self._all):
      with self._changed:
        self._last = max(calls) + 1
        self._changed.notify_all()

  def name(self, process: int) -> str:
    """How a process is called in messages."""
    return f"process {process} of {len(self._all)} ({self.hosts[process]})"


def lost(who: str) -> str:
  """What to say when a process is gone."""
  return (
    f"{who} has died or cannot be reached any more, so all others stop; what "
    "was saved is whole: start again with the same --workdir, with as many "
    "processes as you like"
  )


_leaving = threading.Lock()


def leave(text: str, status: int) -> NoReturn:
  """Ends the process at once, whatever its other threads wait for."""
  if _leaving.acquire(blocking=False):
    sys.stdout.flush()
    if text:
      os.write(2, f"error: {text}\n".encode())
    os._exit(status)
  time.sleep(60)  # another thread is at it
  os._exit(status)
