"""Configs: files that return a ConfigDict, and keys on the command line.

A config file starts from the defaults of `jaxlm/keys.py` and changes values:

    from jaxlm.config import default_config

    def get_config(style: str = "gpt2"):
      config = default_config()
      config.steps = 2000
      config.model.family = style
      return config

`--config=FILE` names the file, `--config.style=modern` sets a parameter of its
`get_config` (a switch), and `--config.optimizer.lr=3e-4` any key after that.
What a program receives is frozen: it is a value, like everything else here.

Left out on purpose: reading flags through absl, whose errors for a wrong key
are tracebacks, and interpolation between keys, which Python already has.
"""

import ast
import inspect
import json
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import keys
from jaxlm.errors import UserError
from jaxlm.keys import Key

Config = ConfigDict | FrozenConfigDict


def default_config() -> ConfigDict:
  """Every key at its default, for a config file to change."""
  # Types are checked later, all in one place and with one kind of message.
  return ConfigDict(keys.sections(keys.defaults()), type_safe=False)


def freeze(flat: dict[str, Any]) -> FrozenConfigDict:
  """A config from leaves by dotted key; what is not given is default.

  Raises:
    UserError: for an unknown key, or a value that does not fit.
  """
  return FrozenConfigDict(keys.sections(keys.checked(flat)))


# --- Config files -----------------------------------------------------------


def from_file(path: Path, texts: dict[str, str]) -> tuple[dict[str, Any], str]:
  """The leaves of what a config file returns, and a name for the run.

  Takes the switches out of `texts`, and leaves the rest of it.
  """
  function = _get_config(path)
  switches = _switches(path, function, texts)
  config = _blame(path, lambda: function(**switches))
  if not isinstance(config, Config):
    raise UserError(
      f"{path}: get_config must return its config, not {config!r}"
    )
  try:
    flat = keys.checked(keys.flatten(config))
  except UserError as e:
    raise UserError(f"{path}: {e}") from None
  return flat, "-".join([path.stem, *map(str, switches.values())])


def _get_config(path: Path) -> Callable[..., Any]:
  """The function `get_config` of a config file."""
  if not path.is_file():
    files = [str(p) for p in sorted(path.parent.glob("*.py"))]
    raise UserError(f"no config file {path}{keys.nearest(str(path), files)}")
  module = types.ModuleType(path.stem)
  module.__file__ = str(path)

  def execute():
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    exec(code, module.__dict__)

  _blame(path, execute)
  if not callable(getattr(module, "get_config", None)):
    raise UserError(
      f"{path} has no function get_config; docs/config.md shows the form"
    )
  return module.get_config


def _blame(path: Path, part: Callable[[], Any]) -> Any:
  """Runs a part of a config file: its mistakes are told with file and line."""
  try:
    return part()
  except UserError:
    raise
  except SyntaxError as e:
    raise UserError(f"{path} line {e.lineno}: {e.msg}") from e
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    lines = [f.lineno for f in frames if f.filename == str(path)]
    where = f"{path} line {lines[-1]}" if lines else str(path)
    text = f"{type(e).__name__}: {e}"
    if isinstance(e, AttributeError) and isinstance(e.obj, Config):
      text = str(keys.unknown(e.name))  # config.modle.dim = 1
    raise UserError(f"{where}: {text}") from e


def _switches(
  path: Path, function: Callable[..., Any], texts: dict[str, str]
) -> dict[str, Any]:
  """Takes the parameters of `get_config` out of the texts, typed."""
  parameters = inspect.signature(function).parameters
  switches = {}
  for name, p in parameters.items():
    if name in keys.KEYS:
      raise UserError(f"{path}: get_config's parameter {name} is also a key")
    if name in texts:
      switches[name] = parse_value(name, texts.pop(name), Key(p.default, ""))
    elif p.default is p.empty:
      raise UserError(f"{path} needs the switch --config.{name}=VALUE")
  for name in texts:
    if name not in keys.KEYS and not keys.is_open(name):
      raise keys.unknown(name, parameters)
  return switches


# --- Values from the command line ------------------------------------------


def parse_value(name: str, text: str, key: Key | None = None) -> Any:
  """The value of a key from its text; without a key, as Python reads it.

  >>> parse_value("steps", "1e3", Key(1, ""))
  1000
  >>> parse_value("data.path", "1e3", Key("", ""))
  '1e3'
  >>> parse_value("model.window", "(1, None)"), parse_value("model.x", "ab")
  ((1, None), 'ab')

  Raises:
    UserError: if the text does not read as a value of the key's type.
  """
  if key is None:
    return _literal(text)
  if key.optional and text.lower() == "none":
    return None
  tuple_like = tuple in key.types and text[:1] in ("(", "[")
  if str in key.types and not tuple_like:
    return text
  value = _literal(text)
  if key.types == (tuple,) and not isinstance(value, tuple | list):
    value = tuple(filter(None, (part.strip() for part in text.split(","))))
  return keys.fit(name, value, key)


