"""Qwen 3 MoE (arXiv:2505.09388): Qwen 3 with 128 small experts, 8 at work.

No expert is shared; some layers may be dense, in no published model. Sizes
from the report, table 2, and the `config.json` published with the weights.
"""

from collections.abc import Collection
from typing import Any

from jaxlm.layers.attention import Attention
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
from jaxlm.models.pattern import segments


def decoder(
  vocab: int = 151936,
  dim: int = 2048,
  layers: int = 48,
  heads: int = 32,
  kv_heads: int = 4,
  head_dim: int = 128,
  mlp_dim: int = 6144,
  expert_dim: int = 768,
  experts: int = 128,
  top_k: int = 8,
  normalise: bool = True,
  dense: Collection[int] = (),
  theta: float = 1e6,
  scaling: Scaling | None = None,
  eps: float = 1e-6,
  max_positions: int = 40960,
  tied: bool = False,
  balance: float = 0.0,
  dropout: float = 0.0,
) -> Decoder:
  """Qwen 3 MoE at any size; the defaults are 30B-A3B.

  `dense` are the numbers of the layers with one feed-forward layer, `mlp_dim`
  wide, instead of experts; `normalise` makes the weights of a token's experts
  sum to one, and `balance` is the coefficient of the loss that keeps the
  experts' load even.
  """
  norm, init = RMSNorm(dim, eps), Normal(0.02)
  mixer = Attention(
    dim,
    heads,
    kv_heads,
    head_dim,
    position=Rope(theta, scaling),
    qk_norm=RMSNorm(head_dim, eps, axis="head_dim"),
    init=init,
    out_init=init,
  )
  moe = MoE(
    GLU(dim, expert_dim, act=silu, init=init, out_init=init),
    experts,
    top_k,
    router=TopK(normalise=normalise, balance=balance, init=init),
  )
  mlp = GLU(dim, mlp_dim, act=silu, init=init, out_init=init)
  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=segments(
      [
        Block(mixer, mlp if i in dense else moe, norm, dropout=dropout)
        for i in range(layers)
      ]
    ),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    dropout=dropout,
    head_init=init,
  )


_A22 = {"dim": 4096, "layers": 94, "heads": 64, "expert_dim": 1536}
_LONG = {"max_positions": 262144}

PUBLISHED = {
  "qwen3-30b-a3b": decoder(),
  "qwen3-235b-a22b": decoder(**_A22),
  "qwen3-30b-a3b-2507": decoder(**_LONG, theta=1e7),
  "qwen3-235b-a22b-2507": decoder(**_A22, **_LONG, theta=5e6),
  "qwen3-coder-480b-a35b": decoder(
    dim=6144,
    layers=62,
    heads=96,
    kv_heads=8,
    expert_dim=2560,
    experts=160,
    theta=1e7,
    **_LONG,
  ),
}

_EXPERTS = "model.layers.{}.mlp.experts.{expert}."
_NAMES = Names(
  (
    *COMMON,
    ("ffn/router/w", "model.layers.{}.mlp.gate.weight"),
    ("ffn/experts/gate", _EXPERTS + "gate_proj.weight"),
    ("ffn/experts/up", _EXPERTS + "up_proj.weight"),
    ("ffn/experts/down", _EXPERTS + "down_proj.weight"),
  )
)


def read(config: Config) -> Decoder:
  """A config.json of `model_type` qwen3_moe.

  The balancing loss counts where the config switches the router's output on.
  """
  expect(
    config,
    hidden_act="silu",
    attention_bias=False,
    use_sliding_window=False,
    partial_rotary_factor=1.0,
  )
  defaults = {"num_key_value_heads": 4, "max_position_embeddings": 32768}
  found = sizes(config, rms_norm_eps=1e-6, **defaults)
  found.setdefault("head_dim", found["dim"] // found["heads"])
  rope = read_rope(config)
  balance = given(config, "router_aux_loss_coef", 0.001)
  return decoder(
    **found,
    expert_dim=given(config, "moe_intermediate_size", 768),
    experts=given(
      config, "num_experts", given(config, "num_local_experts", 128)
    ),
    top_k=given(config, "num_experts_per_tok", 8),
    normalise=given(config, "norm_topk_prob", False),
    dense=_dense(config, found["layers"]),
    theta=rope.theta,
    scaling=rope.scaling,
    balance=balance if config.get("output_router_logits") else 0.0,
  )


def _dense(config: Config, layers: int) -> set[int]:
  """The layers without experts: those named, and all but every n-th."""
  step = given(config, "decoder_sparse_step", 1)
  named = set(config.get("mlp_only_layers") or ())
  return named | {i for i in range(layers) if (i + 1) % step}


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  mixer, ffns = model.blocks[0].mixer, [block.ffn for block in model.blocks]
  dense = [i for i, ffn in enumerate(ffns) if not isinstance(ffn, MoE)]
  moe = next((ffn for ffn in ffns if isinstance(ffn, MoE)), None)
  return write_sizes(model, ffns[dense[0]] if dense else moe.expert) | {
    "hidden_act": "silu",
    "num_experts": moe.experts,
    "num_experts_per_tok": moe.top_k,
    "norm_topk_prob": moe.router.normalise,
    "moe_intermediate_size": moe.expert.hidden,
    "mlp_only_layers": dense,
    "decoder_sparse_step": 1,
    "rope_parameters": write_rope(mixer.position),
    "output_router_logits": moe.router.balance > 0,
    "router_aux_loss_coef": moe.router.balance,
  }


HF = (Hub("qwen3_moe", "Qwen3MoeForCausalLM", read, write, _NAMES),)
