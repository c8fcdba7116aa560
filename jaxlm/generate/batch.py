"""A file of prompts in, a file of texts out, a line for each.

Prompts of like lengths are continued side by side: they are taken in windows
of a few batches, sorted by length within one, and written in the order in
which they came. Whatever a batch is made of, a text follows from its own
prompt and seed. A line is written whole or not at all, so what an interrupted
run has written is good, and `resume` goes on behind it.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import keys as names
from jaxlm import speed
from jaxlm.data.chat import ChatTemplate, encode
from jaxlm.errors import UserError
from jaxlm.generate.text import Transcript, Writer

WINDOW = 8  # batches that are sorted together
_FIELDS = ("prompt", "messages", "id", "seed", "max_new_tokens")


@dataclass(frozen=True)
class Request:
  """One line of the file.

  Attributes:
    id: what its texts are called by; the number of the line, if not given.
    prompt: a text, or the messages of a conversation.
    seed: its randomness; None means that of the run.
    n: the most new tokens; None means that of the run.
    ids: its tokens, once they are known.
    error: what is wrong with it, if anything.
  """

  id: Any
  prompt: str | list[dict[str, Any]]
  seed: int | None = None
  n: int | None = None
  ids: np.ndarray | None = None
  error: str | None = None

  def told(self) -> dict[str, Any]:
    """What its lines of output begin with."""
    kind = "prompt" if isinstance(self.prompt, str) else "messages"
    return {"id": self.id, kind: self.prompt}


# --- Reading ----------------------------------------------------------------


def read(path: str | Path) -> list[Request]:
  """The requests of a file: JSON lines if its name ends so, else plain text.

  Raises:
    UserError: if it cannot be read, or a line is no request.
  """
  path = Path(path)
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    why = getattr(error, "strerror", None) or "it is not UTF-8"
    raise UserError(f"cannot read the prompts in {path}: {why}") from error
  lines = lines[:-1] if lines[-1] == "" else lines
  if path.suffix not in (".jsonl", ".ndjson"):
    found = [Request(i, line) for i, line in enumerate(lines)]
  else:
    found = [
      _request(f"{path} line {i + 1}", i, line)
      for i, line in enumerate(lines)
      if line.strip()
    ]
  if not found:
    raise UserError(f"there are no prompts in {path}")
  return found


def _request(where: str, number: int, line: str) -> Request:
  """What a line of JSON asks for."""
  try:
    said = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(f"{where} is not JSON: {error}") from error
  if not isinstance(said, dict):
    raise UserError(f'{where}: write an object, as in {{"prompt": "..."}}')
  for name in said:
    if name not in _FIELDS:
      near = names.nearest(name, _FIELDS)
      raise UserError(
        f"{where}: unknown field {name!r}{near}; there are {', '.join(_FIELDS)}"
      )
  if ("prompt" in said) == ("messages" in said):
    raise UserError(f'{where}: give one of the two, "prompt" or "messages"')
  prompt = said.get("prompt", said.get("messages"))
  kind = str if "prompt" in said else list
  if not isinstance(prompt, kind):
    raise UserError(f"{where}: {prompt!r} is not a {kind.__name__}")
  for name, least in (("seed", None), ("max_new_tokens", 0)):
    value = said.get(name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and (not whole or (least == 0 and value < 0)):
      raise UserError(f"{where}: {name}={value!r} is no such number")
  return Request(
    said.get("id", number), prompt, said.get("seed"), said.get("max_new_tokens")
  )


# --- Running ----------------------------------------------------------------


@dataclass(frozen=True)
class Batches:
  """How the prompts of a file are continued.

  Attributes:
    writer: what continues them.
    template: how conversations are written, if there is one.
    seed: of requests that have none.
    samples: texts of each prompt.
    size: texts that are made side by side.
    top: log-probabilities wanted beside the chosen ones; None: none at all.
  """

  writer: Writer
  template: ChatTemplate | None = None
  seed: int = 0
  samples: int = 1
  size: int = 8
  top: int | None = None

  def __post_init__(self):
    if self.size < 1 or self.samples < 1:
      raise UserError(
        f"{self.samples} samples in batches of {self.size}: use 1 or more"
      )

  @property
  def prompts(self) -> int:
    """How many are continued side by side."""
    return max(1, self.size // self.samples)

  def lines(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
    """Lines of output in the order of the requests, as soon as they are known.

    Yields:
      How many requests are done, and the lines of the next ones, perhaps none.
    """
    step = WINDOW * self.prompts
    rows = min(self.prompts, len(requests))
    done = 0
    for first in range(0, len(requests), step):
      window = [self.ready(r) for r in requests[first : first + step]]
      found: dict[int, str] = {
        i: _line(r.told() | {"error": r.error})
        for i, r in enumerate(window)
        if r.error is not None
      }
      done, written = done + len(found), 0
      for batch in self.plan(window):
        told = self._continue([window[i] for i in batch], rows)
        found |= dict(zip(batch, told, strict=True))
        done += len(batch)
        ready = written
        while ready in found:
          ready += 1
        yield done, "".join(found[i] for i in range(written, ready))
        written = ready
      yield done, "".join(found[i] for i in range(written, len(window)))

  def ready(self, request: Request) -> Request:
    """The request with its tokens, or with what is wrong with it."""
    writer = self.writer
    n = writer.n if request.n is None else request.n
    try:
      ids = self._encode(request.prompt)
      return replace(request, n=n, ids=writer.fitted(ids, n))
    except UserError as error:
      return replace(request, n=n, error=str(error))

  def _encode(self, prompt: str | list[dict[str, Any]]) -> np.ndarray:
    if isinstance(prompt, str):
      if not prompt:
        raise UserError("the prompt is empty; leave it out, or give it a text")
      return self.writer.ids(prompt)
    if self.template is None:
      raise UserError(
        "nothing says how this model writes conversations; choose a --template"
      )
    if not all(isinstance(message, dict) for message in prompt):
      raise UserError('messages are objects with "role" and "content"')
    return encode(self.template, self.writer.tokenizer, prompt)

  def plan(self, window: Sequence[Request]) -> list[list[int]]:
    """Which requests are continued side by side, those of like lengths.

    Where texts would outgrow the context, the window of all rows slides at
    once; so only prompts of one length may then stand together.
    """
    fine = [i for i, r in enumerate(window) if r.error is None]
    fine.sort(key=lambda i: (len(window[i].ids), window[i].n))
    batches: list[list[int]] = []
    for i in fine:
      rows = [window[j] for j in batches[-1]] if batches else []
      if rows and len(rows) < self.prompts and self._fit([*rows, window[i]]):
        batches[-1].append(i)
      else:
        batches.append([i])
    return batches

  def _fit(self, rows: Sequence[Request]) -> bool:
    """Whether requests can stand together without changing one another."""
    lengths, n = {len(r.ids) for r in rows}, {r.n for r in rows}
    if not self.writer.method.streams:  # a search knows how long it may be
      return len(n) == 1
    most = self.writer.model.max_positions
    return len(lengths) == 1 or max(lengths) + max(n) - 1 <= most

  def _continue(self, batch: Sequence[Request], rows: int) -> list[str]:
    """The lines of requests that are continued side by side."""
    writer, k = self.writer, self.samples
    told = [writer.transcript(r.n) for r in batch for _ in range(k)]
    # Always as many rows: another number would be compiled anew.
    full = [*batch, *[batch[-1]] * (rows - len(batch))]
    keys = _keys([self.seed if r.seed is None else r.seed for r in full], k)
    blocks = writer.run(
      [r.ids for r in full],
      keys,
      told,
      max(r.n for r in batch),
      top=self.top,
      pace=0.1,
    )
    for _ in blocks:
      pass
    return [
      "".join(self._lines(r, told[i * k : (i + 1) * k]))
      for i, r in enumerate(batch)
    ]

  def _lines(self, r: Request, told: Sequence[Transcript]) -> Iterator[str]:
    for i, text in enumerate(told):
      said = r.told()
      if self.samples > 1:
        said["sample"] = i
      said |= {
        "text": text.text,
        "finish_reason": text.finish,
        "prompt_tokens": len(r.ids),
        "new_tokens": len(text.tokens),
        "seed": self.seed if r.seed is None else r.seed,
      }
      if self.top is not None:
        said["logprobs"] = self._scores(text)
      yield _line(said)

  def _scores(self, text: Transcript) -> list[dict[str, Any]]:
    """What is told of each token."""
    if text.scores is None:
      return []
    new, told = text.scores, []
    for i, token in enumerate(text.tokens):
      one = self._token(token, new.logprobs[i])
      if self.top:
        pairs = zip(new.top_tokens[i], new.top_logprobs[i], strict=True)
        one["top"] = [self._token(int(t), p) for t, p in pairs]
      told.append(one)
    return told

  def _token(self, token: int, logprob: float) -> dict[str, Any]:
    known = token < self.writer.tokenizer.vocab_size
    text = self.writer.tokenizer.decode([token]) if known else ""
    return {"id": token, "token": text, "logprob": round(float(logprob), 6)}


def _keys(seeds: Sequence[int], samples: int) -> jax.Array:
  """Text i of a prompt has key fold_in(key(seed), i), as with --prompt."""
  numbers = jnp.arange(samples, dtype=jnp.uint32)
  each = [
    jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    for seed in seeds
  ]
  return jnp.concatenate(each)


def _line(said: dict[str, Any]) -> str:
  return json.dumps(said, ensure_ascii=False) + "\n"


# --- Writing ----------------------------------------------------------------


def run(
  batches: Batches,
  requests: Sequence[Request],
  out: str | Path | None = None,
  resume: bool = False,
) -> None:
  """Continues all prompts, into a file or to stdout, with a bar on stderr.

  Raises:
    UserError: if the file exists and is not to be resumed, holds texts of
      other prompts, or cannot be written.
  """
  with _opened(out, resume) as file:
    done = 0
    if resume:
      done = _finished(file, requests, batches.samples)
    bar = Bar(len(requests), done)
    try:
      for count, lines in batches.lines(requests[done:]):
        file.write(lines)
        file.flush()
        bar.show(done + count, batches.writer.figures.new_tokens)
    except KeyboardInterrupt:
      if out is not None:
        print(f"\n{out} is good as it is; --resume goes on", file=sys.stderr)
      raise
    finally:
      bar.close()


@contextlib.contextmanager
def _opened(out: str | Path | None, resume: bool) -> Iterator[TextIO]:
  """The file of output; with `resume` it is read before it is written."""
  if out is None:
    yield sys.stdout
    return
  if Path(out).exists() and not resume:
    raise UserError(
      f"{out} exists; go on behind it with --resume, or choose another --out"
    )
  try:
    file = open(out, "a+", encoding="utf-8", newline="\n")  # noqa: SIM115
  except OSError as error:
    raise UserError(f"cannot write {out}: {error.strerror}") from error
  with file:
    yield file


def _finished(file: TextIO, requests: Sequence[Request], samples: int) -> int:
  """How many requests a file has whole; what is behind them is cut off."""
  file.seek(0)
  lines = file.read().split("\n")[:-1]
  done, size, at = 0, 0, 0
  while done < len(requests) and at < len(lines):
    first = _same(file, lines[at], requests[done])
    many = 1 if "error" in first else samples
    if at + many > len(lines):
      break
    for line in lines[at : at + many]:
      _same(file, line, requests[done])
      size += len(line.encode("utf-8")) + 1
    done, at = done + 1, at + many
  if done == len(requests) and at < len(lines):
    raise _foreign(file)
  file.seek(0)
  os.truncate(file.fileno(), size)
  file.seek(0, os.SEEK_END)
  return done


def _same(file: TextIO, line: str, request: Request) -> dict[str, Any]:
  """A line of output, if it is one of that request."""
  try:
    said = json.loads(line)
  except json.JSONDecodeError:
    said = {}
  if not isinstance(said, dict) or not request.told().items() <= said.items():
    raise _foreign(file)
  return said


def _foreign(file: TextIO) -> UserError:
  return UserError(
    f"{file.name} holds other texts than those of these prompts and samples; "
    "choose another --out"
  )


class Bar:
  """A line on stderr that says how far a run is, where somebody can see it."""

  def __init__(self, total: int, done: int = 0):
    """Of `total` prompts, `done` before this run."""
    self._total, self._first = total, done
    self._began = time.perf_counter()
    self._shown = sys.stderr.isatty()
    self.show(done, 0)

  def show(self, done: int, tokens: int) -> None:
    """Redraws it.

    Args:
      done: prompts.
      tokens: that this run has made.
    """
    if not self._shown:
      return
    took = time.perf_counter() - self._began
    full = 24 * done // self._total
    line = f"[{'#' * full}{'.' * (24 - full)}] {done:,}/{self._total:,}"
    if done > self._first:
      left = took / (done - self._first) * (self._total - done)
      rate = speed.short(tokens / took)
      line += f" | {rate} tokens/s | {speed.clock(left)} left"
    print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)

  def close(self) -> None:
    """Leaves the line behind."""
    if self._shown:
      print(file=sys.stderr)
