"""Qwen 2 and 2.5 (arXiv:2407.10671, 2412.15115): Llama's block, biased q, k, v.

Some layers can look back by a window instead of at everything; no published
model switches that on. Sizes from the reports' tables 1 and the `config.json`
published with the weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention
from jaxlm.layers.mask import Causal, Sliding
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
  vocab: int = 152064,
  dim: int = 3584,
  layers: int = 28,
  heads: int = 28,
  kv_heads: int = 4,
  head_dim: int | None = None,
  mlp_dim: int = 18944,
  windows: Sequence[int | None] | None = None,
  theta: float = 1e6,
  scaling: Scaling | None = None,
  eps: float = 1e-6,
  max_positions: int = 131072,
  tied: bool = False,
  dropout: float = 0.0,
) -> Decoder:
  """Qwen 2 at any size; the defaults are the 7B model of 2 and 2.5.

  `windows` says of each layer how far it looks back, None for everything.

  Raises:
    UserError: if `windows` does not have one entry for each layer.
  """
  windows = [None] * layers if windows is None else windows
  if len(windows) != layers:
    raise UserError(
      f"windows (layer_types) has {len(windows)} entries for {layers} layers; "
      "give one for each"
    )
  norm, init = RMSNorm(dim, eps), Normal(0.02)
  mixer = Attention(
    dim,
    heads,
    kv_heads,
    head_dim,
    position=Rope(theta, scaling),
    bias=True,
    init=init,
    out_init=init,
  )
  ffn = GLU(dim, mlp_dim, act=silu, init=init, out_init=init)
  masks = [Causal() if w is None else Sliding(w) for w in windows]
  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=segments(
      [
        Block(replace(mixer, mask=mask), ffn, norm, dropout=dropout)
        for mask in masks
      ]
    ),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    dropout=dropout,
    head_init=init,
  )


_SMALL = {"vocab": 151936, "kv_heads": 2, "tied": True}
_B05 = _SMALL | {"dim": 896, "layers": 24, "heads": 14, "mlp_dim": 4864}
_B1 = _SMALL | {"dim": 1536, "heads": 12, "mlp_dim": 8960}
_B3 = _SMALL | {"dim": 2048, "layers": 36, "heads": 16, "mlp_dim": 11008}
_LARGE = {"dim": 5120, "heads": 40, "kv_heads": 8, "eps": 1e-5}
_B72 = {"dim": 8192, "layers": 80, "heads": 64, "kv_heads": 8}
_B72 |= {"mlp_dim": 29568, "eps": 1e-5}

PUBLISHED = {
  "qwen2-0.5b": decoder(**_B05),
  "qwen2-1.5b": decoder(**_B1),
  "qwen2-7b": decoder(),
  "qwen2-72b": decoder(**_B72),
  "qwen2.5-0.5b": decoder(**_B05, max_positions=32768),
  "qwen2.5-1.5b": decoder(**_B1),
  "qwen2.5-3b": decoder(**_B3, max_positions=32768),
  "qwen2.5-7b": decoder(),
  "qwen2.5-14b": decoder(**_LARGE, layers=48, mlp_dim=13824),
  "qwen2.5-32b": decoder(**_LARGE, layers=64, mlp_dim=27648),
  "qwen2.5-72b": decoder(**_B72),
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` qwen2."""
  expect(config, hidden_act="silu", partial_rotary_factor=1.0)
  rope = read_rope(config)
  defaults = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
  given = sizes(config, rms_norm_eps=1e-6, **defaults)
  return decoder(
    **given,
    windows=_windows(config, given["layers"]),
    theta=rope.theta,
    scaling=rope.scaling,
  )


def _windows(config: Config, layers: int) -> list[int | None]:
  """How far each layer looks back.

  Raises:
    UserError: if `layer_types` has windows that the other keys do not.
  """
  window, full = None, "full_attention"
  if config.get("use_sliding_window"):
    window = config.get("sliding_window", 4096)
  first = layers if window is None else config.get("max_window_layers", 28)
  kinds = config.get("layer_types")
  if kinds is None:
    kinds = [full if i < first else "sliding_attention" for i in range(layers)]
  known = {full} if window is None else {full, "sliding_attention"}
  if not known.issuperset(kinds):
    raise UserError(
      f"the config's layer_types are {', '.join(sorted(set(kinds)))}; by its "
      f"other keys they can be {' or '.join(sorted(known))}"
    )
  return [None if kind == full else window for kind in kinds]


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  mixers = [block.mixer for block in model.blocks]
  reach = [mixer.mask.reach for mixer in mixers]
  window = max((r for r in reach if r), default=None)
  return write_sizes(model) | {
    "hidden_act": "silu",
    "use_sliding_window": window is not None,
    "sliding_window": window,
    "layer_types": [
      "sliding_attention" if r else "full_attention" for r in reach
    ],
    "rope_parameters": write_rope(mixers[0].position),
  }


HF = (Hub("qwen2", "Qwen2ForCausalLM", read, write, Names(COMMON)),)
