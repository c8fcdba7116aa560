"""The launch recipes are real: their scripts run, their manifest is one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.parallel import clusters, distributed

LAUNCH = Path(__file__).parent.parent / "docs" / "launch"
SCRIPTS = ("slurm.sbatch", "cloud_tpu.sh")

# --- Scripts ------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name):
  """Parsed by bash, and by shellcheck where it is installed."""
  subprocess.run(["bash", "-n", LAUNCH / name], check=True)
  checker = shutil.which("shellcheck")
  if checker is None:
    pytest.skip("shellcheck is not installed")
  subprocess.run([checker, LAUNCH / name], check=True)


def fake(folder: Path, name: str, status: int = 0, says: str = "") -> None:
  """A command that notes how it was called."""
  path = folder / name
  path.write_text(
    f"#!/bin/bash\nprintf '%s|' {name} \"$@\" >>{folder}/calls\n"
    f"echo >>{folder}/calls\n{says}\nexit {status}\n"
  )
  path.chmod(0o755)


def call(folder: Path, script: str, *arguments: str, **env: str):
  """Runs a recipe with the fake commands first; what was called, its status."""
  path = f"{folder}:{os.environ['PATH']}"
  done = subprocess.run(
    ["bash", LAUNCH / script, *arguments],
    env={**os.environ, "PATH": path, **env},
    capture_output=True,
    text=True,
    cwd=folder,
  )
  calls = folder / "calls"
  lines = calls.read_text().splitlines() if calls.exists() else []
  return [line.rstrip("|").split("|") for line in lines], done


@pytest.mark.parametrize(
  ("status", "again"), [(0, 0), (2, 0), (1, 0), (75, 1), (143, 1), (137, 1)]
)
def test_slurm_requeues_what_is_worth_it(status, again, tmp_path):
  """Lost and stopped runs come back; finished and wrong ones do not."""
  fake(tmp_path, "srun", status)
  fake(tmp_path, "scontrol")
  flags = ("--config=a b.py", "--workdir=w")
  calls, done = call(tmp_path, "slurm.sbatch", *flags, SLURM_JOB_ID="7")
  assert done.returncode == status
  assert calls[0][-5:] == ["-u", "-m", "jaxlm.train", *flags]
  assert calls[1:] == [["scontrol", "requeue", "7"]] * again


def test_slurm_does_not_requeue_for_ever(tmp_path):
  """A run that dies each time ends some day."""
  fake(tmp_path, "srun", distributed.LOST)
  fake(tmp_path, "scontrol")
  calls, _ = call(
    tmp_path, "slurm.sbatch", "x", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="20"
  )
  assert len(calls) == 1


@pytest.mark.parametrize(
  ("state", "verbs"),
  [
    ("", ["describe", "create", "scp", "ssh", "ssh"]),
    ("READY", ["describe", "scp", "ssh", "ssh"]),
    ("PREEMPTED", ["describe", "delete", "create", "scp", "ssh", "ssh"]),
  ],
)
def test_cloud_tpu_calls_gcloud(state, verbs, tmp_path):
  """A slice is made if it is needed; arguments survive two shells."""
  fake(tmp_path, "gcloud", says=f"[[ $4 == describe ]] && echo {state}")
  settings = {"PROJECT": "p", "ZONE": "z", "TYPE": "v6e-16"}
  (tmp_path / "source").mkdir()
  argument = "--config.sample.prompt=it's $5"
  _, done = call(
    tmp_path, "cloud_tpu.sh", argument, **settings, SOURCE="source"
  )
  assert done.returncode == 0, done.stderr
  text = (tmp_path / "calls").read_text()
  lines = [c for c in text.splitlines() if c.startswith("gcloud")]
  assert [line.split("|")[4] for line in lines] == verbs
  assert all("--zone=z|--project=p" in line for line in lines if "zone" in line)
  command = text.split("--command=")[-1].split("|")[0]
  heard = subprocess.run(
    ["bash", "-c", f"printf '%s\n' {command.split('jaxlm.train')[1]}"],
    capture_output=True,
    text=True,
  )
  assert heard.stdout.strip() == argument


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_say_how_they_are_used(name, tmp_path):
  """Without arguments: one line, status 2, nothing started."""
  settings = {"PROJECT": "p", "ZONE": "z", "TYPE": "v6e-16"}
  calls, done = call(tmp_path, name, **settings)
  assert (done.returncode, calls) == (2, [])
  assert done.stderr.startswith("usage: ")


# --- The manifest -------------------------------------------------------------


def record(required: str = "", **fields) -> dict:
  """The schema of an object that has these fields and no others."""
  return {
    "type": "object",
    "properties": fields,
    "required": required.split(),
    "additionalProperties": False,
  }


def many(item: dict) -> dict:
  return {"type": "array", "items": item}


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
OBJECT = {"type": "object"}  # Kubernetes' own: see `strangers`

# What jobset.x-k8s.io/v1alpha2 takes (kubernetes-sigs/jobset, jobset_types.go).
JOBSET = record(
  "apiVersion kind metadata spec",
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=OBJECT,
  spec=record(
    replicatedJobs=many(
      record(
        "name template",
        name={**TEXT, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        groupName=TEXT,
        template=OBJECT,
        replicas=COUNT,
        dependsOn=many(OBJECT),
      )
    ),
    network=record(
      enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG
    ),
    successPolicy=record(
      "operator",
      operator={"enum": ["All", "Any"]},
      targetReplicatedJobs=many(TEXT),
    ),
    failurePolicy=record(
      maxRestarts=COUNT,
      restartStrategy={
        "enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]
      },
      rules=many(
        record(
          "name action",
          name={**TEXT, "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
          action={
            "enum": [
              "FailJobSet",
              "RestartJobSet",
              "RestartJobSetAndIgnoreMaxRestarts",
              "RestartJob",
              "RestartJobAndIgnoreMaxRestarts",
            ]
          },
          onJobFailureReasons=many(TEXT),
          onJobFailureMessagePatterns=many(TEXT),
          targetReplicatedJobs=many(TEXT),
        )
      ),
    ),
    startupPolicy=OBJECT,
    suspend=FLAG,
    coordinator=OBJECT,
    managedBy=TEXT,
    ttlSecondsAfterFinished={**COUNT, "minimum": 0},
    volumeClaimPolicies=many(OBJECT),
  ),
)


@pytest.fixture
def manifest() -> dict:
  yaml = pytest.importorskip("yaml")
  return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_the_manifest_fits_its_schema(manifest):
  """Every field exists and has its type; a planted one does not pass."""
  jsonschema = pytest.importorskip("jsonschema")
  jsonschema.validate(manifest, JOBSET)
  manifest["spec"]["network"]["enableDNSHostname"] = True
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(manifest, JOBSET)


def strangers(models, kind: str, value, path: str = "") -> list[str]:
  """Fields of a manifest that a Kubernetes type does not have."""
  if kind.lower().startswith("list["):
    items = enumerate(value)
    pairs = [(kind[5:-1], v, f"{path}[{i}]") for i, v in items]
  elif not hasattr(models, kind):  # a text, a number, a dict of texts
    return []
  else:
    model = getattr(models, kind)
    types = {model.attribute_map[k]: t for k, t in model.openapi_types.items()}
    unknown = [f"{path}.{name}" for name in value if name not in types]
    if unknown:
      return unknown
    pairs = [(types[k], v, f"{path}.{k}") for k, v in value.items()]
  return [s for pair in pairs for s in strangers(models, *pair)]


def test_the_pods_fit_kubernetes(manifest):
  """Against the types of Kubernetes' own client, where it is installed."""
  models = pytest.importorskip("kubernetes.client.models")
  (job,) = manifest["spec"]["replicatedJobs"]
  assert strangers(models, "V1JobTemplateSpec", job["template"]) == []
  job["template"]["spec"]["template"]["spec"]["containers"][0]["image_"] = ""
  found = strangers(models, "V1JobTemplateSpec", job["template"])
  assert found == [".spec.template.spec.containers[0].image_"]


