"""Many processes are one run: they come, learn, save and stop together."""

import re
import signal
import socket
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from distributed_processes import (
  ROOT,
  finish,
  free_port,
  start,
  trained,
  wait_for_lines,
)

from jaxlm import data, metrics, program
from jaxlm.checkpoint import Checkpoints
from jaxlm.data.loader import Tokens
from jaxlm.errors import UserError
from jaxlm.parallel import distributed
from jaxlm.parallel.clusters import Place
from jaxlm.parallel.meeting import meet
from jaxlm.parallel.mesh import make_mesh, process_rows
from jaxlm.parallel.rules import preset
from jaxlm.parallel.watch import Watch
from jaxlm.recipe import schedule
from jaxlm.train import train

# --- Meeting ------------------------------------------------------------------


def gather(*asked: tuple[int, int], timeout: float = 10) -> list:
  """What each (process, processes) hears at one meeting, errors as texts."""
  port, heard = free_port(), [None] * len(asked)

  def go(i: int, process: int, processes: int) -> None:
    try:
      heard[i] = meet(f"127.0.0.1:{port}", processes, process, timeout)
    except UserError as error:
      heard[i] = str(error)

  threads = [
    threading.Thread(target=go, args=(i, *a)) for i, a in enumerate(asked)
  ]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  return heard


def test_all_meet():
  """Each learns the machines of all, in the order of the processes."""
  assert gather((2, 3), (0, 3), (1, 3)) == [[socket.gethostname()] * 3] * 3


def test_somebody_is_missing():
  """Those who came are told who did not."""
  for text in gather((0, 4), (2, 4), timeout=1):
    assert text.startswith("2 of 4 processes did not come within 1 s: 1, 3;")


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    (((0, 2), (1, 3)), "started as one of 3, process 0 as one of 2"),
    (((0, 3), (1, 3), (1, 3)), "two processes were started as --process=1"),
  ],
)
def test_processes_that_do_not_fit(asked, message):
  """Counted differently or numbered twice: all hear the same sentence."""
  for text in gather(*asked):
    assert message in text


def test_process_0_is_not_there():
  """The address and what to check: started? name? another program?"""
  with pytest.raises(UserError, match=r"127.0.0.1:\d+ within 0 s: nothing"):
    meet(f"127.0.0.1:{free_port()}", 2, 1, 0.3)
  with pytest.raises(UserError, match="by the name no"):
    meet("no.such.invalid:1", 2, 1, 0.3)
  with pytest.raises(UserError, match="should read HOST:PORT"):
    meet("localhost", 2, 1, 0.3)


def test_strangers_at_the_door():
  """Port scanners, and clients of an earlier run, do not disturb a meeting."""
  port, heard = free_port(), []
  address = f"127.0.0.1:{port}"
  first = threading.Thread(target=lambda: heard.append(meet(address, 2, 0, 10)))
  first.start()
  for noise in (b"PRI * HTTP/2.0\r\n\r\n", b"", b"[1]\n", b'{"process": 1}\n'):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
      try:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
          stranger.sendall(noise)
        break
      except ConnectionRefusedError:
        time.sleep(0.02)
  assert meet(address, 2, 1, 10) == [socket.gethostname()] * 2
  first.join()
  assert len(heard[0]) == 2


# --- Agreeing -----------------------------------------------------------------


class Service:
  """The part of JAX's coordination service that `Watch` asks, in one place."""

  def __init__(self, processes: int):
    self.store, self.lock = {}, threading.Lock()
    self.round = threading.Barrier(processes)
    self.everyone = dict.fromkeys(range(processes), 7)

  def get_live_nodes(self, ids):
    self.round.wait(20)
    return self.everyone

  def wait_at_barrier(self, name, timeout):
    with self.lock:
      size = self.round.parties
      barrier = self.store.setdefault(name, threading.Barrier(size))
    barrier.wait(20)

  def key_value_set(self, key, value, allow_overwrite=False):
    with self.lock:
      self.store[key] = value

  def key_value_dir_get(self, prefix):
    with self.lock:
      return [i for i in self.store.items() if i[0].startswith(prefix)]


