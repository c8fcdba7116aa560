"""Frozen values as JSON: a model is data, so it can be written down whole.

A dataclass becomes an object whose key "is" names its class and whose other
keys are its fields, a function becomes {"is": its name}, a tuple a list:

    {"is": "layers.norm:RMSNorm", "dim": 64, "eps": 1e-06, ...}

Names are read below `jaxlm.layers` and `jaxlm.models` alone, and nothing is
called but the constructors of frozen dataclasses, so a file from elsewhere can
describe a model and nothing more.
"""

import dataclasses
import importlib
import inspect
import json
from typing import Any

from jaxlm.errors import UserError

_ROOT = "jaxlm."
_HOMES = ("layers.", "models.")


def to_json(value: Any) -> str:
  """The JSON text of a value; `from_json` gives an equal value back.

  Raises:
    UserError: if some part of it is not plain, frozen data from jaxlm.
  """
  return json.dumps(_plain(value), indent=1) + "\n"


def from_json(text: str) -> Any:
  """The value that `to_json` wrote; fields it lacks take their defaults.

  Raises:
    UserError: if the text is not JSON, or names what this version of jaxlm
      does not have.
  """
  try:
    return _value(json.loads(text))
  except ValueError as e:
    raise UserError(f"it is not JSON ({e})") from e
  except (TypeError, KeyError, AttributeError) as e:
    raise UserError(f"it describes no value ({e})") from e


def _plain(value: Any) -> Any:
  """Dicts, lists and scalars that stand for a value."""
  if value is None or type(value) in (bool, int, float, str):
    return value
  if isinstance(value, tuple):
    return [_plain(v) for v in value]
  name = _name(value if inspect.isfunction(value) else type(value))
  if inspect.isfunction(value):
    return {"is": name}
  fields = dataclasses.fields(value)
  return {"is": name} | {f.name: _plain(getattr(value, f.name)) for f in fields}


def _name(thing: Any) -> str:
  """'layers.norm:RMSNorm', if that is where it can be found again."""
  name = f"{thing.__module__}:{thing.__qualname__}"
  name = name.removeprefix(_ROOT)
  if not name.startswith(_HOMES) or _find(name) is not thing:
    raise UserError(
      f"{thing} cannot be written down: only frozen dataclasses and functions "
      "of jaxlm.layers and jaxlm.models can, plain numbers, texts and tuples"
    )
  return name


def _value(data: Any) -> Any:
  """The inverse of `_plain`."""
  if isinstance(data, list):
    return tuple(_value(v) for v in data)
  if not isinstance(data, dict):
    return data
  fields = {name: _value(v) for name, v in data.items() if name != "is"}
  thing = _find(data["is"])
  return thing if inspect.isfunction(thing) else thing(**fields)


def _find(name: str) -> Any:
  """The class or function of this name."""
  module, _, attribute = name.partition(":")
  if not module.startswith(_HOMES):
    raise UserError(f"{name!r} is outside jaxlm.layers and jaxlm.models")
  try:
    thing = getattr(importlib.import_module(_ROOT + module), attribute)
  except (ImportError, AttributeError):
    raise UserError(
      f"this version of jaxlm has no {name!r}; use the version it was "
      "written with"
    ) from None
  frozen = inspect.isclass(thing) and dataclasses.is_dataclass(thing)
  if not inspect.isfunction(thing) and not frozen:
    raise UserError(f"{name!r} is neither a dataclass nor a function")
  return thing
