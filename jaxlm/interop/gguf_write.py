"""Writing GGUF files: what `gguf.read` reads, and llama.cpp runs."""

import os
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
from jaxlm.interop.gguf_numbers import FREQS, write_rope
from jaxlm.interop.gguf_tables import ARCHS

Config = Mapping[str, Any]  # a config.json
Arrays = Mapping[str, np.ndarray]

_FILE_TYPES = {  # what can be stored, and what llama.cpp calls such a file
  "F16": "MOSTLY_F16",
  "Q8_0": "MOSTLY_Q8_0",
  "BF16": "MOSTLY_BF16",
  "F32": "ALL_F32",
}
_PRECISE = ("ffn_gate_inp.weight", "position_embd.weight")  # float32 there


def write(
  path: str | Path,
  config: Config,
  tensors: Arrays,
  tokenizer: Tokenizer,
  type: str = "F16",
  template: ChatTemplate | None = None,
  bos: int | None = None,
  ends: tuple[int, ...] = (),
  add_bos: bool = False,
) -> None:
  """Writes a model as a GGUF file, tensor by tensor.

  Args:
    path: the file; it appears when it is whole.
    config: the model's config.json, by its family's `Hub`.
    tensors: the hub's tensors by name; one at a time is asked for.
    tokenizer: byte-level BPE or SentencePiece.
    type: of matrices: 'F16', 'Q8_0' (F16 where rows are no multiple of 32),
      'BF16' or 'F32'. Vectors, norms and routers are float32, as llama.cpp
      wants them.
    template: how a conversation is written.
    bos: id of the token that begins a text.
    ends: ids of the tokens that end a text or a turn, the usual one first.
    add_bos: whether plain text is to begin with `bos`.

  Raises:
    UserError: if llama.cpp has no word for the model or its tokenizer, or the
      file cannot be written.
  """
  if type not in _FILE_TYPES:
    raise UserError(
      f"type={type!r} cannot be written; use {', '.join(_FILE_TYPES)}"
    )
  gguf, arch = gguf_file.library(), _arch(config)
  numbers, freqs = _numbers(arch, config)
  vocabulary = gguf_tokenizer.Vocabulary(
    tokenizer, template, bos, tuple(ends), add_bos
  )
  # Tensors wait in a temporary file: the head, which comes first, has their
  # sizes.
  writer = gguf.GGUFWriter(None, arch.name, use_temp_file=True)
  writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[type]])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  for key, value in numbers.items():
    add(writer, f"{arch.name}.{key}", value)
  for key, value in gguf_tokenizer.entries(vocabulary, config["vocab_size"]):
    add(writer, key, value)
  try:
    for part in _parts(arch, config, tensors, freqs):
      x = part.array(tensors, config)
      kind = _stored(part.name, x, type)
      writer.add_tensor(
        part.name,
        _encoded(gguf, x, kind),
        raw_dtype=gguf.GGMLQuantizationType[kind],
      )
    _save(writer, Path(path))
  except OSError as error:
    raise UserError(
      f"cannot write {path}: {error.strerror or error}; free some space or "
      "choose another folder"
    ) from error
  finally:
    if writer.temp_file is not None:
      writer.temp_file.close()


def add(writer: Any, key: str, value: Any) -> None:
  """Adds a value under the type that llama.cpp expects of its kind."""
  kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
  kinds |= {list: "array", bytes: "array"}
  getattr(writer, f"add_{kinds[type(value)]}")(key, value)


