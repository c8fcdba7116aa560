"""Recurrent decoders: a state instead of a look back, or a little of both.

`rnn`, `lstm` and `gru` put the classical cells where attention would be (as a
modern block: norm before, residual around, a feed-forward after); `rglru` is
Hawk and `hybrid` is Griffin of arXiv:2402.19427, section 2: two gated linear
recurrences and one layer of local attention in turn, a gated feed-forward of
three times the width. Memory while generating does not grow with the text.
"""

from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention
from jaxlm.layers.mask import Sliding
from jaxlm.layers.mlp import GLU, gelu_tanh
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.position import Rope
from jaxlm.layers.recurrent import GRU, LSTM, RNN, Elman
from jaxlm.layers.rglru import RGLRU
from jaxlm.models.decoder import Block, Decoder
from jaxlm.models.pattern import segments

CELLS = {"gru": GRU(), "lstm": LSTM(), "rnn": Elman()}


def decoder(
  vocab: int = 50304,
  dim: int = 768,
  layers: int = 12,
  heads: int = 6,
  mixer: str = "hybrid",
  hidden: int | None = None,
  window: int = 1024,
  mlp_dim: int | None = None,
  max_positions: int = 1024,
  tied: bool = False,
  dropout: float = 0.0,
) -> Decoder:
  """A recurrent decoder of any size.

  Args:
    vocab: number of tokens.
    dim: width of the residual stream.
    layers: number of blocks.
    heads: heads of the local attention, which share one key and value head,
      and blocks of the recurrence's gates.
    mixer: 'rnn', 'lstm', 'gru', 'rglru' or 'hybrid'.
    hidden: width of the state; None means `dim`.
    window: tokens that the local attention sees.
    mlp_dim: width of the feed-forward; None means 3 x dim.
    max_positions: the longest sequence it is meant for.
    tied: share the embedding with the head.
    dropout: on embeddings and branches.

  Raises:
    UserError: for an unknown mixer, or heads that do not divide a width.
  """
  norm = RMSNorm(dim)
  names = {
    **{name: (RNN(dim, cell, hidden),) for name, cell in CELLS.items()},
    "rglru": (RGLRU(dim, hidden, heads),),
  }
  local = Attention(dim, heads, 1, mask=Sliding(window), position=Rope())
  names["hybrid"] = (*names["rglru"] * 2, local)
  if mixer not in names:
    known = ", ".join(sorted(names))
    raise UserError(f"model.mixer is {mixer!r}; known: {known}")
  if mixer in ("rglru", "hybrid") and (hidden or dim) % heads:
    raise UserError(
      f"model.heads={heads} does not divide the {hidden or dim} features of "
      "the recurrence; change model.heads, model.hidden or model.dim"
    )
  feed = GLU(dim, mlp_dim or 3 * dim, gelu_tanh)
  pattern = [Block(m, feed, norm, dropout=dropout) for m in names[mixer]]
  blocks = [pattern[i % len(pattern)] for i in range(layers)]
  return Decoder(
    vocab=vocab,
    dim=dim,
    layers=segments(blocks),
    norm=norm,
    max_positions=max_positions,
    tied=tied,
    dropout=dropout,
  )
