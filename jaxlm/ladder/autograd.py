"""Automatic differentiation of arrays, backwards, in a page.

Linnainmaa, 1970 (in his thesis, for rounding errors); Speelpenning, 1980;
for networks Rumelhart, Hinton and Williams, Nature 1986. While a value is
computed, each array remembers what it came from and how a change of itself
goes back to that. One walk in reverse order then gives every gradient, at
about twice the price of the value, however many weights there are.

What it could not do: be fast. Every operation is a trip through Python, and
every array on the way is kept until the walk back. The next rung writes one
network's walk out by hand, and a compiler (JAX) does both at once.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlm.ladder import perceptron, rung, tensor, toys
from jaxlm.ladder.tensor import Tensor


def fit(d: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Sums a gradient over what broadcasting repeated."""
  d = d.sum(tuple(range(d.ndim - len(shape))))
  ones = tuple(i for i, n in enumerate(shape) if n == 1 and d.shape[i] != 1)
  return d.sum(ones, keepdims=True)


def grad(y: Tensor, wrt: Sequence[Tensor]) -> list[np.ndarray]:
  """The gradients of a number `y` with respect to some tensors."""
  if y.shape:
    raise ValueError(f"only a number has a gradient, not shape {y.shape}")
  order, seen, stack = [], set(), [(y, False)]
  while stack:  # depth first; a node follows all that it was made of
    node, done = stack.pop()
    if done:
      order.append(node)
    elif id(node) not in seen:
      seen.add(id(node))
      stack.append((node, True))
      stack.extend((parent, False) for parent, _ in node.parents)
  found = {id(y): np.ones(())}
  for node in reversed(order):
    for parent, pull in node.parents:
      d = fit(pull(found[id(node)]), parent.shape)
      found[id(parent)] = found.get(id(parent), 0) + d
  return [found.get(id(x), np.zeros(x.shape)) for x in wrt]


# --- The rung ---------------------------------------------------------------


def start(rng: np.random.Generator, sizes: Sequence[int]) -> list[np.ndarray]:
  """Weights [in, out] and biases [out] of a network of these layer sizes."""
  pairs = itertools.pairwise(sizes)
  layers = [(rng.normal(size=s) / np.sqrt(s[0]), np.zeros(s[1])) for s in pairs]
  return [p for layer in layers for p in layer]


def scores(params: Sequence, x: Any, ops: Any) -> Any:
  """The network: two layers; `ops` is `tensor` or `jax.numpy`."""
  w1, b1, w2, b2 = params
  return ops.tanh(x @ w1 + b1[None]) @ w2 + b2[None]


def loss(params: Sequence, x: Any, onehot: Any, ops: Any) -> Any:
  """Cross entropy of the network, of any two libraries' arrays."""
  z = scores(params, x, ops)
  z = z - z.max(1, keepdims=True)
  log_p = z - ops.log(ops.exp(z).sum(1, keepdims=True))
  return -(log_p * onehot).sum() / float(len(x))


def descend(slopes: Callable, params: list, steps: int, rate: float = 0.5):
  """Gradient descent; `slopes(params)` gives a loss and its gradients.

  Returns:
    The last parameters, and the loss before each step [steps].
  """
  seen = []
  for _ in range(steps):
    value, gradients = slopes(params)
    params = [p - rate * g for p, g in zip(params, gradients, strict=True)]
    seen.append(float(value))
  return params, np.array(seen)


def by_hand(x: np.ndarray, onehot: np.ndarray) -> Callable:
  """Loss and gradients by this rung."""

  def slopes(params: list) -> tuple[np.ndarray, list[np.ndarray]]:
    weights = [tensor.Tensor(p) for p in params]
    value = loss(weights, x, onehot, tensor)
    return value.value, grad(value, weights)

  return slopes


def by_jax(x: np.ndarray, onehot: np.ndarray) -> Callable:
  """Loss and gradients by JAX, compiled."""
  import jax
  import jax.numpy as jnp

  return jax.jit(jax.value_and_grad(lambda p: loss(p, x, onehot, jnp)))


def main(argv: list[str] | None = None) -> None:
  """Trains one network twice, here and in JAX, and compares the curves."""
  import jax

  flags = rung.parser(__doc__)
  flags.add_argument("--steps", type=int, default=1000)
  args = flags.parse_args(argv)
  rng = np.random.default_rng(args.seed)
  x, y = toys.moons(rng, 300)
  first, onehot, curves = start(rng, (2, 32, 2)), np.eye(2)[y], {}
  for name, make in (("by hand", by_hand), ("JAX", by_jax)):
    with jax.enable_x64(True):
      slopes = make(x, onehot)
      slopes(first)
      begin = time.perf_counter()
      params, curves[name] = descend(slopes, first, args.steps)
    each = (time.perf_counter() - begin) / args.steps
    print(f"{name}: {1e6 * each:.0f} us a step")
  params = [np.asarray(p) for p in params]
  right = np.mean(scores(params, x, np).argmax(1) == y)
  gap = np.abs(curves["by hand"] - curves["JAX"]).max()
  print(f"moons: {right:.1%} right after {args.steps} steps")
  print(f"largest difference of the two loss curves: {gap:.0e}")
  page, (left, right) = rung.figure(2)
  perceptron.regions(
    left, lambda g: scores(params, g, np).argmax(1), x, 2 * y - 1, (-1.5, 2.5)
  )
  left.set_title("the moons, apart")
  right.semilogy(curves["by hand"], linewidth=4, alpha=0.4, label="by hand")
  right.semilogy(curves["JAX"], color=rung.COLORS[1], label="JAX")
  right.set(title="one loss curve", xlabel="step", ylabel="loss")
  right.legend(frameon=False)
  rung.save(page, args.out, "autograd")


if __name__ == "__main__":
  rung.run(main)
