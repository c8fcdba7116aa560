"""The keys of a config, declared once: default, meaning, type and range.

The table of `--help`, the page docs/config.md, the checks of config files and
of the command line are views of `SCHEMA`. There are at most sixty keys: what
a model family takes beyond four sizes is the family's to declare, as the
parameters of its function, and so are the keys of an objective (`OPEN`,
`jaxlm.config.call`).
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.errors import UserError


@dataclass(frozen=True)
class Key:
  """One key: its default, what it means, and which values it takes.

  Attributes:
    default: the value it starts with; its type is the key's type. None stands
      for "not set", and such a key can be set to None again.
    meaning: one line for people.
    kinds: the types it takes, where the default alone does not say.
    low: the smallest number allowed.
    high: the largest number allowed.
  """

  default: Any
  meaning: str
  kinds: tuple[type, ...] = ()
  low: float = -math.inf
  high: float = math.inf

  @property
  def types(self) -> tuple[type, ...]:
    """The types of its values, besides None where None is the default."""
    return self.kinds or (type(self.default),)

  @property
  def optional(self) -> bool:
    """True if it may be None."""
    return self.default is None


# --- The schema -------------------------------------------------------------

SCHEMA: dict[str, Any] = {
  "steps": Key(1000, "optimizer updates in the whole run", low=0),
  "batch_size": Key(16, "sequences per update, over all devices", low=1),
  "seq_len": Key(256, "tokens the model reads at once", low=1),
  "seed": Key(0, "start of everything random: weights, order, dropout", low=0),
  "accumulate": Key(1, "parts a batch is computed in, one by one", low=1),
  "steps_per_call": Key(1, "updates per call of the compiled step", low=1),
  "precision": Key("float32", "of the layers: float32, bfloat16 or float16"),
  "remat": Key("none", "what backward computes again: none, dots or full"),
  "loss_chunk": Key(
    0, "positions whose logits are held at once; 0: all", low=0
  ),
  "unroll": Key(False, "write the layers out instead of scanning over them"),
  "ema": Key(0.0, "decay of the mean of the weights; 0: none", (), 0, 1),
  "spike_skip": Key(0.0, "skip gradients so many times the usual", low=0),
  "early_stop": Key(0, "stop after so many evaluations without gain", low=0),
  "log_every": Key(10, "steps between progress lines", low=1),
  "eval_every": Key(200, "steps between evaluations; 0: at the end", low=0),
  "eval_batches": Key(0, "validation batches at each; 0: all", low=0),
  "checkpoint_every": Key(
    200, "steps between checkpoints; 0: at the end", low=0
  ),
  "model": {  # open: the family's function declares what else it takes
    "family": Key("gpt2", "the function that makes the model"),
    "dim": Key(None, "width of the residual stream", (int,), 1),
    "layers": Key(None, "number of blocks", (int,), 1),
    "heads": Key(None, "query heads of each attention", (int,), 1),
  },
  "objective": {},  # open: `name`, and what that objective's function takes
  "lora": {},  # open: the fields of `LoRA`; any of them turns it on
  "optimizer": {
    "name": Key("adamw", "adamw, muon, sgd, lion, ..."),
    "lr": Key(1e-3, "peak learning rate", low=0),
    "muon_lr": Key(0.02, "peak learning rate of Muon's matrices", low=0),
    "b1": Key(0.9, "decay of the mean of gradients", (), 0, 1),
    "b2": Key(0.99, "decay of the mean of squared gradients", (), 0, 1),
    "eps": Key(1e-8, "what keeps the division finite", low=0),
    "weight_decay": Key(0.1, "pull of matrices to zero, times the rate", low=0),
    "clip": Key(1.0, "largest global norm of a gradient; 0: any", low=0),
    "schedule": Key("cosine", "constant, cosine, linear, wsd, ..."),
    "warmup": Key(100, "steps of linear rise to the peak", low=0),
    "end_lr": Key(0.1, "last learning rate, as a share of the peak", low=0),
    "decay_share": Key(0.2, "share of the steps wsd decays in", (), 0, 1),
    "lr_table": Key((), "(path pattern, factor) pairs for the rate"),
    "decay_table": Key((), "(path pattern, factor) pairs for the decay"),
    "freeze": Key((), "path patterns of parameters that stay as they are"),
    "muon_coefficients": Key("polar_express", "or jordan (Newton-Schulz)"),
    "muon_scale": Key(
      "original", "size of an update: original or match_rms_adamw"
    ),
    "qk_clip": Key(0.0, "largest attention logit with Muon; 0: any", low=0),
    "balance": Key(0.001, "move per step of a bias that evens experts", low=0),
  },
  "data": {
    "path": Key(None, "file or files; None: Python's own docs", (str, tuple)),
    "tokenizer": Key("bpe", "bytes, chars, bpe, sentencepiece, or a file"),
    "vocab": Key(4096, "tokens a trained tokenizer may have", low=1),
    "val_fraction": Key(0.1, "share at the end held out to validate", (), 0, 1),
    "windows": Key("random", "random places, or packed documents"),
    "text_key": Key("text", "field or column that holds the text"),
    "weights": Key((), "share of each path in a mixture"),
  },
  "checkpoint": {
    "keep": Key(3, "newest checkpoints kept", low=1),
    "best": Key(True, "also keep the one of lowest validation loss"),
  },
  "log": {
    "tensorboard": Key(True, "write TensorBoard events"),
    "wandb": Key(None, "Weights & Biases project; None: off", (str,)),
    "histograms": Key(False, "log histograms of the weights"),
  },
  "sample": {
    "prompt": Key("", "what the model continues"),
    "tokens": Key(200, "length of a sample", low=0),
    "temperature": Key(0.8, "1: as learned; 0: always the likeliest", low=0),
    "top_k": Key(0, "choose among the k likeliest; 0: all", low=0),
    "top_p": Key(1.0, "choose among the likeliest that sum to it", (), 0, 1),
    "every": Key(0, "steps between samples; 0: at the end", low=0),
  },
  "parallel": {
    "preset": Key("dp", "rule tables: dp, fsdp, tp, cp, pp, ..., fsdp_tp"),
    "mesh": Key("", "sizes of its axes, as in fsdp:4,tensor:2"),
  },
}

# Sections that take keys beyond the schema, and whose those are.
OPEN = {
  "model": "what the family's function takes",
  "objective": "name: next_token, sft, dpo, ...; and what it takes",
  "lora": "rank, alpha, targets, kind: train adapters of these",
  "ppo": "the fields of jaxlm.rl.options.PPO",
  "grpo": "the fields of jaxlm.rl.options.GRPO",
  "distil": "the fields of jaxlm.rl.distil.Pupil",
  "parallel": "context, microbatches, rounds: how rows and layers divide",
}

# What a run may change when it goes on: nothing here touches what is learned
# from a step, except `steps`, which stretches the schedule to its new end.
FREE = (
  *("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every"),
  *("early_stop", "remat", "unroll", "steps_per_call"),
  *("checkpoint.*", "log.*", "sample.*", "parallel.*"),
)


# --- Views ------------------------------------------------------------------


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Leaves of a nested dict or ConfigDict by dotted key.

  >>> flatten({"steps": 2, "model": {"dim": 8}})
  {'steps': 2, 'model.dim': 8}
  """
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping | ConfigDict | FrozenConfigDict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`.

  >>> nest({"steps": 2, "model.dim": 8})
  {'steps': 2, 'model': {'dim': 8}}
  """
  tree: dict[str, Any] = {}
  for key, value in flat.items():
    *sections, name = key.split(".")
    node = tree
    for section in sections:
      node = node.setdefault(section, {})
    node[name] = value
  return tree


KEYS: dict[str, Key] = flatten(SCHEMA)


def sections(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Like `nest`; an open section is there even if nothing is set in it."""
  return {name: {} for name in OPEN} | nest(flat)


def leaves(config: Any) -> dict[str, Any]:
  """Like `flatten`, in the order of the schema; open keys come last."""
  flat = flatten(config)
  names = dict.fromkeys([*KEYS, *flat])
  return {name: flat[name] for name in names if name in flat}


def defaults() -> dict[str, Any]:
  """The default of every key, flat."""
  return {name: key.default for name, key in KEYS.items()}


def table() -> str:
  """All keys, one per line: name, default, meaning."""
  rows = [(k, repr(key.default), key.meaning) for k, key in KEYS.items()]
  rows += [(f"{name}.*", "", meaning) for name, meaning in OPEN.items()]
  return "\n".join(f"  {k:28}{value:17}{text}" for k, value, text in rows)


# --- Checks -----------------------------------------------------------------


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
  """`'; did you mean X?'` for the closest known name, else an empty text.

  >>> nearest("stpes", ["seed", "steps"], "config.")
  '; did you mean config.steps?'
  """
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f"; did you mean {prefix}{close[0]}?" if close else ""


def unknown(key: str, extra: Iterable[str] = ()) -> UserError:
  """The error for a key that does not exist; `extra` are more known names."""
  if key in SCHEMA:
    example = f"config.{key}.{next(iter(SCHEMA[key]), 'name')}"
    return UserError(f"config.{key} is a section; set its keys, as {example}")
  names = [*KEYS, *extra]
  last = key.rpartition(".")[2]
  # The right name in the wrong place, or else a slip of the pen.
  moved = [name for name in names if name.rpartition(".")[2] == last]
  hint = nearest(key, moved or names, "config.")
  hint = hint or (f"; did you mean config.{moved[0]}?" if moved else "")
  return UserError(
    f"unknown key config.{key}{hint or '; --help lists all keys'}"
  )


def is_open(key: str) -> bool:
  """True for `model.anything`: the family's function will judge it."""
  section, _, rest = key.partition(".")
  return section in OPEN and rest.isidentifier()


# For messages: a type in words, and what one could type.
_WORDS = {
  bool: ("true or false", "true"),
  int: ("a whole number", "100"),
  float: ("a number", "3e-4"),
  str: ("a text", "name"),
  tuple: ("a tuple", "\"('a', 'b')\""),
}


def _wrong(name: str, value: Any, key: Key) -> UserError:
  """The error for a value of the wrong type, with what would be right."""
  words = " or ".join(_WORDS[t][0] for t in key.types)
  example = _WORDS[key.types[0]][1]
  if key.default not in (None, (), ""):
    text = str(key.default)
    example = text.lower() if isinstance(key.default, bool) else text
  return UserError(
    f"config.{name} takes {words}, not {value!r}; "
    f"for example --config.{name}={example}"
  )


def _value(name: str, value: Any) -> Any:
  """Lists as tuples, all the way down: configs are values, and plain ones."""
  if isinstance(value, list | tuple):
    return tuple(_value(name, v) for v in value)
  if value is None or type(value) in (bool, int, float, str):
    return value
  raise UserError(
    f"config.{name} takes texts, numbers, true, false, None and tuples of "
    f"them, not {value!r}"
  )


def fit(name: str, value: Any, key: Key) -> Any:
  """The value as the type of its key.

  Raises:
    UserError: if it has another type or lies outside the key's range.
  """
  value = _value(name, value)
  if value is None and key.optional:
    return None
  for kind in key.types:
    # Not isinstance: True is an int to Python, but not a number of steps.
    if kind is float and type(value) is int:
      value = float(value)
    if kind is int and type(value) is float and value.is_integer():
      value = int(value)
    if type(value) is kind:
      return _ranged(name, value, key)
  raise _wrong(name, value, key)


def _ranged(name: str, value: Any, key: Key) -> Any:
  if isinstance(value, int | float) and not key.low <= value <= key.high:
    bounds = f"at least {key.low:g}"
    if key.high < math.inf:
      bounds = f"between {key.low:g} and {key.high:g}"
    raise UserError(f"config.{name} must be {bounds}, not {value!r}")
  return value


def checked(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Every key: the given values, each fitted to its key, over the defaults.

  Raises:
    UserError: for an unknown key, or a value that does not fit.
  """
  values = defaults()
  for name, value in flat.items():
    if name in KEYS:
      values[name] = fit(name, value, KEYS[name])
    elif is_open(name):
      values[name] = _value(name, value)
    else:
      raise unknown(name)
  return values
