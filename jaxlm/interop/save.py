"""`jaxlm.save`: a model and its parameters, for whoever reads them.

    save("runs/mine", model, params, tokenizer)              # for jaxlm
    save("mine", model, params, tokenizer, format="hf")      # for the hub
    save("mine.gguf", model, params, tokenizer, format="gguf")

Tensors are made and written one by one.
"""

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import files, workdir
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop import beside, gguf, packed, tensors
from jaxlm.interop.source import fit
from jaxlm.layers.param import paths
from jaxlm.models import hub
from jaxlm.models.decoder import Decoder

Tree = Any

SHARD_SIZE = 5_000_000_000
FORMATS = ("jaxlm", "hf", "gguf")


def save(
  path: str | Path,
  model: Decoder,
  params: Tree,
  tokenizer: Tokenizer | None = None,
  step: int = 0,
  format: str = "jaxlm",
  dtype: str | None = None,
  shard_size: int = SHARD_SIZE,
) -> None:
  """Writes a model, so that `load(path)` gives equal values and bits back.

  Args:
    path: a directory; for 'gguf' a file.
    model: what is saved.
    params: its arrays.
    tokenizer: saved beside it, with its own files; 'gguf' must have one.
    step: of format 'jaxlm': the name of this checkpoint.
    format: 'jaxlm' (read by this library, its version and later ones), 'hf'
      (config.json and safetensors, as `transformers` reads them) or 'gguf'
      (llama.cpp).
    dtype: of what is written: 'float32', 'bfloat16' or 'float16'; None means
      as the arrays are ('gguf': float16). For 'gguf' also 'q8_0'.
    shard_size: bytes a file of format 'hf' may have, if it holds more than one
      tensor.

  Raises:
    UserError: if the parameters are not those of the model, the format has no
      words for it, or the path is taken or cannot be written.
  """
  path = Path(path)
  if format not in FORMATS:
    raise UserError(f"format={format!r} is unknown; use {', '.join(FORMATS)}")
  workdir.check_params(model, params)
  if tokenizer is not None:
    fit(tokenizer, model.vocab, path)
  if format == "gguf":
    return _save_gguf(path, model, params, tokenizer, dtype)
  workdir.check_dtype(dtype)
  if format == "hf":
    return _save_hub(path, model, params, tokenizer, dtype, shard_size)
  if dtype is not None:
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
  workdir.save(path, model, params, tokenizer, step)


# --- Hugging Face -----------------------------------------------------------


def _save_hub(
  path: Path,
  model: Decoder,
  params: Tree,
  tokenizer: Tokenizer | None,
  dtype: str | None,
  shard_size: int,
) -> None:
  """Writes a directory of the hub, whole or not at all."""
  family = hub.recognise(model)
  made = Made(model, family, params, dtype)
  widest = max({str(d) for _, d in made.shapes.values()}, key=_rank)
  config = family.config(model) | {"dtype": widest} | _special_ids(tokenizer)
  if "quantization_config" in config:  # one kind is written: ternary
    made = packed.Packed(made, made.shapes)
  with new_folder(path) as folder:
    _write_shards(folder, made, shard_size)
    if tokenizer is not None:
      tokenizer.save(folder)
      for name, content in beside.made(tokenizer).items():
        if not (folder / name).exists():
          files.write(folder / name, content.decode())
    # Last, for without it the rest is no model.
    files.write(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
  """Ids for the config: null where nothing is known, or a default would hold.

  The defaults of `transformers` are those of a family's first model.
  """
  ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  if tokenizer is None:
    return ids
  said = beside.said(tokenizer)
  ends = list(said.ends) if len(said.ends) > 1 else next(iter(said.ends), None)
  return ids | {"bos_token_id": said.bos, "eos_token_id": ends}


def _rank(dtype: str) -> int:
  """Bytes of a dtype."""
  return jnp.dtype(dtype).itemsize


class Made(Mapping[str, np.ndarray]):
  """The hub's tensors, each made from our parameters when it is asked for.

  Attributes:
    shapes: shape and dtype of each by name.
  """

  def __init__(
    self, model: Decoder, family: hub.Hub, params: Tree, dtype: str | None
  ):
    self._leaves, self._dtype = paths(params), dtype and jnp.dtype(dtype)
    self._entries = {e.theirs: e for e in family.names.entries(model)}
    self.shapes = {
      name: (e.shape, self._dtype or self._leaves[e.ours[0]].dtype)
      for name, e in self._entries.items()
    }

  def __getitem__(self, name: str) -> np.ndarray:
    entry, (_, dtype) = self._entries[name], self.shapes[name]
    parts = [
      piece(self._leaves[path], entry.index).astype(dtype)
      for path in entry.ours
    ]
    return entry.layout.join(entry.params, parts)

  def __contains__(self, name: object) -> bool:
    return name in self._entries

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)


