"""GGUF files in and out: the format of llama.cpp.

    found = read("model.gguf")
    found.config          # as a config.json of the Hugging Face hub
    found.tensors         # a mapping of the hub's tensor names, decoded lazily
    found.tokenizer       # and its chat template, `found.template`

A file is translated into what the hub would have, so that the families read
it by their own tables. `write` goes the other way.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.chat import ChatTemplate
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop import gguf_file, gguf_tokenizer
from jaxlm.interop.gguf_arch import Arch, Line, matches
from jaxlm.interop.gguf_file import Container, Tensor
from jaxlm.interop.gguf_numbers import FREQS, read_rope
from jaxlm.interop.gguf_tables import ARCHS
from jaxlm.interop.gguf_write import write

Config = Mapping[str, Any]  # a config.json

__all__ = ["Gguf", "Tensors", "read", "write"]


@dataclass(frozen=True)
class Gguf:
  """A model in a GGUF file.

  Attributes:
    config: what its config.json would say.
    tensors: the hub's tensors by name; each is decoded when asked for.
    tokenizer: with the control tokens as specials.
    template: how a conversation is written, or None.
    bos: id of the token that begins a text, or None.
    ends: ids of the tokens that end a text or a turn.
    add_bos: whether plain text is to begin with `bos`.
    metadata: everything else the file says.
  """

  config: dict[str, Any]
  tensors: "Tensors"
  tokenizer: Tokenizer
  template: ChatTemplate | None
  bos: int | None
  ends: tuple[int, ...]
  add_bos: bool
  metadata: dict[str, Any]


def read(path: str | Path) -> Gguf:
  """Reads a file; tensors stay where they are until asked for.

  They come as floats as they are stored, and in float32 where quantised.

  Raises:
    UserError: if the file is damaged, or of an architecture, a tokenizer or a
      type that is not known here, or has a tensor that has no place.
  """
  container = gguf_file.load(path)
  try:
    arch = _arch(container)
    config, tensors = _translated(arch, container)
    vocab = gguf_tokenizer.read(container.metadata)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  config |= {
    f"{name}_token_id": container.metadata[f"tokenizer.ggml.{name}_token_id"]
    for name in ("bos", "eos")
    if f"tokenizer.ggml.{name}_token_id" in container.metadata
  }
  return Gguf(
    config=config,
    tensors=tensors,
    tokenizer=vocab.tokenizer,
    template=vocab.template,
    bos=vocab.bos,
    ends=vocab.ends,
    add_bos=vocab.add_bos,
    metadata=container.metadata,
  )


class Tensors(Mapping[str, np.ndarray]):
  """The hub's tensors, each made from the file's when it is asked for."""

  def __init__(
    self,
    arch: Arch,
    config: Config,
    found: Mapping[str, Tensor],
  ):
    self._config = config
    self._found = found
    self._places: dict[str, tuple[Line, tuple[str, ...], int, int | None]] = {}
    for line, names, layer in matches(arch, found, "file"):
      self._place(line, names[0], layer)

  def __getitem__(self, name: str) -> np.ndarray:
    """The tensor; KeyError if there is none."""
    line, files, part, expert = self._places[name]
    arrays = [self._found[f].array(expert) for f in files]
    return line.layout.hub(arrays, self._config)[part]

  def __contains__(self, name: object) -> bool:
    """Whether there is such a tensor; decodes nothing."""
    return name in self._places

  def __iter__(self) -> Iterator[str]:
    """The names."""
    return iter(self._places)

  def __len__(self) -> int:
    """How many there are."""
    return len(self._places)

  def _place(
    self, line: Line, files: tuple[str, ...], layer: int | None
  ) -> None:
    """Notes where the hub's tensors of a line are made from."""
    for part, hub in enumerate(line.hub):
      if "{expert}" not in hub:
        self._places[hub.format(layer)] = (line, files, part, None)
        continue
      for e in range(self._found[files[0]].shape[0]):
        name = hub.format(layer, expert=e)
        self._places[name] = (line, files, part, e)


def _arch(container: Container) -> Arch:
  """The architecture of a file."""
  name = container.metadata.get("general.architecture")
  for arch in ARCHS:
    key, least = arch.needs or ("", 0)
    value = container.metadata.get(f"{name}.{key}", 0)
    if arch.name == name and value >= least:
      return arch
  known = ", ".join(sorted({arch.name for arch in ARCHS}))
  raise UserError(
    f"no family here has GGUF's architecture {name!r}; known: {known}"
  )


def _translated(
  arch: Arch, container: Container
) -> tuple[dict[str, Any], Tensors]:
  """The config of a file, and its tensors."""
  found = dict(container.tensors)
  freqs = found.pop(FREQS, None)
  config = _read_config(arch, container, freqs)
  if _same(found.get("output.weight"), found.get("token_embd.weight")):
    del found["output.weight"]  # some converters write the one table twice
  config["tie_word_embeddings"] = "output.weight" not in found
  return config, Tensors(arch, config, found)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
  if a is None or b is None or a.type != b.type:
    return False
  return np.array_equal(a.raw, b.raw)


def _read_config(
  arch: Arch, container: Container, freqs: Tensor | None
) -> dict[str, Any]:
  """The config.json of a file."""
  prefix = f"{arch.name}."
  numbers = {
    key.removeprefix(prefix): _scalar(key, value)
    for key, value in container.metadata.items()
    if key.startswith(prefix)
  }
  config = {"model_type": arch.types[0], **arch.implied}
  config |= {hub: numbers[key] for key, hub in arch.numbers if key in numbers}
  table = container.tensors.get("token_embd.weight")
  if table is None:
    raise UserError("it has no tensor 'token_embd.weight'; is it a vocabulary?")
  config["vocab_size"] = table.shape[0]
  config |= {hub: t in container.tensors for hub, t in arch.flags.items()}
  for number in arch.also:
    config |= number.read(numbers, config)
  width = config.get("head_dim") or _width(config)
  if arch.rope is None:
    return config
  rope = read_rope(numbers, None if freqs is None else freqs.array(), width)
  rope |= arch.rope
  local = numbers.get("rope.freq_base_swa", arch.local_theta)
  config["rope_parameters"] = rope
  if arch.local_theta is not None:
    config["rope_parameters"] = {
      "full_attention": rope,
      "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
  return config


def _width(config: Config) -> int:
  """The width of a head where the config does not say."""
  dim = config.get("hidden_size") or config["n_embd"]
  return dim // (config.get("num_attention_heads") or config["n_head"])


def _scalar(key: str, value: Any) -> Any:
  """A number as people write it: 1e-05 for the float32 9.99999974e-06.

  Numbers per layer must agree.
  """
  if isinstance(value, list) and value and isinstance(value[0], int):
    if len(set(value)) > 1:
      raise UserError(f"{key} differs between layers, which is not built here")
    return value[0]
  return float(str(np.float32(value))) if isinstance(value, float) else value
