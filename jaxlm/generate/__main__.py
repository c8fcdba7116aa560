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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm import program, workdir
from jaxlm.errors import UserError
from jaxlm.generate import decode
from jaxlm.generate.samplers import make_sampler
from jaxlm.generate.text import Writer
from jaxlm.layers.compute import Compute


def parser() -> argparse.ArgumentParser:
  """The flags; those not given follow the run's own `config.sample`."""
  flags = program.Parser(
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


def load(flags: argparse.Namespace) -> Writer:
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


def converse(writer: Writer) -> None:
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


if __name__ == "__main__":
  program.run(main)
