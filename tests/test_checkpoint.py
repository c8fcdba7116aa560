"""A run may be killed, cut off, filled up or moved: nothing saved is lost."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import files
from jaxlm.checkpoint import Checkpoints
from jaxlm.errors import UserError
from jaxlm.interrupt import Interrupt

HERE = Path(__file__).parent


def small(value: float = 1.0) -> dict:
  """A state with the containers and dtypes that training has."""
  return {
    "step": jnp.int32(3),
    "params": {
      "w": jnp.full((4, 6), value, jnp.float32),
      "b.1": jnp.arange(6, dtype=jnp.bfloat16),
    },
    "opt_state": ({"mu": jnp.zeros((4, 6))}, (), jnp.uint32(2**31 + 7)),
    "ema": None,
    "mask": jnp.array([True, False]),
  }


def like(state):
  return jax.eval_shape(lambda: state)


def same(a, b) -> bool:
  """Equal structure, dtypes and bits."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    return False
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in pairs
  )


def saved(directory, *steps: int, **options) -> Checkpoints:
  """Checkpoints of `small(step)` at each step."""
  checkpoints = Checkpoints(directory, **options)
  for step in steps:
    checkpoints.save(step, small(step), data={"at": step})
    checkpoints.wait()
  return checkpoints


def files_of(checkpoint: Path) -> list[Path]:
  return sorted(p for p in checkpoint.rglob("*") if p.is_file())


# --- What goes in comes out --------------------------------------------------


def test_round_trip(tmp_path):
  """Every bit, dtype, container, and the two notes come back."""
  state, data = small(), {"epoch": 2, "ids": [1, 2]}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, state, data=data, config={"lr": 0.1})
    assert 7 in checkpoints
  got = Checkpoints(tmp_path, read_only=True).restore(like(state))
  assert same(got.state, state)
  assert got[1:] == (data, {"lr": 0.1}, 7)


@settings(max_examples=8)
@given(
  shape=st.lists(st.integers(0, 5), max_size=3),
  dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8", "uint32"]),
  key=st.text(st.characters(codec="utf-8"), max_size=6),
  seed=st.integers(0, 2**31),
)
def test_round_trip_of_anything(shape, dtype, key, seed):
  """Empty and scalar arrays, random bits (NaN too), keys in any alphabet."""
  dtype = jnp.dtype(dtype)
  size = int(np.prod(shape)) * dtype.itemsize
  bits = np.random.default_rng(seed).bytes(size)
  array = np.frombuffer(bits, dtype).reshape(shape)
  state = {key: [jnp.asarray(array)], "z": jnp.int32(0)}
  with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as c:
    c.save(0, state)
    assert same(c.restore(like(state)).state, state)


def test_donated_state_is_safe(tmp_path):
  """The next step may overwrite the state as soon as `save` returns."""
  advance = jax.jit(
    lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s),
    donate_argnums=0,
  )
  state = advance({"w": jnp.zeros((1024, 1024)), "v": jnp.zeros((1000,))})
  with Checkpoints(tmp_path, keep=None) as checkpoints:
    for at in range(1, 4):
      assert float(state["w"][0, 0]) == 5 * at - 4
      checkpoints.save(at, state)
      for _ in range(5):
        state = advance(state)
    for at in range(1, 4):
      got = checkpoints.restore(like(state), at).state
      assert all((np.asarray(x) == 5 * at - 4).all() for x in got.values())
      advance(got)  # and what is restored may be donated too


def test_saves_while_training_goes_on(tmp_path, monkeypatch):
  """`save` returns before the files are complete; `wait` waits for them."""
  may_finish, write = threading.Event(), files.write_manifest

  def slowly(*args, **kwargs):
    assert may_finish.wait(30)
    write(*args, **kwargs)

  monkeypatch.setattr(files, "write_manifest", slowly)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, small())
    assert checkpoints.latest() is None
    assert 1 in checkpoints
    may_finish.set()
    checkpoints.wait()
    assert checkpoints.latest() == 1


# --- Other meshes, and parts -------------------------------------------------


