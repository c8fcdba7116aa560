"""DeepSeek V2 and V3: latent attention, and experts in groups.

All heads read one latent per token (arXiv:2405.04434, section 2.1). The first
layers are dense, the others have experts beside one that is always at work
(arXiv:2401.06066). V2 scores experts by a softmax and picks groups by their
best one; V3 (arXiv:2412.19437, section 2.1) scores each by a sigmoid, picks
groups by their two best, and keeps the load even by a bias that enters the
choice alone. R1 has V3's shape. Sizes from the papers, sections 3.1.2 and 4.2,
and the `config.json` published with the weights.
"""

from typing import Any

from jaxlm.errors import UserError
from jaxlm.layers.latent import LatentAttention
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.moe import MoE
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.router import Groups, TopK, sigmoid, softmax
from jaxlm.layers.scaling import Scaling, Yarn, softmax_factor
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
from jaxlm.models.names import COMMON, Interleaved, Names
from jaxlm.models.pattern import segments

_INIT = Normal(0.006)  # of V2 and V3, both sections 3.1.2 and 4.2


def decoder(
  vocab: int = 129280,
  dim: int = 7168,
  layers: int = 61,
  heads: int = 128,
  rank: int = 512,
  q_rank: int | None = 1536,
  nope_dim: int = 128,
  rope_dim: int = 64,
  value_dim: int = 128,
  mlp_dim: int = 18432,
  dense: int = 3,
  expert_dim: int = 2048,
  experts: int = 256,
  top_k: int = 8,
  shared: int = 1,
  score: str = "sigmoid",
  groups: int = 8,
  keep: int = 4,
  normalise: bool = True,
  weight: float = 2.5,
  theta: float = 10000.0,
  scaling: Scaling | None = None,
  interleaved: bool = True,
  eps: float = 1e-6,
  max_positions: int = 4096,
  tied: bool = False,
  balance: float = 0.0,
  dropout: float = 0.0,
) -> Decoder:
  """DeepSeek at any size; the defaults are V3 before its context was extended.

  `rank` and `q_rank` are the widths of the latents (q_rank None: queries have
  none); `nope_dim`, `rope_dim`, `value_dim` those of a head's features that do
  not turn, that do, and of its values. The first `dense` layers are `mlp_dim`
  wide; in the others are `experts`, each `expert_dim` wide, of which `top_k`
  work on a token, and `shared` more that always do.

  `score` is 'softmax' (V2) or 'sigmoid' (V3). Experts stand in `groups`, of
  which a token chooses from `keep`. The weights of its experts are their
  scores times `weight`, or sum to it where `normalise`. `balance` is the
  coefficient of the loss that keeps the load even.

  Raises:
    UserError: for a score that is neither, or experts that do not fit.
  """
  norm = RMSNorm(dim, eps)
  mixer = LatentAttention(
    dim,
    heads,
    rank,
    q_rank,
    nope_dim,
    rope_dim,
    value_dim,
    position=Rope(theta, scaling, interleaved=interleaved),
    scale=(nope_dim + rope_dim) ** -0.5 * softmax_factor(scaling),
    init=_INIT,
    out_init=_INIT,
  )
  moe = MoE(
    _glu(dim, expert_dim),
    experts,
    top_k,
    router=_router(score, groups, keep, normalise, weight, balance),
    shared=_glu(dim, shared * expert_dim),
  )
  first = Block(mixer, _glu(dim, mlp_dim), norm, dropout=dropout)
  other = Block(mixer, moe, norm, dropout=dropout)
  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=segments([first] * dense + [other] * (layers - dense)),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    dropout=dropout,
    embed_init=_INIT,
    head_init=_INIT,
  )


def _glu(dim: int, hidden: int) -> GLU:
  """A feed-forward layer: a dense one, an expert, or several at once."""
  return GLU(dim, hidden, act=silu, init=_INIT, out_init=_INIT)


