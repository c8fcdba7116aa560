"""Imports point one way, and `import jaxlm` stays light.

Each rule is a function from sources to a list of violations, and is first fed
a small planted violation, to prove that it can fail.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxlm"

# What each part may import of the package, besides itself and `errors`. From
# the leaves up; a part that is not here has no place yet, and is a violation.
_NAMES = "parallel.rules parallel.mesh"
_LEAVES = (
  "arrays checkpoint config data files interrupt keys metrics profiling speed "
  "tasks values parallel.distributed"
)
_MODELS = f"{_NAMES} layers models"
_MIDDLE = (
  "losses objectives optim state generate interop preference_losses quant "
  "workdir"
)
_UPPER = "evaluate explain recipe rl"
_PROGRAMS = (
  "host program convert plan train chain serve doctor generate.__main__ "
  "tasks.__main__ evaluate.__main__ rl.best_of rl.distil rl.grpo rl.ppo "
  "rl.reward_check"
)

MAY: dict[str, str] = {
  "errors": "",
  "files": "",
  "interrupt": "",
  "profiling": "",
  "speed": "",
  "values": "",
  "data": "",
  "tasks": "files",
  "keys": "",
  "config": "keys",
  "arrays": "files",
  "checkpoint": "arrays files parallel.distributed",
  "metrics": "files",
  "parallel": "",
  "parallel.rules": "",
  "parallel.mesh": "parallel.rules",
  "parallel.distributed": "parallel interrupt",
  "layers": _NAMES,
  "models": _MODELS,
  "models.build": f"{_MODELS} config keys",  # from a config to a model
  **dict.fromkeys(_MIDDLE.split(), f"{_MODELS} {_LEAVES} {_MIDDLE}"),
  **dict.fromkeys(_UPPER.split(), f"{_MODELS} {_LEAVES} {_MIDDLE} {_UPPER}"),
  **dict.fromkeys(
    _PROGRAMS.split(), f"{_MODELS} {_LEAVES} {_MIDDLE} {_UPPER} {_PROGRAMS}"
  ),
  "host": "data.cache",
  "__init__": f"{_MODELS} {_LEAVES} {_MIDDLE} {_UPPER}",
  "ladder": "layers.param",  # and nothing may import it
}

JUDGES = {"torch", "transformers", "tensorflow"}
HEAVY = ["grain", "jax", "matplotlib", "orbax", "sentencepiece"]
HEAVY += ["tensorboardX", "tokenizers", "wandb"]

Sources = dict[str, str]  # module, without 'jaxlm.', to its text


def sources() -> Sources:
  """Every module of the package."""
  return {
    module_name(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
  }


def module_name(path: Path) -> str:
  parts = path.with_suffix("").parts
  if len(parts) > 1 and parts[-1] == "__init__":
    parts = parts[:-1]
  return ".".join(parts)


def imports(module: str, modules: Sources) -> Iterator[str]:
  """Full names of what a module imports, wherever in it that happens."""
  for node in ast.walk(ast.parse(modules[module])):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = absolute(module, node, modules)
      for alias in node.names:
        inner = f"{base}.{alias.name}"
        name = inner.removeprefix("jaxlm.")
        yield inner if any(within(m, name) for m in modules) else base


def absolute(module: str, node: ast.ImportFrom, modules: Sources) -> str:
  """The module that a `from` names, dots resolved."""
  if not node.level:
    return node.module
  package = f"jaxlm.{module}".split(".")
  is_package = any(other.startswith(f"{module}.") for other in modules)
  up = node.level - 1 if is_package else node.level
  package = package[: len(package) - up]
  return ".".join([*package, *filter(None, [node.module])])


def inside(module: str, modules: Sources) -> set[str]:
  """What it imports of the package; 'jaxlm' is the package itself."""
  found = {n for n in imports(module, modules) if n.split(".")[0] == "jaxlm"}
  return {n.removeprefix("jaxlm.") for n in found} - {module}


def within(module: str, part: str) -> bool:
  return module == part or module.startswith(f"{part}.")


def direction(modules: Sources) -> list[str]:
  """Imports that point the wrong way."""
  wrong = []
  for module in modules:
    parts = [part for part in MAY if within(module, part)]
    if not parts:
      wrong.append(f"{module} has no place in the table")
      continue
    part = max(parts, key=len)
    allowed = ["errors", part, *MAY[part].split()]
    for name in inside(module, modules):
      if not any(within(name, a) for a in allowed):
        wrong.append(f"{module} imports {name}")
  return wrong


def cycles(modules: Sources) -> list[str]:
  """Modules that import each other, directly or around a corner."""
  edges = {m: inside(m, modules) & set(modules) for m in modules}
  reach = {m: set(edges[m]) for m in modules}
  for _ in modules:
    for m in modules:
      reach[m] |= set().union(*(reach[n] for n in reach[m]))
  return [m for m in modules if m in reach[m]]


def judges(modules: Sources) -> list[str]:
  """Imports of libraries that judge us and that we do not depend on."""
  return [
    f"{module} imports {name}"
    for module in modules
    for name in imports(module, modules)
    if name.split(".")[0] in JUDGES
  ]


def loaded(statement: str) -> list[str]:
  """Which heavy libraries are there after a statement, in a new process."""
  code = f"import sys; {statement}; print(*sys.modules)"
  run = subprocess.run(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
  )
  return [name for name in HEAVY if name in run.stdout.split()]


# --- The rules can fail -----------------------------------------------------


@pytest.mark.parametrize(
  ("planted", "violation"),
  [
    ({"layers.norm": "import jaxlm.models"}, "layers.norm imports models"),
    ({"layers": "def f():\n  from jaxlm import data"}, "layers imports data"),
    ({"layers.x": "from ..train import y"}, "layers.x imports train"),
    ({"layers": "", "layers.x": "from .. import rl"}, "layers.x imports rl"),
    ({"models.a": "import jaxlm.losses"}, "models.a imports losses"),
    ({"losses": "from jaxlm.evaluate import f"}, "losses imports evaluate"),
    ({"rl.kl": "from jaxlm import train"}, "rl.kl imports train"),
    ({"data.text": "import jaxlm.config"}, "data.text imports config"),
    ({"checkpoint": "import jaxlm.state"}, "checkpoint imports state"),
    (
      {"parallel.rules": "import jaxlm.layers"},
      "parallel.rules imports layers",
    ),
    (
      {"ladder.mlp": "import jaxlm.layers.norm"},
      "ladder.mlp imports layers.norm",
    ),
    ({"train": "import jaxlm.ladder.mlp"}, "train imports ladder.mlp"),
    ({"__init__": "from jaxlm import ladder"}, "__init__ imports ladder"),
    ({"losses": "from jaxlm import forward"}, "losses imports jaxlm"),
    ({"helpers": ""}, "helpers has no place in the table"),
    ({"parallel.plan": "import jaxlm.state"}, "parallel.plan imports state"),
  ],
)
def test_direction_finds(planted, violation):
  """Every kind of wrong import is found, in every way of writing it."""
  others = ("data", "train", "rl", "ladder", "losses")
  assert direction(dict.fromkeys(others, "") | planted) == [violation]


def test_direction_allows_what_the_table_says():
  """The table is no stricter than it reads."""
  allowed = {
    "errors": "",
    "layers.param": "import jax\nfrom jaxlm.parallel.rules import Rules",
    "layers.norm": "from jaxlm.layers.param import Param",
    "data.text": "from jaxlm.errors import UserError\nfrom . import cache",
    "data.cache": "",
    "ladder.mlp": "from jaxlm.layers.param import Param",
    "train": "from jaxlm import data, errors\nimport jaxlm.layers.norm",
  }
  assert direction(allowed) == []


def test_cycles_finds():
  """Around a corner, too; what hangs on a cycle is not in it."""
  modules = {
    "a": "import jaxlm.b",
    "b": "def f():\n  from jaxlm.c import x",
    "c": "from jaxlm import a",
    "d": "import jaxlm.a",
  }
  assert cycles(modules) == ["a", "b", "c"]


def test_judges_finds():
  """Also inside a function, and a submodule."""
  planted = {"x": "def f():\n  import torch.nn", "y": "import torchx"}
  assert judges(planted) == ["x imports torch.nn"]


# --- The package ------------------------------------------------------------


def test_imports_point_one_way():
  """Layers, models, middle, upper, programs; and leaves stay leaves."""
  assert direction(sources()) == []


def test_no_cycles():
  """A reader can take the modules in one order."""
  assert cycles(sources()) == []


def test_judges_are_no_dependencies():
  """What we are compared with (torch, transformers) is not used."""
  assert judges(sources()) == []


def test_importing_is_light():
  """What plots, logs, tokenizes and saves is loaded when that is done."""
  assert loaded("import sentencepiece") == ["sentencepiece"]
  assert loaded("import jaxlm") == []
  every = (
    "import jaxlm, jaxlm.train; [getattr(jaxlm, n) for n in jaxlm.__all__]"
  )
  assert loaded(every) == ["jax"]
