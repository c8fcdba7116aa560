"""Users' files and other people's generators as tasks."""

import dataclasses
import gzip
import json
import sys

import pytest

from jaxlm import tasks
from jaxlm.data.chat import PLAIN, ChatTemplate
from jaxlm.errors import UserError
from jaxlm.tasks import __main__ as program
from jaxlm.tasks.rows import conversation

USER = {"role": "user", "content": "12+34="}
RIGHT = {"role": "assistant", "content": "46"}
WRONG = {"role": "assistant", "content": "56"}
SYSTEM = {"role": "system", "content": "Add."}


def written(path, rows):
  """A file of JSON lines."""
  path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
  return path


@pytest.mark.parametrize(
  ("row", "prompt", "rejected"),
  [
    ({"prompt": "12+34=", "response": "46"}, "12+34=", ""),
    ({"question": "12+34=", "answer": "46"}, "12+34=", ""),
    (
      {"instruction": "Add.", "input": "12+34", "output": "46"},
      "Add.\n12+34",
      "",
    ),
    (
      {"prompt": "12+34=", "chosen": "46", "rejected": "56", "id": 3},
      "12+34=",
      "56",
    ),
    ({"messages": [USER, RIGHT]}, "12+34=", ""),
    (
      {"messages": [SYSTEM, USER, RIGHT]},
      "System: Add.\nUser: 12+34=\nAssistant: ",
      "",
    ),
    ({"prompt": [USER], "response": "46"}, "12+34=", ""),
    ({"chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, "12+34=", "56"),
    (
      {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
      "12+34=",
      "56",
    ),
    (
      {"prompt": "12+34=", "chosen": [RIGHT], "rejected": [WRONG]},
      "12+34=",
      "56",
    ),
    (
      {
        "prompt": [USER],
        "chosen": [USER, RIGHT],
        "rejected": [USER, WRONG],
      },
      "12+34=",
      "56",
    ),
  ],
)
def test_forms(tmp_path, row, prompt, rejected):
  """Every form of a row that the page names."""
  (example,) = tasks.read(written(tmp_path / "a.jsonl", [row])).rows
  assert (example.prompt, example.response) == (prompt, "46")
  assert (example.rejected, example.answer) == (rejected, "46")
  assert (example.skill, example.level) == ("a", 1)


def test_a_template_writes_the_prompt(tmp_path):
  """`ChatTemplate.render` fits as it is."""
  path = written(tmp_path / "a.jsonl", [{"messages": [SYSTEM, USER, RIGHT]}])
  (example,) = tasks.read(path, ChatTemplate(PLAIN).render).rows
  assert example.prompt == "System: Add.\nUser: 12+34=\nAssistant:"


def test_what_the_program_writes_is_a_task(tmp_path, capsys):
  """The same examples come back, and are judged by their skill."""
  path = tmp_path / "mix.jsonl"
  program.main(["--task=mix", "--worked", "--n=40", f"--out={path}"])
  made = tasks.examples(tasks.make("mix", worked=True), "train", 40)
  task = tasks.make(str(path))
  assert list(task.rows) == made
  assert task.split("train") == made
  assert task.split("test") == []
  assert {task.example(3, i) for i in range(40)} == set(made)
  assert task.example(3, 0) == task.example(3, 0)
  for example in made:
    assert task.score(example, example.response) == 1
    assert task.score(example, example.rejected) < 1
  program.main(["--task=add", "--option", "worked=True", "--n=2"])
  lines = capsys.readouterr().out.splitlines()
  assert [set(json.loads(line)) for line in lines] == [
    {f.name for f in dataclasses.fields(tasks.Example)}
  ] * 2


def test_files_and_skills_mix(tmp_path):
  """Each example is judged by the task it is of."""
  path = written(tmp_path / "own.jsonl", [{"prompt": "a", "response": "b"}])
  mix = tasks.make(f"add,{path}", levels=1)
  found = [mix.example(0, i) for i in range(20)]
  assert {e.skill for e in found} == {"add", "own"}
  assert all(mix.score(e, e.response) == 1 for e in found)


def test_parquet_and_gzip(tmp_path):
  """The same rows in other clothes."""
  import pyarrow
  import pyarrow.parquet

  rows = [
    {"messages": [USER, RIGHT], "rejected": "5", "answer": None},
    {"messages": [SYSTEM, USER, RIGHT], "rejected": "6", "answer": "46"},
  ]
  path = written(tmp_path / "a.jsonl", rows)
  with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
    file.write(path.read_bytes())
  table = pyarrow.Table.from_pylist(rows)
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  found = tasks.read(path)
  assert tasks.read(tmp_path / "a.jsonl.gz").rows == found.rows
  assert tasks.read(tmp_path / "a.parquet").rows == found.rows
  (tmp_path / "b.parquet").write_bytes(b"no table")
  with pytest.raises(UserError, match=r"cannot read .* as parquet"):
    tasks.read(tmp_path / "b.parquet")


def test_useless_rows_are_counted_and_told(tmp_path, capsys):
  """Left out, never in silence; a file of nothing else is an error."""
  good = {"prompt": "a", "chosen": "b", "rejected": "c"}
  equal = good | {"rejected": "b"}
  empty = {"prompt": "a", "response": " "}
  path = written(tmp_path / "a.jsonl", [good, equal, equal, empty, good])
  task = tasks.read(path)
  assert len(task.rows) == 2
  assert task.skipped == (("equal sides", 2), ("an empty response", 1))
  told = capsys.readouterr().err
  assert "left out 3 of the 5 examples" in told
  assert "2 with equal sides, 1 with an empty response" in told
  with pytest.raises(UserError, match="no example: 1 with equal sides"):
    tasks.read(written(tmp_path / "b.jsonl", [equal]))
  with pytest.raises(UserError, match=r"b\.jsonl holds no example$"):
    tasks.read(written(tmp_path / "b.jsonl", []))


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "line 2 is not JSON"),
    ("[]", "line 2: write an object"),
    ('{"prompt": "a"}', "line 2: there is no response .* fields prompt"),
    ("{}", r"line 2: there is no prompt .* fields \(none\)"),
    ('{"prompt": 3, "response": "b"}', "line 2: prompt=3 is not a text"),
    ('{"prompt": "a", "response": "b", "rejected": 1}', "rejected=1"),
    ('{"prompt": "a", "response": "b", "level": "x"}', "level='x'"),
    (r'{"prompt": "\ud83d", "response": "b"}', "half a surrogate pair"),
    ('{"messages": []}', "messages should be a list"),
    ('{"messages": [{"role": "user"}]}', "messages should be a list"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "has to be the assi"),
    (
      json.dumps({"chosen": [USER, RIGHT], "rejected": [SYSTEM, WRONG]}),
      "differ before their last message",
    ),
  ],
)
def test_what_cannot_be_understood(tmp_path, line, message):
  """An error that names the line and what was expected."""
  path = tmp_path / "a.jsonl"
  path.write_text('{"prompt": "a", "response": "b"}\n' + line, "utf-8")
  with pytest.raises(UserError, match=message):
    tasks.read(path)


