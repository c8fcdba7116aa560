"""Samples from a trained model, in the terminal.

    python -m jaxlm.generate --workdir=runs/tiny --prompt="A list is"

Without --prompt, what is piped in is the prompt; at a terminal, each line
typed is one. What the model adds appears as it is made, and figures about it
on stderr at the end.
"""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from jaxlm import config as configs
from jaxlm import program, workdir
from jaxlm.data.tokenizer import TextStream, Tokenizer
from jaxlm.errors import UserError
from jaxlm.generate import decode
from jaxlm.generate.samplers import Sampler, make_sampler
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder

# --- The command line -------------------------------------------------------


class _Parser(argparse.ArgumentParser):
  """An argument parser whose errors are UserErrors."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; --help shows all flags")


def parser() -> argparse.ArgumentParser:
  """The flags; those not given follow the run's own `config.sample`."""
  flags = _Parser(
    prog="python -m jaxlm.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = flags.add_argument
  add("--workdir", required=True, metavar="DIR", help="where the run lives")
  add("--prompt", metavar="TEXT", help="what the model continues; may be empty")
  add("--max_new_tokens", type=int, metavar="N", help="length of a sample")
  add("--temperature", type=float, metavar="T", help="0: always the likeliest")
  add("--top_k", type=int, metavar="K", help="among the K likeliest; 0: all")
  add("--top_p", type=float, metavar="P", help="among those that sum to P")
  add("--greedy", action="store_true", help="the same as --temperature=0")
  add("--seed", type=int, default=0, metavar="N", help="of what is random")
  add("--num_samples", type=int, default=1, metavar="N", help="default: 1")
  add("--checkpoint", default="latest", help="latest, best, or a step")
  add("--dtype", default="float32", help="float32, bfloat16 or float16")
  add("--no-stream", action="store_true", help="all samples at once, when done")
  return flags


def main(argv: Sequence[str]) -> None:
  """Runs the program.

  Raises:
    UserError: for wrong flags, a workdir without a usable model, or a prompt
      that the tokenizer cannot express.
  """
  flags = parser().parse_args(argv)
  prompt = flags.prompt
  if prompt is None and not sys.stdin.isatty():
    prompt = sys.stdin.read().removesuffix("\n")
  writer = load(flags)
  if prompt is None:
    converse(writer)
  elif flags.no_stream:
    texts = writer.texts(prompt, flags.num_samples)
    print("\n---\n".join(texts))
  else:
    for i in range(flags.num_samples):
      print("---\n" * (i > 0), end="")
      show(writer.pieces(prompt, i))
  print(writer.figures(), file=sys.stderr)


def load(flags: argparse.Namespace) -> "Writer":
  """The writer that the flags ask for."""
  if flags.num_samples < 1:
    raise UserError(f"--num_samples={flags.num_samples}: use 1 or more")
  path, which = Path(flags.workdir), flags.checkpoint
  which = int(which) if which.isdecimal() else which
  model, params = workdir.load(path, flags.dtype, which)
  of_run = path / "config.json"
  run = configs.read(path) if of_run.exists() else configs.default_config()
  usual = run.sample

  def chosen(value: Any, default: Any) -> Any:
    return default if value is None else value

  compute = Compute(dtype=flags.dtype, unroll=True)
  return Writer(
    model=model,
    params=decode.ready(model, params, compute),
    compute=compute,
    tokenizer=workdir.load_tokenizer(path),
    sampler=make_sampler(
      0 if flags.greedy else chosen(flags.temperature, usual.temperature),
      chosen(flags.top_k, usual.top_k),
      chosen(flags.top_p, usual.top_p),
    ),
    n=chosen(flags.max_new_tokens, usual.tokens),
    key=jax.random.key(flags.seed),
  )


def converse(writer: "Writer") -> None:
  """Continues each line that is typed, until the end of input (Ctrl-D)."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401, it gives input() a history
  print("Type a beginning. Ctrl-C stops a text, Ctrl-D ends.")
  for i in itertools.count():
    try:
      prompt = input("> ")
    except EOFError:
      return print()
    try:
      show(writer.pieces(prompt, i))
    except KeyboardInterrupt:
      print()
    except UserError as e:
      print(f"error: {e}", file=sys.stderr)


def show(pieces: Iterable[str]) -> None:
  """Prints text as it comes."""
  for piece in pieces:
    print(piece, end="", flush=True)
  print()


# --- A model that writes ----------------------------------------------------


@dataclass
class Writer:
  """A model, how it is sampled, and what has been measured of it so far.

  Attributes:
    model, params, compute: what writes.
    tokenizer: between text and tokens.
    sampler: how it chooses.
    n: how many tokens it adds to a text.
    key: its randomness; text number i has key `fold_in(key, i)`.
    made: how many tokens it has made.
    first: how many of those were the first of their text.
    first_seconds: how long the first ones took: they include reading the
      prompt, and compiling where sizes are new.
    seconds: how long the others took.
  """

  model: Decoder
  params: Any
  compute: Compute
  tokenizer: Tokenizer
  sampler: Sampler
  n: int
  key: jax.Array
  made: int = 0
  first: int = 0
  first_seconds: float = 0.0
  seconds: float = 0.0

  def pieces(self, prompt: str, number: int = 0) -> Iterator[str]:
    """The prompt, then what follows, never in half characters."""
    keys = jax.random.fold_in(self.key, number)[None]
    tokens, text = self._tokens(prompt, keys), TextStream(self.tokenizer)
    yield prompt
    for token in tokens:
      yield text.push(self._shown(token))
    yield text.flush()

  def texts(self, prompt: str, n: int) -> list[str]:
    """`n` texts, which are made side by side."""
    keys = decode.row_keys(self.key, n)
    found = [*self._tokens(prompt, keys)]
    rows = np.stack(found, axis=1) if found else np.zeros((n, 0), int)
    texts = [TextStream(self.tokenizer) for _ in rows]
    return [
      prompt + text.push(self._shown(row)) + text.flush()
      for text, row in zip(texts, rows, strict=True)
    ]

  def figures(self) -> str:
    """What was measured, in a line."""
    if not self.made:
      return "no tokens"
    wait = self.first_seconds / self.first
    text = f"{self.made:,} tokens; the first after {wait:.2f} s"
    if self.made > self.first:
      speed = (self.made - self.first) / max(self.seconds, 1e-9)
      text += f", the others at {speed:,.0f} tokens/s"
    return text

  def _tokens(self, prompt: str, keys: jax.Array) -> Iterator[np.ndarray]:
    """New tokens [batch] of texts that begin alike, with the time they take."""
    ids = self.tokenizer.encode(prompt)
    ids = np.array(ids if len(ids) else self._start(), np.int32)
    found = decode.stream(
      self.model,
      self.params,
      np.broadcast_to(ids, (len(keys), len(ids))),
      self.n,
      self.sampler,
      keys,
      eot=self.tokenizer.eot,
      slide=True,
      compute=self.compute,
    )
    return self._measured(found, len(keys))

  def _measured(
    self, tokens: Iterable[np.ndarray], batch: int
  ) -> Iterator[np.ndarray]:
    since = time.perf_counter()
    for i, token in enumerate(tokens):
      took = time.perf_counter() - since
      self.made += batch
      self.first += batch if i == 0 else 0
      if i == 0:
        self.first_seconds += took * batch
      else:
        self.seconds += took
      yield token
      since = time.perf_counter()

  def _start(self) -> Sequence[int]:
    """What stands before a text that begins with nothing."""
    if self.tokenizer.eot is not None:
      return [self.tokenizer.eot]
    try:
      return self.tokenizer.encode("\n")
    except UserError:  # characters, none of them a newline
      return [0]

  def _shown(self, tokens: np.ndarray) -> list[int]:
    """Tokens that have a text, up to the end of the row's."""
    shown = itertools.takewhile(lambda t: t != self.tokenizer.eot, tokens)
    return [int(t) for t in shown if t < self.tokenizer.vocab_size]


if __name__ == "__main__":
  program.run(main)
