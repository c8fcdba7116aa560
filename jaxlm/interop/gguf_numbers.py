"""Numbers of a GGUF file and keys of a config.json, where they differ.

Most are pairs of names, which `gguf_tables` lists. Here are those that take a
formula: some sizes, and rotary positions, which a GGUF file keeps partly as
numbers and partly as a tensor of factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.errors import UserError

Config = Mapping[str, Any]  # a config.json
Numbers = Mapping[str, Any]  # of a file, without the architecture's name

FREQS = "rope_freqs.weight"  # the tensor of factors


@dataclass(frozen=True)
class Fraction:
  """The share of a head that rotates, for the number of its dimensions."""

  key: str

  def read(self, numbers: Numbers, config: Config) -> dict[str, Any]:
    """Keys of the config."""
    width = config["hidden_size"] // config["num_attention_heads"]
    share = numbers.get("rope.dimension_count", width) / width
    return {self.key: share, "partial_rotary_factor": share}

  def write(self, config: Config) -> dict[str, Any]:
    """Numbers of the file."""
    rope = config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", config.get(self.key, 1.0))
    width = config["hidden_size"] // config["num_attention_heads"]
    return {"rope.dimension_count": round(share * width)}


@dataclass(frozen=True)
class QueryScale:
  """What queries are scaled by: llama.cpp knows it by the number of layers.

  The head's width, but the model's width per head in models of `wide` layers.
  """

  wide: int

  def read(self, numbers: Numbers, config: Config) -> dict[str, Any]:
    """Keys of the config."""
    size = config["head_dim"]
    if config["num_hidden_layers"] == self.wide:
      size = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": size}

  def write(self, config: Config) -> dict[str, Any]:
    """Nothing, if llama.cpp will find it."""
    given = config.get("query_pre_attn_scalar")
    want = self.read({}, config)["query_pre_attn_scalar"]
    if given not in (None, want):
      raise UserError(
        f"query_pre_attn_scalar is {given}, and a GGUF file of this "
        f"architecture implies {want}; it cannot be written as GGUF"
      )
    return {}


@dataclass(frozen=True)
class Windows:
  """Every `period`-th layer sees everything, the others a window."""

  period: int

  def read(self, numbers: Numbers, config: Config) -> dict[str, Any]:
    """Keys of the config."""
    kinds = ("sliding_attention", "full_attention")
    return {
      "layer_types": [
        kinds[i % self.period == self.period - 1]
        for i in range(config["num_hidden_layers"])
      ]
    }

  def write(self, config: Config) -> dict[str, Any]:
    """Nothing, if llama.cpp will find it."""
    given = config.get("layer_types")
    if given is not None and list(given) != self.read({}, config).popitem()[1]:
      raise UserError(
        "a GGUF file of this architecture implies that every "
        f"{self.period}. layer has no window, which is not so in this model; "
        "it cannot be written as GGUF"
      )
    return {}


@dataclass(frozen=True)
class LatentSizes:
  """Latent attention, which llama.cpp runs as one key head per layer.

  Attributes:
    gating: how experts are scored: 1 softmax, 2 sigmoid.
  """

  gating: int

  def read(self, numbers: Numbers, config: Config) -> dict[str, Any]:
    """Keys of the config."""
    if "attention.key_length_mla" not in numbers:
      raise UserError(
        "this file keeps latent attention in the form llama.cpp used before "
        "April 2025; take a newer conversion of the model"
      )
    whole = numbers["attention.key_length_mla"]
    rope = config["qk_rope_head_dim"]
    return {
      "num_key_value_heads": config["num_attention_heads"],
      "qk_nope_head_dim": whole - rope,
      "head_dim": rope,
      "q_lora_rank": config.get("q_lora_rank"),
      "topk_method": self._method(config),
    }

  def _method(self, config: Config) -> str:
    """How experts are chosen, which follows from the rest."""
    if self.gating == 2:
      return "noaux_tc"
    many = config.get("n_group", 1) > 1
    return "group_limited_greedy" if many else "greedy"

  def write(self, config: Config) -> dict[str, Any]:
    """Numbers of the file."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return {
      "attention.head_count_kv": 1,
      "attention.key_length": rank + rope,
      "attention.value_length": rank,
      "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
      "expert_gating_func": self.gating,
    }


@dataclass(frozen=True)
class Wide:
  """The width of feed-forward layers, four times the model's if not given."""

  key: str
  dim: str

  def read(self, numbers: Numbers, config: Config) -> dict[str, Any]:
    """Keys of the config."""
    width = numbers.get("feed_forward_length", 4 * config[self.dim])
    return {self.key: width}

  def write(self, config: Config) -> dict[str, Any]:
    """Numbers of the file."""
    width = config.get(self.key) or 4 * config[self.dim]
    return {"feed_forward_length": width}


