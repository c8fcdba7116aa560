"""The program that asks whether a reward model can be trusted."""

import json

import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import default_config, freeze
from jaxlm.errors import UserError
from jaxlm.keys import flatten
from jaxlm.rl import reward_check, sanity
from jaxlm.rl.reward_page import told
from jaxlm.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A small reward model after a few steps, and its workdir."""
  folder = tmp_path_factory.mktemp("reward")
  c = default_config()
  c.objective.name, c.objective.examples = "reward", 64
  c.data.path, c.data.tokenizer = "task:reverse?levels=1", "chars"
  c.model.dim, c.model.layers, c.model.heads = 16, 1, 2
  c.steps, c.batch_size, c.seq_len, c.log_every = 4, 8, 24, 4
  c.optimizer.warmup, c.log.tensorboard = 0, False
  train(freeze(flatten(c)), folder)
  return folder


@pytest.fixture(scope="module")
def report(run):
  """What the program finds, the control included."""
  asked = ["--task=reverse?levels=1", "--examples=40", "--control"]
  reward_check.main([f"--workdir={run}", *asked])
  return json.loads((run / "report.json").read_text())


@pytest.mark.slow
def test_the_control_is_a_run_on_shuffled_labels(run, report):
  """The same config but for the labels; kept, so that it can be looked at."""
  ours, theirs = config.read(run), config.read(run / "control")
  changed = {key for key, _, _ in config.differences(ours, theirs)}
  assert changed == {"objective.noise"}
  assert theirs.objective.noise == 0.5
  assert 0.0 <= report["control"]["accuracy"] <= 1.0
  assert report["control"]["promise"] == pytest.approx(0.5, abs=0.05)
  assert (
    "| trained on shuffled labels: accuracy |"
    in (run / "report.md").read_text()
  )


@pytest.mark.slow
def test_changes_that_do_not_fit_are_told(report):
  """Ten times three letters and a prompt are 41 tokens; the model reads 24."""
  tricks = report["tricks"]
  assert tricks["ten times"] == {"share": None, "asked": 0, "too_long": 40}
  assert tricks["twice"]["asked"] == 40
  assert "40 are longer than the model reads" in told(report)
  assert (tricks["turned around"]["asked"]) <= 40  # palindromes are no change


def test_a_promise_is_no_sign():
  """A lean of next to nothing, in all pairs: always right, and no more sure."""
  good, bad = np.full(10, 1e-6), np.zeros(10)
  assert sanity.accuracy(good, bad)[0] == 1.0
  assert sanity.promise(good, bad) == pytest.approx(0.5, abs=1e-6)
  assert sanity.promise(good + 1e4, bad) == 1.0
  assert sanity.promise(bad, good + 1e4) == 0.0


def test_what_cannot_be_asked(tmp_path):
  """No reward model, or nothing to ask: said before anything is done."""
  with pytest.raises(UserError, match="holds no"):
    reward_check.main([f"--workdir={tmp_path}", "--task=reverse"])
  for flag in ("--examples=0", "--samples=-1"):
    with pytest.raises(UserError, match=f"{flag}; ask for 1"):
      reward_check.main([f"--workdir={tmp_path}", "--task=reverse", flag])