def sharded(mesh, *axes) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(*axes))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_restores_onto_another_mesh(tmp_path, count):
  """Saved from 4 x 2 devices, read onto 1, 2 or 8 with other axes."""
  mesh = jax.make_mesh((4, 2), ("data", "model"))
  x = jnp.arange(64.0).reshape(8, 8)
  state = {
    "x": jax.device_put(x, sharded(mesh, "data", "model")),
    "n": jax.device_put(jnp.int32(5), sharded(mesh)),
  }
  other = jax.make_mesh((count,), ("all",), devices=jax.devices()[:count])
  want = {
    "x": jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharded(other, None, "all")
    ),
    "n": jax.ShapeDtypeStruct((), jnp.int32, sharding=sharded(other)),
  }
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    got = checkpoints.restore(want).state
  assert same(got, {"x": x, "n": jnp.int32(5)})
  assert got["x"].sharding == want["x"].sharding
  assert len(got["x"].addressable_shards) == count


def test_restores_in_a_process_with_three_devices(tmp_path):
  """A process that has fewer devices than those that saved reads it."""
  mesh = jax.make_mesh((8,), ("data",))
  x = jax.device_put(jnp.arange(24.0), sharded(mesh, "data"))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": x})
  code = (
    "import jax, sys; from jaxlm.checkpoint import Checkpoints\n"
    "mesh = jax.make_mesh((3,), ('a',)); P = jax.P\n"
    "where = jax.NamedSharding(mesh, P('a'))\n"
    "x = jax.ShapeDtypeStruct((24,), 'float32', sharding=where)\n"
    "c = Checkpoints(sys.argv[1], read_only=True)\n"
    "x = c.restore({'x': x}).state['x']\n"
    "assert len(x.addressable_shards) == 3\n"
    "assert x.tolist() == list(range(24))\n"
  )
  flags = "--xla_force_host_platform_device_count=3"
  done = run([sys.executable, "-c", code, str(tmp_path)], XLA_FLAGS=flags)
  assert done.returncode == 0, done.stderr


def bytes_read() -> int:
  lines = Path("/proc/self/io").read_text().splitlines()
  return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.skipif(
  not Path("/proc/self/io").exists(), reason="counts bytes as Linux does"
)
def test_a_part_is_read_alone(tmp_path):
  """Sampling reads the parameters and leaves the optimizer state on disk."""
  big = 3_000_000
  with Checkpoints(tmp_path) as checkpoints:
    state = {"params": {"w": jnp.ones((100,))}, "opt": jnp.ones((big,))}
    checkpoints.save(1, state)
    checkpoints.wait()
    before = bytes_read()
    want = {"params": {"w": jax.ShapeDtypeStruct((100,), jnp.bfloat16)}}
    got = checkpoints.restore(want, part=True).state
    assert bytes_read() - before < big
  assert same(got, {"params": {"w": jnp.ones((100,), jnp.bfloat16)}})


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"mask": None}, "the checkpoint has mask [2] and the model has not"),
    ({"ema": jnp.zeros((3,))}, "the model has ema [3] and the checkpoint has"),
    (
      {"params": {"w": jnp.zeros((4, 8)), "b.1": jnp.zeros((6,))}},
      "params/w is [4, 6] in the checkpoint and [4, 8] in the model",
    ),
    ({"step": jnp.float32(0)}, "step is int32 in the checkpoint and float32"),
  ],
)
def test_another_model_is_named(tmp_path, change, words):
  """The message names the first leaf that differs, and how."""
  state = small()
  if "params" in change:  # the order of the tree decides what is first
    change["params"]["b.1"] = state["params"]["b.1"]
  with saved(tmp_path, 1) as checkpoints:
    with pytest.raises(UserError) as caught:
      checkpoints.restore(like(state | change))
    assert words in str(caught.value)
    assert same(checkpoints.restore(like(state)).state, state)


@pytest.mark.parametrize("end", ["", "raise ZeroDivisionError"])
def test_the_end_of_the_program_waits_for_the_save(tmp_path, end):
  """However a program ends by itself, what it began to save is saved."""
  code = (
    "import jax.numpy as jnp, sys; from jaxlm.checkpoint import Checkpoints\n"
    "c = Checkpoints(sys.argv[1])\n"
    "c.save(1, {'w': jnp.ones((2000, 2000))})\n"
    "assert c.latest() is None\n"
  )
  done = run([sys.executable, "-c", code + end, str(tmp_path)])
  assert done.returncode == (1 if end else 0), done.stderr
  assert done.stderr.count("Traceback") == bool(end)
  assert Checkpoints(tmp_path, read_only=True).steps() == [1]


# --- Which are kept ----------------------------------------------------------


