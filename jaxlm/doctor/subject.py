"""Who is examined: a model with the functions that run and train it.

Every function is a field, so that a mistake in any of them can be put in its
place (`bugs.py`) and a reader's own version can be examined as well.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.layers import param
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import Param, map_params
from jaxlm.models import decoder
from jaxlm.models.decoder import Block, Decoder, unstack
from jaxlm.objectives import next_token
from jaxlm.state import make_step

Array = jax.Array
Tree = Any
TOKENS = 12  # of a row where every pair of positions is looked at


@dataclass(frozen=True)
class Finding:
  """What a check found.

  Attributes:
    ok: whether all is well; None where the check does not apply.
    seen: what was measured, in a few words.
    advice: where to look; shown if it is not well.
  """

  ok: bool | None
  seen: str
  advice: str = ""


@dataclass(frozen=True)
class Subject:
  """A model, a batch, and all that is done with them.

  Attributes:
    model: the decoder.
    batch: `inputs`, `targets` and `mask`, [batch, seq]; two rows or more.
    params: trained arrays; None for those the model starts with.
    start: (model, key) -> the arrays it starts with.
    forward: as `jaxlm.models.decoder.forward`.
    objective: as `jaxlm.objectives.next_token`.
    tx: the optimizer.
    make_step: as `jaxlm.state.make_step`.
    seed: of everything random.
  """

  model: Decoder
  batch: dict[str, np.ndarray]
  params: Tree = None
  start: Callable = None
  forward: Callable = decoder.forward
  objective: Callable = next_token
  tx: Any = None
  make_step: Callable = make_step
  seed: int = 0

  @functools.cached_property
  def initial(self) -> Tree:
    """The arrays training starts with."""
    key = jax.random.key(self.seed)
    if self.start is not None:
      return self.start(self.model, key)
    return jax.jit(lambda key: param.init(self.model.params(), key))(key)

  @functools.cached_property
  def now(self) -> Tree:
    """The trained arrays, or else the initial ones."""
    return self.initial if self.params is None else self.params

  @functools.cached_property
  def lively(self) -> Tree:
    """Random arrays without a zero, so that nothing hides behind one.

    Many models start with output projections of zeros: then no gradient
    passes, and a wrong layer looks right.
    """
    tree, key = self.model.params(), jax.random.key(self.seed + 1)
    keys = jax.random.split(key, len(jax.tree.leaves(self.initial)))
    keys = jax.tree.unflatten(jax.tree.structure(self.initial), list(keys))

    def one(p: Param, x: Array, key: Array) -> Array:
      noise = jax.random.normal(key, p.shape, jnp.float32)
      if p.is_matrix:
        fan_in = 1 if "vocab" in p.axes[:1] else p.fan_in
        return noise / jnp.float32(fan_in**0.5)
      return x.astype(jnp.float32) + 0.1 * noise

    return jax.jit(lambda x, k: map_params(one, tree, x, k))(self.initial, keys)

  @property
  def optimizer(self) -> optax.GradientTransformationExtraArgs:
    """`tx`, or plain Adam where none is given."""
    tx = optax.adam(3e-3) if self.tx is None else self.tx
    return optax.with_extra_args_support(tx)

  def loss(self, params: Tree, batch: Tree, key: Any = None) -> tuple:
    """The objective as `make_step` wants it, without dropout."""
    del key
    return self.objective(self.model, params, batch, None, Compute())

  @functools.cached_property
  def losses(self) -> Callable[[Tree, Tree], tuple]:
    """`loss`, compiled."""
    return jax.jit(self.loss)

  @functools.cached_property
  def gradients(self) -> Tree:
    """Of the loss of the batch, at the lively arrays."""
    grad = jax.jit(jax.grad(lambda p, b: self.loss(p, b)[0]))
    return grad(self.lively, self.batch)

  @functools.cached_property
  def logits(self) -> Callable[..., Any]:
    """`forward` of (params, tokens, at, cache), compiled."""
    return jax.jit(functools.partial(self.forward, self.model))

  def layers(self, params: Tree) -> list[tuple[str, Block, Tree]]:
    """Every block in order: its name, itself and its own arrays."""
    found = []
    for i, (pattern, n) in enumerate(self.model.layers):
      parts = [
        unstack(params["layers"][str(i)][str(j)], n)
        for j in range(len(pattern))
      ]
      for k in range(n):
        for j, block in enumerate(pattern):
          found.append((f"block {len(found)}", block, parts[j][k]))
    return found

  def shorter(self, at_most: int) -> dict[str, np.ndarray]:
    """The batch with fewer tokens a row."""
    return {k: v[:, :at_most] for k, v in self.batch.items()}


def influence(s: Subject, at: At | None = None) -> np.ndarray:
  """How much each token moves what is said in row 0, [out, rows, in].

  The squared norm of the gradient of the logits at position `out` of row 0,
  in a random direction, with respect to the embedding of every token of two
  rows: zero means that the token cannot be seen from there.
  """
  keys = jax.random.split(jax.random.key(s.seed), 2)
  x = jax.random.normal(keys[0], (2, TOKENS, s.model.dim), jnp.float32)
  r = jax.random.normal(keys[1], (s.model.vocab,), jnp.float32)

  def said(x: Array, t: Array) -> Array:
    y = s.forward(s.model, s.lively, x, at)
    return jnp.sum(jnp.take(y[0], t, axis=0) * r)

  @jax.jit
  def all_of(x: Array) -> Array:
    each = jax.vmap(jax.grad(said), (None, 0))(x, jnp.arange(TOKENS))
    return jnp.sum(jnp.square(each), axis=-1)

  return np.asarray(all_of(x))


@functools.cache
def alone(block: Block) -> Callable[[Tree, Array], Array]:
  """One block as a compiled function of its arrays and `[rows, seq, dim]`."""
  return jax.jit(lambda p, x: block(p, x, At(), None, Compute())[0])