def piece(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
  """`leaf[index]` on the host, wherever the array lies.

  Raises:
    UserError: if a part of it is on another host.
  """
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf)[index]
  if not leaf.is_fully_addressable:
    raise UserError(
      "the parameters are spread over several hosts; save them as a run "
      "(format='jaxlm'), and convert that on one host"
    )
  n, out = len(index), np.empty(leaf.shape[len(index) :], leaf.dtype)
  for shard in leaf.addressable_shards:
    if shard.replica_id:
      continue
    starts = [s.start or 0 for s in shard.index[:n]]
    at = tuple(i - start for i, start in zip(index, starts, strict=True))
    if all(0 <= i < m for i, m in zip(at, shard.data.shape, strict=False)):
      out[shard.index[n:]] = np.asarray(_at(shard.data, at))
  return out


@functools.partial(jax.jit)
def _at(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
  """One entry of the leading dimensions."""
  return x[index] if index else x


def _write_shards(
  folder: Path, made: Made | packed.Packed, shard_size: int
) -> None:
  """One file, or several and their index."""
  shards, size = [{}], 0
  for name, shape in made.shapes.items():
    n = tensors.n_bytes(shape)
    if shards[-1] and size + n > shard_size:
      shards.append({})
      size = 0
    shards[-1][name] = shape
    size += n
  if len(shards) == 1:
    return tensors.write(folder / tensors.SINGLE, shards[0], made.__getitem__)
  where = {}
  for i, shapes in enumerate(shards, 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    tensors.write(folder / file, shapes, made.__getitem__)
    where |= dict.fromkeys(shapes, file)
  total = sum(map(tensors.n_bytes, made.shapes.values()))
  index = {"metadata": {"total_size": total}, "weight_map": where}
  files.write(folder / tensors.INDEX, json.dumps(index, indent=2) + "\n")
  return None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """A folder to fill, which becomes `path` when all of it is on the disk."""
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path} exists already; choose another place")
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(
      tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    )
    temporary.chmod(0o755)
    yield temporary
    files.sync(temporary)
    os.rename(temporary, path)
    files.sync(path.parent)
  except OSError as error:
    raise UserError(
      f"cannot write {path} ({files.reason(error)}); free some space or choose "
      "another place"
    ) from error
  finally:
    if temporary is not None:
      shutil.rmtree(temporary, ignore_errors=True)


# --- GGUF -------------------------------------------------------------------

_TYPES = {None: "F16", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_TYPES |= {"q8_0": "Q8_0"}


def _save_gguf(
  path: Path,
  model: Decoder,
  params: Tree,
  tokenizer: Tokenizer | None,
  dtype: str | None,
) -> None:
  """Writes a GGUF file."""
  if dtype not in _TYPES:
    known = ", ".join(filter(None, _TYPES))
    raise UserError(f"dtype={dtype!r} is unknown for GGUF; use {known}")
  if tokenizer is None:
    raise UserError("a GGUF file has its tokenizer inside; give one")
  if path.exists():
    raise UserError(f"{path} exists already; choose another place")
  family = hub.recognise(model)
  said = beside.said(tokenizer)
  path.parent.mkdir(parents=True, exist_ok=True)
  gguf.write(
    path,
    family.config(model),
    Made(model, family, params, None),
    tokenizer,
    _TYPES[dtype],
    said.template,
    said.bos,
    said.ends,
    bool(said.start),
  )