def test_keeps_the_newest_and_the_best(tmp_path):
  """A metric that comes after its save still protects that checkpoint."""
  with saved(tmp_path, keep=2, best="val_loss") as checkpoints:
    for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 2.5]):
      checkpoints.save(step, small())
      checkpoints.wait()
      checkpoints.note(step, val_loss=loss)
    assert checkpoints.steps() == [1, 3, 4]
    assert (checkpoints.best(), checkpoints.latest()) == (1, 4)
  again = Checkpoints(tmp_path, best="val_loss", read_only=True)
  assert again.best() == 1
  assert Checkpoints(tmp_path, best="other", read_only=True).best() is None


def test_deletes_nothing_before_a_newer_one_is_complete(tmp_path, monkeypatch):
  """With room for one, a failing save leaves that one; the next replaces it."""

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  with saved(tmp_path, 1, keep=1) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(files, "write_manifest", full)
      checkpoints.save(2, small())
      with pytest.raises(UserError, match="checkpoint 2 could not be written"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    checkpoints.save(2, small())
    checkpoints.wait()
    assert checkpoints.steps() == [2]


# --- Damage ------------------------------------------------------------------


def truncate(path: Path) -> None:
  with open(path, "r+b") as file:
    file.truncate(max(0, path.stat().st_size - 1))


def flip(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, os.unlink, flip])
def test_falls_back_from_any_damaged_file(tmp_path, capsys, harm):
  """Whichever file of the newest is hurt, the one before it is restored."""
  saved(tmp_path, 1, 2).close()
  for path in files_of(tmp_path / "2"):
    content = path.read_bytes()
    harm(path)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
      got = checkpoints.restore(like(small()))
    assert got.step == 1
    assert same(got.state, small(1))
    warning = capsys.readouterr().err
    assert "checkpoint 2" in warning
    assert path.relative_to(tmp_path / "2").as_posix() in warning
    path.write_bytes(content)


def test_damage_is_an_error_where_nothing_else_is_left(tmp_path, capsys):
  """An explicit step, and a run without a good checkpoint, say so."""
  saved(tmp_path, 1, 2).close()
  checkpoints = Checkpoints(tmp_path, read_only=True)
  truncate(tmp_path / "2" / "manifest.json")
  with pytest.raises(UserError, match=r"checkpoint 2 .* damaged .*try step 1"):
    checkpoints.restore(like(small()), step=2)
  truncate(tmp_path / "1" / "data.json")
  with pytest.raises(UserError, match=r"every checkpoint .* damaged"):
    checkpoints.restore(like(small()))


def test_a_damaged_step_can_be_saved_again(tmp_path, capsys):
  """The continued run reaches the damaged step once more and replaces it."""
  saved(tmp_path, 1, 2).close()
  truncate(tmp_path / "2" / "data.json")
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.restore(like(small())).step == 1
    checkpoints.save(2, small(22))
    got = checkpoints.restore(like(small()))
    assert same(got.state, small(22))
    assert checkpoints.steps() == [2]


# --- Refusals ----------------------------------------------------------------


def test_refuses_what_would_harm(tmp_path):
  """Saving twice, two writers, saving where one only looks."""
  with saved(tmp_path, 1) as checkpoints:
    with pytest.raises(UserError, match="step 1 is already"):
      checkpoints.save(1, small())
    with pytest.raises(UserError, match="another run is writing"):
      Checkpoints(tmp_path)
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.latest() == 1
    with pytest.raises(UserError, match="read-only"):
      reader.save(2, small())
  Checkpoints(tmp_path).close()  # the lock was given back


@pytest.mark.parametrize("place", ["file", "gs://bucket/run"])
def test_refuses_what_cannot_be_written(tmp_path, place):
  """A path that is no directory is an error at once, not after an hour."""
  (tmp_path / "file").touch()
  where = place if "://" in place else tmp_path / place / "checkpoints"
  with pytest.raises(UserError):
    Checkpoints(where)


def test_nothing_to_restore(tmp_path):
  """Missing directories and steps are named; looking creates nothing."""
  empty = Checkpoints(tmp_path / "none", read_only=True)
  assert empty.latest() is None
  assert empty.best() is None
  with pytest.raises(UserError, match="no checkpoint in"):
    empty.restore({})
  assert not (tmp_path / "none").exists()
  with saved(tmp_path, 1, 2) as c, pytest.raises(UserError, match="are: 1, 2"):
    c.restore({}, step=3)