@dataclass(frozen=True)
class _Part:
  """A tensor to write, and how to make it.

  Attributes:
    name: in the file.
    sources: names on the hub; one tuple per expert where they are stacked.
    line: how the first become the second; None for what is there already.
    index: which of the line's tensors it is.
    values: of a tensor that no line makes.
  """

  name: str
  sources: tuple[tuple[str, ...], ...] = ()
  line: Line | None = None
  index: int = 0
  values: np.ndarray | None = None

  def array(self, tensors: Arrays, config: Config) -> np.ndarray:
    """Its values."""
    if self.line is None:
      return self.values
    made = [
      self.line.layout.file([np.asarray(tensors[n]) for n in names], config)
      for names in self.sources
    ]
    rows = [arrays[self.index] for arrays in made]
    stacked = "{expert}" in self.line.hub[0]
    return np.stack(rows) if stacked else rows[0]


def _arch(config: Config) -> Arch:
  """The architecture that stores a config."""
  name = config.get("model_type")
  for arch in ARCHS:
    if name in arch.types:
      return arch
  known = ", ".join(sorted(t for arch in ARCHS for t in arch.types))
  raise UserError(
    f"model_type {name!r} cannot be written as GGUF; known: {known}. "
    "jaxlm.save(path, model, params, format='hf') writes safetensors"
  )


def _numbers(
  arch: Arch, config: Config
) -> tuple[dict[str, Any], np.ndarray | None]:
  """The numbers of a file, and rotary factors where it has them."""
  for key, value in arch.implied.items():
    if config.get(key) is not None and config[key] != value:
      raise UserError(
        f"the model has {key}={config[key]!r}, and a GGUF file of architecture "
        f"{arch.name!r} implies {value!r}; it cannot be written as GGUF"
      )
  numbers = {"vocab_size": config["vocab_size"]}
  for key, hub in arch.numbers:
    if config.get(hub) is not None:
      numbers[key] = config[hub]
  for number in arch.also:
    numbers |= number.write(config)
  numbers.setdefault("context_length", 2048)
  rope, local = _rope(config)
  if rope is None:
    return numbers, None
  if local is not None:
    numbers["rope.freq_base_swa"] = float(local)
  width = config.get("head_dim") or (
    config["hidden_size"] // config["num_attention_heads"]
  )
  scaling, freqs = write_rope(rope, width)
  return numbers | scaling, freqs


def _rope(config: Config) -> tuple[Config | None, float | None]:
  """`rope_parameters` of any year, and the base of layers with a window."""
  rope = config.get("rope_parameters")
  if rope and "full_attention" in rope:
    return rope["full_attention"], rope["sliding_attention"]["rope_theta"]
  if rope is None and "rope_theta" in config:
    scaling = dict(config.get("rope_scaling") or {})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    rope = {"rope_theta": config["rope_theta"], **scaling}
  return rope, config.get("rope_local_base_freq")


def _parts(
  arch: Arch, config: Config, tensors: Arrays, freqs: np.ndarray | None
) -> Iterator[_Part]:
  """Everything that is written, in the order of the table."""
  if freqs is not None:
    yield _Part(FREQS, values=freqs)
  names = set(tensors)
  if config.get("tie_word_embeddings"):
    names.discard("lm_head.weight")
  for line, rows, layer in matches(arch, names, "hub"):
    for index, file in enumerate(line.file):
      yield _Part(file.format(layer), tuple(rows), line, index)


def _stored(name: str, x: np.ndarray, type: str) -> str:
  """The type in which a tensor is stored."""
  if x.ndim < 2 or name.endswith(_PRECISE):
    return "F32"
  return "F16" if type == "Q8_0" and x.shape[-1] % 32 else type


def _encoded(gguf: Any, x: np.ndarray, type: str) -> np.ndarray:
  """Values as `GGUFWriter` takes them: floats, or the bytes of blocks."""
  x = np.ascontiguousarray(x, np.float32)
  return gguf.quants.quantize(x, gguf.GGMLQuantizationType[type])


def _save(writer: Any, path: Path) -> None:
  """The collected head and tensors as a file, whole or not at all."""
  temporary = path.with_name(path.name + ".new")
  try:
    writer.write_header_to_file(temporary)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)
  finally:
    writer.close()
    temporary.unlink(missing_ok=True)
