"""Mistral (arXiv:2310.06825): Llama's block, a sliding window in the first one.

Version 0.1 looks back by 4,096 tokens, later ones at everything. Sizes from
the paper, table 1, and the `config.json` published with the weights; from Nemo
on, heads are 128 wide whatever the model's width.
"""

from typing import Any

from jaxlm.layers.attention import Attention
from jaxlm.layers.mask import Causal, Sliding
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.scaling import Scaling
from jaxlm.models.decoder import Block, Decoder
from jaxlm.models.hub import (
  Config,
  Hub,
  expect,
  read_rope,
  sizes,
  write_rope,
  write_sizes,
)
from jaxlm.models.names import COMMON, Names


def decoder(
  vocab: int = 32768,
  dim: int = 4096,
  layers: int = 32,
  heads: int = 32,
  kv_heads: int = 8,
  head_dim: int | None = None,
  mlp_dim: int = 14336,
  window: int | None = None,
  theta: float = 1e6,
  scaling: Scaling | None = None,
  eps: float = 1e-5,
  max_positions: int = 32768,
  tied: bool = False,
  dropout: float = 0.0,
) -> Decoder:
  """Mistral at any size; the defaults are the 7B model, version 0.3."""
  norm, init = RMSNorm(dim, eps), Normal(0.02)
  block = Block(
    mixer=Attention(
      dim,
      heads,
      kv_heads,
      head_dim,
      mask=Causal() if window is None else Sliding(window),
      position=Rope(theta, scaling),
      init=init,
      out_init=init,
    ),
    ffn=GLU(dim, mlp_dim, act=silu, init=init, out_init=init),
    norm=norm,
    dropout=dropout,
  )
  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=(((block,), layers),),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    dropout=dropout,
    head_init=init,
  )


PUBLISHED = {
  "mistral-7b-v0.1": decoder(vocab=32000, window=4096, theta=10000.0),
  "mistral-7b-v0.2": decoder(vocab=32000),
  "mistral-7b-v0.3": decoder(),
  "mistral-nemo-12b": decoder(
    vocab=131072, dim=5120, layers=40, head_dim=128, max_positions=131072
  ),
  "mistral-small-22b": decoder(dim=6144, layers=56, heads=48, mlp_dim=16384),
  "mistral-small-24b": decoder(
    vocab=131072, dim=5120, layers=40, head_dim=128, mlp_dim=32768, theta=1e8
  ),
  "mistral-large-123b": decoder(
    dim=12288, layers=88, heads=96, mlp_dim=28672, max_positions=131072
  ),
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` mistral."""
  window, rope = config.get("sliding_window", 4096), read_rope(config)
  defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
  given = sizes(config, rms_norm_eps=1e-6, **defaults)
  kind = "full_attention" if window is None else "sliding_attention"
  expect(
    config,
    hidden_act="silu",
    partial_rotary_factor=1.0,
    layer_types=[kind] * given["layers"],
  )
  return decoder(**given, window=window, theta=rope.theta, scaling=rope.scaling)


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  mixer = model.blocks[0].mixer
  return write_sizes(model) | {
    "hidden_act": "silu",
    "sliding_window": mixer.mask.reach,
    "rope_parameters": write_rope(mixer.position),
  }


HF = (Hub("mistral", "MistralForCausalLM", read, write, Names(COMMON)),)
