"""Samples from a model, and talks with it, in the terminal and from files.

    python -m jaxlm.generate --workdir=runs/tiny --prompt="A list is"
    python -m jaxlm.generate --model=FILE.gguf --chat --prompt="Who are you?"
    python -m jaxlm.generate --model=DIR --prompts=IN.jsonl --out=OUT.jsonl

Without --prompt, what is piped in is the prompt; at a terminal, each line
typed is one, or one turn of a conversation (/help there shows commands). What
the model adds appears as it is made, and figures about it on stderr at the
end. docs/generate.md has all flags with examples.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm import program, workdir
from jaxlm.data.chat import TEMPLATES, ChatTemplate
from jaxlm.errors import UserError
from jaxlm.generate import batch, constraints, decode
from jaxlm.generate.chat import Chat
from jaxlm.generate.methods import Draw, Method, parse_method
from jaxlm.generate.options import parse_cache, parse_filters
from jaxlm.generate.samplers import Sampler, make_sampler
from jaxlm.generate.text import Writer
from jaxlm.interop import beside, pretrained
from jaxlm.interop.load import load
from jaxlm.interop.pretrained import Pretrained
from jaxlm.layers.cache import FULL
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
  add("--prompts", metavar="FILE", help="many: JSON lines, or plain ones")
  add("--out", metavar="FILE", help="of --prompts, JSON lines; else stdout")
  add("--resume", action="store_true", help="go on behind what --out has")
  add("--batch", type=int, metavar="N", help="texts side by side; default: 8")
  add("--logprobs", type=int, metavar="N", help="and those of the N likeliest")
  add("--max_new_tokens", type=int, metavar="N", help="length of a sample")
  add("--stop", action="append", metavar="TEXT", help="ends a text; repeatable")
  add("--truncate", action="store_true", help="cut prompts that are too long")
  add("--slide", action="store_true", help="read the end of such prompts")
  add("--cache", metavar="KIND", help="'ring(1024, sinks=4)', int8, float8")
  add("--method", metavar="NAME", help="sample, greedy, beam(beams=4), ...")
  add("--draft", metavar="PATH", help="a smaller model, to speculate with")
  add("--sampler", metavar="TEXT", help="as 'temperature(0.8) min_p(0.05)'")
  add("--temperature", type=float, metavar="T", help="0: always the likeliest")
  add("--top_k", type=int, metavar="K", help="among the K likeliest; 0: all")
  add("--top_p", type=float, metavar="P", help="among those that sum to P")
  add("--greedy", action="store_true", help="the same as --temperature=0")
  add("--regex", metavar="TEXT", help="what all of the new text has to match")
  add("--json_schema", metavar="JSON", help="what it is, as JSON; or a file")
  add("--grammar", metavar="FILE", help="a grammar it is of, as Lark writes it")
  add("--seed", type=int, default=0, metavar="N", help="of what is random")
  add("--num_samples", type=int, default=1, metavar="N", help="default: 1")
  add("--checkpoint", default="latest", help="latest, best, or a step")
  add("--dtype", default="float32", help="float32, bfloat16 or float16")
  add("--no-stream", action="store_true", help="all samples at once, when done")
  add("--profile", metavar="DIR", help="write a trace of it there")
  add("--stats", metavar="FILE", help="the figures as JSON, too")
  return flags


def main(argv: Sequence[str]) -> None:
  """Runs the program.

  Raises:
    UserError: for wrong or contradictory flags, a workdir without a usable
      model, a prompt that the tokenizer cannot express or the context hold.
  """
  flags = parser().parse_args(argv)
  check(flags)
  requests = None if flags.prompts is None else batch.read(flags.prompts)
  prompt = flags.prompt
  if not (flags.chat or requests or sys.stdin.isatty()) and prompt is None:
    prompt = sys.stdin.read().removesuffix("\n")
  found, usual = find(flags)
  writer = make_writer(flags, found, usual)
  with contextlib.ExitStack() as scope:
    scope.enter_context(memory_explained(flags, writer))
    if flags.profile is not None:
      folder = Path(flags.profile)
      scope.enter_context(
        jax.profiler.trace(folder, create_perfetto_trace=True)
      )
    go_on(flags, writer, found, requests, prompt)
  conclude(writer, flags.stats)


def go_on(
  flags: argparse.Namespace,
  writer: Writer,
  found: Pretrained,
  requests: Sequence[batch.Request] | None,
  prompt: str | None,
) -> None:
  """Writes what the flags ask for."""
  if requests is not None:
    many(flags, writer, found, requests)
  elif flags.chat:
    chat(flags, Chat(writer, find_template(flags.template, found.template)))
  elif prompt is None:
    converse(writer)
  elif flags.no_stream or not writer.method.streams:
    texts = writer.texts(prompt, flags.num_samples)
    print("\n---\n".join(texts))
  else:
    for i in range(flags.num_samples):
      print("---\n" * (i > 0), end="")
      show(writer.pieces(prompt, i))


def memory_explained(
  flags: argparse.Namespace, writer: Writer
) -> contextlib.AbstractContextManager:
  """Where memory runs out, the error says of what and what would help."""
  from jaxlm.plan import failure, make

  rows = flags.num_samples * (flags.batch or 8 if flags.prompts else 1)
  length = min(writer.model.max_positions, 512 + writer.n)
  kind = getattr(writer.method, "cache", FULL)
  config = configs.freeze({"precision": flags.dtype})
  return failure.explained(
    lambda: failure.of_generation(
      config, writer.model, make.Generation(rows, length, kind)
    )
  )


# --- What the flags say -----------------------------------------------------

# Flags that contradict one another, and those that need another one.
_EITHER = (
  ("prompt", "prompts"),
  ("chat", "prompts"),
  ("truncate", "slide"),
  ("greedy", "sampler"),
  ("greedy", "method"),
  *(("greedy", name) for name in ("temperature", "top_k", "top_p")),
  *(("sampler", name) for name in ("temperature", "top_k", "top_p")),
)
_NEEDS = (
  ("out", "prompts"),
  ("resume", "out"),
  ("batch", "prompts"),
  ("logprobs", "prompts"),
  ("system", "chat"),
)


def check(flags: argparse.Namespace) -> None:
  """Raises UserError for flags that do not go together."""
  given = {
    k for k, v in vars(flags).items() if v is not None and v is not False
  }
  for one, other in _EITHER:
    if {one, other} <= given:
      raise UserError(
        f"--{one} and --{other} contradict each other; leave one out"
      )
  for one, other in _NEEDS:
    if one in given and other not in given:
      raise UserError(f"--{one} belongs to --{other}, which is not given")
  for name, least in (("num_samples", 1), ("batch", 1), ("logprobs", 0)):
    value = getattr(flags, name)
    if value is not None and value < least:
      raise UserError(f"--{name}={value}: use {least} or more")
  if flags.draft and not (flags.method or "").startswith("speculative"):
    raise UserError("--draft belongs to --method=speculative; leave one out")
  if flags.chat and flags.num_samples > 1:
    raise UserError("--chat and --num_samples contradict each other")


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
  model, params = load(path, flags.dtype, which=which)
  pretrained.check_talks(model, path)
  of_run = path / "config.json"
  run = configs.read(path) if of_run.exists() else configs.default_config()
  tokenizer = workdir.load_tokenizer(path)
  said = beside.said(tokenizer)
  return Pretrained(
    model, params, tokenizer, said.template, said.ends, said.start
  ), run.sample


def make_writer(
  flags: argparse.Namespace, found: Pretrained, usual: Any
) -> Writer:
  """A model as a writer, which goes on as the flags say or else as usual."""
  n = flags.max_new_tokens
  if n is None:
    n = 512 if flags.chat else usual.tokens
  method = make_method(flags, found, usual)
  compute = Compute(dtype=flags.dtype, unroll=True)
  return Writer(
    model=found.model,
    params=decode.ready(found.model, found.params, compute),
    compute=compute,
    tokenizer=found.tokenizer,
    method=method,
    n=n,
    key=jax.random.key(flags.seed),
    ends=found.ends,
    start=found.start,
    stops=[_unescaped(stop) for stop in flags.stop or ()],
    long="truncate" if flags.truncate else "slide" if flags.slide else None,
  )


def make_method(
  flags: argparse.Namespace, found: Pretrained, usual: Any
) -> Method:
  """How the flags, or else the run's config, say that texts go on."""
  filters = None
  if flags.sampler is not None:
    filters = parse_filters(flags.sampler, found.ends, found.model.vocab)
  draft = None
  if flags.draft is not None:
    smaller = pretrained.read(flags.draft, flags.dtype)
    draft = smaller.model, smaller.params
  sampler = _sampler(flags, usual)
  method = parse_method(flags.method or "sample", filters, sampler, draft)
  if method.counts is not None and flags.num_samples > method.counts:
    raise UserError(
      f"--method={flags.method} finds {method.counts} texts of a prompt; ask "
      f"for fewer than --num_samples={flags.num_samples}, or raise its numbers"
    )
  if flags.logprobs is not None and not method.scores:
    raise UserError(
      "--logprobs works where tokens are chosen one by one; use "
      "--method=sample or --method=greedy"
    )
  if flags.slide and not method.streams:
    raise UserError(
      f"--method={flags.method} needs the whole text, so nothing can --slide; "
      "use --truncate, or --method=sample"
    )
  if flags.cache is not None:
    if not isinstance(method, Draw):
      raise UserError(
        f"--method={flags.method} keeps whole caches; --cache works with "
        "--method=sample and --method=greedy"
      )
    method = dataclasses.replace(method, cache=parse_cache(flags.cache))
  return _constrained(method, flags, found)


