"""A process finds its place by what its launcher set, or by flags."""

from types import SimpleNamespace

import pytest

from jaxlm.errors import UserError
from jaxlm.parallel import clusters, distributed
from jaxlm.parallel.clusters import Place, first_node

SLURM = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "gpu[007-008]",
  "SLURM_STEP_NUM_NODES": "2",
  "SLURM_STEP_NUM_TASKS": "8",
  "SLURM_NTASKS": "16",
  "SLURM_PROCID": "5",
  "SLURM_LOCALID": "1",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JOBSET = {
  "JOBSET_NAME": "run",
  "REPLICATED_JOB_NAME": "workers",
  "JOBSET_PROCESSES": "4",
  "JOB_COMPLETION_INDEX": "3",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}
SLICES = {
  "MEGASCALE_NUM_SLICES": "2",
  "MEGASCALE_SLICE_ID": "1",
  "MEGASCALE_COORDINATOR_ADDRESS": "s0:8080",
}


@pytest.mark.parametrize(
  ("env", "place"),
  [
    (SLURM, Place("gpu007:61441", 8, 5, 1, "SLURM")),
    (
      SLURM | {"SLURM_STEP_NUM_TASKS": "2"},
      Place("gpu007:61441", 2, 5, None, "SLURM"),
    ),
    (OPEN_MPI, Place("10.96.0.1:55527", 2, 1, None, "Open MPI")),
    (SLURM | OPEN_MPI, Place("10.96.0.1:55527", 2, 1, None, "Open MPI")),
    (JOBSET, Place("run-workers-0-0.run:55527", 4, 3, None, "JobSet")),
    (TPU, Place("t-0:55527", 2, 1, None, "Cloud TPU")),
    (TPU | SLICES, Place("s0:55527", 4, 3, None, "Cloud TPU")),
    ({}, None),
    # A shell of `salloc` knows of tasks, but is none of them.
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
  ],
)
def test_launchers_are_recognised(env, place):
  """By what they set; the innermost wins; one task per GPU takes its GPU."""
  assert clusters.detect(env) == place


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("node1", "node1"),
    ("node1,node2", "node1"),
    ("node[3-7]", "node3"),
    ("node[003,007-9],x1", "node003"),
    ("rack[1-2]-gpu", "rack1-gpu"),
  ],
)
def test_first_node(nodes, first):
  """Every form of SLURM's compressed lists."""
  assert first_node(nodes) == first


def test_the_metadata_server_knows_a_tpu_slice():
  """Where no variable is set: both forms of its lists, and several slices."""
  answers = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:b:10.0.0.1,a:b:10.0.0.2,a:b:10.0.0.3",
    "tpu-env": "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'",
  }
  place = clusters.cloud_tpu({}, answers.get)
  assert place == Place("10.0.0.1:55527", 6, 5, None, "Cloud TPU")
  answers |= {"worker-network-endpoints": "h0,h1,h2", "tpu-env": None}
  assert clusters.cloud_tpu({}, answers.get).coordinator == "h0:55527"
  assert clusters.cloud_tpu({}, {}.get) is None


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_JOB_ID"])
def test_a_launcher_may_be_wrong(name):
  """Its variable is named."""
  with pytest.raises(UserError, match=f"{name}='x'"):
    clusters.detect(SLURM | {name: "x"})
  with pytest.raises(UserError, match="JOBSET_PROCESSES unset"):
    clusters.detect({k: v for k, v in JOBSET.items() if k[-4:] != "SSES"})


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("h:1", 2, None), "--processes and --process go together"),
    (("h:1", None, None), "--processes and --process go together"),
    ((None, 2, 1), "give all processes the same --coordinator"),
    (("h:1", 2, 2), "numbered from 0 to 1"),
    (("h:1", 0, 0), "at least one"),
  ],
)
def test_flags_that_contradict(flags, message, monkeypatch):
  """Each is one sentence that says what to give."""
  monkeypatch.setattr(distributed, "detect", lambda: None)
  with pytest.raises(UserError, match=message):
    distributed.place(*flags)


def test_flags_before_launchers(monkeypatch):
  """Flags win whole; a coordinator alone completes what the launcher says."""
  found = Place(None, 4, 3, source="Open MPI")
  monkeypatch.setattr(distributed, "detect", lambda: found)
  assert distributed.place("a:1", 2, 1) == Place("a:1", 2, 1)
  assert distributed.place("a:1") == Place("a:1", 4, 3, None, "Open MPI")
  with pytest.raises(UserError, match="Open MPI does not say"):
    distributed.place()
  assert distributed.place("a:1", 1, 0) is None  # one process is no group


def test_one_process_changes_nothing(monkeypatch):
  """No flags and no launcher: nothing is connected, all answers are local."""
  monkeypatch.setattr(distributed, "detect", lambda: None)
  assert distributed.initialize() is False
  assert distributed.is_first()
  assert distributed.from_first({"a": 1}) == {"a": 1}
  distributed.same("a number", 3)
  together = distributed.Together(SimpleNamespace(signal=None))
  assert not together.poll()
  together = distributed.Together(SimpleNamespace(signal=15))
  assert together.poll()
  assert together.signal == 15
