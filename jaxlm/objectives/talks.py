"""Conversations from files of a user, or from a task that makes them.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", ..
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", ...
    {"prompt": "12+34=", "response": "46"}
    {"instruction": "Add.", "input": "12, 34", "output": "46"}

The fields of the last two kinds may have the other names that `jaxlm.tasks`
knows, and a `system` message beside them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import tasks
from jaxlm.data import sources
from jaxlm.data.chat import ROLES
from jaxlm.data.dataset import held_out
from jaxlm.errors import UserError
from jaxlm.tasks.rows import PROMPTS, RESPONSES

Talk = list[dict[str, str]]  # messages: "role" and "content"

TASK = "task:"
_SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant"}


def talks(
  path: str | Sequence[str] | None, examples: int, val_fraction: float
) -> tuple[list[Talk], list[Talk], dict[str, int]]:
  """Conversations for training and for validation, and what was left out.

  Args:
    path: files, folders or patterns of JSON lines, parquet or Arrow; or
      'task:NAME', with options as in 'task:add?levels=1-2&worked=true'.
    examples: how many a task makes for training.
    val_fraction: the share that is held out; of a task, so many more of its
      test split.

  Returns:
    Two lists, and reasons with the number of conversations each.

  Raises:
    UserError: for a path, a file, a line or a task that is wrong, or if no
      conversation is left.
  """
  if not path:
    raise UserError(
      "fine-tuning needs conversations; set config.data.path to a file of "
      "them, or to a task that makes them, as in --config.data.path=task:add"
    )
  if isinstance(path, str) and path.startswith(TASK):
    return (*_made(path.removeprefix(TASK), examples, val_fraction), {})
  found, skipped = [], Counter()
  for where, record in sources.records(paths(path)):
    talk = _blamed(where, record)
    reason = useless(talk)
    skipped[reason] += 1 if reason else 0
    if not reason:
      found.append(talk)
  skipped = {reason: n for reason, n in skipped.items() if n}
  if not found:
    told = ", ".join(f"{n:,} with {reason}" for reason, n in skipped.items())
    raise UserError(
      f"{path} has no example to learn from: {told or 'it is empty'}"
    )
  sizes = np.array([sum(len(m["content"]) for m in talk) for talk in found])
  held = held_out(sizes, val_fraction if len(found) > 1 else 0.0)
  train = [talk for talk, out in zip(found, held, strict=True) if not out]
  val = [talk for talk, out in zip(found, held, strict=True) if out]
  return train, val, skipped


def paths(path: str | Sequence[str]) -> str | list[str]:
  """'a.jsonl,b.jsonl' is two paths."""
  if isinstance(path, str) and "," in path:
    return [part.strip() for part in path.split(",")]
  return path


# --- Tasks ------------------------------------------------------------------


def _made(
  name: str, examples: int, val_fraction: float
) -> tuple[list[Talk], list[Talk]]:
  """What a task makes: its training split, and its test split to validate."""
  task = named_task(name)
  held = round(examples * val_fraction)
  train, val = (
    [asked(e.prompt, e.response) for e in tasks.examples(task, split, n)]
    for split, n in (("train", examples), ("test", held))
  )
  return train, val


def named_task(name: str) -> tasks.Task:
  """The task of a name with options behind it, 'add?levels=1-2&worked=true'.

  Raises:
    UserError: as `jaxlm.tasks.make`, or for options that do not read.
  """
  name, _, rest = name.removeprefix(TASK).partition("?")
  options = {}
  for part in filter(None, rest.split("&")):
    key, equals, value = part.partition("=")
    if not equals:
      raise UserError(
        f"the task option {part!r} has no value; write task:{name}?{part}=VALUE"
      )
    words = {"true": True, "false": False}
    number = int(value) if value.isdigit() else value
    options[key] = words.get(value.lower(), number)
  return tasks.make(name, **options)


def asked(prompt: str, response: str, system: str = "") -> Talk:
  """The conversation of one question and its answer."""
  first = [{"role": "system", "content": system}] if system else []
  return [
    *first,
    {"role": "user", "content": prompt},
    {"role": "assistant", "content": response},
  ]


# --- One record -------------------------------------------------------------


def _blamed(where: str, record: Mapping[str, Any]) -> Talk:
  try:
    return talk_of({k: v for k, v in record.items() if v is not None})
  except UserError as error:
    raise UserError(f"{where}: {error}") from None


def talk_of(record: Mapping[str, Any]) -> Talk:
  """The messages that a record says, in one of the forms above.

  Raises:
    UserError: if it has none of them, or something else in their place.
  """
  for name in ("messages", "conversations"):
    if name in record:
      return _messages(record[name], name)
  prompt, response = (_field(record, names) for names in (PROMPTS, RESPONSES))
  if isinstance(response, list):
    return _messages(response, "the response")
  if not isinstance(response, str):
    raise UserError(f"the response {response!r} is not a text")
  if isinstance(prompt, list):
    answer = {"role": "assistant", "content": response}
    return [*_messages(prompt, "the prompt"), answer]
  if not isinstance(prompt, str):
    raise UserError(f"the prompt {prompt!r} is not a text")
  more = record.get("input", "") if "prompt" not in record else ""
  prompt = f"{prompt}\n{more}" if more else prompt
  return asked(prompt, response, record.get("system", ""))


def _field(record: Mapping[str, Any], names: Sequence[str]) -> Any:
  """The first of some fields that there is."""
  name = next((name for name in names if name in record), None)
  if name is None:
    raise UserError(
      f"there are no messages, and no {names[0]} (or {', '.join(names[1:])}), "
      f"among the fields {', '.join(record) or '(none)'}"
    )
  return record[name]


def _messages(given: Any, name: str) -> Talk:
  """Messages with our names for roles; UserError if they are something else."""
  if not isinstance(given, list) or not given:
    raise UserError(f"{name} is no list of messages")
  return [_message(message, name) for message in given]


def _message(message: Any, name: str) -> dict[str, str]:
  fields = message if isinstance(message, dict) else {}
  role = fields.get("role", fields.get("from"))
  role = _SPEAKERS.get(role, role)
  content = fields.get("content", fields.get("value"))
  if role not in ROLES or not isinstance(content, str):
    raise UserError(
      f"{message!r} in {name} is no message; write "
      '{"role": ROLE, "content": TEXT} with a ROLE of ' + ", ".join(ROLES)
    )
  return {"role": role, "content": content}


def useless(talk: Talk) -> str:
  """Why nothing can be learned from a conversation; '' if something can."""
  said = [m["content"] for m in talk if m["role"] == "assistant"]
  if not said:
    return "no response"
  if not all(text.strip() for text in said):
    return "an empty response"
  if not any(m["content"].strip() for m in talk[: _first_answer(talk)]):
    return "an empty prompt"
  return ""


def _first_answer(talk: Talk) -> int:
  return next(i for i, m in enumerate(talk) if m["role"] == "assistant")
