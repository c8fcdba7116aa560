"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases.

Sizes are those of the published checkpoints (openai/gpt-2, `hparams.json`);
the initialization is the paper's, section 2.3: normal(0.02), with residual
projections scaled by 1 / sqrt(2 * layers).
"""

import math
from typing import Any

from jaxlm.layers.attention import Attention
from jaxlm.layers.mlp import MLP, gelu_tanh
from jaxlm.layers.norm import LayerNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Learned
from jaxlm.models.decoder import Block, Decoder
from jaxlm.models.hub import Config, Hub, expect, given
from jaxlm.models.names import Joined, Names


def decoder(
  vocab: int = 50257,
  dim: int = 768,
  layers: int = 12,
  heads: int = 12,
  max_positions: int = 1024,
  bias: bool = True,
  dropout: float = 0.0,
) -> Decoder:
  """GPT-2 at any size; the defaults are the 124M model."""
  out_init = Normal(0.02 / math.sqrt(2 * layers))
  norm = LayerNorm(dim, bias=bias)
  block = Block(
    mixer=Attention(
      dim,
      heads,
      bias=bias,
      out_bias=bias,
      init=Normal(0.02),
      out_init=out_init,
    ),
    ffn=MLP(
      dim,
      4 * dim,
      act=gelu_tanh,
      bias=bias,
      init=Normal(0.02),
      out_init=out_init,
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
    tied=True,
    positions=Learned(max_positions),
    dropout=dropout,
  )


PUBLISHED = {
  "gpt2": decoder(),
  "gpt2-medium": decoder(dim=1024, layers=24, heads=16),
  "gpt2-large": decoder(dim=1280, layers=36, heads=20),
  "gpt2-xl": decoder(dim=1600, layers=48, heads=25),
}

_NAMES = Names(
  (
    ("embed/tokens", "transformer.wte.weight"),
    ("embed/positions/table", "transformer.wpe.weight"),
    ("mixer_norm/scale", "transformer.h.{}.ln_1.weight"),
    ("mixer_norm/bias", "transformer.h.{}.ln_1.bias"),
    ("mixer/q mixer/k mixer/v", "transformer.h.{}.attn.c_attn.weight"),
    (
      "mixer/q_bias mixer/k_bias mixer/v_bias",
      "transformer.h.{}.attn.c_attn.bias",
    ),
    ("mixer/o", "transformer.h.{}.attn.c_proj.weight"),
    ("mixer/o_bias", "transformer.h.{}.attn.c_proj.bias"),
    ("ffn_norm/scale", "transformer.h.{}.ln_2.weight"),
    ("ffn_norm/bias", "transformer.h.{}.ln_2.bias"),
    ("ffn/up", "transformer.h.{}.mlp.c_fc.weight"),
    ("ffn/up_bias", "transformer.h.{}.mlp.c_fc.bias"),
    ("ffn/down", "transformer.h.{}.mlp.c_proj.weight"),
    ("ffn/down_bias", "transformer.h.{}.mlp.c_proj.bias"),
    ("norm/scale", "transformer.ln_f.weight"),
    ("norm/bias", "transformer.ln_f.bias"),
  ),
  layout=Joined(transposed=False),
  base="transformer.",
  ignored=(r"\.attn\.(masked_)?bias$", r"^lm_head\.weight$"),
)


def read(config: Config) -> Decoder:
  """A config.json of `model_type` gpt2."""
  dim = given(config, "n_embd", 768)
  expect(
    config,
    activation_function=("gelu_new", "gelu_pytorch_tanh"),
    n_inner=4 * dim,
    layer_norm_epsilon=1e-5,
    tie_word_embeddings=True,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
  )
  return decoder(
    vocab=given(config, "vocab_size", 50257),
    dim=dim,
    layers=given(config, "n_layer", 12),
    heads=given(config, "n_head", 12),
    max_positions=given(config, "n_positions", 1024),
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  return {
    "vocab_size": model.vocab,
    "n_embd": model.dim,
    "n_layer": model.depth,
    "n_head": model.blocks[0].mixer.heads,
    "n_positions": model.max_positions,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
  }


HF = (Hub("gpt2", "GPT2LMHeadModel", read, write, _NAMES),)
