"""The encoder-decoder: one stack reads the input, one writes the output.

An `EncoderDecoder` is two stacks of blocks, each a `Decoder` value: the first
sees everything (`Full()` masks), the second is causal, and each of its blocks
also looks at what the first has made of the input (arXiv:1706.03762). Keys and
values of the input are made once and kept in the cache.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.attention import Attention
from jaxlm.layers.cache import empty, number
from jaxlm.layers.compute import DEFAULT, Compute
from jaxlm.layers.param import Param, count, gather, stack
from jaxlm.layers.relative import RelativeBias
from jaxlm.models.decoder import Block, Decoder, hidden, logits

Array = jax.Array
Tree = Any


# --- A block with a second source -------------------------------------------


@dataclass(frozen=True)
class Cross:
  """Attention whose queries come from `x` and whose keys come from elsewhere.

  Elsewhere is `at.context`, or without one what the cache kept of it.

  Attributes:
    attention: projections, heads, scale; its mask should hide nothing.
  """

  attention: Attention

  def params(self) -> dict[str, Any]:
    """Those of the attention."""
    return self.attention.params()

  def cache(self, batch: int, length: int) -> dict[str, Any]:
    """Keys and values of a context of `length`."""
    return self.attention.cache(batch, length)

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    at: At,
    cache: dict[str, Array] | None = None,
    compute: Compute = DEFAULT,
  ) -> tuple[Array, dict[str, Array]]:
    """Maps `x` [batch, seq, dim] to the same shape; keeps keys and values.

    A context that comes with a cache replaces what was kept.
    """
    seen, keys = cache, At()
    if at.context is not None:
      keys = At() if at.sources is None else at.sources
      seen = self._read(p, at.context, keys)
    keys = keys.replace(positions=seen["positions"])
    q = self.attention.queries(p, x, at)
    k, v = seen["k"].astype(q.dtype), seen["v"].astype(q.dtype)
    y = self.attention.weigh(p, q, k, v, at, keys, compute)
    y = self.attention.output(p, y, x.shape, compute)
    if cache is None:
      return y, {}
    return y, {name: seen[name].astype(x.dtype) for name, x in cache.items()}

  def _read(self, p: dict[str, Any], context: Array, at: At) -> dict:
    """Keys, values and positions of the context."""
    k, v = self.attention.keys(p, context, at)
    where = at.positions
    if where is None:
      where = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
    return {"k": k, "v": v, "positions": where}


@dataclass(frozen=True)
class CrossBlock(Block):
  """A residual layer with three branches: mixer, `cross`, ffn.

  Attributes:
    cross: looks at the context; the other slots are those of `Block`.
  """

  cross: Cross | None = None

  def params(self) -> dict[str, Any]:
    """Those of a block, `cross`, and the norms before and after it."""
    tree = super().params() | {"cross": self.cross.params()}
    for name in ("norm", "post_norm"):
      if f"mixer_{name}" in tree:
        tree[f"cross_{name}"] = tree[f"mixer_{name}"]
    return tree

  def cache(
    self, batch: int, length: int, source: int | None = None
  ) -> dict[str, Any]:
    """What is remembered of `length` own tokens and a context of `source`."""
    return {
      "mixer": self.mixer.cache(batch, length),
      "cross": self.cross.cache(batch, source or length),
    }

  def __call__(
    self,
    p: dict[str, Any],
    x: Array,
    at: At,
    cache: dict[str, Any] | None,
    compute: Compute,
  ) -> tuple[Array, dict[str, Any]]:
    """As a block's; `at.context` is [batch, keys, dim]."""
    before = {"mixer": None, "cross": None} if cache is None else cache
    after = {}
    for name, site in (("mixer", 0), ("cross", 3)):
      x, after[name] = self._mix(p, name, x, at, before[name], compute, site)
    x, report = self._feed(p, x, x, at, compute)
    if cache is None:
      return x, after["mixer"] | report
    return x, after


