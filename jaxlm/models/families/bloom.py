"""Bloom (arXiv:2211.05100): linear biases for positions, a normed embedding.

Attention knows distances by ALiBi alone; a LayerNorm follows the embedding;
everything has a bias; the head is the embedding. Sizes from the paper, table 3,
and the `config.json` published with the weights.
"""

from typing import Any

from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention
from jaxlm.layers.mlp import MLP, gelu_tanh
from jaxlm.layers.norm import LayerNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Alibi
from jaxlm.models.decoder import Block, Decoder
from jaxlm.models.hub import Config, Hub, expect
from jaxlm.models.names import Interleaved, Names


def decoder(
  vocab: int = 250880,
  dim: int = 1024,
  layers: int = 24,
  heads: int = 16,
  eps: float = 1e-5,
  max_positions: int = 2048,
  dropout: float = 0.0,
) -> Decoder:
  """Bloom at any size; the defaults are the 560M model.

  `max_positions` is what it was trained with; nothing ends there.
  """
  norm, init = LayerNorm(dim, eps), Normal(0.02)
  block = Block(
    mixer=Attention(
      dim,
      heads,
      position=Alibi(),
      bias=True,
      out_bias=True,
      init=init,
      out_init=init,
    ),
    ffn=MLP(dim, 4 * dim, act=gelu_tanh, bias=True, init=init, out_init=init),
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
    embed_norm=norm,
  )


PUBLISHED = {
  "bloom-560m": decoder(),
  "bloom-1.1b": decoder(dim=1536),
  "bloom-1.7b": decoder(dim=2048),
  "bloom-3b": decoder(dim=2560, layers=30, heads=32),
  "bloom-7.1b": decoder(dim=4096, layers=30, heads=32),
  "bloom-176b": decoder(dim=14336, layers=70, heads=112),
}

_NAMES = Names(
  (
    ("embed/tokens", "transformer.word_embeddings.weight"),
    ("embed/norm/scale", "transformer.word_embeddings_layernorm.weight"),
    ("embed/norm/bias", "transformer.word_embeddings_layernorm.bias"),
    ("mixer_norm/scale", "transformer.h.{}.input_layernorm.weight"),
    ("mixer_norm/bias", "transformer.h.{}.input_layernorm.bias"),
    (
      "mixer/q mixer/k mixer/v",
      "transformer.h.{}.self_attention.query_key_value.weight",
      Interleaved(),
    ),
    (
      "mixer/q_bias mixer/k_bias mixer/v_bias",
      "transformer.h.{}.self_attention.query_key_value.bias",
      Interleaved(),
    ),
    ("mixer/o", "transformer.h.{}.self_attention.dense.weight"),
    ("mixer/o_bias", "transformer.h.{}.self_attention.dense.bias"),
    ("ffn_norm/scale", "transformer.h.{}.post_attention_layernorm.weight"),
    ("ffn_norm/bias", "transformer.h.{}.post_attention_layernorm.bias"),
    ("ffn/up", "transformer.h.{}.mlp.dense_h_to_4h.weight"),
    ("ffn/up_bias", "transformer.h.{}.mlp.dense_h_to_4h.bias"),
    ("ffn/down", "transformer.h.{}.mlp.dense_4h_to_h.weight"),
    ("ffn/down_bias", "transformer.h.{}.mlp.dense_4h_to_h.bias"),
    ("norm/scale", "transformer.ln_f.weight"),
    ("norm/bias", "transformer.ln_f.bias"),
  ),
  base="transformer.",
  ignored=(r"^lm_head\.weight$",),
)


def read(config: Config) -> Decoder:
  """A config.json of `model_type` bloom, whose keys changed over the years."""
  dim = _first(config, "n_embed", "hidden_size")
  expect(
    config,
    apply_residual_connection_post_layernorm=False,
    tie_word_embeddings=True,
    n_inner=4 * dim,
  )
  return decoder(
    vocab=_first(config, "vocab_size"),
    dim=dim,
    layers=_first(config, "n_layer", "num_hidden_layers"),
    heads=_first(config, "n_head", "num_attention_heads"),
    eps=config.get("layer_norm_epsilon", 1e-5),
    max_positions=config.get("seq_length", 2048),
  )


def _first(config: Config, *names: str) -> int:
  """A size that a config may have under several names."""
  for name in names:
    if config.get(name) is not None:
      return config[name]
  raise UserError(
    f"the config has no {' or '.join(map(repr, names))}; is config.json whole?"
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  return {
    "vocab_size": model.vocab,
    "hidden_size": model.dim,
    "n_layer": model.depth,
    "n_head": model.blocks[0].mixer.heads,
    "layer_norm_epsilon": model.norm.eps,
    "seq_length": model.max_positions,
    "tie_word_embeddings": True,
  }


HF = (Hub("bloom", "BloomForCausalLM", read, write, _NAMES),)
