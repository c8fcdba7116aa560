"""Mixtral (arXiv:2401.04088): Mistral's block with eight experts, two at work.

The weights of a token's experts are the softmax of the chosen scores alone.
Sizes from the paper, table 1, and the `config.json` published with the weights.
"""

from typing import Any

from jaxlm.layers.attention import Attention
from jaxlm.layers.mask import Causal, Sliding
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.moe import MoE
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.router import TopK
from jaxlm.layers.scaling import Scaling
from jaxlm.models.decoder import Block, Decoder
from jaxlm.models.hub import (
  Config,
  Hub,
  expect,
  given,
  read_rope,
  sizes,
  write_rope,
  write_sizes,
)
from jaxlm.models.names import COMMON, Names


def decoder(
  vocab: int = 32000,
  dim: int = 4096,
  layers: int = 32,
  heads: int = 32,
  kv_heads: int = 8,
  head_dim: int | None = None,
  mlp_dim: int = 14336,
  experts: int = 8,
  top_k: int = 2,
  window: int | None = None,
  theta: float = 1e6,
  scaling: Scaling | None = None,
  eps: float = 1e-5,
  max_positions: int = 32768,
  tied: bool = False,
  balance: float = 0.0,
  dropout: float = 0.0,
) -> Decoder:
  """Mixtral at any size; the defaults are 8x7B.

  `mlp_dim` is that of one expert, `balance` the coefficient of the loss that
  keeps their load even.
  """
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
    ffn=MoE(
      GLU(dim, mlp_dim, act=silu, init=init, out_init=init),
      experts,
      top_k,
      router=TopK(balance=balance, init=init),
    ),
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
  "mixtral-8x7b": decoder(),
  "mixtral-8x22b": decoder(
    dim=6144, layers=56, heads=48, mlp_dim=16384, max_positions=65536
  ),
}

_EXPERTS = "model.layers.{}.block_sparse_moe.experts.{expert}."
_NAMES = Names(
  (
    *COMMON,
    ("ffn/router/w", "model.layers.{}.block_sparse_moe.gate.weight"),
    ("ffn/experts/gate", _EXPERTS + "w1.weight"),
    ("ffn/experts/up", _EXPERTS + "w3.weight"),
    ("ffn/experts/down", _EXPERTS + "w2.weight"),
  )
)


def read(config: Config) -> Decoder:
  """A config.json of `model_type` mixtral.

  The balancing loss counts where the config switches the router's output on.
  """
  expect(config, hidden_act="silu", partial_rotary_factor=1.0)
  rope = read_rope(config, theta=1e6)
  defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
  balance = given(config, "router_aux_loss_coef", 0.001)
  return decoder(
    **sizes(config, rms_norm_eps=1e-5, **defaults),
    experts=given(config, "num_local_experts", 8),
    top_k=given(config, "num_experts_per_tok", 2),
    window=config.get("sliding_window"),
    theta=rope.theta,
    scaling=rope.scaling,
    balance=balance if config.get("output_router_logits") else 0.0,
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  mixer, moe = model.blocks[0].mixer, model.blocks[0].ffn
  return write_sizes(model, moe.expert) | {
    "hidden_act": "silu",
    "num_local_experts": moe.experts,
    "num_experts_per_tok": moe.top_k,
    "sliding_window": mixer.mask.reach,
    "rope_parameters": write_rope(mixer.position),
    "output_router_logits": moe.router.balance > 0,
    "router_aux_loss_coef": moe.router.balance,
  }


HF = (Hub("mixtral", "MixtralForCausalLM", read, write, _NAMES),)
