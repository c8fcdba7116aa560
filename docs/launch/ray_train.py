"""Trains under Ray: its workers are the processes of the run.

    pip install 'ray[train]'
    python docs/launch/ray_train.py --workers=2 \
      --config=configs/tiny.py --workdir=runs/tiny

Ray's own `JaxTrainer` places the workers and starts them again when one has
died; the run then goes on from its last checkpoint. Flags that are not listed
below are those of `jaxlm.train`. All workers need to see the workdir.

On TPUs and GPUs Ray connects the processes by `jax.distributed` itself, which
jaxlm accepts; on CPUs it does not, and the first worker tells the others where
it can be found.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ray import train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.jax import JaxTrainer


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Ray's part of the command line, and the rest."""
  flags = argparse.ArgumentParser(allow_abbrev=False)
  flags.add_argument("--workers", type=int, default=2)
  flags.add_argument("--accelerator", choices=["cpu", "gpu", "tpu"])
  flags.add_argument("--per_worker", type=int, default=1, help="chips of each")
  flags.add_argument("--tpu_type", help="as Ray calls it, e.g. TPU-V6E")
  flags.add_argument("--topology", help="of the TPU slice, e.g. 4x4")
  flags.add_argument("--retries", type=int, default=3)
  flags.set_defaults(accelerator="cpu")
  return flags.parse_known_args(argv)


def worker(settings: dict) -> None:
  """What each worker does: `jaxlm.train`, from the driver's directory."""
  os.chdir(settings["directory"])

  import jax

  from jaxlm import host
  from jaxlm.train import main

  host.prepare()
  argv = settings["argv"]
  if not jax.distributed.is_initialized():
    argv = [*argv, *place()]
  main(argv)


def place() -> list[str]:
  """The flags that tell this worker where it stands."""
  context = train.get_context()
  with socket.socket() as free:
    free.bind(("", 0))
    port = free.getsockname()[1]
  address = socket.gethostbyname(socket.gethostname())
  coordinator = broadcast_from_rank_zero(f"{address}:{port}")
  return [
    f"--coordinator={coordinator}",
    f"--processes={context.get_world_size()}",
    f"--process={context.get_world_rank()}",
  ]


def scaling(flags: argparse.Namespace) -> ScalingConfig:
  """How many workers, and what each has."""
  if flags.accelerator == "cpu":
    return ScalingConfig(num_workers=flags.workers)
  name = flags.accelerator.upper()
  return ScalingConfig(
    num_workers=flags.workers,
    use_gpu=flags.accelerator == "gpu",
    use_tpu=flags.accelerator == "tpu",
    accelerator_type=flags.tpu_type,
    topology=flags.topology,
    resources_per_worker={name: flags.per_worker},
  )


def main(argv: Sequence[str]) -> None:
  """Starts the workers, and waits until the run is over."""
  flags, rest = parse(argv)
  platforms = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
  environment = {
    "JAX_PLATFORMS": platforms[flags.accelerator],
    "JAX_ENABLE_RECOVERABILITY": "1",  # where Ray connects the processes
    "JAX_ENABLE_PREEMPTION_SERVICE": "0",
    "PYTHONPATH": os.pathsep.join(sys.path[1:]),
  }
  trainer = JaxTrainer(
    worker,
    train_loop_config={"argv": rest, "directory": os.getcwd()},
    scaling_config=scaling(flags),
    run_config=RunConfig(
      name="jaxlm",
      storage_path=str(Path("runs/ray").absolute()),
      failure_config=FailureConfig(max_failures=flags.retries),
      worker_runtime_env={"env_vars": environment},
    ),
  )
  trainer.fit()


if __name__ == "__main__":
  main(sys.argv[1:])
