"""nanochat (Karpathy 2025, github.com/karpathy/nanochat): 2025's small GPT.

RMSNorm without parameters everywhere, on the embeddings and on queries and
keys after they were turned too; rotary positions that turn the other way;
squared ReLU; untied head, capped logits. Depth d makes a width of 64 d and
heads of 128. Sizes from the repository and the `config.json` of
karpathy/nanochat-d32.
"""

from typing import Any

from jaxlm.layers.attention import Attention
from jaxlm.layers.mlp import MLP, relu2
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import ZEROS, Normal
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
  vocab: int = 65536,
  dim: int = 1280,
  layers: int = 20,
  heads: int = 10,
  kv_heads: int | None = None,
  head_dim: int | None = None,
  mlp_dim: int = 5120,
  theta: float = 10000.0,
  scaling: Scaling | None = None,
  eps: float = 1e-6,
  max_positions: int = 2048,
  tied: bool = False,
  softcap: float | None = 15.0,
  dropout: float = 0.0,
) -> Decoder:
  """Any size of nanochat; the defaults are d20, the "$100 model"."""
  norm = RMSNorm(dim, eps, scale=False)
  width = head_dim or dim // heads
  block = Block(
    mixer=Attention(
      dim,
      heads,
      kv_heads,
      width,
      position=Rope(theta, scaling, reverse=True),
      qk_norm=RMSNorm(width, eps, scale=False, axis="head_dim"),
      norm_after_rope=True,
      out_init=ZEROS,
    ),
    ffn=MLP(dim, mlp_dim, act=relu2, out_init=ZEROS),
    norm=norm,
    dropout=dropout,
  )
  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=(((block,), layers),),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    embed_norm=norm,
    softcap=softcap,
    dropout=dropout,
    embed_init=Normal(1.0),
    head_init=Normal(0.001),
  )


PUBLISHED = {
  "nanochat-d20": decoder(),
  "nanochat-d32": decoder(dim=2048, layers=32, heads=16, mlp_dim=8192),
}


def read(config: Config) -> Decoder:
  """A config.json of `model_type` nanochat."""
  expect(config, hidden_act="relu2", attention_bias=False)
  rope = read_rope(config)
  return decoder(
    **sizes(config, rms_norm_eps=1e-6),
    theta=rope.theta,
    scaling=rope.scaling,
    softcap=config.get("final_logit_softcapping", 15.0),
  )


def write(model: Decoder) -> dict[str, Any]:
  """The config.json of a model."""
  return write_sizes(model) | {
    "hidden_act": "relu2",
    "rope_parameters": write_rope(model.blocks[0].mixer.position),
    "final_logit_softcapping": model.softcap,
  }


_NAMES = Names(
  (
    *(line for line in COMMON if not line[0].startswith("ffn/")),
    ("ffn/up", "model.layers.{}.mlp.fc1.weight"),
    ("ffn/down", "model.layers.{}.mlp.fc2.weight"),
  )
)

HF = (Hub("nanochat", "NanoChatForCausalLM", read, write, _NAMES),)
