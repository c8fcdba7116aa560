"""Llama 4 (Meta 2025), text: chunked attention, experts that see a weight.

Three layers of four turn by neighbouring pairs and see their own chunk of the
text; Scout also normalises their queries and keys, after the turn. Every
fourth has no positions, sees everything, and its queries grow with their
position. A token goes to one expert, by a sigmoid that multiplies what the
expert reads, and to a shared one; in Maverick every other layer is dense. There
is no paper: the sizes are those of the `config.json` published with the
weights (Llama-4-Scout-17B-16E, Llama-4-Maverick-17B-128E).
"""

from collections.abc import Sequence
from typing import Any

from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention, Temperature
from jaxlm.layers.mask import Causal, Chunked
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.moe import MoE
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.router import TopK, sigmoid
from jaxlm.layers.scaling import Llama3, Scaling
from jaxlm.models.decoder import Block, Decoder
from jaxlm.models.hub import (
  Config,
  Hub,
  expect,
  given,
  read_pattern,
  read_rope,
  sizes,
  text_of,
  write_pattern,
  write_rope,
  write_sizes,
)
from jaxlm.models.names import COMMON, Joined, Names
from jaxlm.models.pattern import segments

_INIT = Normal(0.02)


def decoder(
  vocab: int = 202048,
  dim: int = 5120,
  layers: int = 48,
  heads: int = 40,
  kv_heads: int = 8,
  head_dim: int = 128,
  mlp_dim: int = 16384,
  expert_dim: int = 8192,
  experts: int = 16,
  top_k: int = 1,
  moe_layers: Sequence[int] | None = None,
  theta: float = 500000.0,
  scaling: Scaling | None = None,
  chunk: int = 8192,
  pattern: str = "CCCG",
  qk_norm: bool = True,
  temperature: Temperature | None = Temperature(),
  eps: float = 1e-5,
  max_positions: int = 262144,
  tied: bool = False,
  balance: float = 0.0,
  dropout: float = 0.0,
) -> Decoder:
  """Llama 4 at any size; the defaults are Scout's, without its stretch.

  Args beyond the usual:
    mlp_dim: hidden width of dense layers; `expert_dim` of each expert.
    moe_layers: numbers of the layers with experts; None means all.
    chunk: what a layer with positions sees: its own chunk of so many tokens.
    pattern: C for a layer with positions and chunks, G for one with neither,
      tiled over the depth.
    qk_norm: layers with positions normalise queries and keys.
    temperature: of the queries of layers without positions, or None.
    balance: coefficient of the loss that keeps the experts' load even.
  """
  norm = RMSNorm(dim, eps)
  sizes = {"dim": dim, "heads": heads, "kv_heads": kv_heads}
  sizes |= {"head_dim": head_dim, "init": _INIT, "out_init": _INIT}
  mixers = {
    "C": Attention(
      **sizes,
      mask=Chunked(chunk),
      position=Rope(theta, scaling, interleaved=True),
      qk_norm=_head_norm(head_dim, eps) if qk_norm else None,
      norm_after_rope=qk_norm,
    ),
    "G": Attention(**sizes, mask=Causal(), temperature=temperature),
  }
  expert = GLU(dim, expert_dim, act=silu, init=_INIT, out_init=_INIT)
  moe = MoE(
    expert,
    experts,
    top_k,
    router=TopK(sigmoid, normalise=False, balance=balance, init=_INIT),
    shared=expert,
    weigh_input=True,
  )
  dense = GLU(dim, mlp_dim, act=silu, init=_INIT, out_init=_INIT)

  def block(i: int) -> Block:
    has_experts = moe_layers is None or i in moe_layers
    return Block(
      mixer=mixers[pattern[i % len(pattern)]],
      ffn=moe if has_experts else dense,
      norm=norm,
      dropout=dropout,
    )

  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=segments([block(i) for i in range(layers)]),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    dropout=dropout,
    head_init=_INIT,
  )


def _head_norm(head_dim: int, eps: float) -> RMSNorm:
  """Of queries and keys: to length sqrt(head_dim), nothing to learn."""
  return RMSNorm(head_dim, eps, scale=False, axis="head_dim")