@pytest.mark.parametrize("seed", range(4))
def test_all_stop_after_the_same_call(seed):
  """However far apart they are; the signals may reach several of them."""
  count = 4
  service, rng = Service(count), np.random.default_rng(seed)
  calls, pauses = [0] * count, rng.random((count, 5)) * 0.004
  signalled = {int(i): int(rng.integers(1, 30)) for i in rng.integers(0, 4, 2)}

  def process(i: int) -> None:
    watch = Watch(service, ["here"] * count, i, 10, interval=0.02)
    stopped = None
    while stopped is None and calls[i] < 5000:
      time.sleep(pauses[i, calls[i] % 5])
      calls[i] += 1
      now = calls[i] >= signalled.get(i, 9999)
      stopped = watch.stop_together(15 if now else None)
    watch.end()

  threads = [threading.Thread(target=process, args=(i,)) for i in range(count)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert len(set(calls)) == 1, calls
  assert calls[0] > min(signalled.values())


def test_agreement_costs_next_to_nothing():
  """A step without a signal pays for a lock: far below a hundredth of 1 ms."""
  watch = Watch(Service(1), ["here"], 0, 10)
  begin = time.perf_counter()
  for _ in range(10_000):
    watch.stop_together(None)
  assert (time.perf_counter() - begin) / 10_000 < 1e-4
  watch.end()


# --- Rows ---------------------------------------------------------------------


def rows_by_process(
  name: str, sizes: str, processes: int, rows: int, accumulate: int = 1
) -> list[list[int]]:
  """The rows of each, if the eight devices were those of several processes."""
  mesh = make_mesh(preset(name), sizes)
  groups = np.array(jax.devices()).reshape(processes, -1)
  return [
    process_rows(mesh, preset(name), rows, accumulate, group).tolist()
    for group in groups
  ]


def test_a_batch_is_cut_where_it_lies():
  """Data and FSDP cut it; tensor parallelism over processes does not."""
  assert rows_by_process("dp", "", 4, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]
  assert rows_by_process("fsdp", "", 2, 16) == [
    list(range(8)),
    list(range(8, 16)),
  ]
  assert rows_by_process("tp", "", 2, 4) == [[0, 1, 2, 3]] * 2
  # Pairs of processes share what pairs of them compute.
  sizes = "fsdp:2,tensor:4"
  assert rows_by_process("fsdp_tp", sizes, 4, 4) == [[0, 1]] * 2 + [[2, 3]] * 2


def test_parts_of_a_batch_are_those_of_one_process():
  """Part a has the same rows on any number of processes, in that order."""
  found = rows_by_process("dp", "", 2, 32, accumulate=2)
  parts = np.concatenate([np.reshape(f, (2, -1)) for f in found], axis=1)
  np.testing.assert_array_equal(parts, np.arange(32).reshape(2, 16))


@pytest.mark.parametrize("windows", ["random", "packed"])
def test_the_order_of_the_data_is_one(windows):
  """Rows that are asked for are those of the global batch, mixed or not."""
  ids = np.arange(997, dtype=np.uint16)
  docs = np.array([[i * 100, i * 100 + 99] for i in range(9)])
  sources = [Tokens(ids, docs), Tokens(ids[::-1].copy(), docs)]
  for tokens in (sources[0], sources):
    asked = (tokens, 8, 12, 3, windows)
    every, some = data.batches(*asked), np.array([1, 2, 7, 11])
    mine = data.batches(*asked, rows=some)
    for step in (0, 5, 90):
      for name, whole in every[step].items():
        np.testing.assert_array_equal(mine[step][name], whole[some])
  packed = windows == "packed"
  every = data.windows(sources, 8, 12, packed)
  mine = data.windows(sources, 8, 12, packed, rows=some)
  for i in range(len(every)):
    for name, whole in every[i].items():
      np.testing.assert_array_equal(mine[i][name], whole[some])


# --- The page -----------------------------------------------------------------


def blocks(kind: str) -> list[str]:
  """The examples of docs/distributed.md."""
  page = (ROOT / "docs" / "distributed.md").read_text("utf-8")
  return re.findall(rf"```{kind}\n(.*?)```", page, re.S)


def test_the_laptop_example_is_a_valid_run():
  """Its command line is read as the program reads it."""
  (block,) = blocks("bash")
  command = block.split("jaxlm.train")[1].split("&")[0]
  argv = command.replace("\\\n", " ").replace("$process", "1").split()
  flags = program.parser("A test.")
  distributed.add_flags(flags)
  argv[0] = f"--config={ROOT / argv[0].removeprefix('--config=')}"
  run = program.load(argv, flags)
  schedule(run.config)
  asked = (run.flags.coordinator, run.flags.processes, run.flags.process)
  assert distributed.place(*asked) == Place("127.0.0.1:1234", 2, 1)


def test_the_python_example_runs(capsys):
  """With one process, as it stands."""
  (block,) = blocks("python")
  names: dict = {}
  exec(compile(block, "docs/distributed.md", "exec"), names)
  assert capsys.readouterr().out == "process 0 of 1\n"
  assert names["newest"] == 7


# --- Real processes -----------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("text") / "fox.txt"
  path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
  return path


def alone(text: Path, workdir: Path, *keys: str):
  """Trains in this process, on its eight devices."""
  argv = trained(text, workdir, *keys)[2:]
  asked = program.load(argv, program.parser("A test."))
  return train(asked.config, asked.workdir)


def losses(workdir: Path) -> dict[tuple[int, str], float]:
  """Every training and validation loss by its step."""
  return {
    (record["step"], name): record[name]
    for record in metrics.read(workdir)
    for name in ("loss", "val_loss")
    if name in record
  }


def assert_same_losses(a: Path, b: Path, tolerance: float = 1e-5) -> None:
  found, wanted = losses(a), losses(b)
  assert found.keys() == wanted.keys()
  for key in wanted:
    assert abs(found[key] - wanted[key]) < tolerance, key


def state_on_one_device(workdir: Path, like) -> tuple[int, list[np.ndarray]]:
  """The newest checkpoint, read onto one device of this process."""
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  want = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), like
  )
  found = Checkpoints(workdir / "checkpoints", read_only=True).restore(want)
  return found.step, [np.asarray(x) for x in jax.tree.leaves(found.state)]


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
  """The run of one process: its last state, its directory."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  return alone(text, workdir), workdir


@pytest.mark.slow
@pytest.mark.parametrize(
  ("processes", "devices", "preset"), [(2, 2, "dp"), (4, 1, "fsdp")]
)
def test_processes_train_as_one(
  processes, devices, preset, one, text, tmp_path
):
  """The losses of one process, and one checkpoint that one device can read."""
  state, workdir = one
  keys = [f"parallel.preset={preset}"]
  command = trained(text, tmp_path / "many", *keys)
  ended = finish(start(command, processes, devices))
  assert [status for status, *_ in ended] == [0] * processes, ended
  assert_same_losses(tmp_path / "many", workdir)
  step, found = state_on_one_device(tmp_path / "many", state)
  assert step == 20
  for x, y in zip(found, jax.tree.leaves(state), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)
  # One log, one voice: of the others, only Gloo itself says a line.
  assert "step 20/20" in ended[0][1]
  assert not any("step" in stdout for _, stdout, _ in ended[1:])
  assert (tmp_path / "many/samples.txt").read_text().count("--- step") == 1


@pytest.mark.slow
def test_stopped_and_killed_and_continued(text, tmp_path):
  """SIGTERM to one: all save and stop. Kill -9: all stop. Nothing is lost.

  Two processes of one device, then two of two with another preset, then this
  one alone: together they make the losses of an undisturbed run.
  """
  long = ("steps=70", "eval_every=2", "checkpoint_every=10")
  workdir = tmp_path / "run"
  log = workdir / "metrics.jsonl"

  first = start(trained(text, workdir, *long), 2)
  wait_for_lines(log, 15)
  first[1].send_signal(signal.SIGTERM)
  ended = finish(first)
  assert [status for status, *_ in ended] == [128 + signal.SIGTERM] * 2, ended
  stopped = Checkpoints(workdir / "checkpoints", read_only=True).latest()
  assert f"stopped at step {stopped}, saved" in ended[0][1]

  command = trained(text, workdir, *long, "parallel.preset=fsdp")
  command.append("--heartbeat=5")
  second = start(command, 2, devices=2)
  wait_for_lines(log, len(log.read_text().splitlines()) + 15)
  second[1].kill()
  killed = time.monotonic()
  ended = finish(second)
  assert time.monotonic() - killed < 5 + 10  # the heartbeat, and then some
  assert [status for status, *_ in ended] == [distributed.LOST, -9], ended
  assert "error: process 1 of 2" in ended[0][2]
  assert "start again with the same --workdir" in ended[0][2]
  assert "Traceback" not in ended[0][2]

  alone(text, workdir, *long)
  alone(text, tmp_path / "undisturbed", *long)
  assert_same_losses(workdir, tmp_path / "undisturbed", 1e-4)


@pytest.mark.slow
def test_one_that_fails_ends_all(text, tmp_path):
  """A process with another config: all say why, at once, with status 2."""
  command = trained(text, tmp_path / "run")
  ended = finish(start(command, 2, each=[[], ["--config.optimizer.lr=1"]]))
  assert [status for status, *_ in ended] == [2, 2], ended
  for _, _, stderr in ended:
    assert "this process and process 0 have different configs" in stderr
    assert "Traceback" not in stderr
  assert "error: process 1 of 2" in ended[0][2]