def _constrained(
  method: Method, flags: argparse.Namespace, found: Pretrained
) -> Method:
  """The method within the language that the flags ask for, if they do."""
  spec = constraints.named(flags.regex, flags.json_schema, flags.grammar)
  if spec is None:
    return method
  if not isinstance(method, Draw):
    raise UserError(
      f"--method={flags.method} follows no constraint; use --method=sample or "
      "--method=greedy"
    )
  constraint = constraints.compile(spec, found.tokenizer)
  return dataclasses.replace(method, constraint=constraint)


def _sampler(flags: argparse.Namespace, usual: Any) -> Sampler:
  """The sampler of the three usual numbers; conversations are greedy."""
  names = ("temperature", "top_k", "top_p")
  given = [name for name in names if getattr(flags, name) is not None]
  method = re.split(r"\W", flags.method or "")[0]
  if given and method in ("greedy", "beam", "diverse_beam", "contrastive"):
    raise UserError(f"--method={method} draws nothing; leave --{given[0]} out")
  numbers = {n: getattr(flags if n in given else usual, n) for n in names}
  cold = flags.chat and not flags.method and "temperature" not in given
  if cold or flags.greedy:
    numbers["temperature"] = 0
  return make_sampler(**numbers)


def _unescaped(text: str) -> str:
  r"""What a shell cannot easily write: \n, \t and \\ become what they mean."""
  meant = {"n": "\n", "t": "\t", "\\": "\\"}
  return re.sub(r"\\([nt\\])", lambda found: meant[found[1]], text)


