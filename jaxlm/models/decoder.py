"""The decoder: every language model here is one value of this type.

A `Decoder` is data. Its `layers` are segments, each a pattern of blocks tiled
some number of times: GPT-2 is `(((block,), 12),)`, five local layers and a
global one repeated are `(((local,) * 5 + (full,), 8),)`. Whatever varies is a
value in a slot of a block, and `forward` has no flags for it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.attention import Attention
from jaxlm.layers.cache import FULL
from jaxlm.layers.compute import DEFAULT, Compute, active_mesh
from jaxlm.layers.context import divide, restore, undivided, ways
from jaxlm.layers.dropout import dropout
from jaxlm.layers.latent import LatentAttention
from jaxlm.layers.linear import dot, lookup
from jaxlm.layers.mlp import GLU, MLP
from jaxlm.layers.moe import MoE
from jaxlm.layers.norm import Norm, soft_cap
from jaxlm.layers.param import (
  FanIn,
  Init,
  Normal,
  Param,
  count,
  flops,
  gather,
  stack,
)
from jaxlm.layers.position import Learned, Sinusoidal
from jaxlm.layers.recurrent import RNN, place
from jaxlm.layers.rglru import RGLRU
from jaxlm.models.segment import run, unstack

Array = jax.Array
Tree = Any
Mixer = Attention | LatentAttention | RNN | RGLRU
FFN = MLP | GLU | MoE
ATTENDS = (Attention, LatentAttention)  # these need no row in one place

# The dimensions of what a branch reads; those of the stream say 'seq'. Under
# sequence parallelism 'seq' is cut more often.
BRANCH = ("batch", "length", "embed")


@dataclass(frozen=True)
class Block:
  """One residual layer: x += mixer(norm(x)), then x += ffn(norm(x)).

  Attributes:
    mixer: moves information between positions.
    ffn: works on each position alone.
    norm: before each of the two, or None (OLMo 2 has only those after).
    post_norm: after each of the two, before the sum (sandwich norm).
    parallel: both read the same norm and are added together (GPT-NeoX).
    dropout: rate on each branch before the sum.
    norm_last: `norm` comes after each sum, not before each branch: the
      transformer of 2017 (post-norm, arXiv:1706.03762).
  """

  mixer: Mixer
  ffn: FFN
  norm: Norm | None
  post_norm: Norm | None = None
  parallel: bool = False
  dropout: float = 0.0
  norm_last: bool = False

  def params(self) -> dict[str, Any]:
    """`mixer`, `ffn`, and the norms before and after them."""
    tree = {"mixer": self.mixer.params(), "ffn": self.ffn.params()}
    if self.norm is not None:
      tree["mixer_norm"] = self.norm.params()
      tree["ffn_norm"] = self.norm.params()
    if self.post_norm is not None:
      tree["mixer_post_norm"] = self.post_norm.params()
      tree["ffn_post_norm"] = self.post_norm.params()
    return tree

  def cache(self, batch: int, length: int, kind: Any = FULL) -> dict[str, Any]:
    """What the mixer remembers."""
    return self.mixer.cache(batch, length, kind)

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    at: At,
    cache: dict[str, Array] | None,
    compute: Compute,
  ) -> tuple[Array, dict[str, Array]]:
    """Maps `x` [batch, seq, dim] to the same shape; threads the cache.

    Without a cache the second value is a report: what mixer and feed-forward
    layer have to say of this batch, a dict of arrays.
    """
    mixed, out = self._mix(p, "mixer", x, at, cache, compute, 0)
    x, report = self._feed(p, x if self.parallel else mixed, mixed, at, compute)
    return x, (out | report if cache is None else out)

  @jax.named_scope("mixer")
  def _mix(
    self, p, name: str, x: Array, at: At, cache, compute: Compute, site: int
  ) -> tuple[Array, dict[str, Array]]:
    """Adds what the mixer of this name says; its cache or report."""
    h = self._before(p, name, x, compute)
    mixer = getattr(self, name)
    if cache is None and ways(compute) > 1 and not isinstance(mixer, ATTENDS):
      y, out = undivided(mixer, p[name], h, at, compute)
    else:
      y, out = mixer(p[name], h, at, cache, compute)
    return self._join(p, name, x, y, at, site), out

  @jax.named_scope("ffn")
  def _feed(
    self, p, read: Array, x: Array, at: At, compute: Compute
  ) -> tuple[Array, dict[str, Array]]:
    """Adds to `x` what the feed-forward layer makes of `read`; its report."""
    h = self._before(p, "ffn", read, compute)
    key = None if at.key is None else jax.random.fold_in(at.key, 2)
    y, report = self.ffn(p["ffn"], h, compute, key)
    return self._join(p, "ffn", x, y, at, 1), report

  def _before(self, p, name: str, x: Array, compute: Compute) -> Array:
    """What a branch reads: the stream, normalised where there is a norm."""
    if self.norm is not None and not self.norm_last:
      x = self.norm(p[name + "_norm"], x)
    return place(x.astype(compute.jnp_dtype), BRANCH, compute)

  def _join(self, p, name: str, x: Array, y: Array, at: At, site: int) -> Array:
    """The stream with a branch added to it."""
    x = x + self._branch(p, name, y, at, site).astype(x.dtype)
    return self.norm(p[name + "_norm"], x) if self.norm_last else x

  def _branch(self, p, name: str, y: Array, at: At, site: int) -> Array:
    """What is added to the residual stream: post-norm, then dropout."""
    if self.post_norm is not None:
      y = self.post_norm(p[name + "_post_norm"], y)
    if at.key is None or self.dropout == 0.0:
      return y
    return dropout(y, self.dropout, jax.random.fold_in(at.key, site))


Segment = tuple[tuple[Block, ...], int]


@dataclass(frozen=True)
class Decoder:
  """A causal language model.

  Attributes:
    vocab: number of tokens.
    dim: width of the residual stream.
    layers: segments `((block, ...), repeats)`; see the module's docstring.
    norm: before the head.
    max_positions: the longest sequence it is meant for.
    tied: the head is the transposed embedding.
    positions: what is added to the embeddings, or None.
    embed_norm: applied to the embeddings (Bloom), or None.
    embed_scale: multiplies the embeddings (Gemma: sqrt(dim)).
    softcap: logits become `softcap * tanh(logits / softcap)`.
    dropout: rate on the embeddings.
    embed_init, head_init: initializers of the two tables.
  """

  vocab: int
  dim: int
  layers: tuple[Segment, ...]
  norm: Norm
  max_positions: int
  tied: bool = False
  positions: Learned | Sinusoidal | None = None
  embed_norm: Norm | None = None
  embed_scale: float = 1.0
  softcap: float | None = None
  dropout: float = 0.0
  embed_init: Init = Normal(0.02)
  head_init: Init = FanIn()

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return sum(len(pattern) * n for pattern, n in self.layers)

  @property
  def blocks(self) -> tuple[Block, ...]:
    """All blocks in order, repeats written out."""
    return tuple(b for pattern, n in self.layers for b in pattern * n)

  @property
  def draws(self) -> bool:
    """Whether training draws at random: dropout, or a router with noise."""
    routers = (getattr(b.ffn, "router", None) for b in self.blocks)
    noisy = any(getattr(router, "noise", False) for router in routers)
    return noisy or any(x.dropout for x in (self, *self.blocks))

  def params(self) -> dict[str, Any]:
    """`embed`, `layers/<segment>/<place in pattern>`, `norm`, `head`."""
    table = Param(
      (self.vocab, self.dim), ("vocab", "embed"), 1, self.embed_init
    )
    tree: dict[str, Any] = {"embed": {"tokens": table}}
    if self.positions is not None:
      tree["embed"]["positions"] = self.positions.params(self.dim)
    if self.embed_norm is not None:
      tree["embed"]["norm"] = self.embed_norm.params()
    tree["layers"] = {
      str(i): {str(j): stack(b.params(), n) for j, b in enumerate(pattern)}
      for i, (pattern, n) in enumerate(self.layers)
    }
    tree["norm"] = self.norm.params()
    if not self.tied:
      tree["head"] = Param(
        (self.dim, self.vocab), ("embed", "vocab"), 1, self.head_init
      )
    return tree

  def cache(self, batch: int, length: int, kind: Any = FULL) -> dict[str, Any]:
    """Declares what all layers remember of `length` positions.

    `kind` says how: `Full()`, `Ring`, `Quantised` (`layers/cache.py`), `Paged`.
    """
    return {
      str(i): {
        str(j): stack(b.cache(batch, length, kind), n)
        for j, b in enumerate(pattern)
      }
      for i, (pattern, n) in enumerate(self.layers)
    }

  def n_params(self) -> int:
    """Number of parameters, a tied head counted once."""
    return count(self.params())

  def n_active(self) -> int:
    """Number of parameters that work on one token.

    Experts count as often as a token visits them; the embedding, read by
    index, counts as the whole table, as published figures have it.
    """
    idle = (count(b.ffn.params()) - b.ffn.active() for b in self.blocks)
    return self.n_params() - sum(idle)

  def flops_per_token(self, seq: int) -> int:
    """Forward operations per token at context `seq`; training costs 3 times.

    The matmuls of every layer and of the head, and attention's products at
    the mean number of keys a query sees.
    """
    mixing = sum(b.mixer.flops(seq) for b in self.blocks)
    idle = sum(flops(b.ffn.params()) - b.ffn.flops() for b in self.blocks)
    used = flops(self.params()) - idle
    return used + 2 * self.dim * self.vocab + mixing

  def __call__(self, params: Tree, tokens: Array, **kwargs: Any) -> Any:
    """`forward(self, params, tokens, ...)`."""
    return forward(self, params, tokens, **kwargs)


# --- The forward pass -------------------------------------------------------


def forward(
  model: Decoder,
  params: Tree,
  tokens: Array,
  at: At | None = None,
  cache: Tree | None = None,
  compute: Compute = DEFAULT,
) -> Any:
  """Logits of the next token at every position.

  Args:
    model: what to compute.
    params: its arrays, as `init(model.params(), key)` makes them.
    tokens: integers `[batch, seq]`, or embeddings `[batch, seq, dim]`.
    at: positions, segments, blocks, dropout key; None means plain rows.
    cache: from `empty(model.cache(batch, length))` while generating.
    compute: how to run.

  Returns:
    Logits `[batch, seq, vocab]` in float32; with a cache, `(logits, cache)`.

  Raises:
    UserError: if a token is outside the vocabulary or a row too long (checked
      where the values are known, that is outside jit).
  """
  x, new_cache = hidden(model, params, tokens, at, cache, compute)
  y = logits(model, params, x, compute)
  return y if cache is None else (y, new_cache)


def hidden(
  model: Decoder,
  params: Tree,
  tokens: Array,
  at: At | None = None,
  cache: Tree | None = None,
  compute: Compute = DEFAULT,
) -> tuple[Array, Tree]:
  """The residual stream after the last norm, `[batch, seq, dim]`.

  With it comes the cache or, where there is none, what the blocks report:
  `[segment][place in pattern]`, dicts of arrays stacked over the repeats.
  """
  at = At() if at is None else at
  if cache is None:
    tokens, at = divide(tokens, at, compute, turn=_turns(model, at))
  if cache is not None and at.segments is not None:
    raise UserError(
      "rows with segments are packed for training, and a cache remembers one "
      "text a row; give each text a row of its own"
    )
  x = embed(model, params, tokens, at, compute)
  out = {}
  for i, (pattern, n) in enumerate(model.layers):
    name, first = str(i), sum(len(p) * m for p, m in model.layers[:i])
    here = None if cache is None else cache[name]
    x, out[name] = run(
      pattern, n, params["layers"][name], x, at, here, compute, first
    )
  x = model.norm(_gather(model, params, "norm", compute), x)
  x = place(x.astype(compute.jnp_dtype), BRANCH, compute)
  return restore(x, at, compute), out


def _turns(model: Decoder, at: At) -> bool:
  """Whether tokens of a row may change places: all that is asked is positions.

  A recurrence asks who comes before, and a random draw goes by place: it would
  fall on another token than on one device.
  """
  still = all(isinstance(b.mixer, ATTENDS) for b in model.blocks)
  return still and (at.key is None or not model.draws)


@jax.named_scope("embed")
def embed(
  model: Decoder, params: Tree, tokens: Array, at: At, compute: Compute
) -> Array:
  """Token and position embeddings `[batch, seq, dim]`, the residual stream."""
  dtype = jnp.dtype(compute.residual)
  p = _gather(model, params, "embed", compute)
  spec = compute.spec(("batch", "seq", "embed"), (*tokens.shape[:2], model.dim))
  if tokens.ndim == 3:
    x = tokens.astype(dtype)
  else:
    _check(model, tokens)
    x = lookup(p["tokens"], tokens, spec).astype(dtype)
  if model.embed_scale != 1.0:
    x = x * jnp.asarray(model.embed_scale, dtype)
  if model.positions is not None:
    if at.positions is None:
      where, spec = jnp.arange(x.shape[1])[None], None
    else:
      where = at.positions
    y = model.positions(p.get("positions"), where, model.dim, spec)
    x = x + y.astype(dtype)
  if model.embed_norm is not None:
    x = model.embed_norm(p["norm"], x)
  if at.key is not None and model.dropout:
    x = dropout(x, model.dropout, jax.random.fold_in(at.key, 2**16))
  return x


def _gather(model: Decoder, params: Tree, name: str, compute: Compute) -> Tree:
  """One part of the parameters, cast and moved to where it is used."""
  tree = model.params()[name]
  return gather(params[name], tree, compute.rules, compute.jnp_dtype)


@jax.named_scope("head")
def head(model: Decoder, params: Tree, compute: Compute) -> Array:
  """The matrix `[dim, vocab]` that makes logits, in the compute dtype."""
  if model.tied:
    return _gather(model, params, "embed", compute)["tokens"].T
  return _gather(model, params, "head", compute)


@jax.named_scope("head")
def logits(model: Decoder, params: Tree, x: Array, compute: Compute) -> Array:
  """Logits `[batch, seq, vocab]`, float32, of hidden states `[.., dim]`."""
  w = head(model, params, compute)
  y = dot(x, w, "btd,dv->btv", dtype=jnp.float32)
  return y if model.softcap is None else soft_cap(y, model.softcap)


def layers_apart(model: Decoder, layers: Tree) -> Tree:
  """One tree per layer instead of stacked arrays, for parameters or a cache.

  Generation wants this: a cache that is apart is updated in place, and no
  step has to cut the weights out of their stack.
  """
  return {
    str(i): tuple(unstack(layers[str(i)], n))
    for i, (_, n) in enumerate(model.layers)
  }


def _check(model: Decoder, tokens: Array) -> None:
  """Rejects tokens outside the vocabulary and rows beyond the position table.

  Values can only be read outside jit; inside, an out-of-range token is
  clipped, and the data pipeline has checked it before.
  """
  table = model.positions
  if isinstance(table, Learned) and tokens.shape[1] > table.length:
    raise UserError(
      f"a row of {tokens.shape[1]} tokens is longer than the "
      f"{table.length} positions this model has learned"
    )
  if isinstance(tokens, jax.core.Tracer) or active_mesh() is not None:
    return
  if tokens.size == 0:
    raise UserError("no tokens: a row needs at least one")
  known = np.asarray(tokens)  # jnp would trace this, inside a jit of others
  low, high = int(known.min()), int(known.max())
  if low < 0 or high >= model.vocab:
    wrong = low if low < 0 else high
    raise UserError(
      f"token {wrong} is outside the vocabulary of {model.vocab} tokens; "
      f"encode the text with the tokenizer this model was trained with"
    )
