"""The frame of a program: exit statuses, messages, the compile cache."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import program
from jaxlm.errors import UserError


@pytest.fixture
def status(monkeypatch):
  """Runs a main as a process would, and returns its exit status."""
  monkeypatch.setattr(program.host, "prepare", lambda: None)
  monkeypatch.setattr(sys, "argv", ["program", "--flag"])

  def run(main) -> int:
    with pytest.raises(SystemExit) as ended:
      program.run(main)
    return ended.value.code

  return run


def raiser(error: BaseException):
  def main(argv):
    raise error

  return main


def test_success_is_zero_and_main_gets_the_arguments(status):
  """The program's name is not an argument."""
  seen = []
  assert status(seen.append) == 0
  assert seen == [["--flag"]]


def test_user_error_is_one_line_and_status_two(status, capsys):
  """No traceback wall: one sentence on stderr."""
  assert status(raiser(UserError("no such file; make one"))) == 2
  assert capsys.readouterr() == ("", "error: no such file; make one\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_system_refuses_is_one_line(status, capsys, number):
  """A full disk is not a defect: the reason and the file are enough."""
  error = OSError(number, os.strerror(number), "runs/a/metrics.jsonl")
  assert status(raiser(error)) == 2
  text = capsys.readouterr().err
  assert text == f"error: {os.strerror(number)}: runs/a/metrics.jsonl\n"


def test_ctrl_c_is_quiet(status, capsys):
  """The shell's own status for an interrupt, and nothing printed."""
  assert status(raiser(KeyboardInterrupt())) == 130
  assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EIO, "x")])
def test_a_defect_keeps_its_traceback(status, error):
  """Whatever is not the user's is not hidden."""
  with pytest.raises(type(error)):
    status(raiser(error))


SCRIPT = """
import jax, jax.numpy as jnp
from jaxlm import program

def main(argv):
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((8, 8))).block_until_ready()
  print("\\n".join(["made"] * 100_000))

program.run(main)
"""


def test_process_keeps_its_compiled_code_and_takes_a_closed_pipe(tmp_path):
  """One real process: `program | head -1` is quiet, and leaves a cache."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  clean["XLA_FLAGS"] = ""  # one device; several keep none
  with subprocess.Popen(
    [sys.executable, "-c", SCRIPT],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**clean, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
  ) as process:
    assert process.stdout.readline() == b"made\n"
    process.stdout.close()
    assert process.stderr.read() == b""
  assert process.returncode == 141
  assert any((tmp_path / "jaxlm" / "jax").iterdir())


def test_help_lists_flags_and_keys(capsys):
  """--help is the whole reference of a command line."""
  with pytest.raises(SystemExit) as ended:
    program.load(["--help"], program.parser("Trains."))
  assert ended.value.code == 0
  text = capsys.readouterr().out
  assert "--workdir DIR" in text
  assert "optimizer.lr " in text


FILES = sorted(Path(__file__).parent.parent.glob("configs/*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_every_config_of_the_project_loads(file):
  """A config file that sets a key we renamed is found here."""
  assert program.load([f"--config={file}"]).config.steps > 0
