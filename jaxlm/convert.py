"""Converts a model from one form to another.

    python -m jaxlm.convert --from=Llama-3.2-1B --to=runs/llama
    python -m jaxlm.convert --from=runs/tiny --to=tiny-hf --format=hf
    python -m jaxlm.convert --from=model.gguf --to=model --format=hf
    python -m jaxlm.convert --from=runs/lora --to=adapters --format=peft

Forms are runs of ours (and what `jaxlm.save` wrote), directories of the Hugging
Face hub, and GGUF files. The tokenizer comes along. Without --format it is
GGUF for a name that ends in .gguf, ours for what came from elsewhere, and the
hub's for what is ours. A run with `config.lora` is merged into its base,
or with --format=peft its adapters are written alone.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxlm import config, program, workdir
from jaxlm.errors import UserError
from jaxlm.interop.load import is_ours, load_all
from jaxlm.interop.peft import save_adapters
from jaxlm.interop.save import FORMATS, SHARD_SIZE, save
from jaxlm.objectives.adapters import Adapters
from jaxlm.speed import short

PEFT = "peft"


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flags = program.Parser(
    prog="python -m jaxlm.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = flags.add_argument
  add("--from", required=True, metavar="PATH", dest="source", help="the model")
  add("--to", required=True, metavar="PATH", help="what is written; new")
  add("--format", choices=(*FORMATS, PEFT), help="of what is written")
  add("--dtype", help="of what is written; default: as it is, for GGUF float16")
  add(
    "--shard_size",
    type=int,
    default=SHARD_SIZE,
    metavar="BYTES",
    help="of a file of format hf; default: 5 GB",
  )
  return flags


def main(argv: Sequence[str]) -> None:
  """Runs the program.

  Raises:
    UserError: for wrong flags, a model that cannot be read, or one that has no
      words in the other form.
  """
  flags = parser().parse_args(argv)
  path, to, started = Path(flags.source), Path(flags.to), time.perf_counter()
  form = flags.format or _usual(path, to)
  if to.exists() and (to.is_file() or any(to.iterdir())):
    raise UserError(f"{to} exists already; choose another --to")
  if form == PEFT:
    return adapters(path, to)
  model, params, tokenizer = load_all(path, None)
  save(
    to,
    model,
    params,
    tokenizer,
    format=form,
    dtype=flags.dtype,
    shard_size=flags.shard_size,
  )
  n = sum(x.size for x in jax.tree.leaves(params))
  known = "" if tokenizer is not None else ", no tokenizer"
  took = time.perf_counter() - started
  print(f"{to}: {form}, {short(n)} parameters{known}, {took:.1f} s")


def adapters(path: Path, to: Path) -> None:
  """Writes what a run with `config.lora` has learned, without the base.

  Raises:
    UserError: for a run that trained no adapters.
  """
  run = config.read(path)
  model, trained, params = workdir.load_trained(path)
  if not isinstance(trained, Adapters):
    raise UserError(f"{path} trained no adapters; config.lora.rank makes them")
  base = Path(str(run.model.path)).expanduser().resolve()
  save_adapters(to, model, trained.lora, params["adapters"], str(base))
  n = sum(x.size for x in jax.tree.leaves(params["adapters"]))
  print(f"{to}: {PEFT}, {short(n)} parameters for {base}")


def _usual(path: Path, to: Path) -> str:
  """The format that is meant where none is named."""
  if to.suffix == ".gguf":
    return "gguf"
  return "hf" if is_ours(path) else "jaxlm"


if __name__ == "__main__":
  program.run(main)
