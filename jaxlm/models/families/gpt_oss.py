"""gpt-oss (arXiv:2508.10925): experts everywhere, sinks, windows in turn.

Every other layer sees 128 tokens, the first one among them; each head has a
learned sink, so that it may look at nothing. Experts have biases and a clipped
SwiGLU, (up + 1) gate sigmoid(1.702 gate) with both kept within 7, and a token's
weights are the softmax of the four scores it chose. Sizes from the model card,
table 1 and section 2, and the `config.json` published with the weights. Those
files hold the experts in MXFP4: see `jaxlm.interop.mxfp4`.
"""

from typing import Any

from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention
from jaxlm.layers.mask import Causal, Sliding
from jaxlm.layers.mlp import GLU, ClippedShift, ClippedSiLU
from jaxlm.layers.moe import MoE
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.router import TopK
from jaxlm.layers.scaling import Scaling, Yarn
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
from jaxlm.models.names import COMMON, Interleaved, Joined, Names
from jaxlm.models.pattern import segments

_YARN = Yarn(factor=32.0, original=4096, truncate=False)


def decoder(
  vocab: int = 201088,
  dim: int = 2880,
  layers: int = 24,
  heads: int = 64,
  kv_heads: int = 8,
  head_dim: int = 64,
  mlp_dim: int = 2880,
  experts: int = 32,
  top_k: int = 4,
  window: int = 128,
  full: tuple[int, ...] | None = None,
  limit: float = 7.0,
  slope: float = 1.702,
  theta: float = 150000.0,
  scaling: Scaling | None = _YARN,
  bias: bool = True,
  eps: float = 1e-5,
  max_positions: int = 131072,
  tied: bool = False,
  balance: float = 0.0,
  dropout: float = 0.0,
) -> Decoder:
  """gpt-oss at any size; the defaults are 20b.

  `mlp_dim` is that of one expert; `full` are the numbers of the layers that see
  everything, None for every second one; `limit` and `slope` are those of the
  nonlinearity, `bias` is that of attention, and `balance` the coefficient of
  the loss that keeps the experts' load even.
  """
  norm, init = RMSNorm(dim, eps), Normal(0.02)
  full = tuple(range(1, layers, 2)) if full is None else full
  moe = MoE(
    GLU(
      dim,
      mlp_dim,
      act=ClippedSiLU(limit, slope),
      up_act=ClippedShift(limit),
      bias=True,
      init=init,
      out_init=init,
    ),
    experts,
    top_k,
    router=TopK(bias=True, balance=balance, init=init),
  )

  def block(number: int) -> Block:
    mixer = Attention(
      dim,
      heads,
      kv_heads,
      head_dim,
      mask=Causal() if number in full else Sliding(window),
      position=Rope(theta, scaling),
      bias=bias,
      out_bias=bias,
      sinks=True,
      init=init,
      out_init=init,
    )
    return Block(mixer, moe, norm, dropout=dropout)

  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=segments([block(number) for number in range(layers)]),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    dropout=dropout,
    head_init=init,
  )


PUBLISHED = {
  "gpt-oss-20b": decoder(),
  "gpt-oss-120b": decoder(layers=36, experts=128),
}

_MLP = "model.layers.{}.mlp."
_PAIRS = Interleaved(transposed=False)
_NAMES = Names(
  (
    *COMMON,
    ("mixer/sinks", "model.layers.{}.self_attn.sinks"),
    ("ffn/router/w", _MLP + "router.weight"),
    ("ffn/router/bias", _MLP + "router.bias"),
    (
      "ffn/experts/gate ffn/experts/up",
      _MLP + "experts.gate_up_proj",
      _PAIRS,
    ),
    (
      "ffn/experts/gate_bias ffn/experts/up_bias",
      _MLP + "experts.gate_up_proj_bias",
      _PAIRS,
    ),
    (
      "ffn/experts/down",
      _MLP + "experts.down_proj",
      Joined(transposed=False),
    ),
    ("ffn/experts/down_bias", _MLP + "experts.down_proj_bias"),
  )
)

# What transformers takes where config.json is silent.
_DEFAULTS = {
  "num_key_value_heads": 8,
  "head_dim": 64,
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1e-5,
}
_ROPE = {"rope_parameters": write_rope(Rope(150000.0, _YARN))}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` gpt_oss.

  The balancing loss counts where the config switches the router's output on.
  """
  expect(config, hidden_act="silu", partial_rotary_factor=1.0)
  silent = not {"rope_parameters", "rope_scaling"} & config.keys()
  rope = read_rope(_ROPE | dict(config) if silent else config, theta=150000.0)
  balance = given(config, "router_aux_loss_coef", 0.001)
  return decoder(
    **sizes(config, **_DEFAULTS),
    experts=given(config, "num_local_experts", 128),
    top_k=given(config, "num_experts_per_tok", 4),
    window=given(config, "sliding_window", 128),
    full=_full(config),
    limit=given(config, "swiglu_limit", 7.0),
    slope=given(config, "swiglu_alpha", 1.702),
    theta=rope.theta,
    scaling=rope.scaling,
    bias=given(config, "attention_bias", True),
    balance=balance if config.get("output_router_logits") else 0.0,
  )


def _full(config: Config) -> tuple[int, ...] | None:
  """The layers that see everything.

  Raises:
    UserError: if `layer_types` does not have one of the two for each layer.
  """
  kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
  if kinds is None:
    return None
  if len(kinds) != layers or not set(kinds) <= set(_KINDS):
    raise UserError(
      f"the config's layer_types has {len(kinds)} entries for {layers} layers, "
      f"of {', '.join(sorted(set(kinds)))}; give each layer one of "
      f"{' and '.join(_KINDS)}"
    )
  return tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")


_KINDS = ("full_attention", "sliding_attention")


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  mixers = [block.mixer for block in model.blocks]
  moe, windows = model.blocks[0].ffn, [mixer.mask.reach for mixer in mixers]
  return write_sizes(model, moe.expert) | {
    "hidden_act": "silu",
    "num_local_experts": moe.experts,
    "num_experts_per_tok": moe.top_k,
    "sliding_window": next((w for w in windows if w is not None), 128),
    "layer_types": [_KINDS[window is not None] for window in windows],
    "swiglu_limit": moe.expert.act.limit,
    "swiglu_alpha": moe.expert.act.slope,
    "attention_bias": mixers[0].bias,
    "rope_parameters": write_rope(mixers[0].position),
    "output_router_logits": moe.router.balance > 0,
    "router_aux_loss_coef": moe.router.balance,
  }


HF = (Hub("gpt_oss", "GptOssForCausalLM", read, write, _NAMES),)
