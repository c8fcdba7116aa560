"""Adapters in the format of PEFT: what `PeftModel.from_pretrained` reads.

    save_adapters("mine", model, lora, adapters, base="meta-llama/...")
    lora, adapters = load_adapters("mine", model)

A folder holds adapter_config.json and adapter_model.safetensors, with names as
`base_model.model.<module>.lora_A.weight` [rank, in] and `lora_B.weight` [out,
rank] (github.com/huggingface/peft, docs "PEFT checkpoint format"). Modules are
named by the family's table. Where one of their modules is several matrices of
ours (fused queries, keys and values), theirs gets a rank of ours added up,
each block with outputs of its own; theirs is read as one A for each.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm import files
from jaxlm.errors import UserError
from jaxlm.interop import tensors
from jaxlm.interop.save import new_folder, piece
from jaxlm.layers.param import Param, paths
from jaxlm.models import hub
from jaxlm.models.decoder import Decoder
from jaxlm.models.lora import KINDS, LoRA, adaptable
from jaxlm.models.names import Entry

Tree = Any
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
  "a": "lora_A.weight",
  "b": "lora_B.weight",
  "m": "lora_magnitude_vector",
}
_LETTERS = {name.removesuffix(".weight"): x for x, name in _PARTS.items()}
_TENSOR = re.compile(
  rf"{re.escape(_PREFIX)}(.*)\.({'|'.join(_LETTERS)})(?:\.weight)?"
)


def is_peft(path: Path) -> bool:
  """Whether a path is a folder of adapters in this format."""
  return (path / CONFIG).is_file()


def base_of(path: Path) -> Path:
  """Where the base of some adapters is, by their config.

  Raises:
    UserError: if it is not a place on this machine.
  """
  named = _read_config(path).get("base_model_name_or_path")
  base = Path(str(named)).expanduser()
  if named is None or not base.exists():
    raise UserError(
      f"{path} holds adapters for {named!r}, which is not here; download it "
      "and write its path as base_model_name_or_path into adapter_config.json"
    )
  return base


# --- Modules ----------------------------------------------------------------


@dataclass(frozen=True)
class Module:
  """One of their modules, and the matrices of ours that it is.

  Attributes:
    entry: the tensor of the module, and where its parts belong.
  """

  entry: Entry

  @property
  def name(self) -> str:
    """What they call it: the tensor's name without its end."""
    return self.entry.theirs.removesuffix(".weight")

  @property
  def last(self) -> str:
    """The last part of its name."""
    return self.name.rpartition(".")[2]

  def narrow(self, rank: int) -> list[Param]:
    """Our matrices, with `rank` inputs in place of theirs."""
    return [
      Param((rank, *p.shape[p.n_in :]), (None, *p.axes[p.n_in :]), 1)
      for p in self.entry.params
    ]

  def join(self, parts: list[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Their arrays `a` [rank, in], `b` [out, rank], `m` [out], from ours.

    Args:
      parts: of each of our matrices `a`, `b` and perhaps `m`; empty where it
        has no adapter.
    """
    a, b, rank = [], [], 0
    total = sum(len(x["b"]) for x in parts if x)
    for p, x in zip(self.entry.params, parts, strict=True):
      wide = np.zeros((total, *p.shape[p.n_in :]), np.float32)
      if x:
        wide[rank : rank + len(x["b"])] = x["b"]
        rank += len(x["b"])
        a.append(np.asarray(x["a"], np.float32).reshape(p.fan_in, -1).T)
      b.append(wide)
    layout = replace(self.entry.layout, transposed=True)
    out = {"a": np.concatenate(a), "b": layout.join(self.narrow(total), b)}
    if any("m" in x for x in parts):
      if not all(parts):
        raise UserError(
          f"{self.name} is several matrices in one, and DoRA is on some of "
          "them; put all of them into lora.targets"
        )
      rows = [np.asarray(x["m"], np.float32)[None] for x in parts]
      out["m"] = layout.join(self.narrow(1), rows).reshape(-1)
    return out

  def split(self, theirs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Our `a`, `b` and perhaps `m` of each matrix, from their arrays."""
    layout = replace(self.entry.layout, transposed=True)
    params, rank = self.entry.params, len(theirs["a"])
    b = layout.split(self.narrow(rank), theirs["b"])
    a = [theirs["a"].T.reshape(*p.shape[: p.n_in], rank) for p in params]
    parts = [{"a": x, "b": y} for x, y in zip(a, b, strict=True)]
    if "m" in theirs:
      rows = layout.split(self.narrow(1), theirs["m"].reshape(-1, 1))
      parts = [x | {"m": y[0]} for x, y in zip(parts, rows, strict=True)]
    return parts


def modules(model: Decoder) -> Iterator[Module]:
  """Every module with a weight that adapters could be for."""
  for entry in hub.recognise(model).names.entries(model):
    matrices = all(adaptable(p) and not p.n_stacked for p in entry.params)
    if entry.theirs.endswith(".weight") and matrices:
      yield Module(entry)


# --- Saving -----------------------------------------------------------------


def save_adapters(
  path: str | Path,
  model: Decoder,
  lora: LoRA,
  adapters: Tree,
  base: str | None = None,
) -> None:
  """Writes adapters so that PEFT and `load_adapters` read them.

  Args:
    path: a new folder.
    model: the base.
    lora: which adapters these are.
    adapters: their arrays.
    base: where the base is, for those who read: a folder, or a name of the hub.

  Raises:
    UserError: if the path is taken, no family of the hub has this model, or
      PEFT has no words for an adapter (on stacked experts).
  """
  leaves, known = paths(adapters), list(modules(model))
  made, ranks = {}, {}
  for module in known:
    parts = [
      _of(leaves, path, module.entry.index) for path in module.entry.ours
    ]
    if any(parts):
      made[module.name] = module.join(parts)
      ranks[module.name] = len(made[module.name]["a"])
  _check_all(leaves, known)
  arrays = {
    f"{_PREFIX}{name}.{_PARTS[part]}": x.astype(np.float32)
    for name, theirs in made.items()
    for part, x in theirs.items()
  }
  shapes = {name: (x.shape, x.dtype) for name, x in arrays.items()}
  with new_folder(Path(path)) as folder:
    tensors.write(folder / WEIGHTS, shapes, arrays.__getitem__)
    said = _config(lora, known, ranks, base)
    files.write(folder / CONFIG, json.dumps(said, indent=2) + "\n")


def _of(leaves: Mapping[str, Any], path: str, index: tuple) -> dict[str, Any]:
  """The parts of one matrix's adapter, of one layer; {} if it has none."""
  return {
    part: piece(leaves[f"{path}/{part}"], index)
    for part in _PARTS
    if f"{path}/{part}" in leaves
  }


def _check_all(leaves: Mapping[str, Any], known: list[Module]) -> None:
  """Raises UserError where an adapter is for nothing that has a name."""
  named = {path for module in known for path in module.entry.ours}
  for leaf in leaves:
    path = leaf.rpartition("/")[0]
    if path not in named:
      raise UserError(
        f"PEFT has no module for {path!r}; merge these adapters instead "
        "(python -m jaxlm.convert), or leave it out of lora.targets"
      )


def _config(
  lora: LoRA, known: list[Module], ranks: dict[str, int], base: str | None
) -> dict[str, Any]:
  """What adapter_config.json says."""
  rooted, lengths = KINDS[lora.kind]
  wide = {name: rank for name, rank in ranks.items() if rank != lora.rank}
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": _targets(known, ranks),
    "fan_in_fan_out": not all(m.entry.layout.transposed for m in known),
    "use_rslora": rooted,
    "use_dora": lengths,
    # The scale stays what it is where a rank is that of several matrices.
    "rank_pattern": {re.escape(name): rank for name, rank in wide.items()},
    "alpha_pattern": {
      re.escape(name): lora.scale * (rank**0.5 if rooted else rank)
      for name, rank in wide.items()
    },
    "modules_to_save": None,
    "inference_mode": True,
  }


def _targets(known: list[Module], chosen: Mapping[str, int]) -> list[str]:
  """Last names of modules if these tell them from the rest, or whole ones."""
  short = {module.last for module in known if module.name in chosen}
  meant = {module.name for module in known if module.last in short}
  return sorted(short) if meant == set(chosen) else sorted(chosen)


# --- Loading ----------------------------------------------------------------


def load_adapters(path: str | Path, model: Decoder) -> tuple[LoRA, Tree]:
  """Adapters that PEFT or `save_adapters` wrote, for a base model.

  Where ranks or scales differ from module to module, they are made one: the
  products s A B stay the same.

  Returns:
    The value, and its arrays as NumPy's, float32.

  Raises:
    UserError: if there are none, they are damaged, for another model, or of a
      kind that is more than LoRA.
  """
  path = Path(path)
  said = _read_config(path)
  found = _read_tensors(path)
  known = {module.name: module for module in modules(model)}
  parts, ranks = {}, [_rank(x, name) for name, x in found.items()]
  lora = _value(said, max(ranks, default=1))
  for name, theirs in found.items():
    if name not in known:
      raise UserError(
        f"{path} has an adapter for {name!r}, and this model has no such "
        "module; take the base that it was trained on"
      )
    scaled = _scaled(theirs, _scale(said, name, lora), lora.rank)
    entry = known[name].entry
    _check_shapes(path, known[name], scaled)
    for ours, part in zip(entry.ours, known[name].split(scaled), strict=True):
      parts.setdefault(ours, {})[entry.index] = part
  lora = replace(lora, targets=tuple(map(re.escape, parts)))
  return lora, _placed(path, lora.declare(model.params()), parts)


def _read_config(path: Path) -> dict[str, Any]:
  """adapter_config.json, checked."""
  try:
    said = json.loads((path / CONFIG).read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(
      f"no adapters in {path}: {CONFIG} cannot be read ({error.strerror})"
    ) from error
  except ValueError as error:
    raise UserError(f"{path / CONFIG} is not JSON ({error})") from error
  if said.get("peft_type") != "LORA":
    raise UserError(
      f"{path} holds a {said.get('peft_type')!r} adapter; LORA is read"
    )
  for key in ("bias", "modules_to_save", "target_parameters", "lora_bias"):
    if said.get(key) not in (None, False, "none", [], {}):
      raise UserError(
        f"{path} has {key}={said[key]!r}, which is more than low-rank "
        "matrices; merge it with PEFT and load the whole model"
      )
  return said


def _read_tensors(path: Path) -> dict[str, dict[str, np.ndarray]]:
  """By module `a`, `b` and perhaps `m`."""
  if not (path / WEIGHTS).is_file():
    raise UserError(f"{path} lacks {WEIGHTS}; take all of the adapter's files")
  found: dict[str, dict[str, np.ndarray]] = {}
  for name, head in tensors.heads(path / WEIGHTS).items():
    parts = _TENSOR.fullmatch(name)
    if parts is None:
      raise UserError(f"{path} has a tensor {name!r} that is no LoRA matrix")
    module, part = parts[1], _LETTERS[parts[2]]
    array = np.asarray(head.map()).astype(np.float32)
    found.setdefault(module, {})[part] = array
  return found


def _rank(theirs: Mapping[str, np.ndarray], name: str) -> int:
  """The rank of a module's adapter; UserError if half of it is missing."""
  if not {"a", "b"} <= set(theirs) or len(theirs["a"]) != theirs["b"].shape[1]:
    raise UserError(
      f"the adapter of {name!r} has no lora_A and lora_B that fit"
    )
  return len(theirs["a"])


def _value(said: Mapping[str, Any], rank: int) -> LoRA:
  """What adapter_config.json describes, at one rank for all modules."""
  flags = bool(said.get("use_rslora")), bool(said.get("use_dora"))
  kind = next(kind for kind, have in KINDS.items() if have == flags)
  rank, alpha = max(rank, said.get("r", 1)), said.get("lora_alpha", 8)
  return LoRA(rank, alpha, kind=kind)


def _scale(said: Mapping[str, Any], name: str, lora: LoRA) -> float:
  """What PEFT multiplies a module's product by, over what `lora` does."""

  def of(patterns: str, default: float) -> float:
    for pattern, value in (said.get(patterns) or {}).items():
      if re.match(rf"(.*\.)?({pattern})$", name):
        return value
    return default

  alpha = of("alpha_pattern", said.get("lora_alpha", 8))
  rank = of("rank_pattern", said.get("r", 8))
  rooted, _ = KINDS[lora.kind]
  return alpha / (rank**0.5 if rooted else rank) / lora.scale


def _scaled(
  theirs: Mapping[str, np.ndarray], scale: float, rank: int
) -> dict[str, np.ndarray]:
  """The same with `scale` in B, and zeros up to `rank`."""
  more = rank - len(theirs["a"])
  a = np.pad(theirs["a"], ((0, more), (0, 0)))
  b = np.pad(theirs["b"] * np.float32(scale), ((0, 0), (0, more)))
  return dict(theirs) | {"a": a, "b": b}


def _check_shapes(path: Path, module: Module, theirs: Mapping) -> None:
  """Raises UserError where an adapter does not fit its module."""
  out, into = replace(module.entry.layout, transposed=True).shape(
    module.entry.params
  )
  want = (theirs["a"].shape[1], theirs["b"].shape[0])
  if want != (into, out):
    raise UserError(
      f"{path}: the adapter of {module.name!r} maps {want[0]} features to "
      f"{want[1]}, this model's module {into} to {out}; it is for another model"
    )


def _placed(path: Path, declared: Tree, parts: dict[str, dict]) -> Tree:
  """Arrays as declared: the layers stacked, zeros where a layer has none."""

  def fill(tree: Tree, prefix: str) -> Tree:
    if not isinstance(tree, Param):
      return {k: fill(x, f"{prefix}/{k}".strip("/")) for k, x in tree.items()}
    matrix, _, part = prefix.rpartition("/")
    out, missing = (
      np.zeros(tree.shape, np.float32),
      set(np.ndindex(tree.shape[: tree.n_stacked])),
    )
    for index, arrays in parts[matrix].items():
      if part in arrays:
        out[index] = arrays[part]
        missing.discard(index)
    if part == "m" and missing:
      raise UserError(
        f"{path} has no lengths for some layers of {matrix!r}; DoRA needs them"
        " all, so merge it with PEFT and load the whole model"
      )
    return jnp.asarray(out)

  return fill(declared, "")
