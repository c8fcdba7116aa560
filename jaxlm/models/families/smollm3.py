"""SmolLM 3: Llama's block, without any positions in every fourth layer.

Leaving the rotation out of some layers (NoPE, arXiv:2501.18795) helps with
long texts. Sizes from the release notes (huggingface.co/blog/smollm3) and the
`config.json` published with the weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.scaling import Scaling
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
from jaxlm.models.names import COMMON, Names
from jaxlm.models.pattern import segments


def decoder(
  vocab: int = 128256,
  dim: int = 2048,
  layers: int = 36,
  heads: int = 16,
  kv_heads: int = 4,
  head_dim: int | None = None,
  mlp_dim: int = 11008,
  rotary: Sequence[bool] | None = None,
  theta: float = 5e6,
  scaling: Scaling | None = None,
  eps: float = 1e-6,
  max_positions: int = 65536,
  tied: bool = True,
  bias: bool = False,
  dropout: float = 0.0,
) -> Decoder:
  """SmolLM 3 at any size; the defaults are the 3B model.

  `rotary` says of each layer whether it turns queries and keys; by default all
  but every fourth do.

  Raises:
    UserError: if `rotary` does not have one entry for each layer.
  """
  rotary = _all_but_every(4, layers) if rotary is None else rotary
  if len(rotary) != layers:
    raise UserError(
      f"rotary (no_rope_layers) has {len(rotary)} entries for {layers} layers; "
      "give one for each"
    )
  norm, init = RMSNorm(dim, eps), Normal(0.02)
  mixer = Attention(
    dim,
    heads,
    kv_heads,
    head_dim,
    bias=bias,
    out_bias=bias,
    init=init,
    out_init=init,
  )
  ffn = GLU(dim, mlp_dim, act=silu, init=init, out_init=init)
  rope = Rope(theta, scaling)
  positions = [rope if on else None for on in rotary]
  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=segments(
      [
        Block(replace(mixer, position=position), ffn, norm, dropout=dropout)
        for position in positions
      ]
    ),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    dropout=dropout,
    head_init=init,
  )


def _all_but_every(interval: int, layers: int) -> list[bool]:
  """False for the last of every `interval` layers."""
  return [(i + 1) % interval != 0 for i in range(layers)]


PUBLISHED = {"smollm3-3b": decoder()}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` smollm3."""
  defaults = {"num_key_value_heads": 4, "max_position_embeddings": 32768}
  defaults |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
  given = sizes(config, **defaults)
  layers = given["layers"]
  expect(
    config,
    hidden_act="silu",
    mlp_bias=False,
    use_sliding_window=False,
    layer_types=["full_attention"] * layers,
    partial_rotary_factor=1.0,
  )
  rope, rotary = read_rope(config, theta=2e6), config.get("no_rope_layers")
  if rotary is None:
    rotary = _all_but_every(config.get("no_rope_layer_interval", 4), layers)
  return decoder(
    **given,
    rotary=rotary[:layers],
    theta=rope.theta,
    scaling=rope.scaling,
    bias=config.get("attention_bias", False),
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  mixers = [block.mixer for block in model.blocks]
  ropes = [mixer.position for mixer in mixers if mixer.position is not None]
  rotary = {"rope_parameters": write_rope(ropes[0])} if ropes else {}
  return (
    write_sizes(model)
    | rotary
    | {
      "hidden_act": "silu",
      "attention_bias": mixers[0].bias,
      "no_rope_layers": [int(mixer.position is not None) for mixer in mixers],
    }
  )


HF = (Hub("smollm3", "SmolLM3ForCausalLM", read, write, Names(COMMON)),)
