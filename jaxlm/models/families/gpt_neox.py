"""GPT-NeoX and Pythia (arXiv:2204.06745, 2304.01373): parallel residuals.

Attention and feed-forward read the same stream, each through a LayerNorm of
its own, and are added to it together; a quarter of each head's features turn.
Sizes from the papers' tables 1 and 2 and the `config.json` published with the
weights; vocabularies are padded by how many devices a model was trained on.
"""

from typing import Any

from jaxlm.layers.attention import Attention
from jaxlm.layers.mlp import MLP, Activation, gelu, gelu_tanh
from jaxlm.layers.norm import LayerNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
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
from jaxlm.models.names import Interleaved, Names


def decoder(
  vocab: int = 50304,
  dim: int = 2560,
  layers: int = 32,
  heads: int = 32,
  mlp_dim: int | None = None,
  theta: float = 10000.0,
  fraction: float = 0.25,
  scaling: Scaling | None = None,
  act: Activation = gelu,
  parallel: bool = True,
  bias: bool = True,
  eps: float = 1e-5,
  max_positions: int = 2048,
  tied: bool = False,
  dropout: float = 0.0,
) -> Decoder:
  """GPT-NeoX at any size; the defaults are Pythia 2.8B.

  `bias` is that of attention; `mlp_dim` is 4 dim unless given.
  """
  norm, init = LayerNorm(dim, eps), Normal(0.02)
  block = Block(
    mixer=Attention(
      dim,
      heads,
      position=Rope(theta, scaling, fraction),
      bias=bias,
      out_bias=bias,
      init=init,
      out_init=init,
    ),
    ffn=MLP(
      dim, mlp_dim or 4 * dim, act=act, bias=True, init=init, out_init=init
    ),
    norm=norm,
    parallel=parallel,
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
  "pythia-14m": decoder(dim=128, layers=6, heads=4),
  "pythia-31m": decoder(dim=256, layers=6, heads=8),
  "pythia-70m": decoder(dim=512, layers=6, heads=8),
  "pythia-160m": decoder(dim=768, layers=12, heads=12),
  "pythia-410m": decoder(dim=1024, layers=24, heads=16),
  "pythia-1b": decoder(dim=2048, layers=16, heads=8),
  "pythia-1.4b": decoder(dim=2048, layers=24, heads=16),
  "pythia-2.8b": decoder(),
  "pythia-6.9b": decoder(vocab=50432, dim=4096),
  "pythia-12b": decoder(vocab=50688, dim=5120, layers=36, heads=40),
  "gpt-neox-20b": decoder(
    vocab=50432, dim=6144, layers=44, heads=64, act=gelu_tanh
  ),
}

_NAMES = Names(
  (
    ("embed/tokens", "gpt_neox.embed_in.weight"),
    ("mixer_norm/scale", "gpt_neox.layers.{}.input_layernorm.weight"),
    ("mixer_norm/bias", "gpt_neox.layers.{}.input_layernorm.bias"),
    (
      "mixer/q mixer/k mixer/v",
      "gpt_neox.layers.{}.attention.query_key_value.weight",
      Interleaved(),
    ),
    (
      "mixer/q_bias mixer/k_bias mixer/v_bias",
      "gpt_neox.layers.{}.attention.query_key_value.bias",
      Interleaved(),
    ),
    ("mixer/o", "gpt_neox.layers.{}.attention.dense.weight"),
    ("mixer/o_bias", "gpt_neox.layers.{}.attention.dense.bias"),
    ("ffn_norm/scale", "gpt_neox.layers.{}.post_attention_layernorm.weight"),
    ("ffn_norm/bias", "gpt_neox.layers.{}.post_attention_layernorm.bias"),
    ("ffn/up", "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight"),
    ("ffn/up_bias", "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias"),
    ("ffn/down", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
    ("ffn/down_bias", "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias"),
    ("norm/scale", "gpt_neox.final_layer_norm.weight"),
    ("norm/bias", "gpt_neox.final_layer_norm.bias"),
    ("head", "embed_out.weight"),
  ),
  base="gpt_neox.",
  ignored=(
    r"\.attention\.(masked_)?bias$",
    r"\.rotary_emb\.inv_freq$",
  ),
)

_ACTS = {
  "gelu": gelu,
  "gelu_fast": gelu_tanh,
  "gelu_new": gelu_tanh,
  "gelu_pytorch_tanh": gelu_tanh,
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` gpt_neox."""
  defaults = {"hidden_act": "gelu", "max_position_embeddings": 2048}
  defaults |= {"rotary_emb_base": 10000.0, "rotary_pct": 0.25}
  config = dict(config) | {k: given(config, k, v) for k, v in defaults.items()}
  found = sizes(config, "kv_heads", "head_dim", "eps")
  expect(
    config,
    hidden_act=tuple(_ACTS),
    head_dim=found["dim"] // found["heads"],
    num_key_value_heads=found["heads"],
  )
  older = {
    "rope_theta": config["rotary_emb_base"],
    "partial_rotary_factor": config["rotary_pct"],
  }
  rope = read_rope(older | config)
  return decoder(
    **found,
    theta=rope.theta,
    fraction=rope.fraction,
    scaling=rope.scaling,
    act=_ACTS[config["hidden_act"]],
    parallel=given(config, "use_parallel_residual", True),
    bias=given(config, "attention_bias", True),
    eps=given(config, "layer_norm_eps", 1e-5),
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  block = model.blocks[0]
  left_out = ("num_key_value_heads", "head_dim", "rms_norm_eps")
  found = {k: v for k, v in write_sizes(model).items() if k not in left_out}
  rope = block.mixer.position
  return found | {
    "layer_norm_eps": model.norm.eps,
    "hidden_act": {gelu: "gelu", gelu_tanh: "gelu_fast"}[block.ffn.act],
    "use_parallel_residual": block.parallel,
    "attention_bias": block.mixer.bias,
    "rope_parameters": write_rope(rope)
    | {"partial_rotary_factor": rope.fraction},
  }


HF = (Hub("gpt_neox", "GPTNeoXForCausalLM", read, write, _NAMES),)