# --- The model --------------------------------------------------------------


@dataclass(frozen=True)
class EncoderDecoder:
  """Two stacks: what a text says, and what to say after it.

  Attributes:
    encoder: of blocks that see everything; its own head is never used, so it
      is `tied`.
    decoder: of `CrossBlock`s.
    shared: both read one table of token embeddings, the decoder's.
    head_scale: multiplies the last hidden states (T5: dim ** -0.5, so that a
      table made for embeddings can be the head).
  """

  encoder: Decoder
  decoder: Decoder
  shared: bool = True
  head_scale: float = 1.0

  @property
  def vocab(self) -> int:
    """Number of tokens that are written."""
    return self.decoder.vocab

  def params(self) -> dict[str, Any]:
    """`encoder` and `decoder`, with `bias` where positions are relative."""
    tree = {"encoder": self.encoder.params(), "decoder": self.decoder.params()}
    if self.shared:
      del tree["encoder"]["embed"]["tokens"]
    for name, part in tree.items():
      tree[name] = {k: v for k, v in part.items() if v != {}}
      table = relative_table(getattr(self, name))
      if table is not None:
        tree[name]["bias"] = table
    return tree

  def cache(self, batch: int, length: int, source: int) -> dict[str, Any]:
    """What the decoder remembers of `length` tokens and `source` inputs."""
    return {
      str(i): {
        str(j): stack(b.cache(batch, length, source), n)
        for j, b in enumerate(pattern)
      }
      for i, (pattern, n) in enumerate(self.decoder.layers)
    }

  def n_params(self) -> int:
    """Number of parameters, what is shared counted once."""
    return count(self.params())


def relative_table(model: Decoder) -> Param | None:
  """The table of relative biases that the layers of a stack share."""
  for block in model.blocks:
    if isinstance(block.mixer.position, RelativeBias):
      return block.mixer.position.params(block.mixer.heads)
  return None


def padded(mask: Array) -> At:
  """Where tokens stand in rows of which `mask` [batch, seq] is the text.

  What is padding gets a negative position, which no one sees.
  """
  mask = jnp.asarray(mask, bool)
  where = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
  return At(positions=jnp.where(mask, where, -1))


def forward(
  model: EncoderDecoder,
  params: Tree,
  inputs: Array,
  targets: Array,
  sources: At | None = None,
  at: At | None = None,
  compute: Compute = DEFAULT,
) -> Array:
  """Logits of the next target at every position.

  Args:
    model: what to compute.
    params: its arrays, as `init(model.params(), key)` makes them.
    inputs: integers `[batch, keys]`.
    targets: what the decoder reads, `[batch, seq]`: a start token, then the
      output so far.
    sources: where the inputs stand, `padded(mask)` where rows differ in
      length; its `key` is for the encoder's dropout.
    at: where the targets stand, and the decoder's dropout key; with
      `segments` in both, rows may be packed.
    compute: how to run.

  Returns:
    `[batch, seq, vocab]`, float32.

  Raises:
    UserError: for tokens outside the vocabulary (outside jit).
  """
  context = encode(model, params, inputs, sources, compute)
  return decode(model, params, targets, context, sources, at, compute=compute)


def encode(
  model: EncoderDecoder,
  params: Tree,
  inputs: Array,
  at: At | None = None,
  compute: Compute = DEFAULT,
) -> Array:
  """What the encoder makes of `inputs` [batch, keys]: `[batch, keys, dim]`."""
  p = params["encoder"]
  if model.shared:
    table = {"tokens": params["decoder"]["embed"]["tokens"]}
    p = p | {"embed": p.get("embed", {}) | table}
  at = _with_table(model.encoder, p, At() if at is None else at, compute)
  return hidden(model.encoder, p, inputs, at, None, compute)[0]


