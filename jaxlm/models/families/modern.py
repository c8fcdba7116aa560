"""The modern small decoder: what years of ablations left of GPT-2.

Rotary positions, RMSNorm without parameters, normalised queries and keys, a
squared ReLU (arXiv:2109.08668) or a gated unit (arXiv:2002.05202), no biases,
untied head, output projections that start at zero so that every block starts
as the identity (as in muP practice and the speedruns of modded-nanogpt). Meant
to be trained with Muon.
"""

from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention
from jaxlm.layers.mlp import GLU, MLP, relu2, silu
from jaxlm.layers.moe import MoE
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import ZEROS, FanIn, Normal
from jaxlm.layers.position import Rope
from jaxlm.layers.router import TopK, sigmoid
from jaxlm.models.decoder import Block, Decoder

ROUTERS = {
  "loss": TopK(balance=0.01, z_loss=0.001),  # as the Switch and ST-MoE papers
  "bias": TopK(sigmoid, correction=True),
  "none": TopK(),
}


def decoder(
  vocab: int = 50304,
  dim: int = 768,
  layers: int = 12,
  heads: int = 6,
  kv_heads: int | None = None,
  max_positions: int = 1024,
  ffn: str = "relu2",
  mlp_dim: int | None = None,
  theta: float = 10000.0,
  softcap: float | None = 15.0,
  tied: bool = False,
  dropout: float = 0.0,
  experts: int = 0,
  top_k: int = 2,
  balance: str = "loss",
) -> Decoder:
  """A modern decoder of any size.

  Args:
    vocab: number of tokens.
    dim: width of the residual stream.
    layers: number of blocks.
    heads: query heads; each `dim / heads` wide.
    kv_heads: key and value heads; None means as many.
    max_positions: the longest sequence it is meant for.
    ffn: 'relu2' (squared ReLU) or 'glu' (SwiGLU).
    mlp_dim: hidden width; None means 4 x dim, for 'glu' 8/3 x dim, which has
      the same number of parameters, rounded to a multiple of 64.
    theta: base of the rotary frequencies.
    softcap: bound on the logits, or None.
    tied: share the embedding with the head.
    dropout: on embeddings and branches.
    experts: a mixture of so many feed-forward layers; 0 for one, dense.
    top_k: how many experts work on a token. Where `mlp_dim` is None, each is
      narrower by that factor, and a token costs what it would without experts.
    balance: what evens their load: 'loss' (the Switch loss, and a z-loss),
      'bias' (the optimizer's `balance_experts`) or 'none'.

  Raises:
    UserError: for an unknown `ffn` or `balance`, or experts that do not fit.
  """
  norm = RMSNorm(dim, scale=False)
  parts = top_k if experts else 1
  if ffn == "relu2":
    hidden = mlp_dim or 4 * dim // max(parts, 1)
    feed = MLP(dim, hidden, relu2, out_init=ZEROS)
  elif ffn == "glu":
    hidden = mlp_dim or round(8 * dim / 3 / 64) * 64 // max(parts, 1)
    feed = GLU(dim, hidden, silu, out_init=ZEROS)
  else:
    raise UserError(f"model.ffn is {ffn!r}; known: relu2, glu")
  if experts:
    if balance not in ROUTERS:
      known = ", ".join(ROUTERS)
      raise UserError(f"model.balance is {balance!r}; known: {known}")
    feed = MoE(feed, experts, top_k, ROUTERS[balance])
  block = Block(
    mixer=Attention(
      dim,
      heads,
      kv_heads,
      position=Rope(theta),
      qk_norm=RMSNorm(dim // heads, scale=False, axis="head_dim"),
      init=FanIn(),
      out_init=ZEROS,
    ),
    ffn=feed,
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
    embed_init=Normal(1.0) if not tied else Normal(0.02),
    head_init=Normal(0.0) if not tied else FanIn(),
  )
