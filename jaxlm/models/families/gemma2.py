"""Gemma 2 (arXiv:2408.00118): windows and full attention in turn, soft caps.

Norms stand before and after each branch and store their scales as differences
from one; scores and logits are bounded by cap * tanh(x / cap); queries are
scaled by a number of their own. Embeddings are multiplied by sqrt(dim) in the
dtype of the residual stream: in bfloat16 59.87 is then 59.75, as it was in
training. Sizes from the report, table 1, and the `config.json` published with
the weights.
"""

from typing import Any

from jaxlm.layers.attention import Attention
from jaxlm.layers.mask import Causal, Sliding
from jaxlm.layers.mlp import GLU, gelu_tanh
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.scaling import Scaling
from jaxlm.models.decoder import Block, Decoder
from jaxlm.models.hub import (
  Config,
  Hub,
  expect,
  given,
  read_pattern,
  read_rope,
  sizes,
  write_pattern,
  write_rope,
  write_sizes,
)
from jaxlm.models.names import SANDWICH, Names
from jaxlm.models.pattern import segments


def decoder(
  vocab: int = 256000,
  dim: int = 2304,
  layers: int = 26,
  heads: int = 8,
  kv_heads: int = 4,
  head_dim: int = 256,
  mlp_dim: int = 9216,
  theta: float = 10000.0,
  scaling: Scaling | None = None,
  eps: float = 1e-6,
  max_positions: int = 8192,
  tied: bool = True,
  window: int = 4096,
  pattern: str = "LG",
  query_dim: int = 256,
  score_cap: float | None = 50.0,
  logit_cap: float | None = 30.0,
  dropout: float = 0.0,
) -> Decoder:
  """Gemma 2 at any size; the defaults are the 2B model.

  Args beyond the usual:
    window: how many tokens a local layer sees.
    pattern: L for a local and G for a global layer, tiled over the depth.
    query_dim: scores are divided by its root (`query_pre_attn_scalar`).
    score_cap, logit_cap: bounds, or None.
  """
  norm, init = RMSNorm(dim, eps, offset=1.0), Normal(0.02)

  def block(kind: str) -> Block:
    return Block(
      mixer=Attention(
        dim,
        heads,
        kv_heads,
        head_dim,
        mask=Sliding(window) if kind == "L" else Causal(),
        position=Rope(theta, scaling),
        scale=query_dim**-0.5,
        softcap=score_cap,
        init=init,
        out_init=init,
      ),
      ffn=GLU(dim, mlp_dim, act=gelu_tanh, init=init, out_init=init),
      norm=norm,
      post_norm=norm,
      dropout=dropout,
    )

  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=segments([block(pattern[i % len(pattern)]) for i in range(layers)]),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    embed_scale=dim**0.5,
    softcap=logit_cap,
    dropout=dropout,
    head_init=init,
  )


PUBLISHED = {
  "gemma2-2b": decoder(),
  "gemma2-9b": decoder(
    dim=3584, layers=42, heads=16, kv_heads=8, mlp_dim=14336
  ),
  "gemma2-27b": decoder(
    dim=4608,
    layers=46,
    heads=32,
    kv_heads=16,
    head_dim=128,
    mlp_dim=36864,
    query_dim=144,
  ),
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` gemma2."""
  expect(
    config,
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
    use_bidirectional_attention=False,
  )
  defaults = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
  defaults |= {"num_key_value_heads": 4, "head_dim": 256}
  rope = read_rope(config)
  return decoder(
    **sizes(config, **defaults),
    theta=rope.theta,
    scaling=rope.scaling,
    window=given(config, "sliding_window", 4096),
    pattern=read_pattern(config, "LG"),
    query_dim=given(config, "query_pre_attn_scalar", 256),
    score_cap=config.get("attn_logit_softcapping", 50.0),
    logit_cap=config.get("final_logit_softcapping", 30.0),
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  mixer = model.blocks[0].mixer
  windows = [b.mixer.mask.reach for b in model.blocks if b.mixer.mask.reach]
  return write_sizes(model) | {
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": write_rope(mixer.position),
    "layer_types": write_pattern(model),
    "sliding_window": windows[0] if windows else 4096,
    "query_pre_attn_scalar": round(mixer.scale**-2),
    "attn_logit_softcapping": mixer.softcap,
    "final_logit_softcapping": model.softcap,
  }


HF = (Hub("gemma2", "Gemma2ForCausalLM", read, write, Names(SANDWICH)),)
