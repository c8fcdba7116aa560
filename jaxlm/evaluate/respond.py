"""A model's responses to the prompts of examples, in batches."""

import json
import sys
from collections.abc import Sequence

from jaxlm.data.chat import ChatTemplate
from jaxlm.evaluate.results import Record, scored
from jaxlm.generate.batch import Bar, Batches, Request
from jaxlm.generate.text import Writer
from jaxlm.tasks import Example, Task


def respond(
  writer: Writer,
  task: Task,
  examples: Sequence[Example],
  samples: int = 1,
  seed: int = 0,
  size: int = 64,
  template: ChatTemplate | None = None,
) -> list[Record]:
  """Records of what a model says to every prompt.

  Args:
    writer: the model, and how it goes on.
    task: scores.
    examples: what is asked.
    samples: responses to each.
    seed: of what is random. A response depends on its prompt and the seed, not
      on the other prompts of its batch.
    size: texts side by side.
    template: how a prompt is written as the turn of a user; None means as it
      is.
  """
  requests = [Request(i, _said(e, template)) for i, e in enumerate(examples)]
  batches = Batches(writer, template, seed, samples, max(size, samples))
  found: dict[int, list[dict]] = {}
  bar = Bar(len(requests))
  for done, lines in batches.lines(requests):
    for line in lines.split("\n")[:-1]:  # a text may hold other line ends
      said = json.loads(line)
      found.setdefault(said["id"], []).append(said)
    bar.show(done, writer.figures.new_tokens)
  bar.close()
  _warn(found)
  told = [_filled(found[i], samples) for i in range(len(requests))]
  return scored(
    task,
    examples,
    [[said.get("text", "") for said in row] for row in told],
    [[said.get("finish_reason") == "stop" for said in row] for row in told],
  )


def _said(example: Example, template: ChatTemplate | None):
  """A prompt as it is asked for."""
  if template is None:
    return example.prompt
  return [{"role": "user", "content": example.prompt}]


def _filled(row: list[dict], samples: int) -> list[dict]:
  """What could not be continued counts as saying nothing."""
  return row * samples if "error" in row[0] else row


def _warn(found: dict[int, list[dict]]) -> None:
  """Tells which prompts could not be continued."""
  wrong = [row[0]["error"] for row in found.values() if "error" in row[0]]
  if wrong:
    print(
      f"warning: {len(wrong):,} of {len(found):,} prompts could not be "
      f"continued and count as wrong; the first: {wrong[0]}",
      file=sys.stderr,
    )


def room(writer: Writer, examples: Sequence[Example]) -> int:
  """Tokens enough for any gold response twice over, and for its end."""
  golds = [example.response for example in examples]
  longest = max(len(ids) for ids in writer.tokenizer.encode_many(golds))
  return 2 * longest + 8
