"""How a family stands on the Hugging Face hub: config.json and tensors.

Each family file ends with `HF`, a tuple of `Hub` values, one for each
`model_type` it covers: how its config.json is read into a `Decoder`, how a
`Decoder` is written as one, and the names of its tensors. What most families'
configs share is read and written here.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from jaxlm.errors import UserError
from jaxlm.layers.mask import Chunked, Sliding
from jaxlm.layers.position import Rope
from jaxlm.layers.scaling import Dynamic, Linear, Llama3, LongRope, Yarn
from jaxlm.models import families
from jaxlm.models.decoder import Decoder
from jaxlm.models.names import Names

Config = Mapping[str, Any]  # a config.json


@dataclass(frozen=True)
class Hub:
  """One `model_type` of the hub.

  Attributes:
    type: the `model_type` of its config.json.
    architecture: the class that `transformers` loads it with.
    read: a config.json as a model; raises UserError for what it cannot be.
    write: a model as a config.json that `read` gives back.
    names: where its tensors are.
  """

  type: str
  architecture: str
  read: Callable[[Config], Decoder]
  write: Callable[[Decoder], dict[str, Any]]
  names: Names

  def config(self, model: Decoder) -> dict[str, Any]:
    """The whole config.json of a model."""
    head = {"architectures": [self.architecture], "model_type": self.type}
    out = head | self.write(model)
    rope = out.get("rope_parameters") or {}
    if "rope_theta" in rope:  # where transformers 4 looks for it
      scaled = rope["rope_type"] != "default"
      out |= {"rope_theta": rope["rope_theta"]}
      out |= {"rope_scaling": rope if scaled else None}
    return out


def text_of(
  text: Hub, type: str, architecture: str, prefix: str = "language_model."
) -> Hub:
  """A `model_type` that holds a text model, and reads images besides.

  The text model alone is read, from `text_config` and the tensors that begin
  with `prefix`. It is written as what it is, with the `type` of `text`.
  """

  def read(config: Config) -> Decoder:
    if not isinstance(config.get("text_config"), Mapping):
      raise UserError(f"a config of model_type {type} has no 'text_config'")
    return text.read(config["text_config"])

  def write(model: Decoder) -> dict[str, Any]:
    del model
    raise UserError(f"a text model is no {type}; write it as {text.type}")

  table = tuple((o, prefix + t, *rest) for o, t, *rest in text.names.table)
  images = (r"^vision_(model|tower)\.", r"^multi_modal_projector\.")
  names = dataclasses.replace(
    text.names, table=table, base="", ignored=text.names.ignored + images
  )
  return Hub(type, architecture, read, write, names)


def modules() -> Iterator[ModuleType]:
  """The files of all families, in the order of their names."""
  for name in sorted(m.name for m in pkgutil.iter_modules(families.__path__)):
    yield importlib.import_module(f"{families.__name__}.{name}")


def hubs() -> Iterator[Hub]:
  """Those of all families."""
  for family in modules():
    yield from getattr(family, "HF", ())


def published() -> dict[str, Decoder]:
  """All models at their published sizes, by name."""
  found = {}
  for family in modules():
    found |= getattr(family, "PUBLISHED", {})
  return found


def find(config: Config) -> Hub:
  """The `Hub` of a config.json.

  Raises:
    UserError: if no family here has its `model_type`.
  """
  known = {hub.type: hub for hub in hubs()}
  name = config.get("model_type")
  if name not in known:
    raise UserError(
      f"no family here reads model_type {name!r}; known: "
      f"{', '.join(sorted(known))}. docs/add-a-family.md says how to add one"
    )
  return known[name]


def recognise(model: Decoder, among: Iterable[Hub] | None = None) -> Hub:
  """The `Hub` that writes a model as a config and reads the same one back.

  Args:
    model: any decoder.
    among: where to look; None means everywhere.

  Raises:
    UserError: if no family does, so that no other program could read it.
  """
  for hub in hubs() if among is None else among:
    try:
      if _bare(hub.read(hub.config(model))) == _bare(model):
        return hub
    except (UserError, AttributeError, TypeError, KeyError):
      continue  # it has what this family's config has no word for
  raise UserError(
    "no family on the Hugging Face hub has the shape of this model, so it "
    "cannot be saved in that format; jaxlm.save(path, model, params) keeps it"
  )


# Fields that say how a model is trained: configs leave them out.
_TRAINING = ("dropout", "init", "out_init", "embed_init", "head_init")
_TRAINING += ("balance", "z_loss", "noise", "dispatch", "capacity_factor")
_TRAINING += ("q_init",)


def _bare(value: Any) -> Any:
  """A value without what only training asks for, to compare."""
  if isinstance(value, tuple):
    return tuple(_bare(v) for v in value)
  if not dataclasses.is_dataclass(value):
    return value
  return type(value), tuple(
    _bare(getattr(value, f.name))
    for f in dataclasses.fields(value)
    if f.name not in _TRAINING
  )


# --- What configs share -----------------------------------------------------

_SIZES = {
  "vocab": "vocab_size",
  "dim": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "mlp_dim": "intermediate_size",
  "eps": "rms_norm_eps",
  "max_positions": "max_position_embeddings",
  "tied": "tie_word_embeddings",
}
_MUST = ("vocab_size", "hidden_size", "num_hidden_layers")
_MUST += ("num_attention_heads", "intermediate_size")


def sizes(config: Config, *leave_out: str, **defaults: Any) -> dict[str, Any]:
  """The arguments of a family's `decoder` that most configs name alike.

  Args:
    config: a config.json.
    leave_out: arguments this family's `decoder` does not take.
    defaults: what a key of the config means where it is absent. Files leave
      out what their program takes anyway, so give what it takes.

  Raises:
    UserError: if a size is missing.
  """
  config = {"tie_word_embeddings": False} | defaults | dict(config)
  for key in _MUST:
    if config.get(key) is None:
      raise UserError(f"the config has no {key!r}; is config.json whole?")
  if config.get("num_key_value_heads") is None:
    config["num_key_value_heads"] = config["num_attention_heads"]
  found = {}
  for ours, theirs in _SIZES.items():
    if ours not in leave_out and config.get(theirs) is not None:
      found[ours] = config[theirs]
  return found


def write_sizes(model: Decoder, ffn: Any = None) -> dict[str, Any]:
  """`sizes` the other way: what a model of equal blocks says of them.

  Args:
    model: every block of which has an `Attention` of the first one's sizes.
    ffn: the layer whose `hidden` is the intermediate size; None means the
      first block's.
  """
  block = model.blocks[0]
  return {
    "vocab_size": model.vocab,
    "hidden_size": model.dim,
    "num_hidden_layers": model.depth,
    "num_attention_heads": block.mixer.heads,
    "num_key_value_heads": block.mixer.groups,
    "head_dim": block.mixer.width,
    "intermediate_size": (ffn or block.ffn).hidden,
    "rms_norm_eps": model.norm.eps,
    "max_position_embeddings": model.max_positions,
    "tie_word_embeddings": model.tied,
  }


def expect(config: Config, **wanted: Any) -> None:
  """Refuses a config that says something this family does not build.

  Args:
    config: a config.json.
    wanted: the one value of a key that can be built, or a tuple of such
      values; the key may be absent or null.

  Raises:
    UserError: naming the key, its value and what it can be.
  """
  for key, value in wanted.items():
    values = value if isinstance(value, tuple) else (value,)
    if config.get(key) is not None and config[key] not in values:
      raise UserError(
        f"the config says {key}={config[key]!r}, which is not built here; it "
        f"can be {' or '.join(map(repr, values))}"
      )


def given(config: Config, key: str, default: Any) -> Any:
  """What a config says of a key, or `default` where it is absent.

  Raises:
    UserError: where it is there and null, which leaves nothing to build.
  """
  value = config.get(key, default)
  if value is None:
    raise UserError(
      f"the config says {key}=null; leave it out ({default!r}) or give a value"
    )
  return value


# --- Layers that differ -----------------------------------------------------

_LETTERS = {
  "sliding_attention": "L",
  "chunked_attention": "C",
  "full_attention": "G",
}


def read_pattern(config: Config, pattern: str) -> str:
  """What each layer sees, a letter each, from `layer_types`.

  Args:
    config: a config.json.
    pattern: the letters where it has no `layer_types`, tiled over the depth: L
      for a layer that sees a window (local), C for a chunk, G for all (global).
      Only these letters can be built.

  Raises:
    UserError: for another kind of layer, or not one kind for each layer.
  """
  kinds, depth = config.get("layer_types"), config["num_hidden_layers"]
  if kinds is None:
    return "".join(pattern[i % len(pattern)] for i in range(depth))
  known = {kind: c for kind, c in _LETTERS.items() if c in pattern}
  if len(kinds) != depth or not set(kinds) <= known.keys():
    raise UserError(
      f"layer_types names {len(kinds)} layers of kinds {sorted(set(kinds))}; "
      f"it needs {depth}, each {' or '.join(known)}"
    )
  return "".join(known[kind] for kind in kinds)


def write_pattern(model: Decoder) -> list[str]:
  """The `layer_types` that `read_pattern` reads back."""
  names = {Sliding: "sliding_attention", Chunked: "chunked_attention"}
  masks = (block.mixer.mask for block in model.blocks)
  return [names.get(type(mask), "full_attention") for mask in masks]


# --- Rotary positions -------------------------------------------------------

_LENGTH = "original_max_position_embeddings"
_SCALINGS: dict[str, tuple[type, dict[str, str]]] = {
  "linear": (Linear, {"factor": "factor"}),
  "dynamic": (Dynamic, {"factor": "factor", "original": _LENGTH}),
  "llama3": (
    Llama3,
    {
      "factor": "factor",
      "low": "low_freq_factor",
      "high": "high_freq_factor",
      "original": _LENGTH,
    },
  ),
  "yarn": (
    Yarn,
    {
      "factor": "factor",
      "original": _LENGTH,
      "beta_fast": "beta_fast",
      "beta_slow": "beta_slow",
      "attention_factor": "attention_factor",
      "mscale": "mscale",
      "mscale_all_dim": "mscale_all_dim",
      "truncate": "truncate",
    },
  ),
  "longrope": (
    LongRope,
    {
      "short": "short_factor",
      "long": "long_factor",
      "original": _LENGTH,
      "factor": "factor",
      "attention_factor": "attention_factor",
    },
  ),
}


def read_rope(
  config: Config, kind: str | None = None, theta: float = 10000.0, **more: Any
) -> Rope:
  """The rotary positions of a config, in the form of any year.

  Newer files have `rope_parameters`, older ones `rope_theta` and
  `rope_scaling`.

  Args:
    config: a config.json.
    kind: the key within `rope_parameters` where layers differ
      ('full_attention', ...).
    theta: the base where the config has none.
    more: further arguments of `Rope`.

  Raises:
    UserError: for a scaling that is not known here.
  """
  found = config.get("rope_parameters") or config.get("rope_scaling") or {}
  if kind is not None and kind in found:
    found = found[kind]
  theta = found.get("rope_theta") or config.get("rope_theta") or theta
  fraction = found.get("partial_rotary_factor")
  if fraction is None:
    fraction = config.get("partial_rotary_factor")
  if fraction is not None:
    more["fraction"] = fraction
  return Rope(float(theta), _read_scaling(config, found), **more)


def _read_scaling(config: Config, found: Config) -> Any:
  """The scaling value of a dict `rope_parameters`, or None."""
  name = found.get("rope_type") or found.get("type") or "default"
  if name == "default":
    return None
  if name not in _SCALINGS:
    raise UserError(
      f"no rope_type {name!r} here; known: default, {', '.join(_SCALINGS)}"
    )
  cls, keys = _SCALINGS[name]
  given = {k: found[v] for k, v in keys.items() if found.get(v) is not None}
  most = config.get("max_position_embeddings")
  if "original" in keys and name != "dynamic":
    given["original"] = config.get(_LENGTH) or given.get("original") or most
  elif name == "dynamic":
    given["original"] = most
  if name in ("yarn", "longrope") and "factor" not in given:
    given["factor"] = most / given["original"]
  given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
  return cls(**given)


def write_rope(rope: Rope) -> dict[str, Any]:
  """The dict `rope_parameters` that `read_rope` reads back."""
  out = {"rope_type": "default", "rope_theta": rope.theta}
  if rope.fraction != 1.0:
    out["partial_rotary_factor"] = rope.fraction
  for name, (cls, keys) in _SCALINGS.items():
    if type(rope.scaling) is cls:
      values = {v: getattr(rope.scaling, k) for k, v in keys.items()}
      out["rope_type"] = name
      out |= {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in values.items()
        if v is not None
      }
  return out
