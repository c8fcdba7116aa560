"""Gemma 3 (arXiv:2503.19786), text: five local layers, then a global one.

As Gemma 2, but normalised queries and keys in place of soft caps. Local layers
turn by a base of 10,000; global ones by a million, stretched eightfold in the
models of 128k tokens. Sizes from the report, section 2 and table 1, and the
`config.json` published with the weights.
"""

from typing import Any

from jaxlm.layers.attention import Attention
from jaxlm.layers.mask import Causal, Sliding
from jaxlm.layers.mlp import GLU, gelu_tanh
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.scaling import Linear, Scaling
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
from jaxlm.models.names import SANDWICH, Names
from jaxlm.models.pattern import segments


def decoder(
  vocab: int = 262208,
  dim: int = 2560,
  layers: int = 34,
  heads: int = 8,
  kv_heads: int = 4,
  head_dim: int = 256,
  mlp_dim: int = 10240,
  theta: float = 1e6,
  scaling: Scaling | None = None,
  local_theta: float = 10000.0,
  local_scaling: Scaling | None = None,
  eps: float = 1e-6,
  max_positions: int = 131072,
  tied: bool = True,
  window: int = 1024,
  pattern: str = "LLLLLG",
  query_dim: int = 256,
  dropout: float = 0.0,
) -> Decoder:
  """Gemma 3 at any size; the defaults are the 4B model without its stretch.

  Args beyond the usual:
    theta, scaling: of the global layers; `local_...` those of local ones.
    window: how many tokens a local layer sees.
    pattern: L for a local and G for a global layer, tiled over the depth.
    query_dim: scores are divided by its root (`query_pre_attn_scalar`).
  """
  norm, init = RMSNorm(dim, eps, offset=1.0), Normal(0.02)
  local = Sliding(window), Rope(local_theta, local_scaling)
  full = Causal(), Rope(theta, scaling)

  def block(kind: str) -> Block:
    mask, position = local if kind == "L" else full
    return Block(
      mixer=Attention(
        dim,
        heads,
        kv_heads,
        head_dim,
        mask=mask,
        position=position,
        qk_norm=RMSNorm(head_dim, eps, offset=1.0, axis="head_dim"),
        scale=query_dim**-0.5,
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
    dropout=dropout,
    head_init=init,
  )


PUBLISHED = {
  "gemma3-270m": decoder(
    vocab=262144,
    dim=640,
    layers=18,
    heads=4,
    kv_heads=1,
    mlp_dim=2048,
    max_positions=32768,
    window=512,
  ),
  "gemma3-1b": decoder(
    vocab=262144,
    dim=1152,
    layers=26,
    heads=4,
    kv_heads=1,
    mlp_dim=6912,
    max_positions=32768,
    window=512,
  ),
  "gemma3-4b": decoder(scaling=Linear(8.0)),
  "gemma3-12b": decoder(
    dim=3840,
    layers=48,
    heads=16,
    kv_heads=8,
    mlp_dim=15360,
    scaling=Linear(8.0),
  ),
  "gemma3-27b": decoder(
    dim=5376,
    layers=62,
    heads=32,
    kv_heads=16,
    head_dim=128,
    mlp_dim=21504,
    scaling=Linear(8.0),
    query_dim=168,
  ),
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` gemma3_text."""
  expect(
    config,
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
    use_bidirectional_attention=False,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
  )
  defaults = {"vocab_size": 262208, "hidden_size": 2304}
  defaults |= {"intermediate_size": 9216, "num_hidden_layers": 26}
  defaults |= {"num_attention_heads": 8, "num_key_value_heads": 4}
  defaults |= {"head_dim": 256, "rms_norm_eps": 1e-6}
  defaults |= {"max_position_embeddings": 131072, "tie_word_embeddings": True}
  config = defaults | dict(config)
  rope, local = _ropes(config)
  turn = given(config, "sliding_window_pattern", 6)
  return decoder(
    **sizes(config),
    theta=rope.theta,
    scaling=rope.scaling,
    local_theta=local.theta,
    local_scaling=local.scaling,
    window=given(config, "sliding_window", 4096),
    pattern=read_pattern(config, "L" * (turn - 1) + "G"),
    query_dim=given(config, "query_pre_attn_scalar", 256),
  )


def _ropes(config: Config) -> tuple[Rope, Rope]:
  """Of global and of local layers, from files of either form."""
  rope = read_rope(config, "full_attention", 1e6)
  if config.get("rope_parameters"):
    return rope, read_rope(config, "sliding_attention")
  return rope, Rope(config.get("rope_local_base_freq", 10000.0))


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  mixers = [b.mixer for b in model.blocks]
  windows = [m.mask.reach for m in mixers if m.mask.reach]
  kinds = write_pattern(model)
  return write_sizes(model) | {
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {
      kind: write_rope(mixer.position)
      for kind, mixer in zip(kinds, mixers, strict=True)
    },
    "layer_types": kinds,
    "sliding_window": windows[0] if windows else 4096,
    "query_pre_attn_scalar": round(mixers[0].scale ** -2),
  }


_TEXT = Hub("gemma3_text", "Gemma3ForCausalLM", read, write, Names(SANDWICH))

# From 4B on the published files see images too.
HF = (_TEXT, text_of(_TEXT, "gemma3", "Gemma3ForConditionalGeneration"))
