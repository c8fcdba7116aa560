"""BitNet b1.58 2B4T (arXiv:2504.12285): Llama's block for ternary weights.

A norm stands before every projection: inside attention before the output, and
in the gated squared ReLU before the second matrix, besides the usual two. The
published model has ternary weights and, at each of these norms, activations
of 8 bits for each token (arXiv:2402.17764). What runs here: weights as float
arrays that hold three values (`jaxlm.interop.packed` makes them from packed
files), activations rounded by `Rounded` norms where `activation_bits` is set,
which a config with `quantization_config` does; the matmuls are ordinary. To
train, see `jaxlm.layers.rounding.ternary_weights`. Sizes from the report and
the `config.json` published with the weights.
"""

from typing import Any

from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention
from jaxlm.layers.mlp import GLU, relu2
from jaxlm.layers.norm import Norm, RMSNorm, Rounded
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


def decoder(
  vocab: int = 128256,
  dim: int = 2560,
  layers: int = 30,
  heads: int = 20,
  kv_heads: int = 5,
  mlp_dim: int = 6912,
  theta: float = 500000.0,
  scaling: Scaling | None = None,
  eps: float = 1e-5,
  max_positions: int = 4096,
  tied: bool = True,
  activation_bits: int | None = None,
  dropout: float = 0.0,
) -> Decoder:
  """BitNet b1.58 at any size; the defaults are 2B4T with float activations.

  Args beyond the usual:
    activation_bits: of what projections read; None leaves it as it is.
  """
  init = Normal(0.02)

  def norm(size: int, axis: str) -> Norm:
    plain = RMSNorm(size, eps, axis=axis)
    return Rounded(plain, activation_bits) if activation_bits else plain

  block = Block(
    mixer=Attention(
      dim,
      heads,
      kv_heads,
      position=Rope(theta, scaling),
      out_norm=norm(dim, "heads"),
      init=init,
      out_init=init,
    ),
    ffn=GLU(
      dim,
      mlp_dim,
      act=relu2,
      init=init,
      out_init=init,
      hidden_norm=norm(mlp_dim, "mlp"),
    ),
    norm=norm(dim, "embed"),
    dropout=dropout,
  )
  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=(((block,), layers),),
    norm=RMSNorm(dim, eps),
    max_positions=max_positions,
    tied=tied,
    dropout=dropout,
    head_init=init,
  )


PUBLISHED = {"bitnet-2b4t": decoder(activation_bits=8)}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` bitnet."""
  defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
  arguments = sizes(config, "head_dim", **defaults)
  expect(
    config,
    hidden_act="relu2",
    attention_bias=False,
    head_dim=arguments["dim"] // arguments["heads"],
  )
  rope = read_rope(config, theta=500000.0)
  return decoder(
    **arguments,
    theta=rope.theta,
    scaling=rope.scaling,
    activation_bits=_bits(config),
  )


def _bits(config: Config) -> int | None:
  """8 where the config's projections are BitLinear, None for plain ones."""
  quantized = config.get("quantization_config")
  if quantized is None:
    return None
  expect(quantized, quant_method="bitnet", use_rms_norm=False)
  return 8


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  block = model.blocks[0]
  out = write_sizes(model) | {
    "hidden_act": "relu2",
    "rope_parameters": write_rope(block.mixer.position),
  }
  if not isinstance(block.norm, Rounded):
    return out
  if block.norm.bits != 8:
    raise UserError(
      f"the hub's BitNet has activations of 8 bits, this model of "
      f"{block.norm.bits}; jaxlm.save(path, model, params) keeps it"
    )
  quantized = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
  return out | {
    "quantization_config": quantized | {"quantization_mode": "offline"}
  }


_NAMES = Names(
  (
    *COMMON,
    (
      "mixer/out_norm/scale",
      "model.layers.{}.self_attn.attn_sub_norm.weight",
    ),
    ("ffn/hidden_norm/scale", "model.layers.{}.mlp.ffn_sub_norm.weight"),
  )
)

HF = (Hub("bitnet", "BitNetForCausalLM", read, write, _NAMES),)
