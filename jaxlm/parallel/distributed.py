"""Many processes, one run.

    with distributed.joined(flags):
      train(...)

Every process runs the same program on its own devices; `jax.devices()` are
those of all. This module brings them together, keeps them together, and ends
them together: by `jax.distributed`, which is wrapped so that whatever can go
wrong is one sentence. With one process nothing here does anything.

On CPUs the collectives are Gloo's (JAX's default there).
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxlm.errors import UserError
from jaxlm.interrupt import Interrupt
from jaxlm.parallel.clusters import Place, detect
from jaxlm.parallel.meeting import meet
from jaxlm.parallel.watch import FOREVER, LOST, Watch, leave, lost

__all__ = [
  "LOST",
  "Together",
  "add_flags",
  "first_alone",
  "from_first",
  "initialize",
  "is_first",
  "joined",
  "place",
  "same",
  "wait_for_all",
  "whole",
]

_watch: Watch | None = None
_numbers = itertools.count()


# --- Coming together ----------------------------------------------------------


def add_flags(flags: argparse.ArgumentParser) -> None:
  """Adds the flags that say where the processes are."""
  group = flags.add_argument_group(
    "several processes (found out under SLURM, Open MPI, JobSet, Cloud TPU)"
  )
  group.add_argument(
    "--coordinator", metavar="HOST:PORT", help="where process 0 listens"
  )
  group.add_argument("--processes", type=int, help="how many there are")
  group.add_argument("--process", type=int, help="which one this is, from 0")
  group.add_argument(
    "--join_timeout",
    type=float,
    default=300,
    help="seconds to wait for the others at the start",
  )
  group.add_argument(
    "--heartbeat",
    type=int,
    default=30,
    help="seconds of silence after which a process counts as dead",
  )


def place(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> Place | None:
  """This process's place: what is given, the rest from the launcher.

  Returns:
    None for a run of one process.

  Raises:
    UserError: for flags that contradict each other or do not suffice.
  """
  found = detect()
  if found is None and (coordinator, processes, process) == (None,) * 3:
    return None
  by_hand = processes is not None or process is not None or found is None
  if by_hand:
    if processes is None or process is None:
      raise UserError(
        "--processes and --process go together: how many there are, and which "
        "one this is; give both, and --coordinator=HOST:PORT"
      )
    found = Place(coordinator, processes, process)
  _check(found.processes, found.process)
  if found.processes == 1:
    return None
  coordinator = coordinator or found.coordinator
  if coordinator is None:
    raise UserError(
      f"{found.source} does not say where process 0 is; give all processes "
      "the same --coordinator=HOST:PORT"
    )
  return Place(
    coordinator, found.processes, found.process, found.local, found.source
  )


def _check(processes: int, process: int) -> None:
  if processes < 1:
    raise UserError(f"--processes={processes}; there must be at least one")
  if not 0 <= process < processes:
    raise UserError(
      f"--process={process} is not one of {processes}: they are numbered from "
      f"0 to {processes - 1}"
    )


def initialize(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  join_timeout: float = 300,
  heartbeat: int = 30,
) -> bool:
  """Connects this process with the others of its run, if there are any.

  To be called before anything asks JAX for devices. Where JAX is connected
  already (by Ray, or by `jax.distributed.initialize`), that is taken as it is.

  Args:
    coordinator: `host:port` of process 0; None asks the launcher.
    processes: how many there are; None asks the launcher.
    process: which one this is; None asks the launcher.
    join_timeout: seconds to wait for the others.
    heartbeat: seconds of silence after which a process counts as dead; the
      others then stop. At least 5.

  Returns:
    Whether there are several processes.

  Raises:
    UserError: for flags that make no sense, and when the processes do not
      come together in time; says who is missing or what to check.
  """
  global _watch
  if heartbeat < 5:
    raise UserError(f"--heartbeat={heartbeat} is too short; use 5 or more")
  if not jax.distributed.is_initialized():
    here = place(coordinator, processes, process)
    if here is None:
      return False
    hosts = meet(here.coordinator, here.processes, here.process, join_timeout)
    _connect(here, join_timeout, heartbeat)
  elif jax.process_count() == 1:
    return False
  else:
    hosts = None
  if _watch is None:
    if jax.default_backend() == "cpu":  # see host.compile_cache
      jax.config.update("jax_enable_compilation_cache", False)
    index = jax.process_index()
    _watch = Watch(_client(), hosts or _hosts(), index, heartbeat)
    _explain_abort()
  return True


def _connect(here: Place, timeout: float, heartbeat: int) -> None:
  """Starts JAX's own service and clients."""
  # A death is to be told by `Watch`; without this, jaxlib tells it first, by a
  # stack trace in every process. The service for preemptions would take
  # SIGTERM away from us.
  jax.config.update("jax_enable_recoverability", True)
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    here.coordinator,
    here.processes,
    here.process,
    local_device_ids=None if here.local is None else [here.local],
    cluster_detection_method="deactivate",
    initialization_timeout=max(int(timeout), 10),
    heartbeat_timeout_seconds=heartbeat,
  )


def _client() -> Any:
  """The client of the coordination service; JAX has no public name for it."""
  from jax._src.distributed import global_state

  return global_state.client


