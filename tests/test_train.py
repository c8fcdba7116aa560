"""The training program as its user meets it: runs, resumes, kills, errors."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import metrics, program
from jaxlm.checkpoint import Checkpoints
from jaxlm.errors import UserError
from jaxlm.train import main, train

ROOT = Path(__file__).parent.parent
TEXT = "The quick brown fox jumps over the lazy dog. " * 60
TINY = (
  "steps=12",
  "batch_size=8",
  "seq_len=16",
  "log_every=1",
  "eval_every=4",
  "checkpoint_every=2",
  "model.dim=16",
  "model.layers=1",
  "model.heads=2",
  "optimizer.warmup=2",
  "data.tokenizer=bytes",
  "sample.tokens=8",
  "log.tensorboard=false",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("text") / "fox.txt"
  path.write_text(TEXT)
  return path


def arguments(text: Path, workdir: Path, *keys: str) -> list[str]:
  """A command line: the tiny run, with some keys changed."""
  config = ROOT / "configs" / "shakespeare_char.py"
  flags = [f"--config={config}", f"--workdir={workdir}"]
  return flags + [
    f"--config.{key}" for key in (*TINY, f"data.path={text}", *keys)
  ]


def run(text: Path, workdir: Path, *keys: str):
  """Trains in this process."""
  asked = program.load(
    arguments(text, workdir, *keys), program.parser("A test.")
  )
  return train(asked.config, asked.workdir)


def records(workdir: Path) -> list[dict]:
  """The log without what depends on the clock."""
  lines = metrics.read(workdir)
  return [
    {k: v for k, v in line.items() if k != "tokens_per_sec"} for line in lines
  ]


def arrays(state) -> list[np.ndarray]:
  return [np.asarray(x) for x in jax.tree.leaves(state)]


def assert_same(a, b) -> None:
  for x, y in zip(arrays(a), arrays(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
  """An undisturbed run: its last state, its directory."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return run(text, workdir), workdir


