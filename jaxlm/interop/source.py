"""A model as other people keep it: a Hugging Face directory, or a GGUF file.

`open` looks at a path, says what is wrong with it where something is, and
gives a `Source`: the config, the tensors by the hub's names, and how to get
the tokenizer. Nothing large is read.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data import tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop import beside, fp8, gguf, mxfp4, packed, tensors
from jaxlm.models import hub
from jaxlm.models.decoder import Decoder
from jaxlm.models.hub import Hub
from jaxlm.models.names import Entry, Names

Config = dict[str, Any]  # a config.json
Arrays = Mapping[str, np.ndarray]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Source:
  """Where a model comes from.

  Attributes:
    path: the directory or file.
    config: its config.json.
    hub: of its family.
    model: what the config describes.
    tensors: by name; each is read when asked for.
    heads: what has the `shape` of each tensor, where that is known before.
    tokenizer: reads the tokenizer; None if there is none.
  """

  path: Path
  config: Config
  hub: Hub
  model: Decoder
  tensors: Arrays
  heads: Mapping[str, Any] | None
  tokenizer: Callable[[], Tokenizer] | None

  def check(self) -> list[Entry]:
    """All tensors of the model, after seeing that they are there and fit.

    Raises:
      UserError: for one that is missing, left over or of another shape.
    """
    names = self.hub.names
    extra = names.extra(self.model, list(self.tensors))
    extra = [name for name in extra if not self._is_tied(name)]
    if extra:
      more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
      raise UserError(
        f"{self.path} has a tensor {extra[0]!r}{more}, for which the model of "
        "its config.json has no place; take config and tensors from the same "
        "model"
      )
    entries = list(names.entries(self.model))
    try:
      for entry in entries:
        if self.heads is not None or entry.theirs not in self.tensors:
          entry.read(self.heads or {})
    except UserError as error:
      raise UserError(f"{self.path}: {error}") from error
    return entries

  def _is_tied(self, name: str) -> bool:
    """Whether a tensor is but a copy of the embedding, as some files have."""
    table = {line[0]: line[1] for line in self.hub.names.table}
    if not self.model.tied or name != table.get("head"):
      return False
    embedding = self.tensors[table["embed/tokens"]]
    if not np.array_equal(self.tensors[name], embedding):
      raise UserError(
        f"{self.path}: the config says that the head is the embedding, but "
        f"{name!r} differs from it; set tie_word_embeddings to false"
      )
    return True

  def read(self, entry: Entry) -> np.ndarray:
    """One tensor, checked; `check` has seen that it is there."""
    try:
      return entry.read({entry.theirs: self.tensors[entry.theirs]})
    except UserError as error:
      raise UserError(f"{self.path}: {error}") from error


def open(path: str | Path) -> Source:
  """The model at a path.

  Args:
    path: a directory with config.json and safetensors, or a GGUF file.

  Raises:
    UserError: if it is neither, or of a family that is not known here.
  """
  path = Path(path)
  if not path.exists():
    raise UserError(
      f"there is no {path}; nothing is downloaded here: give a directory of a "
      "Hugging Face model, a .gguf file, or a run of jaxlm"
    )
  return _directory(path) if path.is_dir() else _file(path)


def is_hub(path: Path) -> bool:
  """Whether a path is a Hugging Face directory, or looks as if it should be.

  What has a config.json with a `model_type`, and what has weights of others
  and no config.json at all.
  """
  if (path / "model.json").exists():
    return False
  config = path / "config.json"
  if not config.exists():
    return any(path.glob("*.safetensors")) or bool(_pickles(path))
  try:
    said = json.loads(config.read_bytes())
  except ValueError:
    return not (path / "checkpoints").exists()
  return isinstance(said, dict) and "steps" not in said


def _file(path: Path) -> Source:
  """A GGUF file; explains about other files."""
  if path.suffix in _PICKLES:
    raise _refusal(path)
  if path.suffix == ".safetensors":
    raise UserError(
      f"{path} is one file of a model; give its directory, {path.parent}, "
      "which has config.json"
    )
  found = gguf.read(path)

  def tokenizer() -> Tokenizer:
    found.tokenizer.beside = beside.of_gguf(found)
    return found.tokenizer

  return _source(path, found.config, found.tensors, None, tokenizer)


def _directory(path: Path) -> Source:
  """A directory of the hub."""
  config = read_config(path)
  if not any((path / n).exists() for n in (tensors.SINGLE, tensors.INDEX)):
    if _pickles(path):
      raise _refusal(_pickles(path)[0])
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8])
    raise UserError(
      f"{path} has neither {tensors.SINGLE} nor {tensors.INDEX}, only {found}"
    )
  raw = tensors.open_folder(path)
  arrays = _dequantised(raw, config)
  heads = raw.heads if arrays is raw else None

  def tokenizer() -> Tokenizer:
    return beside.with_config(tokenizers.load(path), config)

  has = tokenizers.is_in(path)
  return _source(path, config, arrays, heads, tokenizer if has else None)


def read_config(path: Path) -> Config:
  """The config.json of a directory.

  Raises:
    UserError: if there is none, or it is not JSON.
  """
  file = path / "config.json"
  if not file.exists():
    raise UserError(
      f"{path} has no config.json, so nothing says what its tensors are; take "
      "it from where the tensors come from"
    )
  try:
    config = json.loads(file.read_bytes())
  except ValueError as error:
    raise UserError(
      f"{file} is not JSON ({error}); download it again"
    ) from error
  if not isinstance(config, dict):
    raise UserError(f"{file} is no JSON object but {type(config).__name__}")
  return config


def _source(
  path: Path,
  config: Config,
  arrays: Arrays,
  heads: Mapping[str, Any] | None,
  tokenizer: Callable[[], Tokenizer] | None,
) -> Source:
  """Finds the family, and settles how it spells its names here."""
  try:
    family = hub.find(config)
    model = family.read(config)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  base = _based(family.names, model, arrays)
  if base is not None:
    heads = heads and {base.get(n, n): h for n, h in heads.items()}
    arrays = Renamed(arrays, {ours: theirs for theirs, ours in base.items()})

  def fitted() -> Tokenizer:
    return fit(tokenizer(), model.vocab, path)

  reads = tokenizer and fitted
  return Source(path, config, family, model, arrays, heads, reads)


def fit(tokenizer: Tokenizer, vocab: int, path: Path) -> Tokenizer:
  """A tokenizer, after seeing that it fits a model.

  Special tokens past the vocabulary (Gemma 3's image token, in models that
  see no images) are forgotten: no text reaches them.

  Raises:
    UserError: if it makes other tokens that the model does not have.
  """
  past = {n for n, i in tokenizer.specials.items() if i >= vocab}
  if tokenizer.vocab_size - len(past) > vocab:
    raise UserError(
      f"the tokenizer of {path} has {tokenizer.vocab_size:,} tokens and the "
      f"model {vocab:,}; it is another model's tokenizer"
    )
  if past:
    specials = tokenizer.specials.items()
    tokenizer.specials = {n: i for n, i in specials if n not in past}
    tokenizer.vocab_size = min(tokenizer.vocab_size, vocab)
  return tokenizer


class Renamed(Mapping[str, np.ndarray]):
  """Arrays under other names: `names` gives the old one of each."""

  def __init__(self, arrays: Arrays, names: Mapping[str, str]):
    self._arrays, self._names = arrays, dict(names)

  def __getitem__(self, name: str) -> np.ndarray:
    return self._arrays[self._names[name]]

  def __contains__(self, name: object) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def _based(
  names: Names, model: Decoder, arrays: Arrays
) -> dict[str, str] | None:
  """New names by old, for the file of a model that was saved without head."""
  if not names.base or any(name.startswith(names.base) for name in arrays):
    return None
  known = {entry.theirs for entry in names.entries(model)}
  return {n: n if n in known else names.base + n for n in arrays}


def _dequantised(arrays: Arrays, config: Config) -> Arrays:
  """Tensors as plain arrays, where the config says they are quantised."""
  said = config.get("quantization_config")
  if said is None:
    return arrays
  method = said.get("quant_method")
  if method not in _VIEWS:
    raise UserError(
      f"the tensors are quantised by {method!r}, which is not read here; "
      f"known: {', '.join(_VIEWS)}. Take the model as it was before"
    )
  return _VIEWS[method](arrays, config)


_VIEWS: dict[str, Callable[[Arrays, Config], Arrays]] = {
  "fp8": fp8.view,
  "mxfp4": mxfp4.view,
  "bitnet": packed.view,
}


def _pickles(path: Path) -> list[Path]:
  """Files that are weights pickled by PyTorch."""
  return [p for p in sorted(path.iterdir()) if p.suffix in _PICKLES]


def _refusal(path: Path) -> UserError:
  """Why a pickle is not read."""
  return UserError(
    f"{path} is a pickle, which can run any program when it is read; only "
    'safetensors and GGUF are read here. Where you trust it: python -c "from '
    "transformers import AutoModelForCausalLM as M; M.from_pretrained('DIR')"
    ".save_pretrained('NEW')\" writes safetensors"
  )
