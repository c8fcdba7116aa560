"""Tasks: what is right scores 1, what is wrong less, and nothing leaks."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import tasks
from jaxlm.errors import UserError

MADE = {
  f"{name} {worked}": tasks.make(name, levels=levels, worked=worked)
  if name in ("add", "subtract", "multiply", "story")
  else tasks.make(name, levels=levels)
  for name in tasks.SKILLS
  for worked in (False, True)
  for levels in ((1, 2, 3, 8),)
}
ANY = st.sampled_from([*MADE.values(), tasks.make("mix", worked=True)])
NUMBER = st.integers(0, 2**40)


@given(ANY, NUMBER, NUMBER)
def test_gold_is_right_and_rejected_is_not(task, seed, index):
  """On every skill and level; and an example follows from its numbers."""
  example = task.example(seed, index)
  assert task.score(example, example.response) == 1
  assert task.score(example, example.rejected) < 1
  assert example.rejected != example.response
  assert example.rejected.strip()
  assert example.level in task.levels
  assert example.prompt.isascii()
  assert example.response.isascii()
  assert example == task.example(seed, index)


@given(
  ANY, NUMBER, st.text() | st.sampled_from(["[" * 10**5, "#", "-0", "1e9"])
)
def test_any_text_can_be_scored(task, index, text):
  """Models write anything; it costs no traceback."""
  assert 0 <= task.score(task.example(0, index), text) <= 1


@pytest.mark.parametrize("name", ["add", "subtract", "multiply"])
@given(index=NUMBER)
def test_every_step_of_a_sum_is_true(name, index):
  """Worked responses are judged by Python; the last step names the answer."""
  task = tasks.make(name, levels=(1, 2, 5), worked=True)
  example = task.example(1, index)
  *steps, result = example.response.split(",")
  for step in steps:
    left, right = step.split("=")
    assert eval(left) == int(right)
  assert result == f"#{eval(example.prompt[:-1])}" == f"#{example.answer}"


@given(index=NUMBER)
def test_stories_add_up(index):
  """The sums of a worked story lead from its first number to its answer."""
  example = tasks.make("story", levels=4, worked=True).example(2, index)
  *steps, result = example.response.split(",")
  assert all(eval(s.replace("=", "==")) for s in steps)
  assert len(steps) == 4
  assert result == f"#{example.answer}"
  numbers = [w.strip(".,") for w in example.prompt.split()]
  numbers = [w for w in numbers if w.isdigit()]
  assert steps[0].split("=")[0].replace("-", "+").split("+") == numbers[:2]


def test_edits_recall_and_forms_say_what_is_true():
  """Closed forms of the answers, from the prompts alone."""
  makers = {
    "copy": lambda text: text,
    "reverse": lambda text: text[::-1],
    "sort": lambda text: "".join(sorted(text)),
    "count": lambda text: str(text[2:].count(text[0])),
    "upper": lambda text: text.upper(),
    "list": lambda text: "- " + text.replace(" ", "\n- "),
    "json": lambda text: json.dumps(text.split()),
  }
  for name, make in makers.items():
    for i in range(50):
      example = tasks.make(name).example(0, i)
      text = example.prompt.split(" ", 1)[1].removesuffix("=")
      assert make(text) == example.response
  for i in range(50):
    example = tasks.make("recall", levels=5).example(0, i)
    *said, key = example.prompt.removesuffix("?").split()
    assert dict(s.split("=") for s in said)[key] == example.response


def test_scorers_read_what_is_asked_and_no_more():
  """Blanks, steps and the style of a list are free; the content is not."""
  add = tasks.make("add", digits=2)
  example = dataclasses.replace(add.example(0, 0), answer="46")
  assert add.score(example, " 46\n") == 1
  assert add.score(example, "2+4=6,#46") == 1
  assert add.score(example, "46.") == add.score(example, "") == 0
  form = tasks.make("json")
  example = dataclasses.replace(form.example(0, 0), answer='["fig", "oat"]')
  assert form.score(example, '[ "fig","oat" ]') == 1
  assert form.score(example, "fig oat") == 0
  form = tasks.make("list")
  example = dataclasses.replace(form.example(0, 0), answer="- fig\n- oat")
  assert form.score(example, "* fig\n* oat\n") == 1
  assert form.score(example, "fig\noat") == 0


# --- Splits -------------------------------------------------------------------


def test_splits_share_no_prompt():
  """Whatever the seeds; and one prompt in five is a test's."""
  task = tasks.make("mix")
  train = {e.prompt for e in tasks.examples(task, "train", 3000, seed=0)}
  test = {e.prompt for e in tasks.examples(task, "test", 600, seed=9)}
  assert len(train) == 3000
  assert len(test) == 600
  assert not train & test
  assert {tasks.split_of(p) for p in test} == {"test"}
  seen = [tasks.split_of(f"{i}+1=") for i in range(4000)]
  assert abs(seen.count("test") / 4000 - 0.2) < 0.02


def test_examples_are_the_same_for_ever():
  """A change of these is a change of every published figure."""
  mix = tasks.make("mix", worked=True)
  found = tasks.examples(mix, "test", 3)
  assert [(e.prompt, e.response) for e in found] == [
    ("85+79=", "5+9=14,8+7+1=16,#164"),
    ("v=28 u=89 u?", "89"),
    ("json: bat fern=", '["bat", "fern"]'),
  ]


def test_a_task_that_is_used_up_says_so():
  """One-digit sums are a hundred."""
  task = tasks.make("add", digits=1)
  sizes = [100 - 18, 18]
  for split, size in zip(("train", "test"), sizes, strict=True):
    assert len(tasks.examples(task, split, size)) == size
    with pytest.raises(UserError, match=f"only about {size} on levels"):
      tasks.examples(task, split, size + 1)
  with pytest.raises(UserError, match="'train' and 'test'"):
    tasks.examples(task, "valid", 1)
  with pytest.raises(UserError, match="ask for 0 or more"):
    tasks.examples(task, "train", -1)


# --- Names --------------------------------------------------------------------


def test_names_join_and_options_reach_those_that_take_them():
  """A mix of a worked and of a bare skill; groups are names too."""
  mix = tasks.make("add,copy", worked=True, levels="1-2")
  assert mix.name == "add,copy"
  assert mix.levels == (1, 2)
  found = {mix.example(0, i).skill for i in range(20)}
  assert found == {"add", "copy"}
  assert tasks.make("edits").name == "copy,reverse,sort,count"
  assert tasks.make("mix,add").name == ",".join(tasks.SKILLS)
  assert tasks.make("add", levels="1,3") == tasks.make("add", levels=(1, 3))
  assert hash(mix) == hash(tasks.make("add,copy", worked=True, levels=(1, 2)))


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("ad", {}, "did you mean 'add'.*There are add, subtract"),
    ("add", {"steps": 1}, "takes no steps; it takes levels, worked"),
    ("copy", {"worked": True}, "takes no worked; it takes levels"),
    ("add", {"levels": 0}, "whole numbers from 1"),
    ("add", {"levels": ()}, "whole numbers from 1"),
    ("add", {"levels": "a"}, "whole numbers from 1"),
    ("add", {"levels": 1.5}, "whole numbers from 1"),
    ("add", {"levels": "3-1"}, "whole numbers from 1"),
    ("add", {"levels": 99}, "levels 1 to 15, not 99"),
    ("add", {"levels": 1, "digits": 1}, "same thing"),
  ],
)
def test_wrong_names_and_options(name, options, message):
  """Each says what there is."""
  with pytest.raises(UserError, match=message):
    tasks.make(name, **options)
