"""`jaxlm.load`: a model and its parameters, from whoever keeps them.

    model, params = load("runs/tiny")                 # a run of ours
    model, params = load("Llama-3.2-1B", "bfloat16")  # a directory of the hub
    model, params = load("model.gguf", mesh=mesh, rules=preset("fsdp"))

Tensors are read one by one and each goes at once to the devices that keep it,
in the dtype it will have there; on the host there is never more than one
besides what is kept.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from jaxlm import workdir
from jaxlm.data import tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop import peft, source
from jaxlm.interop.place import Leaf
from jaxlm.interop.source import Source
from jaxlm.layers.param import map_params, path_name, paths, shardings
from jaxlm.models.decoder import Decoder
from jaxlm.parallel.rules import Rules

Tree = Any


def load(
  path: str | Path,
  dtype: str | None = "float32",
  mesh: Mesh | None = None,
  rules: Rules | None = None,
  which: str | int = "latest",
) -> tuple[Decoder, Tree]:
  """The model at a path, and its parameters on the devices.

  Args:
    path: a run of ours or what `save` wrote, a Hugging Face directory
      (config.json and safetensors), a GGUF file, or adapters in the format of
      PEFT, which are merged into their base.
    dtype: of all parameters: 'float32', 'bfloat16' or 'float16'; None means
      as they are stored (float32 where they are quantised). Layers still use
      norm scales and routers in float32.
    mesh: the devices they are spread over; None means the first device.
    rules: where on the mesh each lies (its *stored* table); None means all of
      it on every device.
    which: of a run: 'latest', 'best' (the lowest validation loss), or a step.

  Raises:
    UserError: if there is nothing to read at the path, or it is damaged, of an
      unknown family, or does not fit together. Nothing is half loaded.
  """
  path = Path(path)
  if is_ours(path):

    def base(at: Path) -> Tree:
      return load(at, dtype, mesh, rules)[1]

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
      return workdir.load(path, dtype, which, mesh, rules, base)
  if peft.is_peft(path):
    model, params = load(peft.base_of(path), dtype, mesh, rules)
    lora, adapters = peft.load_adapters(path, model)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
      return model, lora.merge(params, adapters)
  if which != "latest":
    raise UserError(f"{path} is no run, so which={which!r} has no meaning")
  workdir.check_dtype(dtype)
  found = source.open(path)
  return found.model, read(found, dtype, mesh, rules)


def load_model(path: str | Path) -> Decoder:
  """The model at a path, without its parameters; else as `load`."""
  path = Path(path)
  if is_ours(path):
    return workdir.load_model(path)
  if peft.is_peft(path):
    return load_model(peft.base_of(path))
  return source.open(path).model


def load_tokenizer(path: str | Path) -> Tokenizer:
  """The tokenizer of the model at a path.

  Its `beside` has the chat template and whatever else is published with it.

  Raises:
    UserError: if there is none, or it has tokens that the model has not.
  """
  path = Path(path)
  if is_ours(path):
    return workdir.load_tokenizer(path)
  if peft.is_peft(path) and not tokenizers.is_in(path):
    return load_tokenizer(peft.base_of(path))
  found = source.open(path).tokenizer
  if found is None:
    raise UserError(f"no tokenizer.json or tokenizer.model in {path}")
  return found()


def has_tokenizer(path: str | Path) -> bool:
  """Whether there is a tokenizer with the model at a path."""
  path = Path(path)
  if path.is_file() or tokenizers.is_in(path):
    return True
  return peft.is_peft(path) and has_tokenizer(peft.base_of(path))


def load_all(
  path: str | Path,
  dtype: str | None = "float32",
  mesh: Mesh | None = None,
  rules: Rules | None = None,
) -> tuple[Decoder, Tree, Tokenizer | None]:
  """Model, parameters, and the tokenizer where there is one; else as `load`."""
  path = Path(path)
  if is_ours(path):
    model, params = load(path, dtype, mesh, rules)
    has = tokenizers.is_in(path)
    return model, params, workdir.load_tokenizer(path) if has else None
  if peft.is_peft(path):
    has = has_tokenizer(path)
    tokenizer = load_tokenizer(path) if has else None
    return *load(path, dtype, mesh, rules), tokenizer
  workdir.check_dtype(dtype)
  found = source.open(path)
  tokenizer = found.tokenizer and found.tokenizer()
  return found.model, read(found, dtype, mesh, rules), tokenizer


def is_ours(path: Path) -> bool:
  """Whether `workdir` is to read it, or to say what is wrong with it."""
  if path.is_file():
    return False
  return not (path.is_dir() and (source.is_hub(path) or peft.is_peft(path)))


def read(
  found: Source,
  dtype: str | None = "float32",
  mesh: Mesh | None = None,
  rules: Rules | None = None,
) -> Tree:
  """Every parameter of a source, read, cast and placed; as `load`."""
  tree = found.model.params()
  if mesh is None:
    here = SingleDeviceSharding(jax.local_devices()[0])
    places = map_params(lambda _: here, tree)
  else:
    places = shardings(tree, mesh, rules or Rules())
  entries = found.check()
  leaves = map_params(
    lambda p, place: Leaf(p.shape, place, dtype), tree, places
  )
  named = paths(leaves)
  for entry in entries:
    parts = entry.split(found.read(entry))
    for name, part in zip(entry.ours, parts, strict=True):
      named[name].write(entry.index, part)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: named.pop(path_name(path)).array(), leaves
  )
