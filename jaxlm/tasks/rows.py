"""Users' own examples, from JSON lines or parquet.

    {"prompt": "12+34=", "response": "46"}
    {"prompt": "12+34=", "chosen": "46", "rejected": "56"}
    {"messages": [{"role": "user", "content": "12+34="}, ...]}
    {"chosen": [messages], "rejected": [messages]}

A response may also be called `completion`, `output` or `answer`, a prompt
`question` or `instruction` (with `input`); what has other names is passed over.
A conversation ends with what is to be learned, and what stands before that is
the prompt. What nothing can be learned from (an empty response, a preference
between equal sides) is left out, counted and told; what cannot be understood
is an error with its line.
"""

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from jaxlm import files
from jaxlm.errors import UserError
from jaxlm.tasks import gym, task
from jaxlm.tasks.skills import SKILLS
from jaxlm.tasks.task import Draw, Example

KINDS = (".jsonl", ".ndjson", ".parquet")
PROMPTS = ("prompt", "question", "instruction")
RESPONSES = ("response", "chosen", "completion", "output", "answer")

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Listed:
  """A task whose examples are given, one by one.

  Attributes:
    name: what it is called.
    rows: the examples. Where nothing wrong is known, `rejected` is empty.
    skipped: what was left out: reasons and how many examples each.
  """

  name: str
  rows: tuple[Example, ...]
  skipped: tuple[tuple[str, int], ...] = ()

  @property
  def levels(self) -> tuple[int, ...]:
    """Those that occur."""
    return tuple(sorted({row.level for row in self.rows}))

  @property
  def skills(self) -> tuple[str, ...]:
    """Those that occur."""
    return tuple(dict.fromkeys(row.skill for row in self.rows))

  def split(self, split: str) -> list[Example]:
    """All that belong to 'train' or to 'test', by the hash of the prompt."""
    return [row for row in self.rows if task.split_of(row.prompt) == split]

  def example(self, seed: int, index: int) -> Example:
    """As `Task.example`: each once, in an order of the seed, then again."""
    n = len(self.rows)
    draw = Draw("rows", seed, index // n)
    start, stride = draw.below(n), 1 + draw.below(n)
    while gcd(stride, n) > 1:
      stride += 1
    return self.rows[(start + index % n * stride) % n]

  def score(self, example: Example, response: str) -> float:
    """As the skill judges, if it is one of ours; else 1 for the very answer."""
    if example.skill.startswith(gym.PREFIX):
      return gym.score(example, response)
    if example.skill in SKILLS:
      return SKILLS[example.skill]().score(example.answer, response)
    return task.last(example.answer, response)


def conversation(messages: Messages) -> str:
  r"""Messages as a text that an answer follows; a lone question is itself.

  >>> conversation([{"role": "user", "content": "Hi"}])
  'Hi'
  >>> conversation([{"role": r, "content": "."} for r in ("system", "user")])
  'System: .\nUser: .\nAssistant: '
  """
  if len(messages) == 1 and messages[0]["role"] == "user":
    return messages[0]["content"]
  lines = [f"{m['role'].capitalize()}: {m['content']}\n" for m in messages]
  return "".join(lines) + "Assistant: "


# --- Reading ----------------------------------------------------------------


def read(
  path: str | Path, render: Callable[[Messages], str] = conversation
) -> Listed:
  """The examples of a file.

  Args:
    path: of JSON lines (also .gz) or parquet.
    render: writes the messages before an answer as a prompt, for example
      `jaxlm.data.chat.ChatTemplate(...).render`.

  Raises:
    UserError: if it cannot be read, a row is no example, or none is usable.
  """
  path = Path(path).expanduser()
  found, skipped = [], Counter()
  for where, row in _rows(path):
    try:
      found.append(_example(row, path, render))
    except _UselessError as reason:
      skipped[str(reason)] += 1
    except UserError as error:
      raise UserError(f"{where}: {error}") from None
  told = ", ".join(f"{n:,} with {reason}" for reason, n in skipped.items())
  if not found:
    raise UserError(f"{path} holds no example{f': {told}' if told else ''}")
  if skipped:
    total = len(found) + skipped.total()
    print(
      f"warning: left out {skipped.total():,} of the {total:,} examples in "
      f"{path}: {told}",
      file=sys.stderr,
    )
  return Listed(path.stem, tuple(found), tuple(skipped.items()))


class _UselessError(Exception):
  """Nothing can be learned from a row; says why."""


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Where each row stands, and its fields that are not null."""
  kind = (Path(path.stem) if path.suffix == ".gz" else path).suffix
  if kind not in KINDS:
    raise UserError(f"{path} is of no known kind: {', '.join(KINDS)}")
  try:
    rows = _parquet(path) if kind == ".parquet" else _json_lines(path)
    for where, row in rows:
      yield where, {k: v for k, v in row.items() if v is not None}
  except (OSError, EOFError) as error:
    why = files.reason(error)
    raise UserError(f"cannot read the examples in {path}: {why}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  opener = gzip.open if path.suffix == ".gz" else open
  with opener(path, "rb") as file:
    for number, line in enumerate(file, 1):
      where = f"{path} line {number}"
      try:
        row = json.loads(line) if line.strip() else None
      except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
      if row is not None and not isinstance(row, dict):
        raise UserError(f'{where}: write an object, as in {{"prompt": "..."}}')
      if row is not None:
        yield where, row


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(
      "reading parquet needs pyarrow: pip install 'jaxlm[parquet]'"
    ) from error
  try:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
      for row in batch.to_pylist():
        yield f"{path} row {number}", row
        number += 1
  except pyarrow.ArrowException as error:
    raise UserError(f"cannot read {path} as parquet: {error}") from error


# --- One row ----------------------------------------------------------------


def _example(
  row: dict[str, Any], path: Path, render: Callable[[Messages], str]
) -> Example:
  """What a row says; raises _UselessError for what teaches nothing."""
  if "messages" in row:
    before, response = _turn(row["messages"], "messages")
    prompt, rejected = render(before), row.get("rejected", "")
  elif isinstance(row.get("chosen"), list):
    prompt, response, rejected = _chats(row, render)
  else:
    prompt, response = _prompt(row, render), _text(row, RESPONSES)
    rejected = row.get("rejected", "")
  if not isinstance(rejected, str):
    raise UserError(f"rejected={rejected!r} is not a text, as the response is")
  level = row.get("level", 1)
  if not isinstance(level, int) or level < 1:
    raise UserError(f"level={level!r} is no whole number from 1")
  if not response.strip():
    raise _UselessError("an empty response")
  if not prompt:
    raise _UselessError("an empty prompt")
  if response == rejected:
    raise _UselessError("equal sides")
  if "rejected" in row and not rejected.strip():
    raise _UselessError("an empty rejected side")
  if _halves(prompt + response + rejected):
    raise UserError("half a surrogate pair (\\ud800 to \\udfff) is no text")
  answer = str(row.get("answer", response))
  skill = str(row.get("skill", path.name.split(".")[0]))
  return Example(prompt, response, rejected, answer, skill, level)


def _halves(text: str) -> bool:
  """Whether a text has characters that only pairs of UTF-16 are made of."""
  return any("\ud800" <= c <= "\udfff" for c in text)


def _prompt(row: dict[str, Any], render: Callable[[Messages], str]) -> str:
  if isinstance(row.get("prompt"), list):
    return render(_checked(row["prompt"], "prompt"))
  prompt = _text(row, PROMPTS)
  more = row.get("input", "") if "prompt" not in row else ""
  return f"{prompt}\n{more}" if more else prompt


def _text(row: dict[str, Any], names: Sequence[str]) -> str:
  """The first of some fields that there is."""
  name = next((n for n in names if n in row), None)
  if name is None:
    raise UserError(
      f"there is no {names[0]} (or {', '.join(names[1:])}) among the fields "
      f"{', '.join(row) or '(none)'}"
    )
  if not isinstance(row[name], str):
    raise UserError(f"{name}={row[name]!r} is not a text")
  return row[name]


def _chats(
  row: dict[str, Any], render: Callable[[Messages], str]
) -> tuple[str, str, str]:
  """Prompt and both sides of a preference between conversations."""
  sides = {}
  for name in ("chosen", "rejected"):
    before, last = _turn(row.get(name), name)
    sides[name] = ([dict(m) for m in before], last)
  (before, response), (other, rejected) = sides["chosen"], sides["rejected"]
  if before != other:
    raise UserError(
      "chosen and rejected differ before their last message, so they do not "
      "answer the same question"
    )
  stated = row.get("prompt")
  if isinstance(stated, list) and [dict(m) for m in stated] != before:
    before = [*_checked(stated, "prompt"), *before]
  elif isinstance(stated, str) and not before:
    return stated, response, rejected
  return render(before) if before else "", response, rejected


def _turn(messages: Any, name: str) -> tuple[Messages, str]:
  """The messages before the last one, and what that says."""
  messages = _checked(messages, name)
  if messages[-1]["role"] != "assistant":
    raise UserError(
      f"{name} end with a message of {messages[-1]['role']!r}; the last one "
      "has to be the assistant's, which is learned"
    )
  return messages[:-1], messages[-1]["content"]


def _checked(messages: Any, name: str) -> Messages:
  fine = isinstance(messages, list) and messages
  if not fine or not all(
    isinstance(m, dict)
    and isinstance(m.get("role"), str)
    and isinstance(m.get("content"), str)
    for m in messages
  ):
    raise UserError(
      f'{name} should be a list of objects with "role" and "content"'
    )
  return messages
