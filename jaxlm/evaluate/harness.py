"""EleutherAI's lm-evaluation-harness on our models.

    lm = harness.adapter(judge, writer)
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

The harness asks three things of a model, and all of its tasks are made of them:
how likely a continuation is, how likely a whole text is, and what comes next.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.evaluate.likelihood import Judge, Pair
from jaxlm.generate.batch import Batches, Request
from jaxlm.generate.methods import Draw
from jaxlm.generate.samplers import make_sampler
from jaxlm.generate.text import Writer

_TOKENS = 256  # the harness's own default
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


def adapter(judge: Judge, writer: Writer, size: int = 16) -> Any:
  """A model as an `lm_eval.api.model.LM`.

  Args:
    judge: for likelihoods.
    writer: for texts; what tasks ask for replaces its stops and sampling.
    size: texts that are made side by side.

  Raises:
    UserError: if lm-eval is not installed.
  """
  base = _imported().api.model.LM
  # The class can only be made where the library is there.
  made = type("JaxLM", (_Answers, base), {})
  return made(judge, writer, size)


def run(
  lm: Any,
  tasks: Sequence[str],
  folder: str | None = None,
  limit: int | None = None,
  shots: int | None = None,
) -> tuple[dict[str, Any], str]:
  """Runs tasks of the harness.

  Args:
    lm: from `adapter`.
    tasks: their names.
    folder: where more tasks are described, in its YAML.
    limit: examples of each; None means all.
    shots: examples shown before each question; None means as the task says.

  Returns:
    The results as JSON values, and as a table.

  Raises:
    UserError: for a task that there is not.
  """
  lm_eval = _imported()
  manager = lm_eval.tasks.TaskManager(include_path=folder)
  unknown = sorted(set(tasks) - set(manager.match_tasks(list(tasks))))
  if unknown:
    raise UserError(
      f"the harness has no task {unknown[0]!r}; lm-eval ls tasks lists them, "
      "and --include_path=DIR adds your own"
    )
  found = lm_eval.simple_evaluate(
    model=lm,
    tasks=list(tasks),
    num_fewshot=shots,
    limit=limit,
    task_manager=manager,
    log_samples=False,
  )
  told = json.loads(json.dumps(found, default=str))
  return told, lm_eval.utils.make_table(found)


def _imported() -> Any:
  try:
    import lm_eval
    import lm_eval.api.model
    import lm_eval.tasks
    import lm_eval.utils
  except ImportError as error:
    raise UserError(
      "running the harness needs lm-eval: pip install 'jaxlm[lm-eval]'"
    ) from error
  return lm_eval


class _Answers:
  """What the harness asks, answered; the other base is its abstract class."""

  def __init__(self, judge: Judge, writer: Writer, size: int):
    super().__init__()
    self._judge, self._size = judge, size
    self._writer = dataclasses.replace(writer, long="truncate")

  def loglikelihood(
    self, requests: Sequence[Any], **_: Any
  ) -> list[tuple[float, bool]]:
    """For each context and continuation: log-probability, and if greedy."""
    pairs = [self._pair(*request.args) for request in requests]
    found = self._judge.following(pairs)
    told = [(one.logprob, one.greedy) for one in found]
    self._remember("loglikelihood", requests, told)
    return told

  def _pair(self, context: str, continuation: str) -> Pair:
    """Tokens of both, as they are tokenized together.

    Blanks between the two belong to the continuation, with whose first word
    most tokenizers join them.
    """
    encode = self._judge.tokenizer.encode
    if not context:
      return self._judge.prefix(), encode(continuation)
    bare = context.rstrip()
    before = [*self._judge.start, *encode(bare)] if bare else []
    whole = [*self._judge.start, *encode(context + continuation)]
    if not before:
      return self._judge.prefix(), whole
    after = whole[len(before) :] or whole[-1:]
    return whole[: len(whole) - len(after)], after

  def loglikelihood_rolling(
    self, requests: Sequence[Any], **_: Any
  ) -> list[float]:
    """For each text: its log-probability."""
    found = self._judge.texts([request.args[0] for request in requests])
    told = [one.logprob for one in found]
    self._remember("loglikelihood_rolling", requests, told)
    return told

  def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
    """For each context: what follows, up to one of its stops."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1]), []).append(i)
    told = [""] * len(requests)
    for options, members in groups.items():
      contexts = [requests[i].args[0] for i in members]
      texts = self._texts(contexts, json.loads(options))
      for i, text in zip(members, texts, strict=True):
        told[i] = text
    self._remember("generate_until", requests, told)
    return told

  def _texts(
    self, contexts: Sequence[str], options: Mapping[str, Any]
  ) -> list[str]:
    """What follows contexts that ask for the same."""
    unknown = [name for name in options if name not in _KNOWN]
    if unknown:
      print(f"warning: {', '.join(unknown)} ignored", file=sys.stderr)
    until = options.get("until") or []
    writer = dataclasses.replace(
      self._writer,
      n=int(options.get("max_gen_toks", _TOKENS)),
      stops=[until] if isinstance(until, str) else list(until),
      method=_method(options),
    )
    batches = Batches(writer, size=self._size)
    found = {}
    asked = [Request(i, context) for i, context in enumerate(contexts)]
    for _, lines in batches.lines(asked):
      for line in lines.split("\n")[:-1]:  # texts may hold other line ends
        said = json.loads(line)
        if "error" in said:
          raise UserError(f"a prompt of the harness: {said['error']}")
        found[said["id"]] = said["text"]
    return [found[i] for i in range(len(contexts))]

  def _remember(
    self, name: str, requests: Sequence[Any], told: Sequence[Any]
  ) -> None:
    """Tells the harness's cache of answers, if it keeps one."""
    for request, one in zip(requests, told, strict=True):
      self.cache_hook.add_partial(name, request.args, one)


def _method(options: Mapping[str, Any]) -> Draw:
  """How a task says that texts are chosen: greedily, unless it asks to draw."""
  heat = float(options.get("temperature", 1.0))
  if not options.get("do_sample", False):
    heat = 0.0
  top_k, top_p = options.get("top_k", 0), options.get("top_p", 1.0)
  return Draw(make_sampler(heat, int(top_k), float(np.float32(top_p))))
