"""Llama 2 and 3: RMSNorm, rotary positions, SwiGLU, grouped queries.

Sizes from the papers (arXiv:2307.09288, appendix A; arXiv:2407.21783, table 3)
and the `config.json` published with the weights. Many others have this very
shape and its `model_type`: SmolLM 1 and 2, TinyLlama, Yi, DeepSeek Coder.
"""

from typing import Any

from jaxlm.layers.attention import Attention
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.scaling import Llama3, Scaling
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
  vocab: int = 128256,
  dim: int = 4096,
  layers: int = 32,
  heads: int = 32,
  kv_heads: int = 8,
  head_dim: int | None = None,
  mlp_dim: int = 14336,
  theta: float = 500000.0,
  scaling: Scaling | None = None,
  eps: float = 1e-5,
  max_positions: int = 8192,
  tied: bool = False,
  bias: bool = False,
  dropout: float = 0.0,
) -> Decoder:
  """Llama at any size; the defaults are Llama 3 8B."""
  norm, init = RMSNorm(dim, eps), Normal(0.02)
  block = Block(
    mixer=Attention(
      dim,
      heads,
      kv_heads,
      head_dim,
      position=Rope(theta, scaling),
      bias=bias,
      out_bias=bias,
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
  "llama2-7b": decoder(
    vocab=32000,
    kv_heads=32,
    mlp_dim=11008,
    theta=10000.0,
    max_positions=4096,
  ),
  "llama3-8b": decoder(),
  "llama3-70b": decoder(dim=8192, layers=80, heads=64, mlp_dim=28672),
  "llama3.1-405b": decoder(
    dim=16384,
    layers=126,
    heads=128,
    mlp_dim=53248,
    scaling=Llama3(),
    max_positions=131072,
  ),
  "llama3.2-1b": decoder(
    dim=2048,
    layers=16,
    mlp_dim=8192,
    scaling=Llama3(factor=32.0),
    max_positions=131072,
    tied=True,
  ),
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` llama."""
  expect(config, hidden_act="silu", mlp_bias=False)
  rope = read_rope(config)
  return decoder(
    **sizes(config, rms_norm_eps=1e-6),
    theta=rope.theta,
    scaling=rope.scaling,
    bias=config.get("attention_bias", False),
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  mixer = model.blocks[0].mixer
  return write_sizes(model) | {
    "hidden_act": "silu",
    "attention_bias": mixer.bias,
    "rope_parameters": write_rope(mixer.position),
  }


HF = (Hub("llama", "LlamaForCausalLM", read, write, Names(COMMON)),)
