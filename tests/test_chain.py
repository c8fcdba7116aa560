"""A chain runs its stages in order, goes on where it was, and compares."""

import json
from pathlib import Path

import pytest

from jaxlm import chain
from jaxlm.errors import UserError

FILE = """
from jaxlm.chain import Chain, Stage

def get_chain(quick):
  return Chain(
    stages=(
      Stage("first", "train", "a.py", {"steps": 2 if quick else 9}),
      Stage("flags", "rl.best_of", "", {"gold": True, "out": "{flags}/x"}),
      Stage("second", "rl.ppo", "b.py", {"model.path": "{first}"}, judged=True),
    ),
    questions="--task=add --n=3",
  )
"""


@pytest.fixture
def calls(monkeypatch):
  """Programs that were started; they do nothing but be judged."""
  found = []

  def call(module, flags):
    found.append((module, list(flags)))
    named = dict(f.removeprefix("--").split("=", 1) for f in flags if "=" in f)
    if module == "jaxlm.evaluate":
      estimate = {"value": 50.0, "low": 40.0, "high": 60.0}
      Path(named["out"]).write_text(
        json.dumps({"metrics": {"exact": estimate}})
      )
    elif "workdir" in named:
      Path(named["workdir"]).mkdir(parents=True, exist_ok=True)
    return 1.5

  monkeypatch.setattr(chain, "call", call)
  return found


@pytest.fixture
def file(tmp_path):
  """A chain of two stages."""
  path = tmp_path / "chain.py"
  path.write_text(FILE)
  return path


def test_stages_are_run_once_and_compared(file, tmp_path, calls, capsys):
  """Names in braces become directories; what is finished is left."""
  argv = [f"--stages={file}", f"--workdir={tmp_path / 'w'}", "--quick"]
  chain.main([*argv, "--seed=7"])
  names = ["jaxlm.train", "jaxlm.rl.best_of", "jaxlm.rl.ppo", "jaxlm.evaluate"]
  assert [module for module, _ in calls] == names
  a, flags, b, c = (given for _, given in calls)
  assert flags == ["--seed=7", f"--out={tmp_path}/w/flags/x", "--gold"]
  assert {"--config.steps=2", "--config.seed=7"} <= set(a)
  assert f"--config.model.path={tmp_path / 'w' / 'first'}" in b
  assert "--task=add" in c
  out = capsys.readouterr().out
  assert "50.0 (40.0 to 60.0)" in out
  assert (tmp_path / "w" / "chain.png").stat().st_size > 1000
  chain.main(argv)
  assert [module for module, _ in calls[4:]] == ["jaxlm.evaluate"]
  assert "finished before, in 2 s" in capsys.readouterr().out


def test_wrong_chains(file, tmp_path):
  """A missing file, no function, a stage not there yet, a name twice."""
  with pytest.raises(UserError, match="no file"):
    chain.read(tmp_path / "none.py", False)
  file.write_text("x = 1")
  with pytest.raises(UserError, match=r"no function get_chain"):
    chain.read(file, False)
  file.write_text(FILE.replace("{first}", "{third}"))
  with pytest.raises(UserError, match=r"'second' needs \{third\}"):
    chain.read(file, False)
  file.write_text(FILE.replace('"second"', '"first"'))
  with pytest.raises(UserError, match="two stages are called 'first'"):
    chain.read(file, False)


def test_a_program_that_fails_stops_the_chain(capfd):
  """Its own words stand above, and the chain says how to go on."""
  with pytest.raises(UserError, match=r"jaxlm\.tasks ended with status 2"):
    chain.call("jaxlm.tasks", ["--task=none", "--n=1"])
  assert "error: " in capfd.readouterr().err


def test_the_chain_of_the_project_reads():
  """Both forms; its configs are files of the project."""
  path = Path(__file__).parent.parent / "configs" / "chains" / "tiny.py"
  for quick in (True, False):
    for stage in chain.read(path, quick).stages:
      config = path.parent.parent.parent / stage.config
      assert config.is_file() or not stage.config