def _router(
  score: str,
  groups: int,
  keep: int,
  normalise: bool,
  weight: float,
  balance: float,
) -> TopK:
  """V2's router (softmax) or V3's (sigmoid, and a bias for the choice)."""
  if score not in ("softmax", "sigmoid"):
    raise UserError(f"score={score!r} is neither 'softmax' nor 'sigmoid'")
  third = score == "sigmoid"
  return TopK(
    score=sigmoid if third else softmax,
    normalise=normalise,
    scale=weight,
    groups=Groups(groups, keep, 2 if third else 1) if groups > 1 else None,
    correction=third,
    balance=balance,
    init=_INIT,
  )


_YARN = {"factor": 40.0, "original": 4096}
# sqrt(t) = 0.0707 ln s + 1: arXiv:2405.04434, section 3.1.4.
_YARN2 = Yarn(**_YARN, mscale=0.707, mscale_all_dim=0.707)
_YARN3 = Yarn(**_YARN, mscale=1.0, mscale_all_dim=1.0)
_V2 = {"vocab": 102400, "score": "softmax", "normalise": False, "top_k": 6}
_V2 |= {"shared": 2, "scaling": _YARN2, "max_positions": 163840, "dense": 1}

PUBLISHED = {
  "deepseek-v2": decoder(
    **_V2,
    dim=5120,
    layers=60,
    mlp_dim=12288,
    expert_dim=1536,
    experts=160,
    keep=3,
    weight=16.0,
  ),
  "deepseek-v2-lite": decoder(
    **_V2,
    dim=2048,
    layers=27,
    heads=16,
    q_rank=None,
    mlp_dim=10944,
    expert_dim=1408,
    experts=64,
    groups=1,
    keep=1,
    weight=1.0,
  ),
  "deepseek-v3": decoder(scaling=_YARN3, max_positions=163840),
}

_ATTENTION = "model.layers.{}.self_attn."
_MLP = "model.layers.{}.mlp."
_EXPERTS = _MLP + "experts.{expert}."
_SHARED = _MLP + "shared_experts."
_NAMES = Names(
  (
    *COMMON,
    ("mixer/q_down", _ATTENTION + "q_a_proj.weight"),
    ("mixer/q_down_norm/scale", _ATTENTION + "q_a_layernorm.weight"),
    ("mixer/q_up", _ATTENTION + "q_b_proj.weight"),
    ("mixer/down mixer/rope", _ATTENTION + "kv_a_proj_with_mqa.weight"),
    ("mixer/down_norm/scale", _ATTENTION + "kv_a_layernorm.weight"),
    (
      "mixer/k_up mixer/v_up",
      _ATTENTION + "kv_b_proj.weight",
      Interleaved(),
    ),
    ("ffn/router/w", _MLP + "gate.weight"),
    ("ffn/router/correction", _MLP + "gate.e_score_correction_bias"),
    ("ffn/experts/gate", _EXPERTS + "gate_proj.weight"),
    ("ffn/experts/up", _EXPERTS + "up_proj.weight"),
    ("ffn/experts/down", _EXPERTS + "down_proj.weight"),
    ("ffn/shared/gate", _SHARED + "gate_proj.weight"),
    ("ffn/shared/up", _SHARED + "up_proj.weight"),
    ("ffn/shared/down", _SHARED + "down_proj.weight"),
  ),
  # V3's files hold one layer more, a second head that predicts two ahead.
  ignored=(r"rotary_emb\.inv_freq$", r"^model\.layers\.61\."),
)

# What transformers takes where config.json is silent.
_BOTH = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128}
_BOTH |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6}
_DEFAULTS2 = _BOTH | {
  "first_k_dense_replace": 0,
  "max_position_embeddings": 2048,
  "moe_intermediate_size": 1407,
  "n_group": 1,
  "n_routed_experts": 64,
  "n_shared_experts": 2,
  "norm_topk_prob": False,
  "num_experts_per_tok": None,
  "routed_scaling_factor": 1.0,
  "topk_group": 1,
  "topk_method": "greedy",
}
_DEFAULTS3 = _BOTH | {
  "first_k_dense_replace": 3,
  "max_position_embeddings": 4096,
  "moe_intermediate_size": 2048,
  "n_group": 8,
  "n_routed_experts": 256,
  "n_shared_experts": 1,
  "norm_topk_prob": True,
  "num_experts_per_tok": 8,
  "routed_scaling_factor": 2.5,
  "rope_interleave": True,
  "topk_group": 4,
}
_SIZES = {
  "rank": "kv_lora_rank",
  "q_rank": "q_lora_rank",
  "nope_dim": "qk_nope_head_dim",
  "rope_dim": "qk_rope_head_dim",
  "value_dim": "v_head_dim",
  "dense": "first_k_dense_replace",
  "expert_dim": "moe_intermediate_size",
  "experts": "n_routed_experts",
  "top_k": "num_experts_per_tok",
  "shared": "n_shared_experts",
  "groups": "n_group",
  "keep": "topk_group",
  "normalise": "norm_topk_prob",
  "weight": "routed_scaling_factor",
}


