"""Qwen 3 (arXiv:2505.09388): Llama's block with normalised queries and keys.

Sizes from the report, table 1, and the `config.json` published with the
weights. Heads are 128 wide whatever the model's width.
"""

from typing import Any

from jaxlm.layers.attention import Attention
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
  vocab: int = 151936,
  dim: int = 1024,
  layers: int = 28,
  heads: int = 16,
  kv_heads: int = 8,
  head_dim: int = 128,
  mlp_dim: int = 3072,
  theta: float = 1e6,
  scaling: Scaling | None = None,
  eps: float = 1e-6,
  max_positions: int = 40960,
  tied: bool = True,
  dropout: float = 0.0,
) -> Decoder:
  """Qwen 3 (dense) at any size; the defaults are the 0.6B model."""
  norm, init = RMSNorm(dim, eps), Normal(0.02)
  block = Block(
    mixer=Attention(
      dim,
      heads,
      kv_heads,
      head_dim,
      position=Rope(theta, scaling),
      qk_norm=RMSNorm(head_dim, eps, axis="head_dim"),
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
  "qwen3-0.6b": decoder(),
  "qwen3-1.7b": decoder(dim=2048, mlp_dim=6144),
  "qwen3-4b": decoder(dim=2560, layers=36, heads=32, mlp_dim=9728),
  "qwen3-8b": decoder(dim=4096, layers=36, heads=32, mlp_dim=12288, tied=False),
  "qwen3-14b": decoder(
    dim=5120, layers=40, heads=40, mlp_dim=17408, tied=False
  ),
  "qwen3-32b": decoder(
    dim=5120, layers=64, heads=64, mlp_dim=25600, tied=False
  ),
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` qwen3."""
  expect(
    config, hidden_act="silu", attention_bias=False, use_sliding_window=False
  )
  rope = read_rope(config)
  defaults = {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128}
  return decoder(
    **sizes(config, **defaults), theta=rope.theta, scaling=rope.scaling
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  rope = write_rope(model.blocks[0].mixer.position)
  return write_sizes(model) | {"hidden_act": "silu", "rope_parameters": rope}


HF = (Hub("qwen3", "Qwen3ForCausalLM", read, write, Names(COMMON)),)
