"""The whole chain: from text to a model that was taught, rewarded and judged.

    python -m jaxlm.chain --stages=configs/chains/tiny.py --workdir=runs/chain

Every stage is one of the programs, started as one would start it by hand; its
command is printed. Each has a directory of its own below the workdir, so that
a chain which was stopped continues where it was: finished stages are left as
they are, and the one that was cut off resumes. At the end the stages that can
answer are asked the same held-out questions, and a table and a plot tell what
each has brought.
"""

import argparse
import json
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from jaxlm import files, program
from jaxlm.errors import UserError

DONE = "done.json"  # in the directory of a stage that has come to its end


@dataclass(frozen=True)
class Stage:
  """One program of a chain.

  Attributes:
    name: of the stage, and of its directory.
    module: the program: 'train', 'rl.ppo', 'rl.best_of', ...
    config: its config file; '' for a program that has none.
    keys: config keys to set, or flags where there is no config; `{other}`
      becomes the directory of that stage, and `{name}` this one's own.
    judged: whether it is asked the questions at the end.
  """

  name: str
  module: str
  config: str = ""
  keys: dict[str, Any] = field(default_factory=dict)
  judged: bool = False


@dataclass(frozen=True)
class Chain:
  """Stages in order, and what those that can answer are asked.

  Attributes:
    stages: what is run.
    questions: flags of `jaxlm.evaluate`, as in `--task=add --n=200`.
    metric: of those it reports, the one in the table.
  """

  stages: tuple[Stage, ...]
  questions: str
  metric: str = "exact"


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flags = program.Parser(
    prog="python -m jaxlm.chain",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = flags.add_argument
  add(
    "--stages",
    default="configs/chains/tiny.py",
    metavar="FILE",
    help="the chain",
  )
  add("--workdir", default="runs/chain", metavar="DIR", help="where it lives")
  add("--quick", action="store_true", help="a few steps of each, to see it run")
  add("--seed", type=int, default=0, metavar="N", help="of every stage; 0")
  return flags


def main(argv: Sequence[str]) -> None:
  """Runs the stages that are not finished, then compares.

  Raises:
    UserError: for a file without a chain, or a stage that failed.
  """
  flags = parser().parse_args(list(argv))
  chain, workdir = read(Path(flags.stages), flags.quick), Path(flags.workdir)
  for number, stage in enumerate(chain.stages, 1):
    print(f"=== {number} of {len(chain.stages)}: {stage.name}", flush=True)
    run(stage, chain, workdir, flags.seed)
  judged = [stage for stage in chain.stages if stage.judged]
  found = {s.name: judge(s, chain, workdir) for s in judged}
  print(table(chain, found, workdir))
  print(f"plot     {draw(chain, found, workdir)}")


def read(path: Path, quick: bool) -> Chain:
  """The chain that `get_chain(quick)` of a file returns.

  Raises:
    UserError: if there is no such file or function, or stages do not fit.
  """
  if not path.is_file():
    raise UserError(f"there is no file {path}; name a chain with --stages=FILE")
  get = runpy.run_path(str(path)).get("get_chain")
  if get is None:
    raise UserError(f"{path} has no function get_chain(quick)")
  chain, seen = get(quick), set()
  for stage in chain.stages:
    for name in needs(stage):
      if name not in {*seen, stage.name}:
        raise UserError(
          f"stage {stage.name!r} needs {{{name}}}, which is no stage before "
          f"it; those are: {', '.join(sorted(seen)) or 'none'}"
        )
    if stage.name in seen:
      raise UserError(f"two stages are called {stage.name!r}; rename one")
    seen.add(stage.name)
  return chain


def needs(stage: Stage) -> list[str]:
  """Names of the stages that a stage's keys speak of, in braces."""
  texts = [v for v in stage.keys.values() if isinstance(v, str)]
  parts = [part for text in texts for part in Formatter().parse(text)]
  return [name for _, name, _, _ in parts if name]


def run(stage: Stage, chain: Chain, workdir: Path, seed: int) -> None:
  """Runs one stage to its end, unless it has come there before."""
  here = workdir / stage.name
  if (here / DONE).exists():
    took = json.loads((here / DONE).read_text())["seconds"]
    print(f"finished before, in {took:.0f} s")
    return
  where = {s.name: str(workdir / s.name) for s in chain.stages}
  took = call(f"jaxlm.{stage.module}", flags_of(stage, where, seed))
  here.mkdir(parents=True, exist_ok=True)
  files.replace(here / DONE, json.dumps({"seconds": took}))


def flags_of(stage: Stage, where: dict[str, str], seed: int) -> list[str]:
  """The flags of a stage's program.

  Args:
    stage: what is run.
    where: the directory of each stage.
    seed: of the run.
  """
  values = {
    key: value.format(**where) if isinstance(value, str) else value
    for key, value in ({"seed": seed} | stage.keys).items()
  }
  if not stage.config:
    switches = [f"--{k}" for k, v in values.items() if v is True]
    return [f"--{k}={v}" for k, v in values.items() if v is not True] + switches
  begin = [f"--config={stage.config}", f"--workdir={where[stage.name]}"]
  return begin + [f"--config.{key}={v}" for key, v in values.items()]


def call(module: str, flags: Sequence[str]) -> float:
  """Runs a program as a process of its own; the seconds it took.

  Raises:
    UserError: if it failed; what it said stands above.
    SystemExit: if it was interrupted.
  """
  command = [sys.executable, "-m", module, *flags]
  print(f"python -m {module} {shlex.join(flags)}", flush=True)
  begin = time.perf_counter()
  code = subprocess.run(command).returncode
  if code in (130, 143):
    raise SystemExit(code)
  if code:
    raise UserError(
      f"{module} ended with status {code}; mend what it says above, and start "
      "the chain again: it goes on from there"
    )
  return time.perf_counter() - begin


def judge(stage: Stage, chain: Chain, workdir: Path) -> dict[str, Any]:
  """What `jaxlm.evaluate` says of a stage: an estimate with its interval."""
  out = workdir / f"{stage.name}.json"
  flags = [f"--workdir={workdir / stage.name}", f"--out={out}"]
  call("jaxlm.evaluate", [*flags, *shlex.split(chain.questions)])
  metrics = json.loads(out.read_text())["metrics"]
  if chain.metric not in metrics:
    known = ", ".join(metrics)
    raise UserError(f"no metric {chain.metric!r} was measured; known: {known}")
  return metrics[chain.metric]


def table(chain: Chain, found: dict[str, dict], workdir: Path) -> str:
  """Seconds of each stage, and what those that answer have reached."""
  lines = [f"{'stage':12} {'seconds':>8}  {chain.metric}"]
  for stage in chain.stages:
    took = json.loads((workdir / stage.name / DONE).read_text())["seconds"]
    told = ""
    if stage.name in found:
      f = found[stage.name]
      told = f"{f['value']:.1f} ({f['low']:.1f} to {f['high']:.1f})"
    lines.append(f"{stage.name:12} {took:8.0f}  {told}")
  text = "\n".join(lines)
  files.replace(workdir / "chain.txt", text + "\n")
  return text


def draw(chain: Chain, found: dict[str, dict], workdir: Path) -> Path:
  """A bar for each stage that answers, with its interval."""
  from matplotlib.figure import Figure

  page = Figure(figsize=(5.2, 3.4), layout="constrained")
  ax, path = page.subplots(), workdir / "chain.png"
  for name, f in found.items():
    ends = [[f["value"] - f["low"]], [f["high"] - f["value"]]]
    ax.bar(name, f["value"], yerr=ends, color="#2f6db3", capsize=4)
  ax.set(ylabel=chain.metric, title=chain.questions)
  ax.spines[["top", "right"]].set_visible(False)
  page.savefig(path, dpi=110)
  return path


if __name__ == "__main__":
  program.run(main)
