"""Samples from a model, and talks with it, in the terminal.

    python -m jaxlm.generate --workdir=runs/tiny --prompt="A list is"
    python -m jaxlm.generate --model=FILE.gguf --chat --prompt="Who are you?"

Without --prompt, what is piped in is the prompt; at a terminal, each line
typed is one, or one turn of a conversation. What the model adds appears as it
is made, and figures about it on stderr at the end.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm import program, workdir
from jaxlm.data.chat import TEMPLATES, ChatTemplate
from jaxlm.errors import UserError
from jaxlm.generate import decode
from jaxlm.generate.chat import Chat
from jaxlm.generate.samplers import make_sampler
from jaxlm.generate.text import Writer
from jaxlm.interop import pretrained
from jaxlm.interop.pretrained import Pretrained
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
  add("--workdir", metavar="DIR", help="where a run of ours lives")
  add("--model", metavar="PATH", help="a .gguf file, or a model's directory")
  add("--chat", action="store_true", help="a conversation; usually greedy")
  add("--system", metavar="TEXT", help="what the model is told before it")
  add("--template", metavar="NAME", help="of the conversation, or a file")
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
  if flags.chat:
    return chat(flags)
  if prompt is None and not sys.stdin.isatty():
    prompt = sys.stdin.read().removesuffix("\n")
  writer = make_writer(flags, *find(flags))
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


def find(flags: argparse.Namespace) -> tuple[Pretrained, Any]:
  """The model that the flags name, and how it is usually sampled."""
  if (flags.workdir is None) == (flags.model is None):
    raise UserError(
      "name one of the two: --workdir=DIR for a run of ours, or --model=PATH "
      "for a .gguf file or a model's directory"
    )
  if flags.model is not None:
    found = pretrained.read(flags.model, flags.dtype)
    return found, configs.default_config().sample
  path, which = Path(flags.workdir), flags.checkpoint
  which = int(which) if which.isdecimal() else which
  model, params = workdir.load(path, flags.dtype, which)
  of_run = path / "config.json"
  run = configs.read(path) if of_run.exists() else configs.default_config()
  tokenizer = workdir.load_tokenizer(path)
  ends = () if tokenizer.eot is None else (tokenizer.eot,)
  return Pretrained(model, params, tokenizer, None, ends), run.sample


def make_writer(
  flags: argparse.Namespace, found: Pretrained, usual: Any
) -> Writer:
  """A model as a writer, sampled by the flags or else as usual."""
  if flags.num_samples < 1:
    raise UserError(f"--num_samples={flags.num_samples}: use 1 or more")

  def chosen(value: Any, default: Any) -> Any:
    return default if value is None else value

  cold = flags.greedy or (flags.chat and flags.temperature is None)
  compute = Compute(dtype=flags.dtype, unroll=True)
  return Writer(
    model=found.model,
    params=decode.ready(found.model, found.params, compute),
    compute=compute,
    tokenizer=found.tokenizer,
    sampler=make_sampler(
      0 if cold else chosen(flags.temperature, usual.temperature),
      chosen(flags.top_k, usual.top_k),
      chosen(flags.top_p, usual.top_p),
    ),
    n=chosen(flags.max_new_tokens, 512 if flags.chat else usual.tokens),
    key=jax.random.key(flags.seed),
    ends=found.ends,
    start=found.start,
  )


def chat(flags: argparse.Namespace) -> None:
  """A conversation: one turn with --prompt, else a turn per line of input."""
  found, usual = find(flags)
  template = _template(flags.template, found.template)
  talk = Chat(make_writer(flags, found, usual), template)
  if flags.system is not None:
    talk.messages.append({"role": "system", "content": flags.system})
  if flags.prompt is not None:
    show(talk.reply(flags.prompt))
  elif sys.stdin.isatty():
    ask("Talk. Ctrl-C stops an answer, Ctrl-D ends.", talk.reply)
  else:
    for line in sys.stdin:
      show(talk.reply(line.removesuffix("\n")))
  print(talk.writer.figures(), file=sys.stderr)


def _template(name: str | None, own: ChatTemplate | None) -> ChatTemplate:
  """The template that is asked for, or else the model's own."""
  if name is None and own is None:
    raise UserError(
      "this model says nothing of how a conversation is written; choose one "
      f"of --template={', '.join(TEMPLATES)}, or a file"
    )
  if name is None:
    return own
  source = TEMPLATES.get(name)
  if source is None:
    try:
      source = Path(name).read_text(encoding="utf-8")
    except OSError as error:
      raise UserError(
        f"--template={name} is neither {', '.join(TEMPLATES)} nor a file"
      ) from error
  return dataclasses.replace(own or ChatTemplate(""), source=source)


def converse(writer: Writer) -> None:
  """Continues each line that is typed, until the end of input (Ctrl-D)."""
  number = itertools.count()
  ask(
    "Type a beginning. Ctrl-C stops a text, Ctrl-D ends.",
    lambda text: writer.pieces(text, next(number)),
  )


def ask(greeting: str, answer: Callable[[str], Iterable[str]]) -> None:
  """Answers each line that is typed, until the end of input."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401, it gives input() a history
  print(greeting)
  while True:
    try:
      prompt = input("> ")
    except EOFError:
      return print()
    try:
      show(answer(prompt))
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
