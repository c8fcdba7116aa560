"""Plans a run on hardware that need not be there.

    python -m jaxlm.plan --config=configs/llama3_8b.py --target=v5e:16x16
    python -m jaxlm.plan --config=FILE --target=h100:64 --tokens=1e12 --price=2

The programs of the run are compiled for the target from shapes alone, and read.
Prices are yours: `--price` is dollars per chip and hour.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jaxlm import program
from jaxlm.errors import UserError


def main(argv: Sequence[str]) -> None:
  """Prints and saves the plan that the flags ask for."""
  run = program.load(argv, add_flags(program.parser(__doc__)))
  flags = run.flags
  if flags.target is None:
    raise UserError(f"name a target, as in --target=v5e:16x16; {KNOWN}")
  from jaxlm.plan import make, memory, report  # JAX starts here

  which = [n.strip() for n in flags.programs.split(",") if n.strip()]
  generation = _generation(flags)
  where = make.site(flags.target, flags.memory_limit)
  if flags.search:
    seek(run, where, flags)
    return
  if flags.explain:
    flags.no_compile = True
  made = make.plan(
    run.config,
    where,
    which,
    generation,
    not flags.no_compile,
    _say,
  )
  found = report.facts(made, flags.tokens, flags.price)
  print(report.text(found))
  extra = []
  for o in made.outcomes:
    if o.refused or o.total > where.limit:
      told = memory.explain(
        run.config, made.model, where, o.name, generation, o.total
      )
      extra.append(str(told))
  print("".join(f"\n{text}\n" for text in extra), end="")
  paths = report.save(found, run.workdir, "\n\n".join(extra))
  print("\nsaved    " + ", ".join(map(str, paths)))


def seek(run: program.Run, where: Any, flags: argparse.Namespace) -> None:
  """Searches, prints the table, and writes the winner as a config."""
  from jaxlm.files import replace
  from jaxlm.plan import search

  texts = [n.strip() for n in flags.batches.split(",") if n.strip()]
  if not all(n.isdecimal() and int(n) for n in texts):
    raise UserError(f"--batches={flags.batches}: write sizes as in 256,512")
  sizes = [int(n) for n in texts]
  found = search.search(
    run.config, where, sizes, flags.traces, flags.compiles, _say
  )
  print(search.table(found, where))
  if found.winner is None:
    raise UserError(
      "nothing that was compiled fits; raise --compiles, or take more devices"
    )
  name = flags.target.replace(":", "-")
  path = run.workdir / f"best-{name}.py"
  run.workdir.mkdir(parents=True, exist_ok=True)
  replace(path, search.config_file(found.winner, where))
  print(f"\nsaved    {path}")


def _say(text: str) -> None:
  print(f"plan     {text}", file=sys.stderr, flush=True)


KNOWN = "chips: v5e, v5p, v6e, h100, cpu"


def add_flags(flags: argparse.ArgumentParser) -> argparse.ArgumentParser:
  """The program's own flags."""
  flags.add_argument(
    "--target", metavar="CHIP:SIZE", help="v5e:16x16, v5p:8x8x8, h100:64, cpu:8"
  )
  flags.add_argument(
    "--programs",
    default="",
    help="which to plan, of train,prefill,decode and rollout,score,update",
  )
  flags.add_argument("--tokens", type=_number, help="to train on, for days")
  flags.add_argument(
    "--price", type=_number, help="dollars per chip and hour, for the cost"
  )
  flags.add_argument(
    "--rows", type=int, default=0, help="texts at once in prefill and decode"
  )
  flags.add_argument(
    "--length", type=int, default=0, help="tokens of each; default seq_len"
  )
  flags.add_argument("--cache", help="full, int8, window=1024, ... as generate")
  flags.add_argument(
    "--memory-limit", type=_bytes, help="per device, as in 16G; default all"
  )
  flags.add_argument(
    "--search", action="store_true", help="find the fastest mesh and remat"
  )
  flags.add_argument("--batches", default="", help="sizes to search, 256,512")
  flags.add_argument("--traces", type=int, default=32, help="ways to trace")
  flags.add_argument("--compiles", type=int, default=3, help="ways to compile")
  flags.add_argument(
    "--no-compile", action="store_true", help="estimates alone, in a second"
  )
  return flags


def _generation(flags: argparse.Namespace) -> Any:
  """Sizes of prefill and decode, as the flags say."""
  from jaxlm.generate.options import parse_cache
  from jaxlm.plan.make import Generation

  if flags.rows < 0 or flags.length < 0:
    raise UserError("--rows and --length are numbers of at least 1")
  if flags.cache is None:
    return Generation(flags.rows, flags.length)
  return Generation(flags.rows, flags.length, parse_cache(flags.cache))


def _number(text: str) -> float:
  """A positive number: 1e12, 15T, 300B."""
  unit = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1.0)
  return float(text if unit == 1.0 else text[:-1]) * unit


def _bytes(text: str) -> float:
  """Bytes, with a unit of 1,024 each if any: 16G, 900M."""
  unit = "KMGT".find(text[-1:].upper())
  return float(text[:-1]) * 1024 ** (unit + 1) if unit >= 0 else float(text)


if __name__ == "__main__":
  program.run(main)