def test_a_run_leaves_what_it_promises(whole):
  """The files, the metric names, a loss that falls, a model that loads."""
  state, workdir = whole
  assert int(state.step) == 12
  for name in ("config.json", "loss.png", "samples.txt", "tokenizer.json"):
    assert (workdir / name).stat().st_size > 0
  text = (workdir / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  trained = [line for line in lines if "loss" in line]
  assert [line["step"] for line in trained] == list(range(1, 13))
  assert all({"grad_norm", "lr"} <= line.keys() for line in trained)
  assert trained[-1]["loss"] < trained[0]["loss"] - 0.05
  assert [r["step"] for r in lines if "val_loss" in r] == [4, 8, 12]
  model, params = jaxlm.load(workdir)
  np.testing.assert_array_equal(
    params["embed"]["tokens"], state.params["embed"]["tokens"]
  )
  tokens = jaxlm.generate(model, params, np.ones((1, 3), np.int32), 4)
  assert tokens.shape == (1, 7)


def test_an_interrupted_run_continues_to_the_same_bits(
  whole, text, tmp_path, monkeypatch
):
  """SIGTERM between two checkpoints: saved there, and nothing is different."""
  import jaxlm.train as program_under_test

  real, seen = program_under_test._next_event, []

  def interrupting(config, step):
    if step == 5 and not seen:
      seen.append(step)
      os.kill(os.getpid(), signal.SIGTERM)
    return real(config, step)

  monkeypatch.setattr(program_under_test, "_next_event", interrupting)
  with pytest.raises(SystemExit) as stop:
    run(text, tmp_path / "run")
  assert stop.value.code == 128 + signal.SIGTERM
  assert Checkpoints(tmp_path / "run/checkpoints", read_only=True).latest() == 6
  state = run(text, tmp_path / "run")
  assert_same(state, whole[0])
  assert records(tmp_path / "run") == records(whole[1])


@pytest.mark.slow
def test_kills_lose_nothing(whole, text, tmp_path):
  """Signal 9 at random moments, until the run gets through: the same bits."""
  workdir = tmp_path / "run"
  command = [sys.executable, "-m", "jaxlm.train"]
  command += arguments(text, workdir)
  environment = dict(os.environ, PYTHONPATH=str(ROOT))
  random.seed(0)
  kills = 0
  for attempt in range(12):
    process = subprocess.Popen(
      command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if attempt < 11:
      _wait_for_steps(process, workdir, random.randint(1, 6))
      time.sleep(random.random() * 0.05)
      process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    kills += process.returncode == -signal.SIGKILL
    if process.returncode == 0:
      break
    assert process.returncode == -signal.SIGKILL, output.decode()
  assert process.returncode == 0
  assert kills >= 2
  saved = Checkpoints(workdir / "checkpoints", read_only=True)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole[0]
  )
  assert_same(saved.restore(like).state, whole[0])
  assert records(workdir) == records(whole[1])


def _wait_for_steps(process, workdir: Path, more: int) -> None:
  """Until the log has grown by some lines, or the process has ended."""
  path = workdir / "metrics.jsonl"
  start = len(path.read_text().splitlines()) if path.exists() else 0
  deadline = time.time() + 200
  while process.poll() is None and time.time() < deadline:
    lines = path.read_text().splitlines() if path.exists() else []
    if len(lines) < start:  # the log was cut back to the last checkpoint
      start = len(lines)
    if len(lines) >= start + more:
      return
    time.sleep(0.01)


def test_a_finished_run_has_nothing_to_do(whole, text):
  """Asking again changes no bit and harms nothing."""
  before = records(whole[1])
  state = run(text, whole[1])
  assert_same(state, whole[0])
  assert records(whole[1]) == before


def test_a_run_continues_on_another_mesh(text, tmp_path):
  """Saved from a batch over 8 devices, read into parameters split over 8."""
  first = ("eval_every=0", "sample.tokens=0", "optimizer.schedule=constant")
  run(text, tmp_path / "run", "steps=6", *first)
  split = ("parallel.preset=fsdp", *first)
  state = run(text, tmp_path / "run", *split)
  table = state.params["embed"]["tokens"]
  assert table.addressable_shards[0].data.shape == (256, 2)
  alone = run(text, tmp_path / "alone", *first)
  for a, b in zip(arrays(state.params), arrays(alone.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "keys",
  [
    ("steps_per_call=4",),
    ("accumulate=2", "batch_size=16", "data.windows=packed"),
    ("precision=float16", "ema=0.9"),
    ("parallel.preset=fsdp", "optimizer.name=muon"),
    ("optimizer.name=muon", "optimizer.qk_clip=0.01"),
    ("spike_skip=3.0", "remat=full", "loss_chunk=5"),
  ],
)
def test_options_train(text, tmp_path, keys):
  """Options reach the run: it trains, and its loss stays near the plain one."""
  state = run(text, tmp_path / "run", "eval_every=0", "sample.tokens=0", *keys)
  losses = [r["loss"] for r in records(tmp_path / "run") if "loss" in r]
  assert int(state.step) == 12
  assert losses[-1] < losses[0]


def test_steps_per_call_change_nothing(whole, text, tmp_path):
  """Four steps a call are the steps of four calls."""
  state = run(text, tmp_path / "run", "steps_per_call=4")
  for a, b in zip(arrays(state.params), arrays(whole[0].params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- Wrong input -------------------------------------------------------------


def fails(argv: list[str]) -> str:
  """The sentence that a command line is refused with."""
  with pytest.raises(UserError) as error:
    main(argv)
  return str(error.value)


@pytest.mark.parametrize(
  ("keys", "words"),
  [
    (("data.path=/no/such/file.txt",), "file.txt"),
    (("seq_len=100000", "model.max_positions=100000"), "longer than"),
    (("batch_size=9",), "batch_size=9"),
    (("model.dmi=3",), "model.dim"),
    (("stpes=3",), "config.steps"),
    (("parallel.preset=fdsp",), "fsdp"),
    (("parallel.mesh=data:3",), "3"),
    (("precision=float64",), "bfloat16"),
    (("optimizer.name=adamv",), "adamw"),
    (("remat=some",), "full"),
  ],
)
def test_wrong_input_is_one_sentence(text, tmp_path, keys, words):
  """Each names what is wrong."""
  sentence = fails(arguments(text, tmp_path / "run", *keys))
  assert words in sentence
  assert "\n" not in sentence


def test_empty_and_binary_data(tmp_path):
  """An empty file, and one that is no text, are told apart."""
  empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
  empty.write_bytes(b"")
  binary.write_bytes(b"abc \xff\xfe def")
  assert "empty" in fails(arguments(empty, tmp_path / "a"))
  sentence = fails(arguments(binary, tmp_path / "b", "data.tokenizer=chars"))
  assert "UTF-8" in sentence
  assert "bytes" in sentence


def test_a_workdir_of_another_config_is_kept(whole, text):
  """The keys that differ are named, and nothing is overwritten."""
  before = (whole[1] / "config.json").read_text()
  sentence = fails(arguments(text, whole[1], "model.dim=32"))
  assert "model.dim" in sentence
  assert (whole[1] / "config.json").read_text() == before


def test_a_loss_that_is_no_number_names_its_step(text, tmp_path):
  """And the checkpoints from before stay usable."""
  keys = ("optimizer.lr=1e30", "optimizer.clip=0", "optimizer.warmup=0")
  sentence = fails(arguments(text, tmp_path / "run", *keys))
  assert "at step" in sentence


def test_a_truncated_checkpoint_is_passed_over(whole, text, tmp_path, capsys):
  """The run goes back to the one before, says so, and ends the same."""
  import shutil

  shutil.copytree(whole[1], tmp_path / "run")
  newest = tmp_path / "run" / "checkpoints" / "12" / "state"
  file = max(newest.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
  file.write_bytes(file.read_bytes()[:-7])
  state = run(text, tmp_path / "run")
  assert "damaged" in capsys.readouterr().err
  assert_same(state, whole[0])


@pytest.mark.slow
def test_errors_have_no_traceback(tmp_path):
  """At the terminal: one line on stderr, exit status 2."""
  command = [sys.executable, "-m", "jaxlm.train"]
  command += arguments(tmp_path / "none.txt", tmp_path / "run")
  environment = dict(os.environ, PYTHONPATH=str(ROOT))
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: ")
  assert len(done.stderr.strip().splitlines()) == 1


def test_explain_runs_nothing(text, tmp_path, capsys):
  """Every number that is promised is there, and no directory is made."""
  main([*arguments(text, tmp_path / "run"), "--explain"])
  out = capsys.readouterr().out
  for words in ("parameters", "FLOPs per token", "tokens per parameter"):
    assert words in out
  assert "layers/0/0/mixer/q" in out
  assert not (tmp_path / "run").exists()
