"""A bank of mistakes people make in transformers, each to be found by name.

`BUGS[name]` makes a sick subject of a healthy one; `cure` names the check that
finds it. `python -m jaxlm.doctor --bug="rope twice"` shows one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.doctor.plain import Plain
from jaxlm.doctor.subject import Subject
from jaxlm.layers.at import At
from jaxlm.layers.attention import Attention
from jaxlm.layers.compute import DEFAULT
from jaxlm.layers.dropout import dropout
from jaxlm.layers.linear import dot
from jaxlm.layers.mlp import MLP, relu2
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import init
from jaxlm.layers.position import Rope
from jaxlm.models import decoder
from jaxlm.models.decoder import Block, Decoder
from jaxlm.state import make_step

Array = jax.Array
Tree = Any

# --- A healthy one ----------------------------------------------------------


def healthy(model: Decoder | None = None, seed: int = 0) -> Subject:
  """A small decoder with everything a mistake can sit in, and a batch.

  Args:
    model: another model; tokens are drawn for its vocabulary.
    seed: of the tokens.
  """
  if model is None:
    block = Block(
      Attention(32, 4, kv_heads=2, position=Rope(100.0)),
      MLP(32, 64, relu2, bias=True),
      RMSNorm(32),
      dropout=0.1,
    )
    model = Decoder(61, 32, (((block,), 3),), RMSNorm(32), 64, tied=True)
  tokens = jax.random.randint(jax.random.key(seed), (4, 17), 0, model.vocab)
  mask = jnp.ones((4, 16), jnp.int32).at[0, 12:].set(0).at[1, :3].set(0)
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}
  return Subject(model, jax.tree.map(jax.device_get, batch), seed=seed)


def each_block(s: Subject, change: Callable[[Block], Block]) -> Subject:
  """The subject with every block changed."""
  layers = tuple(
    (tuple(change(b) for b in pattern), n) for pattern, n in s.model.layers
  )
  return replace(s, model=replace(s.model, layers=layers))


# --- Parts with a mistake ---------------------------------------------------


def _attention(mistake: str) -> Callable[[Subject], Subject]:
  """The same attention by `Plain`, with a mistake."""

  def change(b: Block) -> Block:
    m = b.mixer
    plain = Plain(
      m.dim,
      m.heads,
      m.kv_heads,
      m.head_dim,
      position=m.position,
      mistake=mistake,
    )
    return replace(b, mixer=plain)

  return lambda s: each_block(s, change)


@dataclass(frozen=True)
class OverAxis(RMSNorm):
  """A norm over another axis than the features."""

  over: int = 1

  def __call__(self, p: dict[str, Any], x: Array) -> Array:
    """Normalises `x` [batch, seq, dim] along `over`."""
    size = jnp.mean(jnp.square(x), axis=self.over, keepdims=True)
    return x * jax.lax.rsqrt(size + self.eps) * p["scale"][None, None]


@dataclass(frozen=True)
class NoRoot(RMSNorm):
  """A norm that divides by the mean square, not by its root."""

  def __call__(self, p: dict[str, Any], x: Array) -> Array:
    """Normalises `x` [batch, seq, dim], or tries to."""
    size = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x / (size + self.eps) * p["scale"][None, None]


@dataclass(frozen=True)
class Wrong(Block):
  """A block with one mistake around its branches."""

  mistake: str = ""

  def _join(self, p, name: str, x: Array, y: Array, at: At, site: int) -> Array:
    """The stream with a branch added to it, or not quite."""
    y = self._branch(p, name, y, at, site)
    if self.mistake == "residual missing":
      return y.astype(x.dtype)
    if self.mistake == "gradient stopped" and name == "ffn":
      y = jax.lax.stop_gradient(y)
    if self.mistake == "residual added twice":
      return x + x + y.astype(x.dtype)
    return x + y.astype(x.dtype)

  def _branch(self, p, name: str, y: Array, at: At, site: int) -> Array:
    if self.mistake == "dropout in evaluation":
      return dropout(y, self.dropout, jax.random.key(site))
    if self.mistake == "dropout never":
      return y
    return super()._branch(p, name, y, at, site)


def _block(mistake: str) -> Callable[[Subject], Subject]:
  def change(b: Block) -> Block:
    return Wrong(b.mixer, b.ffn, b.norm, dropout=b.dropout, mistake=mistake)

  return lambda s: each_block(s, change)


def _norm(norm: type, **options: Any) -> Callable[[Subject], Subject]:
  def change(b: Block) -> Block:
    return replace(b, norm=norm(b.norm.dim, **options))

  return lambda s: each_block(s, change)


# --- Programs with a mistake ------------------------------------------------


def _forward(wrap: Callable) -> Callable[[Subject], Subject]:
  """A subject whose forward pass is `wrap(forward, model, params, ...)`."""

  def forward(model, params, tokens, at=None, cache=None, compute=DEFAULT):
    return wrap(model, params, tokens, at, cache, compute)

  return lambda s: replace(s, forward=forward)


def _restarting(model, params, tokens, at, cache, compute):
  """Every part of a text begins at position zero again."""
  if cache is not None:
    where = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
    at = At(positions=where)
  return decoder.forward(model, params, tokens, at, cache, compute)


def _unpacked(model, params, tokens, at, cache, compute):
  """The segments of packed rows are forgotten."""
  at = at if at is None else at.replace(segments=None)
  return decoder.forward(model, params, tokens, at, cache, compute)


def _copied_head(model, params, tokens, at, cache, compute):
  """The head was copied from the embedding, and learns no more."""
  x, out = decoder.hidden(model, params, tokens, at, cache, compute)
  w = jax.lax.stop_gradient(params["embed"]["tokens"].T)
  y = dot(x, w, "btd,dv->btv", dtype=jnp.float32)
  return y if cache is None else (y, out)


def _objective(loss: Callable) -> Callable[[Subject], Subject]:
  """An objective from `loss(logits, targets, mask)`."""

  def objective(model, params, batch, key=None, compute=DEFAULT):
    y = decoder.forward(
      model, params, batch["inputs"], At(key=key), compute=compute
    )
    mask = batch["mask"].astype(jnp.float32)
    value = loss(y, batch["targets"], mask)
    return value, {"loss": value, "weight": mask.sum()}

  return lambda s: replace(s, objective=objective)


def _nll(y: Array, targets: Array) -> Array:
  y = jax.nn.log_softmax(y, axis=-1)
  return -jnp.take_along_axis(y, targets[..., None], axis=-1)[..., 0]


def _mean(x: Array, mask: Array) -> Array:
  return jnp.sum(x * mask) / jnp.sum(mask)


def _summed_step(loss_fn, tx, *, accumulate: int = 1, **options):
  """Gradients of the parts are added, and never divided."""
  n = float(accumulate)

  def louder(params, batch, key):
    loss, metrics = loss_fn(params, batch, key)
    return n * loss, metrics

  return make_step(louder, tx, accumulate=accumulate, **options)


# --- Arrays and batches with a mistake --------------------------------------


def _start(change: Callable[[Tree], Tree]) -> Callable[[Subject], Subject]:
  """A subject that starts with changed arrays."""

  def start(model: Decoder, key: Array) -> Tree:
    return change(init(model.params(), key))

  return lambda s: replace(s, start=start)


def _everywhere(name: str, change: Callable[[Array], Array]) -> Callable:
  """Changes the arrays of the layers with this last name."""

  def one(path, x: Array) -> Array:
    return change(x) if getattr(path[-1], "key", "") == name else x

  return lambda tree: jax.tree_util.tree_map_with_path(one, tree)


def _loud(tree: Tree) -> Tree:
  return tree | {"embed": jax.tree.map(lambda x: 50 * x, tree["embed"])}


def _batch(change: Callable[[dict], dict]) -> Callable[[Subject], Subject]:
  return lambda s: replace(s, batch=s.batch | change(s.batch))


def _frozen_embedding(s: Subject) -> Subject:
  """The optimizer forgets the embedding."""

  def label(path, _) -> str:
    return "still" if path[0].key == "embed" else "moving"

  labels = jax.tree_util.tree_map_with_path(label, s.model.params())
  parts = {"still": optax.set_to_zero(), "moving": optax.adam(3e-3)}
  return replace(s, tx=optax.multi_transform(parts, labels))


@dataclass(frozen=True)
class Bug:
  """A mistake: how it is made, and the check that finds it."""

  make: Callable[[Subject], Subject]
  check: str


BUGS: dict[str, Bug] = {
  "mask off by one": Bug(_attention("mask off by one"), "causality"),
  "mask missing": Bug(_attention("mask missing"), "causality"),
  "mask too weak": Bug(_attention("mask too weak"), "causality"),
  "mask after softmax": Bug(_attention("mask after softmax"), "causality"),
  "softmax over queries": Bug(_attention("softmax over queries"), "causality"),
  "norm over the sequence": Bug(_norm(OverAxis, over=1), "causality"),
  "norm over the batch": Bug(_norm(OverAxis, over=0), "rows apart"),
  "segments forgotten": Bug(_forward(_unpacked), "documents apart"),
  "no positions": Bug(_attention("no positions"), "order"),
  "mask too strict": Bug(_attention("mask too strict"), "attention"),
  "scale missing": Bug(_attention("scale missing"), "attention"),
  "softmax over heads": Bug(_attention("softmax over heads"), "attention"),
  "rope twice": Bug(_attention("rope twice"), "attention"),
  "rope only on queries": Bug(_attention("rope only on queries"), "attention"),
  "rope on values": Bug(_attention("rope on values"), "attention"),
  "heads transposed": Bug(_attention("heads transposed"), "attention"),
  "key heads tiled": Bug(_attention("key heads tiled"), "attention"),
  "softmax in 16 bits": Bug(_attention("softmax in 16 bits"), "precision"),
  "residual missing": Bug(_block("residual missing"), "residual"),
  "residual added twice": Bug(_block("residual added twice"), "residual"),
  "gradient stopped": Bug(_block("gradient stopped"), "gradients"),
  "dropout in evaluation": Bug(
    _block("dropout in evaluation"), "train and eval"
  ),
  "dropout never": Bug(_block("dropout never"), "train and eval"),
  "norm without root": Bug(_norm(NoRoot), "norms"),
  "positions restart": Bug(_forward(_restarting), "cache parity"),
  "tied head copied": Bug(_forward(_copied_head), "tied head"),
  "labels not shifted": Bug(
    _batch(lambda b: {"targets": b["inputs"]}), "labels"
  ),
  "labels shifted twice": Bug(
    _objective(lambda y, t, m: _mean(_nll(y[:, :-1], t[:, 1:]), m[:, 1:])),
    "loss by hand",
  ),
  "padding counts": Bug(
    _objective(lambda y, t, m: jnp.mean(_nll(y, t))), "loss by hand"
  ),
  "softmax twice": Bug(
    _objective(lambda y, t, m: _mean(_nll(jax.nn.softmax(y), t), m)),
    "loss by hand",
  ),
  "loss is a sum": Bug(
    _objective(lambda y, t, m: jnp.sum(_nll(y, t) * m)), "batch size"
  ),
  "tokens of another vocabulary": Bug(
    _batch(lambda b: {"inputs": b["inputs"] + 50}), "vocabulary"
  ),
  "embedding too large": Bug(_start(_loud), "initial loss"),
  "layers start alike": Bug(
    _start(_everywhere("q", lambda x: jnp.broadcast_to(x[:1], x.shape))),
    "layers differ",
  ),
  "dead units": Bug(
    _start(_everywhere("up_bias", lambda x: x - 10)), "dead units"
  ),
  "parameters in 16 bits": Bug(
    _start(lambda t: jax.tree.map(lambda x: x.astype(jnp.bfloat16), t)),
    "precision",
  ),
  "everything decays": Bug(
    lambda s: replace(s, tx=optax.adamw(3e-3, weight_decay=0.1)),
    "weight decay",
  ),
  "embedding frozen": Bug(_frozen_embedding, "all move"),
  "gradients summed": Bug(
    lambda s: replace(s, make_step=_summed_step), "accumulation"
  ),
  "uphill": Bug(
    lambda s: replace(s, tx=optax.chain(optax.adam(3e-3), optax.scale(-1.0))),
    "overfit",
  ),
}