def find_template(name: str | None, own: ChatTemplate | None) -> ChatTemplate:
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


# --- What is done with it ---------------------------------------------------


def many(
  flags: argparse.Namespace,
  writer: Writer,
  found: Pretrained,
  requests: Sequence[batch.Request],
) -> None:
  """Continues the prompts of a file."""
  template = found.template
  if flags.template is not None:
    template = find_template(flags.template, template)
  batches = batch.Batches(
    writer,
    template,
    flags.seed,
    flags.num_samples,
    flags.batch or 8,
    flags.logprobs,
  )
  batch.run(batches, requests, flags.out, flags.resume)


def chat(flags: argparse.Namespace, talk: Chat) -> None:
  """A conversation: one turn with --prompt, else a turn per line of input."""
  if flags.system is not None:
    talk.system(flags.system)

  def answer(line: str) -> Iterable[str]:
    said = talk.command(line)
    return talk.reply(line) if said is None else [said]

  if flags.prompt is not None:
    show(talk.reply(flags.prompt))
  elif sys.stdin.isatty():
    ask("Talk. Ctrl-C stops an answer, Ctrl-D ends, /help helps.", answer)
  else:
    for line in sys.stdin:
      show(answer(line.removesuffix("\n")))


def conclude(writer: Writer, path: str | None) -> None:
  """Prints the figures, and writes them to a file if there is a path."""
  print(writer.figures, file=sys.stderr)
  if path is not None:
    try:
      report = json.dumps(writer.figures.report(), indent=2)
      Path(path).write_text(report + "\n", encoding="utf-8")
    except OSError as error:
      raise UserError(f"cannot write {path}: {error.strerror}") from error


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
