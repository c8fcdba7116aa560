"""Who am I among how many: read from what a launcher leaves behind.

Each reader takes the environment and answers with a `Place`, or with None
where its launcher did not start this process. They only read; nothing is
contacted but, on a Cloud TPU, the metadata server of the machine itself.
"""

import glob
import os
import re
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxlm.errors import UserError

PORT = 55527  # of process 0, where the launcher suggests none

_METADATA = "metadata.google.internal"

Env = Mapping[str, str]
Fetch = Callable[[str], str | None]


@dataclass(frozen=True)
class Place:
  """One process among those of a run.

  Attributes:
    coordinator: `host:port` at which process 0 can be reached; None where the
      launcher does not say.
    processes: how many there are.
    process: which one this is, from 0.
    local: which one it is on its machine, where there are several; it then
      takes only the GPU of that number.
    source: who said so.
  """

  coordinator: str | None
  processes: int
  process: int
  local: int | None = None
  source: str = "flags"


def detect(env: Env | None = None) -> Place | None:
  """The place that the launcher of this process gave it.

  The innermost launcher is asked first: `mpirun` inside a SLURM job, for
  example, is Open MPI's.

  Raises:
    UserError: for a variable of a launcher that is no number.
  """
  env = os.environ if env is None else env
  readers = (open_mpi, slurm, jobset, cloud_tpu)
  places = (reader(env) for reader in readers)
  return next((place for place in places if place is not None), None)


def slurm(env: Env) -> Place | None:
  """The tasks of an `srun` step: process 0 is on its first node.

  Outside a step (in the batch script itself, or a shell from `salloc`) SLURM
  also sets task counts, but there are no tasks; so the step's list of nodes
  must be there.
  """
  nodes = env.get("SLURM_STEP_NODELIST")
  if not nodes or "SLURM_PROCID" not in env:
    return None
  count = _number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
  machines = _number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
  port = 61440 + _number(env, "SLURM_JOB_ID") % 4096  # two jobs, two ports
  several = count > machines
  return Place(
    f"{first_node(nodes)}:{port}",
    count,
    _number(env, "SLURM_PROCID"),
    _number(env, "SLURM_LOCALID") if several else None,
    "SLURM",
  )


def first_node(nodes: str) -> str:
  """The first of SLURM's list of nodes.

  Example:
    >>> first_node("node[007-009,012],login1")
    'node007'
  """
  found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
  return "".join(part or "" for part in found.groups())


def open_mpi(env: Env) -> Place | None:
  """The ranks of an `mpirun`; up to version 4 it says where it runs itself."""
  if "OMPI_COMM_WORLD_RANK" not in env:
    return None
  count = _number(env, "OMPI_COMM_WORLD_SIZE")
  several = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1
  address = r"tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)"
  launcher = re.search(address, env.get("OMPI_MCA_orte_hnp_uri", ""))
  return Place(
    f"{launcher[1]}:{PORT}" if launcher else None,
    count,
    _number(env, "OMPI_COMM_WORLD_RANK"),
    _number(env, "OMPI_COMM_WORLD_LOCAL_RANK") if several else None,
    "Open MPI",
  )


def jobset(env: Env) -> Place | None:
  """The pods of one indexed Job of a Kubernetes JobSet.

  Kubernetes itself sets JOB_COMPLETION_INDEX; the manifest has to hand on the
  others (docs/launch/jobset.yaml does). Pods of a JobSet find each other by
  `<jobset>-<replicated job>-<job index>-<pod index>.<jobset>`.
  """
  if not {"JOBSET_NAME", "JOB_COMPLETION_INDEX"} <= env.keys():
    return None
  name, job = env["JOBSET_NAME"], env.get("REPLICATED_JOB_NAME", "workers")
  return Place(
    f"{name}-{job}-0-0.{name}:{PORT}",
    _number(env, "JOBSET_PROCESSES"),
    _number(env, "JOB_COMPLETION_INDEX"),
    source="JobSet",
  )


def cloud_tpu(env: Env, fetch: Fetch | None = None) -> Place | None:
  """The hosts of a TPU slice, or of several slices joined by Megascale.

  Google Kubernetes Engine sets variables; elsewhere the metadata server knows.

  Args:
    env: the environment.
    fetch: an attribute of this machine by name; None asks the server, and
      that only where there is a TPU.
  """
  hosts = _tpu_hosts(env, fetch)
  if hosts is None:
    return None
  names, index, more = hosts
  slices = int(more.get("MEGASCALE_NUM_SLICES") or 1)
  slice_number = int(more.get("MEGASCALE_SLICE_ID") or 0)
  first = more.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]
  return Place(
    f"{first.split(':')[0]}:{PORT}",
    len(names) * slices,
    index + slice_number * len(names),
    source="Cloud TPU",
  )


def _tpu_hosts(
  env: Env, fetch: Fetch | None
) -> tuple[list[str], int, Env] | None:
  """The hosts of this slice, which of them this is, and what else is set."""
  if "TPU_WORKER_HOSTNAMES" in env and "TPU_WORKER_ID" in env:
    names = env["TPU_WORKER_HOSTNAMES"].split(",")
    return names, _number(env, "TPU_WORKER_ID"), env
  if fetch is None:
    has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if not has_tpu or "TPU_SKIP_MDS_QUERY" in env:
      return None
    fetch = _metadata
  index, ends = fetch("agent-worker-number"), fetch("worker-network-endpoints")
  if not index or not ends:
    return None
  # Lines like `MEGASCALE_NUM_SLICES: '2'`.
  lines = re.findall(
    r"^(\w+)\s*:\s*'?([^'\n]*)'?", fetch("tpu-env") or "", re.M
  )
  # Each end is an address, or `name:number:address`.
  names = [end.split(":")[-1] for end in ends.split(",")]
  return names, int(index), dict(lines) | dict(env)


def _metadata(name: str) -> str | None:
  """An attribute of this machine, where there is a metadata server."""
  request = urllib.request.Request(
    f"http://{_METADATA}/computeMetadata/v1/instance/attributes/{name}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except OSError:
    return None


def _number(env: Env, *names: str) -> int:
  """The first variable that is set, as a number."""
  name = next((n for n in names if n in env), names[0])
  try:
    return int(env[name])
  except KeyError:
    raise UserError(
      f"the launcher left {name} unset; set it, or give --coordinator, "
      "--processes and --process"
    ) from None
  except ValueError:
    raise UserError(
      f"the launcher set {name}={env[name]!r}, which is no number; give "
      "--coordinator, --processes and --process instead"
    ) from None
