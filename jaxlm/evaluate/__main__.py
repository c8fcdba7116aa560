"""Says how right a model is: on a task, beside another, on a text.

    python -m jaxlm.evaluate --workdir=runs/sft --task=add --n=200
    python -m jaxlm.evaluate --workdir=runs/rl --before=runs/sft --task=add
    python -m jaxlm.evaluate --model=FILE.gguf --text=book.txt

What responds is a model (--workdir or --model), or it is a file: --responses
has texts that somebody made, --results what --out has written. Every flag of
jaxlm.generate that says how texts are made may be added; without one, a single
response is the likeliest. docs/evaluation.md has all flags with examples.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm import program, tasks
from jaxlm.data.chat import TEMPLATES, ChatTemplate
from jaxlm.errors import UserError
from jaxlm.evaluate import browser, compare, harness, likelihood, measure, show
from jaxlm.evaluate import results as files
from jaxlm.evaluate.respond import respond, room
from jaxlm.evaluate.results import Record
from jaxlm.generate import __main__ as generate
from jaxlm.generate.text import Writer
from jaxlm.interop.load import is_ours
from jaxlm.interop.pretrained import Pretrained
from jaxlm.tasks import Example, Task
from jaxlm.tasks.__main__ import add_options, options

N = 200  # examples, unless another number is asked for


def parser() -> argparse.ArgumentParser:
  """The flags; those that say how texts are made are of jaxlm.generate."""
  flags = program.Parser(
    prog="python -m jaxlm.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = flags.add_argument
  add("--workdir", metavar="DIR", help="what responds: a run of ours,")
  add("--model", metavar="PATH", help="a .gguf file, a model's directory,")
  add("--responses", metavar="FILE", help="texts: JSON lines,")
  add("--results", metavar="FILE", help="or what --out wrote")
  add("--before", metavar="PATH", help="the same, to be compared with")
  add("--task", metavar="NAME", help="a name as python -m jaxlm.tasks has it")
  add_options(flags)
  add("--n", type=int, metavar="N", help=f"examples; default: {N}, or a file's")
  add("--split", metavar="NAME", help="train or test; default: test")
  add("--task_seed", type=int, default=0, metavar="N", help="of the examples")
  add("--metrics", metavar="A,B", help="only these; default: all there are")
  add("--times", type=int, default=1000, help="resamples for the intervals")
  add("--out", metavar="FILE", help="everything as JSON")
  add("--html", metavar="FILE", help="the failures, to be looked at")
  add("--text", metavar="FILE", help="perplexity of a text, instead of a task")
  add("--harness", metavar="A,B", help="tasks of lm-evaluation-harness instead")
  add("--include_path", metavar="DIR", help="where more of its tasks are")
  add("--shots", type=int, metavar="N", help="of a harness task; default: its")
  return flags


def main(argv: Sequence[str]) -> None:
  """Runs the program.

  Raises:
    UserError: for wrong or contradictory flags, a model, task or file that
      cannot be used, or responses to other prompts.
  """
  flags, rest = parser().parse_known_args(list(argv))
  check(flags)
  if flags.text is not None:
    judge_text(flags, rest)
  elif flags.harness is not None:
    run_harness(flags, rest)
  else:
    evaluate(flags, rest)


def check(flags: argparse.Namespace) -> None:
  """Raises UserError for flags that do not go together."""
  sources = ("workdir", "model", "responses", "results")
  given = [name for name in sources if getattr(flags, name) is not None]
  if len(given) != 1:
    raise UserError(
      "name one that responds: --workdir=DIR, --model=PATH, --responses=FILE "
      f"or --results=FILE; not {' and '.join(given) or 'none'}"
    )
  kinds = [k for k in ("task", "text", "harness") if getattr(flags, k)]
  if len(kinds) > 1:
    raise UserError(f"--{kinds[0]} and --{kinds[1]} are different questions")
  if kinds and kinds[0] != "task" and given[0] not in ("workdir", "model"):
    raise UserError(f"--{kinds[0]} needs a model: --workdir or --model")
  if not kinds and flags.results is None:
    raise UserError("name what is asked: --task=NAME, --text=FILE or --harness")
  for name in ("n", "times"):
    value = getattr(flags, name)
    if value is not None and value < 1:
      raise UserError(f"--{name}={value}: use 1 or more")


# --- A task -----------------------------------------------------------------


def evaluate(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  """Responses to a task: how right they are, and beside others."""
  task, examples = asked(flags)
  kind, path = next(
    (name, getattr(flags, name))
    for name in ("workdir", "model", "responses", "results")
    if getattr(flags, name) is not None
  )
  records = records_of(kind, path, rest, task, examples)
  before = None
  if flags.before is not None:
    before = records_of(_kind(flags.before), flags.before, rest, task, examples)
    total = len(records)
    before, records = compare.pairs(before, records)
    if len(records) < total:
      print(f"{len(records):,} of {total:,} examples are in both")
  report(flags, str(path), task, records, before)


def asked(flags: argparse.Namespace) -> tuple[Task, list[Example]]:
  """The task and its examples: by name, or those that a file of results has.

  Of a file of examples all are meant, unless a split is named.
  """
  if flags.task is None:
    _, records = files.read_results(flags.results)
    rows = tuple(record.example for record in records)
    return tasks.Listed("results", rows), list(rows)
  task = tasks.make(flags.task, **options(flags))
  if isinstance(task, tasks.Listed):
    rows = list(task.rows)
    rows = rows if flags.split is None else task.split(flags.split)
    return task, rows[: flags.n]
  split = flags.split or "test"
  return task, tasks.examples(task, split, flags.n or N, flags.task_seed)


def _kind(path: str) -> str:
  """What a path can be: results, responses, a run of ours, another model."""
  suffix = Path(path).suffix
  if suffix in (".json", ".jsonl", ".ndjson"):
    return "results" if suffix == ".json" else "responses"
  return "workdir" if is_ours(Path(path)) else "model"


def records_of(
  kind: str,
  path: str,
  rest: Sequence[str],
  task: Task,
  examples: Sequence[Example],
) -> list[Record]:
  """What a model says to the examples, or what a file says it said."""
  if kind == "results":
    return files.read_results(path)[1]
  if kind == "responses":
    return files.joined(task, examples, files.read_responses(path), path)
  asked, found, usual = loaded(kind, path, rest)
  writer = make_writer(asked, found, usual, examples)
  records = respond(
    writer,
    task,
    examples,
    asked.num_samples,
    asked.seed,
    asked.batch or 64,
    template(asked, found),
  )
  generate.conclude(writer, asked.stats)
  return records


# --- Models -----------------------------------------------------------------

_SAMPLING = ("temperature", "top_k", "top_p", "sampler", "method")
_NOT_HERE = ("chat", "prompt", "prompts", "system", "out", "resume", "logprobs")


def loaded(
  kind: str, path: str, rest: Sequence[str]
) -> tuple[argparse.Namespace, Pretrained, Any]:
  """A model, with the flags that say how it writes, and how it usually does."""
  asked = generate.parser().parse_args([*rest, f"--{kind}={path}"])
  for name in _NOT_HERE:
    if getattr(asked, name) not in (None, False):
      raise UserError(f"--{name} is of jaxlm.generate, not of jaxlm.evaluate")
  batch, asked.batch = asked.batch, None
  generate.check(asked)
  asked.batch = batch
  if all(getattr(asked, n) is None for n in _SAMPLING) and not asked.greedy:
    asked.greedy = asked.num_samples == 1
  return asked, *generate.find(asked)


def make_writer(
  asked: argparse.Namespace,
  found: Pretrained,
  usual: Any,
  examples: Sequence[Example],
) -> Writer:
  """The model as a writer, with room for the longest gold response."""
  writer = generate.make_writer(asked, found, usual)
  if asked.max_new_tokens is None and examples:
    writer = dataclasses.replace(writer, n=room(writer, examples))
  return writer


def template(
  asked: argparse.Namespace, found: Pretrained
) -> ChatTemplate | None:
  """How prompts are written as turns; None: as they are.

  Unless --template says otherwise, as the model's own template does.
  """
  if (
    asked.template == "none" or (asked.template, found.template) == (None,) * 2
  ):
    return None
  chosen = generate.find_template(asked.template, found.template)
  # A bare prompt is no turn, and what stands before every text stands there.
  return None if chosen.source == TEMPLATES["bare"] else chosen


# --- What is told -----------------------------------------------------------


def report(
  flags: argparse.Namespace,
  name: str,
  task: Task,
  records: Sequence[Record],
  before: Sequence[Record] | None,
) -> None:
  """Prints the tables, and writes them as JSON and HTML where that is asked."""
  names = [n for n in (flags.metrics or "").split(",") if n]
  metrics, missing = measure.choose([*records, *(before or ())], names)
  about = {
    "name": name,
    "task": flags.task or task.name,
    "n": len(records),
    "samples": min(len(r.texts) for r in records),
  }
  head = f"{name}: {about['task']}, {len(records):,} examples"
  if before is None:
    figures, tables = alone(records, metrics, flags.times)
  else:
    head += f", before: {flags.before}"
    about["before"] = flags.before
    figures, tables = compared(before, records, metrics, flags.times)
  if missing:
    tables.append(f"{', '.join(missing)} left out: pip install 'jaxlm[eval]'")
  summary = "\n\n".join([head, *tables])
  print(summary)
  if flags.out is not None:
    files.write(flags.out, files.to_json(about | _plain(figures), records))
  if flags.html is not None:
    files.write(flags.html, browser.page(name, summary, records, before))


def alone(
  records: Sequence[Record], metrics: Sequence[measure.Metric], times: int
) -> tuple[dict[str, Any], list[str]]:
  """Figures of responses, and tables of them."""
  found = measure.measure(records, metrics, times)
  some = metrics[:2]
  parts = measure.sliced(records, some, times)
  tables = [show.metrics(found)]
  if parts:
    tables.append(show.slices(parts, [m.name for m in some]))
  return {"metrics": found, "slices": parts}, tables


def compared(
  before: Sequence[Record],
  after: Sequence[Record],
  metrics: Sequence[measure.Metric],
  times: int,
) -> tuple[dict[str, Any], list[str]]:
  """Figures of what has changed, and tables of them."""
  found = compare.compare(before, after, metrics, times)
  parts = compare.sliced(before, after, metrics[0], times)
  fixed, broken = compare.flips(before, after)
  flips = f"{len(fixed):,} come right, {len(broken):,} gone wrong"
  tables = [show.changes(found), flips]
  if parts:
    tables.append(f"{metrics[0].name}, by slices\n{show.changed(parts)}")
  figures = {
    "metrics": {name: change.after for name, change in found.items()},
    "changes": found,
    "slices": parts,
    "come_right": len(fixed),
    "gone_wrong": len(broken),
  }
  return figures, tables


def _plain(x: Any) -> Any:
  """Estimates and changes as dicts, down through dicts."""
  if isinstance(x, dict):
    return {k: _plain(v) for k, v in x.items()}
  return dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x


# --- A text, and the harness ------------------------------------------------


def judge_text(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  """Perplexity and bits per byte of a text."""
  judge, _ = judged(flags, rest)
  try:
    text = Path(flags.text).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    why = getattr(error, "strerror", None) or "it is not UTF-8"
    raise UserError(f"cannot read {flags.text}: {why}") from error
  if not text:
    raise UserError(f"{flags.text} is empty, and has no perplexity")
  found = likelihood.perplexity(judge.text(text), text)
  print(
    f"loss {found['loss']:.4f} nats per token, perplexity "
    f"{found['perplexity']:.2f}, {found['bits_per_byte']:.4f} bits per byte "
    f"({found['tokens']:,} tokens, {found['bytes']:,} bytes)"
  )
  if flags.out is not None:
    files.write(flags.out, json.dumps(found, indent=2) + "\n")


def run_harness(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  """Tasks of EleutherAI's harness."""
  judge, writer = judged(flags, rest)
  names = [name.strip() for name in flags.harness.split(",")]
  lm = harness.adapter(judge, writer)
  told, table = harness.run(lm, names, flags.include_path, flags.n, flags.shots)
  print(table)
  if flags.out is not None:
    files.write(flags.out, json.dumps(told, indent=2) + "\n")


def judged(
  flags: argparse.Namespace, rest: Sequence[str]
) -> tuple[likelihood.Judge, Writer]:
  """The model that the flags name, as a judge and as a writer."""
  kind = "workdir" if flags.workdir is not None else "model"
  asked, found, usual = loaded(kind, getattr(flags, kind), rest)
  writer = make_writer(asked, found, usual, ())
  judge = likelihood.Judge(
    found.model,
    writer.params,
    found.tokenizer,
    found.start,
    writer.compute,
    asked.batch or 16,
  )
  return judge, writer


if __name__ == "__main__":
  program.run(main)
