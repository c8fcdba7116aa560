"""Processes meet once, in plain TCP, before JAX connects them.

JAX's own coordination service ends a process with a stack trace when it cannot
be reached or somebody is missing. So the processes first meet at the very
address it is going to use: each says who it is, and process 0 answers once all
are there, or says what is wrong. The names of the machines, learned on the
way, make later messages useful.
"""

import contextlib
import json
import socket
import time

from jaxlm.errors import UserError

_RETRY = 0.25  # seconds between two attempts to connect
_LINE = 1 << 20  # bytes in the longest message


def meet(
  coordinator: str, processes: int, process: int, timeout: float
) -> list[str]:
  """Waits until all processes have come to the coordinator's address.

  Args:
    coordinator: `host:port`; process 0 listens there.
    processes: how many are to come.
    process: which one this is.
    timeout: seconds to wait.

  Returns:
    The name of each process's machine.

  Raises:
    UserError: somebody did not come, cannot come, or counts differently.
  """
  host, port = _split(coordinator)
  if process == 0:
    return _host(port, processes, timeout)
  return _visit(host, port, processes, process, timeout)


def _split(coordinator: str) -> tuple[str, int]:
  """`host:port` in two; an IPv6 host may stand in brackets."""
  host, colon, port = coordinator.rpartition(":")
  if not colon or not host or not port.isdigit() or int(port) > 65535:
    raise UserError(
      f"--coordinator={coordinator} should read HOST:PORT, the address of "
      "process 0 and a free port there, as in node1:1234"
    )
  return host.strip("[]"), int(port)


# --- Process 0 --------------------------------------------------------------


def _host(port: int, processes: int, timeout: float) -> list[str]:
  """Listens until all others have come, then tells them so."""
  deadline = time.monotonic() + timeout
  names = {0: socket.gethostname()}
  with contextlib.ExitStack() as scope:
    server = scope.enter_context(_listen(port))
    guests = []
    while len(names) < processes:
      guest = _accept(server, deadline)
      if guest is None:
        problem = _missing(names, processes, timeout)
        _tell(guests, {"error": problem})
        raise UserError(problem)
      scope.enter_context(guest)
      said = _introduction(guest)
      problem = said and _objection(said, names, processes)
      if problem:
        _tell([*guests, guest], {"error": problem})
        raise UserError(problem)
      if said:  # and not somebody who knocked at the wrong door
        names[said["process"]] = said["host"]
        guests.append(guest)
    everyone = [names[i] for i in range(processes)]
    _tell(guests, {"hosts": everyone})
    for guest in guests:  # who hangs up first keeps the port busy for a while
      with contextlib.suppress(OSError):
        guest.recv(1)
  return everyone


def _listen(port: int) -> socket.socket:
  """A socket that listens at all addresses of this machine."""
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    return socket.create_server(
      ("", port), family=family, backlog=1024, dualstack_ipv6=both
    )
  except OSError as error:
    raise UserError(
      f"process 0 cannot listen at port {port} ({error.strerror}); another "
      "run may use it: choose another port in --coordinator"
    ) from error


def _accept(server: socket.socket, deadline: float) -> socket.socket | None:
  """The next who comes before the deadline."""
  server.settimeout(max(deadline - time.monotonic(), 0.001))
  try:
    guest, _ = server.accept()
  except TimeoutError:
    return None
  guest.settimeout(10)
  return guest


def _introduction(guest: socket.socket) -> dict | None:
  """What a guest says of itself; None if it is none of ours."""
  try:
    said = _hear(guest)
  except OSError:
    return None
  ours = said is not None and said.keys() == {"process", "processes", "host"}
  return said if ours else None


def _objection(said: dict, names: dict, processes: int) -> str | None:
  """What is wrong with a guest."""
  process, host = said["process"], said["host"]
  if said["processes"] != processes:
    return (
      f"process {process} on {host} was started as one of {said['processes']}, "
      f"process 0 as one of {processes}; give all the same --processes"
    )
  if process in names:
    return (
      f"two processes were started as --process={process}, on "
      f"{names[process]} and on {host}; give each its own number"
    )
  return None


def _missing(names: dict, processes: int, timeout: float) -> str:
  absent = [str(i) for i in range(processes) if i not in names]
  which = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
  return (
    f"{len(absent)} of {processes} processes did not come within "
    f"{timeout:.0f} s: {which}; see whether they were started, and whether "
    f"their machines can reach {names[0]}"
  )


# --- The others -------------------------------------------------------------


def _visit(
  host: str, port: int, processes: int, process: int, timeout: float
) -> list[str]:
  """Goes to process 0 and waits there for its answer."""
  deadline = time.monotonic() + timeout
  me = {
    "process": process,
    "processes": processes,
    "host": socket.gethostname(),
  }
  while True:
    try:
      answer = _ask(host, port, me, deadline)
    except OSError as error:
      answer, why = None, error
    else:
      why = None
    if answer is not None:
      break
    if time.monotonic() + _RETRY > deadline:
      raise UserError(_unreachable(host, port, timeout, why)) from why
    time.sleep(_RETRY)
  if "error" in answer:
    raise UserError(answer["error"])
  return answer["hosts"]


def _ask(host: str, port: int, me: dict, deadline: float) -> dict | None:
  """Process 0's answer; None if whoever listened there hung up."""
  left = max(deadline - time.monotonic(), 0.1)
  with socket.create_connection((host, port), timeout=left) as there:
    _tell([there], me)
    # Process 0 gives up at its own deadline, and then says who is missing.
    there.settimeout(max(deadline - time.monotonic(), 0.1) + 10)
    return _hear(there)


def _unreachable(
  host: str, port: int, timeout: float, error: OSError | None
) -> str:
  """Why process 0 was not found, and what to look at."""
  if isinstance(error, socket.gaierror):
    why = f"no machine is known by the name {host}; check --coordinator"
  elif isinstance(error, ConnectionRefusedError):
    why = "nothing listens there; see whether process 0 was started"
  elif error is None:
    why = "another program listens there; choose another port"
  else:
    why = f"{error.strerror or 'no answer'}; check the network and firewalls"
  return (
    f"process 0 could not be reached at {host}:{port} within {timeout:.0f} s: "
    f"{why}"
  )


# --- What both say ----------------------------------------------------------


def _tell(sockets: list[socket.socket], message: dict) -> None:
  """Sends a message to each; one that has gone does not matter any more."""
  for there in sockets:
    with contextlib.suppress(OSError):
      there.sendall(json.dumps(message).encode() + b"\n")


def _hear(there: socket.socket) -> dict | None:
  """One message; None if there came anything else."""
  with there.makefile("rb") as file:
    line = file.readline(_LINE)
  try:
    message = json.loads(line)
  except ValueError:
    return None
  return message if isinstance(message, dict) else None
