"""Checks of the model itself: who sees whom, and what each part computes."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.doctor.definition import attention, covers
from jaxlm.doctor.subject import TOKENS, Finding, Subject, alone, influence
from jaxlm.layers.at import At
from jaxlm.layers.cache import empty
from jaxlm.layers.compute import DEFAULT
from jaxlm.layers.linear import dot
from jaxlm.layers.mlp import GLU, MLP
from jaxlm.layers.param import paths
from jaxlm.models.decoder import Block, hidden


def causality(s: Subject) -> Finding:
  """No gradient comes from a later token."""
  if not all(getattr(b.mixer, "mask", s).causal for b in s.model.blocks):
    return Finding(None, "a mask here is not causal")
  later = np.triu(influence(s)[:, 0], 1)
  t, j = np.unravel_index(later.argmax(), later.shape)
  return Finding(
    bool(np.all(later == 0)),
    f"largest squared gradient from a later token: {later.max():.2g}",
    f"position {t} sees position {j}: look at the mask, at what comes after "
    "the softmax, and at sums or norms over the sequence",
  )


def rows_apart(s: Subject) -> Finding:
  """No gradient comes from another row of the batch."""
  other = influence(s)[:, 1].max()
  return Finding(
    bool(other == 0),
    f"largest squared gradient from another row: {other:.2g}",
    "something is summed or normalised over the batch axis",
  )


def documents_apart(s: Subject) -> Finding:
  """No gradient comes from another document of a packed row."""
  half = TOKENS // 2
  segments = jnp.broadcast_to(jnp.arange(TOKENS) // half, (2, TOKENS))
  positions = jnp.broadcast_to(jnp.arange(TOKENS) % half, (2, TOKENS))
  at = At(positions=positions, segments=segments)
  other = influence(s, at)[half:, 0, :half].max()
  return Finding(
    bool(other == 0),
    f"largest squared gradient from the document before: {other:.2g}",
    "segments do not reach the mask; a recurrent state must be reset as well",
  )


def order(s: Subject) -> Finding:
  """Tokens in another order say something else, in some block alone.

  A causal mask tells the order to a second layer, so each block stands alone.
  """
  x = jax.random.normal(
    jax.random.key(s.seed), (1, TOKENS, s.model.dim), jnp.float32
  )
  moved = x[:, jnp.array([1, 0, *range(2, TOKENS)])]
  if s.model.positions is not None:
    return Finding(True, "positions are added to the embeddings")
  moves = []
  for _, block, p in s.layers(s.lively):
    ends = [alone(block)(p, y)[0, -1] for y in (x, moved)]
    moves.append(float(jnp.abs(ends[0] - ends[1]).max()))
  return Finding(
    max(moves) > 1e-5,
    f"two early tokens swapped move the last one by {max(moves):.2g}",
    "nothing here knows positions: the position slot of every mixer is None, "
    "or is not used",
  )


def by_definition(s: Subject) -> Finding:
  """Attention equals its definition, written with loops in float64."""
  worst, count = 0.0, 0
  for _, block, p in s.layers(s.lively):
    if not covers(block.mixer):
      continue
    x = np.random.default_rng(s.seed).normal(size=(9, s.model.dim))
    want = attention(block.mixer, p["mixer"], x)
    got = jax.jit(block.mixer)(p["mixer"], jnp.asarray(x[None], jnp.float32))
    got = got[0][0]
    worst = np.maximum(worst, np.abs(np.asarray(got) - want).max())
    count += 1
    if count == 2:  # the first two blocks say enough, and loops are slow
      break
  if not count:
    return Finding(None, "no block has plain attention")
  return Finding(
    bool(worst < 1e-3),
    f"largest difference {worst:.2g} in {count} blocks",
    "look at the scale, at what the softmax sums over, at the mask's edge, at "
    "which heads share keys, and at how often and what the rotation turns",
  )


def residual(s: Subject) -> Finding:
  """A block whose weights are all zero lets everything through unchanged."""
  x = jax.random.normal(jax.random.key(1), (2, 5, s.model.dim), jnp.float32)
  wrong = []
  for name, block, p in s.layers(s.initial):
    zeros = jax.tree.map(jnp.zeros_like, p)
    y = alone(block)(zeros, x)
    if not block.norm_last and float(jnp.abs(x - y).max()) > 1e-6:
      wrong.append(name)
  return Finding(
    not wrong,
    f"blocks that are not the identity at zero: {len(wrong)}",
    f"{', '.join(wrong[:3])}: the input is not added to the branch",
  )


def norms(s: Subject) -> Finding:
  """What a norm returns has size one, whatever comes in."""
  found = [s.model.norm, *(b.norm for b in s.model.blocks if b.norm)]
  x = 7.0 * jax.random.normal(
    jax.random.key(2), (2, 3, s.model.dim), jnp.float32
  )
  sizes = []
  for norm in dict.fromkeys(found):
    p = {
      k: v.init(jax.random.key(0), v, jnp.float32)
      for k, v in paths(norm.params()).items()
    }
    sizes.append(jnp.sqrt(jnp.mean(jnp.square(norm(p, x)), axis=-1)))
  size = np.concatenate([np.ravel(y) for y in sizes])
  return Finding(
    bool(np.all(np.abs(size - 1) < 0.05)),
    f"root mean square of a row: {size.min():.3f} to {size.max():.3f}",
    "look for a missing root, a wrong axis, or epsilon in the wrong place",
  )


def cache_parity(s: Subject) -> Finding:
  """Read token by token, with a cache, a text gives the same logits."""
  tokens = jnp.asarray(s.batch["inputs"][:, :TOKENS])
  rows, seq = tokens.shape
  whole = s.logits(s.lively, tokens)
  cache = empty(s.model.cache(rows, seq), jnp.float32, DEFAULT)
  worst, start = 0.0, 0
  for stop in (5, 6, 7, seq):
    where = jnp.broadcast_to(jnp.arange(start, stop), (rows, stop - start))
    part, cache = s.logits(
      s.lively, tokens[:, start:stop], At(positions=where), cache
    )
    gap = jnp.abs(part - whole[:, start:stop])
    worst = np.maximum(worst, np.asarray(gap).max())  # a NaN stays
    start = stop
  size = float(jnp.abs(whole).max())
  return Finding(
    bool(worst < 1e-4 * max(size, 1.0)),
    f"largest difference {worst:.2g}, largest logit {size:.2g}",
    "look at the positions given while decoding, at which slot is written, "
    "and at whether empty slots are masked",
  )


def tied_head(s: Subject) -> Finding:
  """A tied head learns with the embedding; an untied one apart from it."""
  tokens = jnp.asarray(s.batch["inputs"][:, :TOKENS])
  absent = int(np.setdiff1d(np.arange(s.model.vocab), tokens)[0])

  def said(table):
    params = s.lively | {"embed": s.lively["embed"] | {"tokens": table}}
    return jnp.sum(s.forward(s.model, params, tokens)[..., absent])

  grad = jax.jit(jax.grad(said))(s.lively["embed"]["tokens"])[absent]
  reached = bool(jnp.any(grad != 0))
  return Finding(
    reached == s.model.tied,
    f"tied={s.model.tied}, and a logit {'moves' if reached else 'leaves'} its "
    "row of the embedding",
    "the head is a copy: it was tied when it was made and is not any more",
  )


@dataclass(frozen=True)
class Listener:
  """A feed-forward layer that also reports which of its units are silent."""

  ffn: MLP | GLU

  def params(self) -> dict:
    """Those of the layer."""
    return self.ffn.params()

  def __call__(self, p, x, compute=DEFAULT, key=None):
    """What the layer returns; `silent` [hidden] in its report."""
    y, report = self.ffn(p, x, compute, key)
    h = dot(x, p["gate" if "gate" in p else "up"], "btd,df->btf")
    if "up_bias" in p:
      h = h + p["gate_bias" if "gate" in p else "up_bias"][None, None]
    silent = jnp.all(jnp.abs(self.ffn.act(h)) < 1e-6, axis=(0, 1))
    return y, report | {"silent": silent}


def dead_units(s: Subject) -> Finding:
  """Few hidden units are silent on every token of the batch."""
  layers = tuple(
    (tuple(_listening(b) for b in pattern), n) for pattern, n in s.model.layers
  )
  model, tokens = replace(s.model, layers=layers), s.batch["inputs"]
  _, seen = jax.jit(functools.partial(hidden, model))(s.now, tokens)
  silent = [
    np.ravel(report["silent"])
    for pattern in seen.values()
    for report in pattern.values()
    if "silent" in report
  ]
  if not silent:
    return Finding(None, "no dense feed-forward layer")
  silent = np.concatenate(silent)
  return Finding(
    bool(silent.mean() <= 0.1),
    f"{silent.sum()} of {silent.size} units are silent on {tokens.size} tokens",
    "their biases are far below zero, or a large step pushed them there",
  )


def _listening(block: Block) -> Block:
  dense = isinstance(block.ffn, MLP | GLU)
  return replace(block, ffn=Listener(block.ffn)) if dense else block


def layers_differ(s: Subject) -> Finding:
  """No two layers start with the same matrix."""
  same = []
  for name, x in paths(s.initial).items():
    if name.startswith("layers/") and x.ndim > 2 and len(x) > 1:
      equal = bool(jnp.all(x[0] == x[1])) and bool(jnp.any(x != 0))
      same += [name] if equal else []
  return Finding(
    not same,
    f"matrices that are equal in two layers: {len(same)}",
    f"{', '.join(same[:3])}: the layers were made with one random key",
  )


def evaluation(s: Subject) -> Finding:
  """Dropout acts in training, and only there."""
  rates = [s.model.dropout, *(b.dropout for b in s.model.blocks)]
  if not any(rates):
    return Finding(None, "no dropout")
  layers = tuple(
    (tuple(replace(b, dropout=0.0) for b in pattern), n)
    for pattern, n in s.model.layers
  )
  plain = replace(s.model, dropout=0.0, layers=layers)
  tokens = jnp.asarray(s.batch["inputs"][:, :TOKENS])
  still = s.logits(s.lively, tokens)
  without = replace(s, model=plain).logits(s.lively, tokens)
  noisy = [
    s.logits(s.lively, tokens, At(key=jax.random.key(i))) for i in range(2)
  ]
  quiet = float(jnp.abs(still - without).max())
  moved = float(jnp.abs(noisy[0] - noisy[1]).max())
  return Finding(
    quiet < 1e-5 and moved > 1e-5,
    f"it moves evaluation by {quiet:.2g}, and training from step to step by "
    f"{moved:.2g}",
    "dropout must read the key of the step, and do nothing without one",
  )
