"""Starts the training program as several processes of one machine.

Not a test: `tests/test_distributed.py` uses it.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

TINY = (
  "steps=20",
  "batch_size=8",
  "seq_len=16",
  "log_every=1",
  "eval_every=10",
  "checkpoint_every=5",
  "model.dim=16",
  "model.layers=1",
  "model.heads=2",
  "model.dropout=0.1",
  "optimizer.warmup=2",
  "data.tokenizer=bytes",
  "sample.tokens=4",
  "log.tensorboard=false",
)


def free_port() -> int:
  """A port that nobody listens at."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def start(
  command: Iterable[str],
  processes: int = 1,
  devices: int = 1,
  each: Sequence[Sequence[str]] = (),
) -> list[subprocess.Popen]:
  """The same Python program in each process, told its place by flags.

  Args:
    command: what follows `python`.
    processes: how many.
    devices: CPU devices of each.
    each: flags of its own for each process.
  """
  where = f"--coordinator=127.0.0.1:{free_port()}"
  environment = dict(
    os.environ,
    PYTHONPATH=str(ROOT),
    JAX_PLATFORMS="cpu",
    XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
  )
  return [
    subprocess.Popen(
      [
        *(sys.executable, *command),
        *(where, f"--processes={processes}", f"--process={i}"),
        *(each[i] if each else ()),
      ],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]


def trained(text: Path, workdir: Path, *keys: str) -> list[str]:
  """The command that trains the tiny model, with some keys changed."""
  config = ROOT / "configs" / "shakespeare_char.py"
  keys = (*TINY, f"data.path={text}", *keys)
  flags = [f"--config.{key}" for key in keys]
  return [
    *("-m", "jaxlm.train", f"--config={config}", f"--workdir={workdir}"),
    *flags,
  ]


def finish(
  processes: list[subprocess.Popen], timeout: float = 120
) -> list[tuple[int, str, str]]:
  """(exit status, stdout, stderr) of each; none outlives this."""
  try:
    texts = [p.communicate(timeout=timeout) for p in processes]
  finally:
    for p in processes:
      p.kill()
  return [(p.returncode, *t) for p, t in zip(processes, texts, strict=True)]


def wait_for_lines(path: Path, count: int, timeout: float = 60) -> None:
  """Returns when a file has so many lines."""
  deadline = time.monotonic() + timeout
  while time.monotonic() < deadline:
    if path.exists() and len(path.read_text().splitlines()) >= count:
      return
    time.sleep(0.02)
  raise TimeoutError(f"{path} has no {count} lines after {timeout} s")
