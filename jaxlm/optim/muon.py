"""Muon: momentum, made orthogonal, as an optax transformation.

Momentum matrices of a transformer are dominated by a few directions. Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces each
by a nearby orthogonal matrix, so that every direction learns at one speed:

  mₜ = β mₜ₋₁ + (1 − β) gₜ         momentum (Nesterov's form by default)
  oₜ = orthogonalize(mₜ)           U V' of the singular value decomposition
  wₜ = wₜ₋₁ − η (s oₜ + λ wₜ₋₁)    s from the matrix' shape, λ decoupled decay

This file gives `s oₜ`; decay and learning rate are optax's and are chained on
in `optimizer.py`. Which dimensions make the matrix is read from `Param`:
'layers' and 'experts' stack matrices, `n_in` dimensions come in, the rest go
out, whatever the rank of the array. The update equals `optax.contrib.muon`.

Notable: the orthogonalisation never transposes (it multiplies from the short
side), and for matrices at least twice as long as wide it iterates on the small
square Gram matrix alone, which halves the work of an MLP's matrices. Left out:
preconditioners and adaptive scaling of optax's version.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.errors import UserError
from jaxlm.layers.param import Param, Tree
from jaxlm.optim.spread import on_whole_matrices

Array = jax.Array
Triples = tuple[tuple[float, float, float], ...]

HEADS = ("heads", "kv_heads")


# --- Orthogonalisation ------------------------------------------------------


@dataclass(frozen=True)
class NewtonSchulz:
  """Drives every singular value of a matrix towards one, by products alone.

  X ← X / (margin ‖X‖); then for each triple (a, b, c): X ← aX + bAX + cA²X
  with A = XX', an odd polynomial applied to the singular values of X.

  Attributes:
    triples: coefficients (a, b, c), one triple a step.
    margin: how far inside the unit ball the iteration starts.
    gram: ratio of sides from which the iteration runs on A alone (see
      `_by_gram`); `math.inf` never does.
    dtype: of the operands; sums are float32 always. bfloat16 is what the GPU
      versions use and changes an update by one to three per cent.
  """

  triples: Triples
  margin: float = 1.0
  gram: float = 2.0
  dtype: Any = jnp.float32

  def __call__(self, x: Array, eps: float = 1e-8) -> Array:
    """Orthogonalises each matrix of `x` [..., in, out]; float32 result."""
    x = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / (norm * self.margin + eps)
    short, long = sorted(x.shape[-2:])
    if long >= self.gram * short and len(self.triples) > 1:
      return _by_gram(x, self.triples, self.dtype)
    return _by_steps(x, self.triples, self.dtype)


def _product(x: Array, y: Array, i: int, j: int, dtype: Any) -> Array:
  """Batched product over dimension `i` of `x` and `j` of `y`, from the end."""
  n = x.ndim
  batch = tuple(range(n - 2))
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (((n + i,), (n + j,)), (batch, batch)),
    preferred_element_type=jnp.float32,
  )


def _by_steps(x: Array, triples: Triples, dtype: Any) -> Array:
  """Newton-Schulz on `x` itself; A is formed on the shorter side."""
  tall = x.shape[-2] > x.shape[-1]
  for a, b, c in triples:
    if tall:  # A = X'X multiplies from the right
      gram = _product(x, x, -2, -2, dtype)
    else:
      gram = _product(x, x, -1, -1, dtype)
    poly = b * gram + c * _product(gram, gram, -1, -2, dtype)
    if tall:
      x = a * x + _product(x, poly, -1, -2, dtype)
    else:
      x = a * x + _product(poly, x, -1, -2, dtype)
  return x


def _by_gram(x: Array, triples: Triples, dtype: Any) -> Array:
  """The same polynomial, with all steps done on the small matrix A = XX'.

  Each step multiplies X by P = aI + bA + cA², hence A by P² (they commute).
  So the product Q of all P needs A alone, and X is read twice instead of ten
  times (arXiv:2505.16932, appendix on rectangular matrices). With k steps and
  sides m <= n this costs 4 m²n + 2(4k − 3)m³ in place of k(4 m²n + 2 m³).
  A must not be rounded, or small singular values blow up: always float32.
  """
  tall = x.shape[-2] > x.shape[-1]
  full = jnp.float32
  gram = _product(x, x, -2, -2, full) if tall else _product(x, x, -1, -1, full)
  eye = jnp.eye(gram.shape[-1], dtype=full)
  eye = jnp.expand_dims(eye, range(gram.ndim - 2))
  total = None
  for step, (a, b, c) in enumerate(triples):
    poly = a * eye + b * gram + c * _product(gram, gram, -1, -2, full)
    total = poly if total is None else _product(poly, total, -1, -2, full)
    if step < len(triples) - 1:
      gram = _product(_product(poly, gram, -1, -2, full), poly, -1, -2, full)
  if tall:
    return _product(x, total, -1, -2, dtype)
  return _product(total, x, -1, -2, dtype)


# Jordan's quintic: steepest slope at zero; singular values end in 0.7 ... 1.2.
JORDAN = NewtonSchulz(((3.4445, -4.7750, 2.0315),) * 5)

# The best polynomial for each step in turn (Amsel et al., arXiv:2505.16932,
# algorithm 1, the first five of degree 5), as printed there; then their safety
# factor 1.01 against rounding: p(x / 1.01).
_PUBLISHED = (
  (8.28721201814563, -23.595886519098837, 17.300387312530933),
  (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
  (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
  (3.3184196573706015, -2.488488024314874, 0.51004894012372),
  (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLAR_EXPRESS = NewtonSchulz(
  tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _PUBLISHED),
  margin=1.01,
)

COEFFICIENTS = {"jordan": JORDAN, "polar_express": POLAR_EXPRESS}


# --- Scale by shape ---------------------------------------------------------


def original(n_in: int, n_out: int) -> float:
  """√max(1, out/in): what keeps the change of the outputs independent of width.

  Jordan's scale; learning rates are near 0.02.
  """
  return math.sqrt(max(1.0, n_out / n_in))


def match_rms_adamw(n_in: int, n_out: int) -> float:
  """0.2 √max(in, out): an update as large (root mean square) as AdamW's.

  So AdamW's learning rate and decay serve both (arXiv:2502.16982).
  """
  return 0.2 * math.sqrt(max(n_in, n_out))


SCALES = {"original": original, "match_rms_adamw": match_rms_adamw}


# --- Matrices in arrays -----------------------------------------------------


@dataclass(frozen=True)
class Matrices:
  """How an array reads as a stack of matrices.

  Attributes:
    stacked: the dimensions that stack matrices.
    n_in: how many of the others, in order, come in; the rest go out.
  """

  stacked: tuple[int, ...]
  n_in: int


def matrices(param: Param, per_head: bool = False) -> Matrices | None:
  """How `param` reads as matrices; None for what Muon leaves to AdamW.

  Args:
    param: the declaration.
    per_head: whether each head of a projection is a matrix of its own, rather
      than all of them side by side one matrix (the published form).
  """
  if not param.is_hidden:
    return None
  stacked = list(range(param.n_stacked))
  rest = list(range(param.n_stacked, len(param.shape)))
  n_in = param.n_in
  for dim in [d for d in rest if per_head and param.axes[d] in HEADS]:
    n_in -= dim < param.n_stacked + param.n_in
    rest.remove(dim)
    stacked.append(dim)
  if not 0 < n_in < len(rest):  # nothing would be left to come in or go out
    return Matrices(tuple(range(param.n_stacked)), param.n_in)
  return Matrices(tuple(stacked), n_in)


# --- The transformation -----------------------------------------------------


@dataclass(frozen=True)
class Muon:
  """Muon's numbers.

  Attributes:
    momentum: β.
    nesterov: whether the gradient counts twice, as in Nesterov's method.
    coefficients: a key of `COEFFICIENTS`.
    steps: how many of the five triples to apply; four cost a fifth less.
    scale: a key of `SCALES`.
    lr_ratio: the learning rate of Muon's matrices over that of the rest.
    per_head: whether attention heads are matrices of their own.
    dtype: of the operands of the orthogonalisation.
  """

  momentum: float = 0.95
  nesterov: bool = True
  coefficients: str = "polar_express"
  steps: int = 5
  scale: str = "match_rms_adamw"
  lr_ratio: float = 1.0
  per_head: bool = False
  dtype: Any = jnp.float32

  def __post_init__(self):
    for name, table in (("coefficients", COEFFICIENTS), ("scale", SCALES)):
      value = getattr(self, name)
      if value not in table:
        known = ", ".join(table)
        raise UserError(f"unknown Muon {name} {value!r}; known: {known}")
    if not 1 <= self.steps <= 5:
      raise UserError(f"Muon takes 1 to 5 steps, not {self.steps}")
    if not 0 <= self.momentum < 1:
      raise UserError(f"Muon's momentum {self.momentum} is not in [0, 1)")

  @property
  def iterate(self) -> NewtonSchulz:
    """The orthogonalisation these numbers ask for."""
    full = COEFFICIENTS[self.coefficients]
    return replace(full, triples=full.triples[: self.steps], dtype=self.dtype)


class MuonState(NamedTuple):
  """Momentum and the number of updates it has seen."""

  count: Array
  mu: Tree


def scale_by_muon(
  tree: Tree, muon: Muon = Muon()
) -> optax.GradientTransformation:
  """Gradients to orthogonal, shape-scaled updates (before learning rate).

  Args:
    tree: the `Param` of every parameter that this transformation will see.
      Those that are no hidden matrices must have been masked out by then (as
      `optax.partition` and `optax.masked` do).
    muon: the numbers.
  """
  views = {
    path: matrices(p, muon.per_head)
    for path, p in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=lambda x: isinstance(x, Param)
    )
  }
  iterate, scale = muon.iterate, SCALES[muon.scale]

  def one(path: Any, m: Array) -> Array:
    view = views[path]

    def orthogonal(m: Array) -> Array:
      n_in = math.prod(m.shape[1 : 1 + view.n_in])
      x = m.reshape(len(m), n_in, -1)
      return (scale(*x.shape[1:]) * iterate(x)).reshape(m.shape)

    return on_whole_matrices(orthogonal, m, view.stacked).astype(m.dtype)

  def init(params: Tree) -> MuonState:
    mu = jax.tree.map(jnp.zeros_like, params)
    return MuonState(jnp.zeros((), jnp.int32), mu)

  def update(grads, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    mu = _momentum(grads, state.mu, muon.momentum)
    point = mu
    if muon.nesterov:
      point = _look_ahead(grads, mu, count, muon.momentum)
    updates = jax.tree_util.tree_map_with_path(one, point)
    return updates, MuonState(count, mu)

  return optax.GradientTransformation(init, update)


def _momentum(grads: Tree, mu: Tree, beta: float) -> Tree:
  """β m + (1 − β) g."""
  return jax.tree.map(
    lambda g, m: beta * m + (1 - beta) * g.astype(m.dtype), grads, mu
  )


def _look_ahead(grads: Tree, mu: Tree, count: Array, beta: float) -> Tree:
  """Nesterov's point β m̂ + (1 − β) ĝ, each debiased as in optax.

  m̂ = m / (1 − βᵗ⁺¹), ĝ = g / (1 − βᵗ). torch mixes without debiasing, so the
  two libraries differ in the first hundred steps.
  """
  t = count.astype(jnp.float32)
  old = beta / (1 - beta ** (t + 1))
  new = (1 - beta) / (1 - beta**t)

  def mix(g: Array, m: Array) -> Array:
    return old.astype(m.dtype) * m + (new * g.astype(t.dtype)).astype(m.dtype)

  return jax.tree.map(mix, grads, mu)
