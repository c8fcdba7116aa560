"""The pages on tasks and on evaluation say what is so."""

import re
from pathlib import Path

import jax
import pytest

import jaxlm
from jaxlm import tasks
from jaxlm.data.tokenizers import Bytes
from jaxlm.evaluate import __main__ as evaluation
from jaxlm.evaluate import measure, results
from jaxlm.layers.param import init
from jaxlm.models.families import modern
from jaxlm.tasks import __main__ as writer

DOCS = Path(__file__).parents[1] / "docs"
TASKS = (DOCS / "tasks.md").read_text("utf-8")
EVALUATION = (DOCS / "evaluation.md").read_text("utf-8")


@pytest.fixture
def runs(tmp_path, monkeypatch):
  """A folder with a run in it, as a reader would have one."""
  monkeypatch.chdir(tmp_path)
  tokenizer = Bytes(["<|endoftext|>"])
  model = modern.decoder(tokenizer.vocab_size, 16, 1, 2, max_positions=64)
  params = init(model.params(), jax.random.key(0))
  jaxlm.save("runs/tiny", model, params, tokenizer)


@pytest.mark.parametrize(
  ("page", "n", "last"),
  [
    (TASKS, 3, "1 (('equal sides', 1),)"),
    (EVALUATION, 2, "8.005624549193878"),  # a fresh model: log2 of 257
  ],
)
def test_examples(page, n, last, runs, capsys):
  """Each block of a page, sharing names, as a reader would try them."""
  blocks = re.findall(r"```python\n(.*?)```", page, re.S)
  assert len(blocks) == n
  names: dict = {}
  for block in blocks:
    exec(compile(block, "page", "exec"), names)
  said = capsys.readouterr().out.splitlines()[-1]
  if page is EVALUATION:
    assert float(said) == pytest.approx(float(last), rel=1e-6)
  else:
    assert said == last


@pytest.mark.parametrize(
  ("page", "parser"), [(TASKS, writer), (EVALUATION, evaluation)]
)
def test_every_flag_is_in_the_table(page, parser):
  """And the table has no others."""
  known = {o for a in parser.parser()._actions for o in a.option_strings}
  rows = re.findall(r"^\| (`--.*?) \|", page, re.M)
  told = set(re.findall(r"`(--[a-z_-]+)`", " ".join(rows)))
  assert told == known - {"-h", "--help"}


def test_what_the_program_prints(capsys):
  """The lines below the command."""
  shown = TASKS.split("$ python -m ")[1].split("```")[0]
  command, _, lines = shown.partition("\n")
  writer.main(command.split()[1:])
  assert capsys.readouterr().out == lines


def test_the_table_of_skills():
  """Every skill, its prompts and responses, and what a level is."""
  rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| `([^`]*)`", TASKS, re.M)
  assert [name for name, *_ in rows] == [*tasks.SKILLS]
  for name, prompt, response in rows:
    skill = tasks.SKILLS[name]()
    if name == "list":
      response = "- fig\n- plum"
    assert skill.score(response, response) == 1
    made = tasks.make(name).example(0, 0).prompt
    shape = re.sub(r"\d+", "0", prompt).split()[0].split("=")[0][:2]
    assert name in ("recall", "story") or shape in re.sub(r"\d+", "0", made)
  worked = re.findall(r"`(\d[^`]*,#[^`]*)`", TASKS)
  for text in worked:
    for step in text.split(",#")[0].split(","):
      assert eval(step.replace("=", "=="))
  for group in tasks.GROUPS:
    assert f"`{group}`" in TASKS


def test_the_table_of_metrics():
  """Every metric that there is, and no other."""
  task = tasks.make("add")
  examples = tasks.examples(task, "test", 3)
  found = results.scored(task, examples, [["1"] * 3] * 3, [[True] * 3] * 3)
  section = EVALUATION.split("## The metrics")[1].split("## Intervals")[0]
  rows = re.findall(r"^\| (`[^|]*) \|", section, re.M)
  told = set(re.findall(r"`([a-z_0-9@]+)`", " ".join(rows)))
  known = {re.sub(r"@\d+", "@k", name) for name in measure.known(found)}
  assert told == known
