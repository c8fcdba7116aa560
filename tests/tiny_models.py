"""Small decoders that between them use every slot, with random parameters."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import save
from jaxlm.data.tokenizers import Chars
from jaxlm.layers.attention import Attention
from jaxlm.layers.mask import Causal, Chunked, Sliding
from jaxlm.layers.mlp import GLU, MLP, gelu, silu
from jaxlm.layers.norm import LayerNorm, RMSNorm
from jaxlm.layers.param import abstract
from jaxlm.layers.position import Alibi, Rope, Sinusoidal
from jaxlm.models.decoder import Block, Decoder
from jaxlm.models.families import gpt2, llama, modern, qwen3

VOCAB, DIM, LENGTH = 31, 16, 32


def block(mask=Causal(), position=Rope(100.0), **options) -> Block:
  """A block with grouped heads."""
  mixer = Attention(DIM, 4, kv_heads=2, mask=mask, position=position)
  return Block(mixer, GLU(DIM, 24, silu), RMSNorm(DIM), **options)


SMALL = {"vocab": VOCAB, "dim": DIM, "max_positions": LENGTH}

FAMILIES = {
  "gpt2": gpt2.decoder(**SMALL, layers=2, heads=2),
  "llama": llama.decoder(
    **SMALL, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_dim=24, theta=1e3
  ),
  "qwen3": qwen3.decoder(
    **SMALL, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_dim=24, theta=1e3
  ),
  "modern": modern.decoder(**SMALL, layers=2, heads=2, mlp_dim=24),
}

MODELS = FAMILIES | {
  # Gemma's habits: windows and full attention in turn, sandwich norms, caps.
  "local": Decoder(
    VOCAB,
    DIM,
    (
      (
        (
          block(Sliding(5), post_norm=RMSNorm(DIM, offset=1.0)),
          block(Causal(), position=None),
        ),
        2,
      ),
      ((block(Sliding(4, sinks=2)),), 1),
    ),
    RMSNorm(DIM, offset=1.0),
    LENGTH,
    tied=True,
    embed_scale=DIM**0.5,
    softcap=5.0,
  ),
  # Llama 4's chunks, and parallel blocks as in GPT-NeoX.
  "chunked": Decoder(
    VOCAB,
    DIM,
    (((block(Chunked(6), parallel=True), block(parallel=True)), 1),),
    RMSNorm(DIM),
    LENGTH,
  ),
  # Bloom: linear biases, a norm on the embeddings, everything with a bias.
  "alibi": Decoder(
    VOCAB,
    DIM,
    (
      (
        (
          Block(
            Attention(DIM, 3, head_dim=5, position=Alibi(), bias=True),
            MLP(DIM, 24, gelu, bias=True),
            LayerNorm(DIM),
          ),
        ),
        2,
      ),
    ),
    LayerNorm(DIM),
    LENGTH,
    positions=Sinusoidal(),
    embed_norm=LayerNorm(DIM),
  ),
}


@functools.cache
def random_params(model: Decoder, seed: int = 0):
  """Every array random, also those that start at zero or one.

  Drawn by numpy, so that no program is compiled for it.
  """
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32),
    abstract(model.params()),
  )


def random_tokens(*shape: int, seed: int = 0):
  """Tokens of the shared vocabulary, int32."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32)


def save_adder(path: Path, dim: int, layers: int, heads: int) -> Path:
  """A model that knows nothing, with a tokenizer for sums; its directory."""
  tokenizer = Chars("0123456789+=", ["<|endoftext|>"])
  model = gpt2.decoder(tokenizer.vocab_size, dim, layers, heads, 16)
  save(path, model, random_params(model), tokenizer)
  return path