def test_files_that_are_none(tmp_path):
  """A missing one, one of another kind, an unwritable one."""
  with pytest.raises(UserError, match=r"cannot read .* No such file"):
    tasks.make(str(tmp_path / "no.jsonl"))
  with pytest.raises(UserError, match="of no known kind"):
    tasks.read(tmp_path / "a.csv")
  with pytest.raises(UserError, match="cannot write"):
    program.main(["--task=add", f"--out={tmp_path / 'no' / 'a.jsonl'}"])
  with pytest.raises(UserError, match="write a name and a value"):
    program.main(["--task=add", "--option=worked"])


def test_conversations_are_told_apart():
  """A lone system message is no question."""
  assert conversation([USER]) == "12+34="
  assert conversation([SYSTEM]) == "System: Add.\nAssistant: "


# --- reasoning-gym ------------------------------------------------------------


def test_gym_says_what_it_needs(monkeypatch):
  """Without the library, the extra is named."""
  monkeypatch.setitem(sys.modules, "reasoning_gym", None)
  tasks.names.gym._entries.cache_clear()
  with pytest.raises(UserError, match=r"jaxlm\[reasoning-gym\]"):
    tasks.make("gym:chain_sum")


def test_gym_generates():
  """Gold 1, rejected less, the same again; a wrong name or option is told."""
  pytest.importorskip("reasoning_gym")
  task = tasks.make("gym:chain_sum", max_terms=2, max_digits=2)
  for i in range(30):
    example = task.example(4, i)
    assert task.score(example, example.response) == 1
    assert task.score(example, f" {example.response}\n") == 1
    assert task.score(example, example.rejected) < 1
    assert 0 <= task.score(example, "\x00[") <= 1
    assert example == task.example(4, i)
  assert len(tasks.examples(tasks.make("add,gym:gcd"), "test", 20)) == 20
  with pytest.raises(UserError, match="no generator 'chain'"):
    tasks.make("gym:chain")
  with pytest.raises(UserError, match="max_term"):
    tasks.make("gym:chain_sum", max_term=2)
