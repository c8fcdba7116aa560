"""OLMo 2 (arXiv:2501.00656): norms after the branches, none before them.

x += norm(mixer(x)), x += norm(ffn(x)); queries and keys are normalised over all
heads at once. Sizes from the report, table 4, and the `config.json` published
with the weights.
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
from jaxlm.models.names import SANDWICH, Names


def decoder(
  vocab: int = 100352,
  dim: int = 4096,
  layers: int = 32,
  heads: int = 32,
  kv_heads: int | None = None,
  head_dim: int | None = None,
  mlp_dim: int = 11008,
  theta: float = 500000.0,
  scaling: Scaling | None = None,
  eps: float = 1e-6,
  max_positions: int = 4096,
  tied: bool = False,
  dropout: float = 0.0,
) -> Decoder:
  """OLMo 2 at any size; the defaults are the 7B model."""
  norm, init = RMSNorm(dim, eps), Normal(0.02)
  width = head_dim or dim // heads
  block = Block(
    mixer=Attention(
      dim,
      heads,
      kv_heads,
      width,
      position=Rope(theta, scaling),
      qk_norm=RMSNorm(heads * width, eps, axis="heads"),
      norm_heads="all",
      init=init,
      out_init=init,
    ),
    ffn=GLU(dim, mlp_dim, act=silu, init=init, out_init=init),
    norm=None,
    post_norm=norm,
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
  "olmo2-1b": decoder(dim=2048, layers=16, heads=16, mlp_dim=8192),
  "olmo2-7b": decoder(),
  "olmo2-13b": decoder(dim=5120, layers=40, heads=40, mlp_dim=13824),
  "olmo2-32b": decoder(
    dim=5120, layers=64, heads=40, kv_heads=8, mlp_dim=27648
  ),
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` olmo2."""
  expect(config, hidden_act="silu", attention_bias=False)
  rope = read_rope(config)
  defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
  return decoder(
    **sizes(config, **defaults), theta=rope.theta, scaling=rope.scaling
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  rope = write_rope(model.blocks[0].mixer.position)
  return write_sizes(model) | {"hidden_act": "silu", "rope_parameters": rope}


HF = (Hub("olmo2", "Olmo2ForCausalLM", read, write, Names(SANDWICH)),)