Number = Fraction | QueryScale | Windows | LatentSizes | Wide

# --- Rotary positions -------------------------------------------------------

# Numbers behind the tensor of factors: every published model has these, and
# llama.cpp does not read them, so a file has them only if it was written here.
_STRETCH = {
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}

_YARN = (
  ("rope.scaling.factor", "factor"),
  ("rope.scaling.original_context_length", "original_max_position_embeddings"),
  ("rope.scaling.yarn_beta_fast", "beta_fast"),
  ("rope.scaling.yarn_beta_slow", "beta_slow"),
)


def read_rope(
  numbers: Numbers, freqs: np.ndarray | None, head_dim: int
) -> dict[str, Any]:
  """`rope_parameters` of a config from the numbers and factors of a file.

  Raises:
    UserError: for a scaling that is not known here.
  """
  theta = numbers.get("rope.freq_base", 10000.0)
  out = {"rope_type": "default", "rope_theta": theta}
  kind = numbers.get("rope.scaling.type", "none")
  if freqs is not None:
    return out | _stretch(freqs, numbers, theta, head_dim)
  if kind == "linear":
    return out | {"rope_type": kind, "factor": numbers["rope.scaling.factor"]}
  if kind == "yarn":
    given = {hub: numbers[file] for file, hub in _YARN if file in numbers}
    log = numbers.get("rope.scaling.yarn_log_multiplier")
    if log:
      mscale = round(log * 10, 6)  # llama.cpp stores a tenth
      given |= {"mscale": mscale, "mscale_all_dim": mscale}
    return out | {"rope_type": kind} | given
  if kind != "none":
    raise UserError(
      f"this file scales rotary positions by {kind!r}; known here: linear, "
      "yarn, and factors as a tensor"
    )
  return out


def write_rope(
  rope: Config, head_dim: int
) -> tuple[dict[str, Any], np.ndarray | None]:
  """Numbers and factors of a file from `rope_parameters`.

  Raises:
    UserError: for a scaling that the format has no word for.
  """
  numbers = {"rope.freq_base": float(rope["rope_theta"])}
  kind = rope.get("rope_type", "default")
  if kind == "default":
    return numbers, None
  if kind == "llama3":
    numbers |= {
      f"rope.scaling.{kind}.{key}": rope[key]
      for key, usual in _STRETCH.items()
      if rope[key] != usual
    }
    return numbers, stretch_factors(rope, head_dim)
  if kind not in ("linear", "yarn"):
    raise UserError(
      f"rope_type {kind!r} cannot be written as GGUF; only default, linear, "
      "yarn and llama3 can"
    )
  numbers["rope.scaling.type"] = kind
  for file, hub in _YARN:
    if rope.get(hub) is not None:
      numbers[file] = rope[hub]
  if rope.get("mscale", 0) != rope.get("mscale_all_dim", 0):
    raise UserError(
      "mscale and mscale_all_dim differ, and a GGUF file has one number for "
      "both; it cannot be written as GGUF"
    )
  if rope.get("mscale_all_dim"):
    numbers["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
  return numbers, None


def stretch_factors(rope: Config, head_dim: int) -> np.ndarray:
  """Llama 3.1's factor of every wavelength, float32 [head_dim / 2].

  Wavelengths λ below original/high stay, those above original/low are
  stretched by `factor`, and in between 1/f = (1-s)/factor + s with
  s = (original/λ - low) / (high - low), https://arxiv.org/abs/2407.21783.
  """
  steps = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  turns = rope["original_max_position_embeddings"] / (
    2 * np.pi * float(rope["rope_theta"]) ** steps
  )
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  s = np.clip((turns - low) / (high - low), 0, 1)
  return (1 / ((1 - s) / rope["factor"] + s)).astype(np.float32)


def _stretch(
  freqs: np.ndarray, numbers: Numbers, theta: float, head_dim: int
) -> dict[str, Any]:
  """The scaling whose factors a file holds, found and then checked."""
  found = {
    "rope_type": "llama3",
    "rope_theta": theta,
    "factor": float(np.max(freqs)),
  }
  found |= {
    key: numbers.get(f"rope.scaling.llama3.{key}", usual)
    for key, usual in _STRETCH.items()
  }
  want = stretch_factors(found, head_dim)
  if want.shape != freqs.shape or not np.allclose(want, freqs, rtol=1e-3):
    raise UserError(
      f"the tensor {FREQS!r} holds factors of rotary frequencies that are not "
      "those of Llama 3.1's rule for 8192 positions; this file cannot be read"
    )
  return found
