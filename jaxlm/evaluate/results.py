"""Responses beside what was expected: what everything is counted from."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from jaxlm import files
from jaxlm.errors import UserError
from jaxlm.tasks import Example, Task

_FIELDS = tuple(f.name for f in fields(Example))


@dataclass(frozen=True)
class Record:
  """One example and the responses to it.

  Attributes:
    example: what was asked, and what is right.
    texts: the responses, one or several samples.
    scores: what the task says of each, from 0 to 1.
    finished: whether each came to an end by itself; empty if nobody knows.
  """

  example: Example
  texts: tuple[str, ...]
  scores: tuple[float, ...]
  finished: tuple[bool, ...] = ()

  @property
  def right(self) -> bool:
    """Whether the first response is right."""
    return self.scores[0] >= 1


def scored(
  task: Task,
  examples: Sequence[Example],
  texts: Sequence[Sequence[str]],
  finished: Sequence[Sequence[bool]] | None = None,
) -> list[Record]:
  """Records of responses, several to each example."""
  ended = [()] * len(examples) if finished is None else finished
  return [
    Record(e, tuple(t), tuple(task.score(e, one) for one in t), tuple(f))
    for e, t, f in zip(examples, texts, ended, strict=True)
  ]


# --- Responses in files -------------------------------------------------------


def read_responses(path: str | Path) -> dict[str, list[tuple[str, Any]]]:
  """Texts and how they ended, by prompt, from JSON lines.

  A line has "prompt" and "text", as `jaxlm.generate --prompts --out` writes
  them, perhaps with "finish_reason", or "texts" for several.

  Raises:
    UserError: if the file cannot be read, or a line is none of these.
  """
  found: dict[str, list[tuple[str, Any]]] = {}
  for where, said in _lines(Path(path)):
    prompt = said.get("prompt")
    texts = said.get("texts", [said.get("text")])
    if "error" in said:
      texts = [""]
    fine = isinstance(texts, list) and texts
    if not isinstance(prompt, str) or not fine or not _all(texts, str):
      raise UserError(f'{where}: a line needs "prompt" and "text" (or "texts")')
    reason = said.get("finish_reason")
    found.setdefault(prompt, []).extend((text, reason) for text in texts)
  if not found:
    raise UserError(f"there are no responses in {path}")
  return found


def joined(
  task: Task,
  examples: Sequence[Example],
  responses: dict[str, list[tuple[str, Any]]],
  path: str | Path,
) -> list[Record]:
  """Records of the examples whose prompt has been responded to.

  Raises:
    UserError: if there are none.
  """
  known = [e for e in examples if e.prompt in responses]
  if not known:
    raise UserError(
      f"{path} responds to none of the {len(examples):,} prompts of the task "
      f"{task.name!r}; the prompts have to be the same, letter by letter"
    )
  texts = [[text for text, _ in responses[e.prompt]] for e in known]
  reasons = [[why for _, why in responses[e.prompt]] for e in known]
  told = all(why is not None for whys in reasons for why in whys)
  ended = [[why == "stop" for why in whys] for whys in reasons]
  return scored(task, known, texts, ended if told else None)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  for i, line in enumerate(_content(path).split("\n"), 1):
    if line.strip():
      said = _json(line, f"{path} line {i}")
      if not isinstance(said, dict):
        raise UserError(f'{path} line {i}: write an object, {{"prompt": ...}}')
      yield f"{path} line {i}", said


def _content(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    why = getattr(error, "strerror", None) or "it is not UTF-8"
    raise UserError(f"cannot read {path}: {why}") from error


def _json(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:
    raise UserError(f"{where} is not JSON: {error}") from error


# --- Results in files ---------------------------------------------------------


def to_json(about: dict[str, Any], records: Sequence[Record]) -> str:
  """Results as JSON: what they are about, and every record."""
  rows = [
    asdict(r.example)
    | {"texts": r.texts, "scores": r.scores, "finished": r.finished}
    for r in records
  ]
  return json.dumps(_finite(about | {"examples": rows}), ensure_ascii=False)


def write(path: str | Path, text: str) -> None:
  """Writes a file at once or not at all.

  Raises:
    UserError: if it cannot be written.
  """
  try:
    files.replace(Path(path), text)
  except OSError as error:
    why = files.reason(error)
    raise UserError(f"cannot write {path}: {why}") from error


def read_results(path: str | Path) -> tuple[dict[str, Any], list[Record]]:
  """What `to_json` wrote.

  Raises:
    UserError: if the file cannot be read, or holds no results.
  """
  said = _json(_content(Path(path)), str(path))
  rows = said.pop("examples", None) if isinstance(said, dict) else None
  try:
    records = [_record(row) for row in rows]
  except (AttributeError, KeyError, TypeError, ValueError):
    records = []
  if not records:
    raise UserError(
      f"{path} holds no results; python -m jaxlm.evaluate --out writes them"
    )
  return said, records


def _record(row: dict[str, Any]) -> Record:
  example = Example(**{name: row[name] for name in _FIELDS})
  texts, scores = tuple(row["texts"]), tuple(map(float, row["scores"]))
  ended = tuple(map(bool, row["finished"]))
  if not texts or len(scores) != len(texts) or not _all(texts, str):
    raise ValueError(row)
  if not _all([*row.values()][:4], str) or len(ended) not in (0, len(texts)):
    raise ValueError(row)
  return Record(replace(example, level=int(row["level"])), texts, scores, ended)


def _all(items: Sequence[Any], kind: type) -> bool:
  return all(isinstance(item, kind) for item in items)


def _finite(x: Any) -> Any:
  """The same with null for what is no number, which JSON has not."""
  if isinstance(x, dict):
    return {k: _finite(v) for k, v in x.items()}
  if isinstance(x, list | tuple):
    return [_finite(v) for v in x]
  return None if isinstance(x, float) and not math.isfinite(x) else x
