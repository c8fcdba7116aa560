"""T5 (arXiv:1910.10683) and T5 1.1: an encoder-decoder with relative biases.

RMSNorm before each branch, no biases in the projections, scores that are not
scaled, one table of relative position biases for each stack. The first version
has a ReLU and shares one table between embeddings and head, whose input is
scaled by dim ** -0.5; version 1.1 (and mT5, Flan-T5) has a gated GELU and a
head of its own. Sizes are those of the `config.json` published with the
weights (google-t5/t5-*, google/t5-v1_1-*); the initialization is that of the
Mesh TensorFlow code, a standard deviation for each matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention
from jaxlm.layers.mask import Causal, Full
from jaxlm.layers.mlp import GLU, MLP, gelu_tanh, relu
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import FanIn, Normal, paths
from jaxlm.layers.relative import RelativeBias
from jaxlm.models.decoder import Block, Decoder
from jaxlm.models.encdec import Cross, CrossBlock, EncoderDecoder
from jaxlm.models.hub import Config, Hub
from jaxlm.models.names import Entry, Names


def encoder_decoder(
  vocab: int = 32128,
  dim: int = 512,
  layers: int = 6,
  decoder_layers: int | None = None,
  heads: int = 8,
  head_dim: int = 64,
  mlp_dim: int = 2048,
  gated: bool = False,
  tied: bool = True,
  buckets: int = 32,
  far: int = 128,
  eps: float = 1e-6,
  max_positions: int = 512,
  dropout: float = 0.0,
) -> EncoderDecoder:
  """T5 at any size; the defaults are T5 small.

  Args:
    vocab: number of tokens.
    dim: width of the residual stream.
    layers: blocks of the encoder.
    decoder_layers: blocks of the decoder; None means as many.
    heads: heads of every attention, `head_dim` wide.
    head_dim: width of a head.
    mlp_dim: hidden width of the feed-forward layers.
    gated: a gated GELU instead of a ReLU.
    tied: the head is the embedding, its input scaled by dim ** -0.5.
    buckets: of relative distances.
    far: from this distance on all share the last bucket.
    eps: of the norms.
    max_positions: the longest output it is meant for; T5 has no limit.
    dropout: on embeddings and branches.
  """
  norm, wide = RMSNorm(dim, eps), heads * head_dim

  def attention(mask, position=None) -> Attention:
    return Attention(
      dim,
      heads,
      head_dim=head_dim,
      mask=mask,
      position=position,
      scale=1.0,  # the queries' initializer makes up for it
      init=FanIn(),
      q_init=Normal((dim * head_dim) ** -0.5),
      out_init=Normal(wide**-0.5),
    )

  def bias(both: bool) -> RelativeBias:
    return RelativeBias(buckets, far, both, Normal(dim**-0.5))

  if gated:
    ffn = GLU(dim, mlp_dim, gelu_tanh)
  else:
    ffn = MLP(dim, mlp_dim, relu)
  reads = Block(attention(Full(), bias(True)), ffn, norm, dropout=dropout)
  writes = CrossBlock(
    attention(Causal(), bias(False)),
    ffn,
    norm,
    dropout=dropout,
    cross=Cross(attention(Full())),
  )
  shell = Decoder(
    vocab=vocab,
    dim=dim,
    layers=(((reads,), layers),),
    norm=norm,
    max_positions=max_positions,
    tied=True,
    dropout=dropout,
    embed_init=Normal(1.0),
  )
  layers = layers if decoder_layers is None else decoder_layers
  return EncoderDecoder(
    encoder=shell,
    decoder=replace(shell, layers=(((writes,), layers),), tied=tied),
    head_scale=dim**-0.5 if tied else 1.0,
  )


def _version_1_1(**sizes: int) -> EncoderDecoder:
  return encoder_decoder(gated=True, tied=False, **sizes)


SIZES = {
  "t5-small": encoder_decoder(),
  "t5-base": encoder_decoder(dim=768, layers=12, heads=12, mlp_dim=3072),
  "t5-large": encoder_decoder(dim=1024, layers=24, heads=16, mlp_dim=4096),
  "t5-3b": encoder_decoder(
    dim=1024, layers=24, heads=32, head_dim=128, mlp_dim=16384
  ),
  "t5-11b": encoder_decoder(
    dim=1024, layers=24, heads=128, head_dim=128, mlp_dim=65536
  ),
  "t5-v1.1-small": _version_1_1(layers=8, heads=6, mlp_dim=1024),
  "t5-v1.1-base": _version_1_1(dim=768, layers=12, heads=12, mlp_dim=2048),
  "t5-v1.1-large": _version_1_1(dim=1024, layers=24, heads=16, mlp_dim=2816),
  "t5-v1.1-xl": _version_1_1(dim=2048, layers=24, heads=32, mlp_dim=5120),
  "t5-v1.1-xxl": _version_1_1(dim=4096, layers=24, heads=64, mlp_dim=10240),
}


# --- On the Hugging Face hub ------------------------------------------------

_KEYS = {
  "vocab": "vocab_size",
  "dim": "d_model",
  "layers": "num_layers",
  "decoder_layers": "num_decoder_layers",
  "heads": "num_heads",
  "head_dim": "d_kv",
  "mlp_dim": "d_ff",
  "buckets": "relative_attention_num_buckets",
  "far": "relative_attention_max_distance",
  "eps": "layer_norm_epsilon",
  "max_positions": "n_positions",
}
_FEEDS = {"relu": False, "gated-gelu": True}


def read(config: Config) -> EncoderDecoder:
  """The model of a config.json.

  Raises:
    UserError: for a missing size, or a feed-forward layer T5 does not have.
  """
  for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers"):
    if config.get(key) is None:
      raise UserError(f"the config has no {key!r}; is config.json whole?")
  feed = config.get("feed_forward_proj", "relu")
  if feed not in _FEEDS:
    raise UserError(
      f"the config says feed_forward_proj={feed!r}, which is not built here; "
      f"it can be {' or '.join(map(repr, _FEEDS))}"
    )
  given = {k: config[v] for k, v in _KEYS.items() if config.get(v) is not None}
  tied = config.get("tie_word_embeddings")
  return encoder_decoder(
    **given, gated=_FEEDS[feed], tied=True if tied is None else tied
  )


def write(model: EncoderDecoder) -> dict[str, Any]:
  """The config.json that `read` gives back; T5 pads with 0, ends with 1."""
  block = model.decoder.blocks[0]
  values = {
    "vocab": model.vocab,
    "dim": model.decoder.dim,
    "layers": model.encoder.depth,
    "decoder_layers": model.decoder.depth,
    "heads": block.mixer.heads,
    "head_dim": block.mixer.width,
    "mlp_dim": block.ffn.hidden,
    "buckets": block.mixer.position.buckets,
    "far": block.mixer.position.far,
    "eps": model.decoder.norm.eps,
    "max_positions": model.decoder.max_positions,
  }
  return {_KEYS[name]: value for name, value in values.items()} | {
    "feed_forward_proj": "gated-gelu" if _gated(model) else "relu",
    "tie_word_embeddings": model.decoder.tied,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
  }


def _gated(model: EncoderDecoder) -> bool:
  return isinstance(model.decoder.blocks[0].ffn, GLU)


def _lines(stack: str, gated: bool) -> Iterator[tuple[str, str]]:
  """The table of names of one stack."""
  block = stack + ".block.{}.layer."
  branches = [("mixer", "SelfAttention")]
  if stack == "decoder":
    branches.append(("cross", "EncDecAttention"))
  for i, (ours, theirs) in enumerate(branches):
    yield f"{ours}_norm/scale", f"{block}{i}.layer_norm.weight"
    for name in "qkvo":
      yield f"{ours}/{name}", f"{block}{i}.{theirs}.{name}.weight"
  last = block + str(len(branches))
  yield "ffn_norm/scale", f"{last}.layer_norm.weight"
  feed = {"up": "wi", "down": "wo"}
  if gated:
    feed = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
  for ours, theirs in feed.items():
    yield f"ffn/{ours}", f"{last}.DenseReluDense.{theirs}.weight"
  yield "norm/scale", f"{stack}.final_layer_norm.weight"
  yield "embed/tokens", "shared.weight"
  yield "head", "lm_head.weight"


@dataclass(frozen=True)
class _StackNames(Names):
  """The names of two stacks, and of what hangs on neither's layers."""

  def entries(self, model: EncoderDecoder) -> Iterator[Entry]:
    """Every tensor that a file of this model has."""
    tree = model.params()
    known = paths(tree)
    for stack in ("encoder", "decoder"):
      names = Names(tuple(_lines(stack, _gated(model))))
      for entry in names.entries(getattr(model, stack)):
        ours = tuple(f"{stack}/{path}" for path in entry.ours)
        if ours[0] in known:  # the encoder's embedding is the decoder's
          yield replace(entry, ours=ours)
      yield Entry(
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        (f"{stack}/bias",),
        (),
        (tree[stack]["bias"],),
        self.layout,
      )


HF = (
  Hub(
    "t5",
    "T5ForConditionalGeneration",
    read,
    write,
    _StackNames(
      (),
      base="",
      ignored=(
        r"^(encoder|decoder)\.embed_tokens\.weight$",
        r"EncDecAttention\.relative_attention_bias\.weight$",
        r"^lm_head\.weight$",
      ),
    ),
  ),
)