def _hosts() -> list[str]:
  """The machines of all processes, where we have not met them ourselves."""
  client, count = _client(), jax.process_count()
  client.key_value_set(f"jaxlm/host/{jax.process_index()}", _own_name())
  return [
    client.blocking_key_value_get(f"jaxlm/host/{i}", 300_000)
    for i in range(count)
  ]


def _own_name() -> str:
  return socket.gethostname() or "unnamed"


# --- Staying together ---------------------------------------------------------


@contextlib.contextmanager
def joined(flags: argparse.Namespace) -> Iterator[None]:
  """A run's frame: together with all its processes, from start to end.

  Only process 0 is heard on stdout. If another process dies or fails, this
  one ends with one sentence and `LOST`, or the other's status; if this one
  fails, the others learn why. On the way out all wait for all.

  Args:
    flags: parsed flags, those of `add_flags` among them.

  Raises:
    UserError: as `initialize`.
  """
  names = ("coordinator", "processes", "process", "join_timeout", "heartbeat")
  if not initialize(**{name: getattr(flags, name) for name in names}):
    yield
    return
  with contextlib.ExitStack() as scope:
    if not is_first():
      nowhere = scope.enter_context(open(os.devnull, "w"))
      scope.enter_context(contextlib.redirect_stdout(nowhere))
    try:
      yield
    except SystemExit:
      _part()
      raise
    except BaseException as error:
      _fail(error)
    _part()


def _part() -> None:
  """Leaves when all have finished; process 0, whom all need, last."""
  global _watch
  watch, _watch = _watch, None
  sys.stdout.flush()
  watch.end()
  if is_first():
    watch.alone()
  jax.distributed.shutdown()


# How errors read that come from a dead process, not from us: Gloo, NCCL, gRPC.
_TRANSPORT = re.compile(
  r"gloo|nccl|coordination|unavailable|deadline.exceeded|connection|"
  r"barrier|aborted|heartbeat",
  re.IGNORECASE,
)


def _fail(error: BaseException) -> None:
  """Ends this process by an error, or finds out whose error it is."""
  ours = isinstance(error, UserError)
  if not ours and _TRANSPORT.search(str(error)):
    _watch.await_verdict()  # ends the process if somebody is gone
  status = 2 if ours else 130 if isinstance(error, KeyboardInterrupt) else 1
  text = str(error) if ours else f"{type(error).__name__}: {error}"
  known = _watch.fail(status, text)
  if ours and not known:
    print(f"error: {text}", file=sys.stderr, flush=True)
  elif not ours:
    sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.flush()
  _watch.left()
  leave("", status)  # not by way of sys.exit: JAX would wait for the others


def _explain_abort() -> None:
  """Adds a sentence where jaxlib aborts because process 0 is gone.

  Its client of the coordination service, which runs in process 0, then logs a
  stack trace and calls abort(); that goes through this handler.
  """
  from jax._src.distributed import global_state

  host, _, port = global_state.coordinator_address.rpartition(":")
  watch = _watch

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def handler(number: int) -> None:
    time.sleep(0.2)  # whoever dies may still be dying
    with contextlib.suppress(OSError):
      socket.create_connection((host.strip("[]"), int(port)), 2).close()
      return  # something else: let it abort
    leave(lost(watch.name(0)), LOST)

  _explain_abort.handler = handler  # C code does not keep it alive
  ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


# --- Agreeing -----------------------------------------------------------------


def is_first() -> bool:
  """Whether this is the process that prints, logs and writes for all."""
  return jax.process_index() == 0


def from_first(value: Any) -> Any:
  """What process 0 gave, for all; a JSON value. All must call it alike.

  For what only process 0 can know for sure, such as what lies on the disk.
  """
  if jax.process_count() == 1:
    return value
  name = f"jaxlm/said/{next(_numbers)}"
  if is_first():
    _client().key_value_set(name, json.dumps(value))
    return value
  return json.loads(_client().blocking_key_value_get(name, FOREVER))


def wait_for_all() -> None:
  """Returns when all processes have called it."""
  if jax.process_count() > 1:
    _client().wait_at_barrier(f"jaxlm/all/{next(_numbers)}", FOREVER)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
  """Process 0 does the body first, then all others at once.

  For what is made once and found by all later ones, such as cached tokens.
  """
  if is_first():
    yield
  from_first(None)
  if not is_first():
    yield


def same(what: str, value: Any) -> None:
  """Makes sure that all processes have the same value.

  Raises:
    UserError: here it is another than in process 0.
  """
  first = from_first(value)
  if first != value:
    raise UserError(
      f"{what} is {value!r} here and {first!r} in process 0; start all "
      "processes alike, with the same files"
    )


def whole(array: jax.Array) -> jax.Array | np.ndarray:
  """All of an array that may be spread over processes. All must call it."""
  if array.is_fully_addressable:
    return array
  if array.is_fully_replicated:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(array, tiled=True)


class Together:
  """An `Interrupt` that all processes obey at the same step.

  Args:
    interrupt: this process's own.

  Attributes:
    signal: what all stop for; None as long as they go on.
  """

  def __init__(self, interrupt: Interrupt):
    self._own = interrupt
    self.signal: int | None = None

  def poll(self) -> bool:
    """Asks whether to stop now; each process once per step."""
    if _watch is None:
      self.signal = self._own.signal
    elif self.signal is None:
      self.signal = _watch.stop_together(self._own.signal)
    return bool(self)

  def __bool__(self) -> bool:
    return self.signal is not None
