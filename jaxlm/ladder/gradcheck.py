"""Is this gradient right? Derivatives from values alone, as judges.

Differences: (f(x + h) - f(x)) / h is wrong by h f''/2 for a large h and by
rounding / h for a small one; (f(x + h) - f(x - h)) / 2h by h^2 f'''/6 and the
same rounding, so its best h is the cube root of the precision, about 1e-5 in
float64. Complex step (Lyness and Moler, 1967; Squire and Trapp, SIAM Review
1998): Im f(x + ih) / h subtracts nothing, so h may be 1e-30 and every digit
is right, for functions that know complex numbers.

What it could not do: these say that a gradient is wrong, not what the right
one is, and cost two evaluations per weight. GPT-2 would need a quarter of a
billion for one step. The next rung gets all of them from one pass backwards.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlm.ladder import rung

Array = np.ndarray
H = 1e-5  # about the cube root of float64's precision


class WrongGradient(AssertionError):
  """A gradient differs from what the values of its function say."""


def forward_difference(f: Callable, x: Array, v: Array, h: float) -> Any:
  """The slope of `f` at `x` along `v`, from two values: error O(h)."""
  return (f(x + h * v) - f(x)) / h


def central(f: Callable, x: Array, v: Array, h: float = H) -> Any:
  """The slope of `f` at `x` along `v`, from both sides: error O(h^2)."""
  return (f(x + h * v) - f(x - h * v)) / (2 * h)


def complex_step(f: Callable, x: Array, v: Array, h: float = 1e-30) -> Any:
  """The slope of an analytic `f` at `x` along `v`, to the last digit."""
  return np.imag(f(x + 1j * h * v)) / h


def jacobian(f: Callable, x: Array, slope: Callable = central) -> Array:
  """All slopes of `f` at `x`: the shape of f(x), then the shape of `x`.

  For a scalar `f` this is the gradient.
  """
  units = np.eye(x.size).reshape(x.size, *x.shape)
  columns = np.stack([np.asarray(slope(f, x, v)) for v in units], axis=-1)
  return columns.reshape(*columns.shape[:-1], *x.shape)


def hessian(f: Callable, x: Array, h: float = 1e-3) -> Array:
  """Second slopes of a scalar `f`, from values: `[*x.shape, *x.shape]`.

  Differences of differences with Richardson's correction (4 D(h) - D(2h)) / 3,
  which leaves an error of O(h^4). Rounding counts as 1 / h^2, hence the wide h.
  """

  def plain(h: float) -> Array:
    slope = lambda g, x, v: central(g, x, v, h)  # noqa: E731
    return jacobian(lambda x: jacobian(f, x, slope), x, slope)

  return (4 * plain(h) - plain(2 * h)) / 3


def hvp(gradient: Callable, x: Array, v: Array, h: float = H) -> Array:
  """The Hessian times `v`, from two gradients and without the Hessian."""
  return central(gradient, x, v, h)


def check(
  f: Callable, x: Any, gradient: Any = None, tol: float = 1e-7, rays: int = 0
) -> float:
  """Compares a gradient with central differences, in float64.

  Args:
    f: from a tree of arrays to a number.
    x: the tree, all leaves float64 (`with jax.enable_x64(True)`).
    gradient: the claim, a tree like `x`; None means `jax.grad`'s.
    tol: largest difference allowed, relative to the largest slope, or to one.
    rays: compare along this many random directions; 0 means every coordinate.

  Returns:
    The largest difference.

  Raises:
    WrongGradient: with the worst place, if the difference is over `tol`.
  """
  import jax
  from jax.flatten_util import ravel_pytree

  flat, back = ravel_pytree(x)
  if flat.dtype != np.float64:
    raise TypeError(f"gradients are checked in float64, not {flat.dtype}")
  run = jax.jit(lambda flat: f(back(flat)))
  claim = jax.grad(run)(flat) if gradient is None else ravel_pytree(gradient)[0]
  flat, claim = np.asarray(flat), np.asarray(claim)
  ways, claims = np.eye(flat.size), claim
  if rays:
    ways = np.random.default_rng(0).normal(size=(rays, flat.size))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    claims = ways @ claim
  slopes = np.array([float(central(run, flat, way)) for way in ways])
  gaps = np.abs(slopes - claims) / max(1.0, np.abs(slopes).max())
  worst = int(np.argmax(np.where(np.isfinite(gaps), gaps, np.inf)))
  if not gaps[worst] <= tol:
    raise WrongGradient(
      f"slope {worst} of {len(ways)} is {slopes[worst]:.9g} by differences "
      f"and {claims[worst]:.9g} by the gradient"
    )
  return float(gaps[worst])


# --- The rung ---------------------------------------------------------------


def squire(x: Array) -> Array:
  """The example of Squire and Trapp: exp(x) / sqrt(sin(x)^3 + cos(x)^3)."""
  return np.exp(x) / np.sqrt(np.sin(x) ** 3 + np.cos(x) ** 3)


def squire_slope(x: Array) -> Array:
  """Its derivative, by hand."""
  s, c = np.sin(x), np.cos(x)
  return squire(x) * (1 - 1.5 * (s**2 * c - c**2 * s) / (s**3 + c**3))


def softmax(x: Array) -> Array:
  """exp(x) / sum(exp(x)), of real or complex numbers."""
  e = np.exp(x - np.max(x.real))
  return e / np.sum(e)


def main(argv: list[str] | None = None) -> None:
  """Draws the error of each rule against its step, and checks softmax."""
  args = rung.parser(__doc__).parse_args(argv)
  page, (ax,) = rung.figure(1, size=(6, 4))
  x, sizes = 1.5, 10.0 ** np.arange(-17, -0.4, 0.25)
  for rule in (forward_difference, central, complex_step):
    slopes = np.array([rule(squire, x, 1.0, h) for h in sizes])
    errors = np.abs(slopes / squire_slope(x) - 1)
    best = np.argmin(errors)
    name = rule.__name__.replace("_", " ")
    print(f"{name:18s} best error {errors[best]:.0e} at h = {sizes[best]:.0e}")
    ax.loglog(sizes, np.maximum(errors, 1e-17), ".-", label=name)
  ax.set(xlabel="step h", ylabel="relative error", title="how long a step?")
  ax.legend(frameon=False)
  z = np.random.default_rng(args.seed).normal(size=6)
  p = softmax(z)
  exact = np.diag(p) - np.outer(p, p)
  for rule in (central, complex_step):
    gap = np.abs(jacobian(softmax, z, rule) - exact).max()
    print(f"softmax's Jacobian, {rule.__name__}: {gap:.0e}")
  log_sum = lambda z: np.log(np.sum(np.exp(z)))  # noqa: E731
  print(f"Hessian of log-sum: {np.abs(hessian(log_sum, z) - exact).max():.0e}")
  v = np.arange(6.0)
  print(f"Hessian times v: {np.abs(hvp(softmax, z, v) - exact @ v).max():.0e}")
  rung.save(page, args.out, "gradcheck")


if __name__ == "__main__":
  rung.run(main)