def decode(
  model: EncoderDecoder,
  params: Tree,
  targets: Array,
  context: Array | None = None,
  sources: At | None = None,
  at: At | None = None,
  cache: Tree | None = None,
  compute: Compute = DEFAULT,
) -> Any:
  """Logits of the next target, from what `encode` returned.

  Args:
    model: what to compute.
    params: its arrays.
    targets: integers `[batch, seq]`; with a cache the next ones only.
    context: from `encode`. With a cache it is needed once: what the layers
      make of it is kept.
    sources: where the context's tokens stand, as they were encoded.
    at: where the targets stand; with a cache the positions are needed.
    cache: from `empty(model.cache(batch, length, keys))`.
    compute: how to run.

  Returns:
    `[batch, seq, vocab]`, float32; with a cache, `(logits, cache)`.

  Raises:
    UserError: if there is neither a context nor a cache.
  """
  if context is None and cache is None:
    raise UserError("decode needs the context that encode returns, or a cache")
  at = At() if at is None else at
  if sources is not None:
    sources = sources.replace(key=None)
  at = at.replace(context=context, sources=sources)
  at = _with_table(model.decoder, params["decoder"], at, compute)
  x, new = hidden(model.decoder, params["decoder"], targets, at, cache, compute)
  x = x * jnp.asarray(model.head_scale, x.dtype)
  y = logits(model.decoder, params["decoder"], x, compute)
  return y if cache is None else (y, new)


def _with_table(model: Decoder, p: Tree, at: At, compute: Compute) -> At:
  """`at` with the relative biases of a stack, where it has any."""
  table = relative_table(model)
  if table is None:
    return at
  return at.replace(
    table=gather(p["bias"], table, compute.rules, compute.jnp_dtype)
  )


def greedy(
  model: EncoderDecoder,
  params: Tree,
  inputs: Array,
  max_new_tokens: int,
  start: int = 0,
  eot: int | None = None,
  sources: At | None = None,
  compute: Compute = DEFAULT,
) -> Array:
  """The most likely next token, again and again.

  Args:
    model: what to run.
    params: its arrays.
    inputs: integers `[batch, keys]`.
    max_new_tokens: how many to make.
    start: the token the decoder begins with.
    eot: a row ends with this token, and is filled up with it.
    sources: where the inputs stand; see `forward`.
    compute: how to run.

  Returns:
    Tokens `[batch, max_new_tokens]`, int32.

  Raises:
    UserError: if no tokens are asked for, or more than there are positions.
  """
  most = model.decoder.max_positions
  if not 0 < max_new_tokens <= most:
    raise UserError(
      f"max_new_tokens is {max_new_tokens}; this model writes 1 to {most}"
    )
  how = (model, max_new_tokens, compute)
  end = -1 if eot is None else eot
  return _greedy(how, params, jnp.asarray(inputs), sources, start, end)


@functools.partial(jax.jit, static_argnums=0)
def _greedy(
  how: tuple,
  params: Tree,
  inputs: Array,
  sources: At | None,
  start: Array,
  eot: Array,
) -> Array:
  """`greedy`, compiled for a model, a number of tokens and a way to run."""
  model, n, compute = how
  batch, keys = inputs.shape
  context = encode(model, params, inputs, sources, compute)
  cache = empty(model.cache(batch, n, keys), number(compute))

  def step(cache, last, ended, i, *read):
    at = At(positions=jnp.broadcast_to(i, (batch, 1)))
    y, cache = decode(
      model, params, last[:, None], *read, at=at, cache=cache, compute=compute
    )
    new = jnp.argmax(y[:, 0], axis=-1).astype(jnp.int32)
    new = jnp.where(ended, eot, new)
    return cache, new, ended | (new == eot)

  first = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))
  none = jnp.zeros((batch,), bool)
  carry = step(cache, first, none, jnp.int32(0), context, sources)

  def go_on(carry, i):
    carry = step(*carry, i)
    return carry, carry[1]

  _, rest = jax.lax.scan(go_on, carry, jnp.arange(1, n, dtype=jnp.int32))
  return jnp.concatenate([carry[1][:, None], rest.T], axis=1)