def test_the_pods_find_each_other(manifest):
  """What the manifest sets is what jaxlm reads, for every pod."""
  (job,) = manifest["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  (train,) = spec["template"]["spec"]["containers"]
  given = {e["name"]: e for e in train["env"]}
  assert given["JOBSET_NAME"]["valueFrom"]["fieldRef"]["fieldPath"].endswith(
    "['jobset.sigs.k8s.io/jobset-name']"
  )
  count = int(given["JOBSET_PROCESSES"]["value"])
  assert spec["parallelism"] == spec["completions"] == count
  assert spec["completionMode"] == "Indexed"  # sets JOB_COMPLETION_INDEX
  env = {
    "JOBSET_NAME": manifest["metadata"]["name"],
    "REPLICATED_JOB_NAME": job["name"],
    "JOBSET_PROCESSES": str(count),
    "JOB_COMPLETION_INDEX": str(count - 1),
  }
  assert env.keys() == {*given, "JOB_COMPLETION_INDEX"}
  place = clusters.detect(env)
  assert place.coordinator == f"jaxlm-workers-0-0.jaxlm:{clusters.PORT}"
  assert train["ports"][0]["containerPort"] == clusters.PORT
  assert (place.processes, place.process) == (count, count - 1)


# --- Ray ----------------------------------------------------------------------


def test_ray_gets_what_was_asked_for(monkeypatch):
  """Its own flags are taken, the others go to the program; TPUs are named."""
  pytest.importorskip("ray.train")
  monkeypatch.syspath_prepend(str(LAUNCH))
  monkeypatch.delitem(sys.modules, "ray_train", raising=False)
  import ray_train

  flags, rest = ray_train.parse(["--workers=4", "--config=a.py", "--workdir=w"])
  assert rest == ["--config=a.py", "--workdir=w"]
  assert ray_train.scaling(flags).num_workers == 4
  flags, _ = ray_train.parse(
    ["--accelerator=gpu", "--per_worker=8", "--workers=2"]
  )
  assert ray_train.scaling(flags).resources_per_worker == {"GPU": 8}