def _read(config: Config, **more: Any) -> Decoder:
  """What the configs of both versions share; `config` has the defaults."""
  heads = config.get("num_attention_heads")
  expect(
    config,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    moe_layer_freq=1,
    num_key_value_heads=heads,
  )
  for key in _SIZES.values():
    if config.get(key) is None and key != "q_lora_rank":
      raise UserError(f"the config has no {key!r}; is config.json whole?")
  rope = read_rope(config)
  given = {ours: config[theirs] for ours, theirs in _SIZES.items()} | more
  return decoder(
    **sizes(config, "kv_heads", "head_dim"),
    **given,
    theta=rope.theta,
    scaling=rope.scaling,
  )


def read_v2(config: Config) -> Decoder:
  """A config.json of `model_type` deepseek_v2."""
  config = _DEFAULTS2 | dict(config)
  methods = ("greedy", "group_limited_greedy")
  expect(
    config, scoring_func="softmax", norm_topk_prob=False, topk_method=methods
  )
  if config["topk_method"] == "greedy":
    config |= {"n_group": 1, "topk_group": 1}
  return _read(config, score="softmax")


def read_v3(config: Config) -> Decoder:
  """A config.json of `model_type` deepseek_v3."""
  config = _DEFAULTS3 | dict(config)
  expect(config, scoring_func="sigmoid", topk_method="noaux_tc")
  return _read(config, score="sigmoid", interleaved=config["rope_interleave"])


def _write(model: Decoder) -> dict[str, Any]:
  """What the configs of both versions share."""
  first, last = model.blocks[0], model.blocks[-1]
  mixer, moe = last.mixer, last.ffn
  dense = sum(block.ffn != moe for block in model.blocks)
  groups = moe.router.groups
  return write_sizes(model, first.ffn if dense else moe.expert) | {
    "hidden_act": "silu",
    "attention_bias": False,
    "head_dim": mixer.rope_dim,
    "kv_lora_rank": mixer.rank,
    "q_lora_rank": mixer.q_rank,
    "qk_nope_head_dim": mixer.nope_dim,
    "qk_rope_head_dim": mixer.rope_dim,
    "v_head_dim": mixer.value_dim,
    "rope_parameters": write_rope(mixer.position),
    "first_k_dense_replace": dense,
    "moe_layer_freq": 1,
    "moe_intermediate_size": moe.expert.hidden,
    "n_routed_experts": moe.experts,
    "num_experts_per_tok": moe.top_k,
    "n_shared_experts": moe.shared.hidden // moe.expert.hidden,
    "n_group": groups.count if groups else 1,
    "topk_group": groups.keep if groups else 1,
    "norm_topk_prob": moe.router.normalise,
    "routed_scaling_factor": moe.router.scale,
  }


def write_v2(model: Decoder) -> dict[str, Any]:
  """The config.json of a model with V2's router."""
  limited = model.blocks[-1].ffn.router.groups is not None
  return _write(model) | {
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy" if limited else "greedy",
  }


def write_v3(model: Decoder) -> dict[str, Any]:
  """The config.json of a model with V3's router."""
  return _write(model) | {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_interleave": model.blocks[-1].mixer.position.interleaved,
    "num_nextn_predict_layers": 0,
  }


HF = (
  Hub("deepseek_v2", "DeepseekV2ForCausalLM", read_v2, write_v2, _NAMES),
  Hub("deepseek_v3", "DeepseekV3ForCausalLM", read_v3, write_v3, _NAMES),
)