PUBLISHED = {
  "llama4-scout-17b-16e": decoder(
    scaling=Llama3(factor=16.0, high=1.0), max_positions=10485760
  ),
  "llama4-maverick-17b-128e": decoder(
    experts=128,
    moe_layers=range(1, 48, 2),
    qk_norm=False,
    max_positions=1048576,
  ),
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` llama4_text."""
  expect(config, hidden_act="silu", attention_bias=False)
  rope = read_rope(config, theta=500000.0)
  defaults = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
  balance = config.get("router_aux_loss_coef", 0.001)
  tuned = Temperature(
    given(config, "attn_scale", 0.1), given(config, "floor_scale", 8192)
  )
  return decoder(
    **sizes(config, "mlp_dim", **defaults, max_position_embeddings=131072),
    mlp_dim=given(config, "intermediate_size_mlp", 16384),
    expert_dim=config["intermediate_size"],
    experts=given(config, "num_local_experts", 16),
    top_k=given(config, "num_experts_per_tok", 1),
    moe_layers=_moe_layers(config),
    theta=rope.theta,
    scaling=rope.scaling,
    chunk=given(config, "attention_chunk_size", 8192),
    pattern=_pattern(config),
    qk_norm=config.get("use_qk_norm", True),
    temperature=tuned if config.get("attn_temperature_tuning", True) else None,
    balance=balance if config.get("output_router_logits") else 0.0,
  )


def _moe_layers(config: Config) -> Sequence[int]:
  """Numbers of the layers with experts: listed, or every so many."""
  if config.get("moe_layers") is not None:
    return config["moe_layers"]
  step = given(config, "interleave_moe_layer_step", 1)
  return range(step - 1, config["num_hidden_layers"], step)


def _pattern(config: Config) -> str:
  """Where positions are (C) and where not (G), as chunks must be as well."""
  every = given(config, "no_rope_layer_interval", 4)
  turned = config.get("no_rope_layers") or [
    (i + 1) % every != 0 for i in range(config["num_hidden_layers"])
  ]
  pattern = "".join("C" if yes else "G" for yes in turned)
  if config.get("layer_types") and read_pattern(config, "CG") != pattern:
    raise UserError(
      "layer_types and no_rope_layers disagree: layers with positions must be "
      "chunked_attention and layers without full_attention"
    )
  return pattern


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  kinds = write_pattern(model)
  mixers = dict(zip(kinds, (b.mixer for b in model.blocks), strict=True))
  turned = mixers["chunked_attention"]
  moe = [i for i, b in enumerate(model.blocks) if isinstance(b.ffn, MoE)]
  ffn = model.blocks[moe[0]].ffn
  dense = [b.ffn for b in model.blocks if isinstance(b.ffn, GLU)]
  out = write_sizes(model, ffn.expert) | {
    "hidden_act": "silu",
    "intermediate_size_mlp": dense[0].hidden if dense else 16384,
    "num_local_experts": ffn.experts,
    "num_experts_per_tok": ffn.top_k,
    "moe_layers": moe,
    "rope_parameters": write_rope(turned.position),
    "attention_chunk_size": turned.mask.size,
    "layer_types": kinds,
    "no_rope_layers": [int(kind == "chunked_attention") for kind in kinds],
    "use_qk_norm": turned.qk_norm is not None,
    "output_router_logits": ffn.router.balance > 0,
    "router_aux_loss_coef": ffn.router.balance,
  }
  if "full_attention" not in mixers:
    return out
  tuned = mixers["full_attention"].temperature
  out["attn_temperature_tuning"] = tuned is not None
  if tuned is not None:
    out |= {"attn_scale": tuned.slope, "floor_scale": tuned.every}
  return out


_FFN = "model.layers.{}.feed_forward."
_PLAIN = Joined(transposed=False)
_NAMES = Names(
  (
    *(line for line in COMMON if not line[0].startswith("ffn/")),
    ("ffn/gate", _FFN + "gate_proj.weight"),
    ("ffn/up", _FFN + "up_proj.weight"),
    ("ffn/down", _FFN + "down_proj.weight"),
    ("ffn/router/w", _FFN + "router.weight"),
    (
      "ffn/experts/gate ffn/experts/up",
      _FFN + "experts.gate_up_proj",
      _PLAIN,
    ),
    ("ffn/experts/down", _FFN + "experts.down_proj", _PLAIN),
    ("ffn/shared/gate", _FFN + "shared_expert.gate_proj.weight"),
    ("ffn/shared/up", _FFN + "shared_expert.up_proj.weight"),
    ("ffn/shared/down", _FFN + "shared_expert.down_proj.weight"),
  )
)

_TEXT = Hub("llama4_text", "Llama4ForCausalLM", read, write, _NAMES)

# The published files see images too.
HF = (_TEXT, text_of(_TEXT, "llama4", "Llama4ForConditionalGeneration"))