def _literal(text: str) -> Any:
  """A Python literal, `true`, `false`, `none`, `inf`, or the text itself."""
  words = {"true": True, "false": False, "none": None, "inf": float("inf")}
  if text.lower() in words:
    return words[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


# --- Runs on disk -----------------------------------------------------------


def to_json(config: Config) -> str:
  """A config as JSON text; `from_json` gives the equal config back."""
  return json.dumps(keys.nest(keys.leaves(config)), indent=2) + "\n"


def from_json(text: str) -> FrozenConfigDict:
  """The config that `to_json` wrote; keys it lacks take their defaults.

  JSON knows no tuples, and a config no lists: each list was a tuple.

  Raises:
    UserError: if the text is not JSON, or not a config.
  """
  try:
    tree = json.loads(text)
  except ValueError as e:
    raise UserError(f"not a config in JSON ({e})") from e
  if not isinstance(tree, dict):
    raise UserError(f"not a config in JSON ({text[:20]!r} is no object)")
  return freeze(keys.flatten(tree))


def read(workdir: Path | str) -> FrozenConfigDict:
  """The config of the run in `workdir`.

  Raises:
    UserError: if there is none, or it does not read.
  """
  path = Path(workdir) / "config.json"
  try:
    return from_json(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(
      f"{workdir} holds no run: it has no config.json; check the path, or "
      "start a run with --config=FILE"
    ) from None
  except (UserError, UnicodeDecodeError) as e:
    raise UserError(f"{path} is damaged: {e}") from e


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
  """`(key, old value, new value)` of every leaf that differs.

  An open key that is absent counts as None, which is the same to `call`.
  """
  a, b = keys.leaves(old), keys.leaves(new)
  names = dict.fromkeys([*a, *b])
  return [(n, a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n)]


def check_continues(old: Config, new: Config, workdir: Path | str) -> None:
  """Raises unless `new` may continue the run that `old` began in `workdir`.

  Keys in `keys.FREE` may differ. Any other difference would make a run that
  is neither the one nor the other.
  """
  changed = [
    f"{name} was {a!r}, now {b!r}"
    for name, a, b in differences(old, new)
    if name not in keys.FREE and f"{name.split('.')[0]}.*" not in keys.FREE
  ]
  if changed:
    raise UserError(
      f"{workdir} was made by another config ({'; '.join(changed)}); choose "
      "another --workdir, or the old values"
    )


# --- From keys to values ----------------------------------------------------


def call(
  function: Callable[..., Any],
  section: Config,
  name: str = "model",
  skip: Sequence[str] = ("family",),
  label: str = "",
  **given: Any,
) -> Any:
  """Calls `function` with the keys of a section that are set, and `given`.

  A key that is None is not passed, so the function's own default holds. The
  types of keys are checked where the function annotates a plain one.

  Args:
    function: makes a value, for example a model family's constructor.
    section: for example `config.model`.
    name: the section's name, for messages.
    skip: keys of the section that are not arguments.
    label: what to call the function in messages, for example 'gpt2'.
    given: arguments that come from elsewhere, for example `vocab=65`.

  Raises:
    UserError: for a key the function does not take, or one that it needs.
  """
  label = label or function.__name__
  parameters = inspect.signature(function).parameters
  hints = typing.get_type_hints(function)
  open_to = [p for p in parameters if p not in given]
  values = dict(given)
  for key, value in section.items():
    if key in skip or value is None:
      continue
    if key not in open_to:
      hint = keys.nearest(key, open_to, f"config.{name}.")
      raise UserError(
        f"{label} takes no config.{name}.{key}"
        + (hint or f"; it takes {', '.join(open_to)}")
      )
    declared = _declared(hints.get(key))
    if declared:
      value = keys.fit(f"{name}.{key}", value, declared)
    values[key] = value
  for p in parameters.values():
    if p.default is p.empty and p.name not in values:
      raise UserError(
        f"{label} needs config.{name}.{p.name}; set it, as in "
        f"--config.{name}.{p.name}=VALUE"
      )
  return function(**values)


def _declared(hint: Any) -> Key | None:
  """A Key of the types in an annotation, if those are plain ones."""
  kinds = typing.get_args(hint) or (hint,)
  if typing.get_origin(hint) is tuple:
    kinds = (tuple,)
  plain = tuple(k for k in kinds if k in (bool, int, float, str, tuple))
  if not plain or set(kinds) - {*plain, types.NoneType}:
    return None
  return Key(None, "", plain)