def test_rubbish_is_ignored_and_swept(tmp_path):
  """Unfinished folders never count; the next writer removes them."""
  saved(tmp_path, 1).close()
  (tmp_path / "2.tmp" / "state").mkdir(parents=True)
  (tmp_path / "notes").mkdir()
  assert Checkpoints(tmp_path, read_only=True).steps() == [1]
  assert (tmp_path / "2.tmp").exists()  # it may be another process's
  Checkpoints(tmp_path).close()
  assert not (tmp_path / "2.tmp").exists()
  assert (tmp_path / "notes").exists()


def save_and_fail(directory) -> None:
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, small())
    raise ZeroDivisionError


def test_an_exception_on_its_way_is_not_hidden(tmp_path, capsys, monkeypatch):
  """What ended the run is reported, and the failed save only mentioned."""

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(files, "write_manifest", full)
  with pytest.raises(ZeroDivisionError):
    save_and_fail(tmp_path)
  assert "checkpoint 1 could not be written" in capsys.readouterr().err


# --- Full disks --------------------------------------------------------------


def fails_once(checkpoints: Checkpoints, step: int, capfd) -> None:
  """A save of 8 MB does not fit; what was there before stays usable."""
  checkpoints.save(step, {"w": jnp.ones((2_000_000,))})
  with pytest.raises(UserError, match=f"checkpoint {step} could not be"):
    checkpoints.save(step + 1, small())
  assert "Traceback" not in capfd.readouterr().err
  assert checkpoints.steps() == [1]
  assert same(checkpoints.restore(like(small())).state, small(1))
  checkpoints.save(step + 1, small(5))  # training goes on, and so may saving
  checkpoints.wait()
  assert checkpoints.latest() == step + 1


def test_full_disk(tmp_path, capfd):
  """A real file system of 4 MB runs full while orbax writes."""
  mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "jaxlm", str(tmp_path)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("may not mount a small file system here")
  try:
    with saved(tmp_path / "checkpoints", 1) as checkpoints:
      fails_once(checkpoints, 2, capfd)
  finally:
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_file_size_limit(tmp_path, capfd):
  """The same where no file system can be mounted: a quota stops the write."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints = saved(tmp_path, 1)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
  try:
    fails_once(checkpoints, 2, capfd)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()


# --- Kills -------------------------------------------------------------------


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    command,
    env=os.environ | environment,
    cwd=HERE.parent,
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.parametrize(
  ("side", "kills"),
  [
    (8, 3),
    pytest.param(8, 25, marks=pytest.mark.slow),
    pytest.param(3000, 15, marks=pytest.mark.slow),  # 36 MB: saves take long
  ],
)
def test_killed_at_random_moments(tmp_path, side, kills):
  """Signal 9 while saving: always the last finished step, bit for bit."""
  program = [sys.executable, str(HERE / "saver.py")]
  arguments = [str(tmp_path), str(side), str(kills), "0"]
  path = os.pathsep.join(p for p in sys.path if p)
  done = run(program + arguments, PYTHONPATH=path)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) >= kills - 2  # almost all continued from another


def test_the_page_runs(tmp_path, monkeypatch, capsys):
  """What docs/checkpoints.md shows works, and saves and keeps what it says."""
  page = (HERE.parent / "docs" / "checkpoints.md").read_text()
  monkeypatch.chdir(tmp_path)
  names: dict = {}
  for code in re.findall(r"```python\n(.*?)```", page, re.S):
    exec(compile(code, "checkpoints.md", "exec"), names)
  assert capsys.readouterr().out == "100 {'seen': 100} bfloat16\n"
  assert Checkpoints("run/checkpoints", read_only=True).steps() == [75, 100]


def test_interrupt_is_a_flag():
  """The first signal is remembered, and the old handlers come back."""
  before = signal.getsignal(signal.SIGTERM)
  for number in (signal.SIGINT, signal.SIGTERM):
    with Interrupt() as interrupted:
      assert not interrupted
      os.kill(os.getpid(), number)
      assert interrupted
      assert interrupted.signal == number
  assert signal.getsignal(signal.SIGTERM) is before


def test_second_interrupt_exits_at_once():
  """Even a program that never looks at the flag can be stopped by two."""
  code = (
    "import os, time; from jaxlm.interrupt import Interrupt\n"
    "with Interrupt():\n"
    "  os.kill(os.getpid(), 2); os.kill(os.getpid(), 15); time.sleep(60)\n"
  )
  done = run([sys.executable, "-c", code])
  assert done.returncode == 128 + 15
  assert "saving first" in done.stderr
