"""The perceptron: one neuron that learns from its mistakes.

Rosenblatt, "The perceptron: a probabilistic model for information storage and
organization in the brain", 1958. On a wrong answer, add the example to the
weights with the sign it should have had:

    y <w, x> <= 0   =>   w <- w + y x

Novikoff (1962): if some unit vector separates the examples with margin gamma,
and none is longer than R, there are at most (R / gamma)^2 mistakes, whatever
the order, the number of examples or their dimension. Proof in two lines: each
mistake adds at least gamma to <w, w*>, and at most R^2 to |w|^2.

What it could not do: Minsky and Papert (1969) showed that no single neuron
computes XOR. Two more neurons do, but this rule says nothing about how *they*
should learn, because a threshold has no slope. The next rung has one.
"""

import numpy as np

from jaxlm.ladder import rung

XOR_X = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float64)
XOR_Y = np.array([-1, 1, 1, -1])


def with_bias(x: np.ndarray) -> np.ndarray:
  """Appends a constant 1 to `x` [n, d], so that a bias is one more weight."""
  return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def train(
  x: np.ndarray, y: np.ndarray, limit: int = 100_000
) -> tuple[np.ndarray, int, bool]:
  """Visits the examples in order, round after round, until none is wrong.

  Stops early if the weights at the start of a round were seen at the start of
  a former one: then it goes round forever, and the set is not separable.

  Args:
    x: examples [n, d], with a constant column if there is to be a bias.
    y: labels [n], each -1 or 1.
    limit: the most mistakes to make.

  Returns:
    The weights [d], the number of mistakes, and whether all are right.
  """
  w, mistakes, seen = np.zeros(x.shape[1]), 0, set()
  while mistakes < limit and w.tobytes() not in seen:
    seen.add(w.tobytes())
    before = mistakes
    for x_i, y_i in zip(x, y, strict=True):
      if y_i * (w @ x_i) <= 0:
        w = w + y_i * x_i
        mistakes += 1
    if mistakes == before:
      return w, mistakes, True
  return w, mistakes, False


def separable(rng: np.random.Generator, d: int, n: int, margin: float):
  """A set that a hidden unit vector separates.

  Returns:
    `x` [n, d], `y` [n], and R / gamma: how long the longest example is,
    measured in its distances from the hidden hyperplane.
  """
  hidden = rng.normal(size=d)
  hidden /= np.linalg.norm(hidden)
  x = rng.uniform(-1, 1, (n, d))
  side = np.where(x @ hidden < 0, -1, 1)
  x += margin * side[:, None] * hidden  # push both sides apart
  gamma = np.min(side * (x @ hidden))
  return x, side, np.max(np.linalg.norm(x, axis=1)) / gamma


def bound_test(sets: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Mistakes [sets] and bounds (R / gamma)^2 [sets] of random sets."""
  rng = np.random.default_rng(seed)
  pairs = []
  for _ in range(sets):
    d, n = rng.integers(2, 20), rng.integers(5, 60)
    x, y, ratio = separable(rng, d, n, 10 ** rng.uniform(-2, 0))
    _, mistakes, done = train(x, y)
    if not done:
      raise AssertionError("a separable set was not learned")
    pairs.append((mistakes, ratio**2))
  return tuple(np.array(pairs).T)


def step(x: np.ndarray) -> np.ndarray:
  """The threshold: 1 where `x` is positive, else 0."""
  return (x > 0).astype(np.float64)


def two_layers(x: np.ndarray) -> np.ndarray:
  """XOR by three neurons: (x1 OR x2) AND NOT (x1 AND x2); `x` [n, 2] -> [n]."""
  hidden = step(x @ np.array([[1, 1], [1, 1]]) - np.array([0.5, 1.5]))
  return step(hidden @ np.array([1, -1]) - 0.5)


def main(argv: list[str] | None = None) -> None:
  """Measures the bound, fails at XOR, solves it with three neurons."""
  flags = rung.parser(__doc__)
  flags.add_argument("--sets", type=int, default=1000)
  args = flags.parse_args(argv)
  mistakes, bounds = bound_test(args.sets, args.seed)
  print(f"separable sets learned: {args.sets} of {args.sets}")
  print(f"mistakes over the bound (R/gamma)^2: {np.sum(mistakes > bounds)}")
  print(f"closest to it: {np.max(mistakes / bounds):.3f} of the bound")
  _, made, done = train(with_bias(XOR_X), XOR_Y)
  state = "learned" if done else f"never, its {made} mistakes repeat forever"
  print(f"XOR by one neuron: {state}")
  right = int(np.sum((two_layers(XOR_X) == 1) == (XOR_Y == 1)))
  print(f"XOR by the 2-2-1 network: {right} of 4 right")
  draw(args.out, args.seed, mistakes, bounds)


def draw(out, seed: int, mistakes: np.ndarray, bounds: np.ndarray) -> None:
  """A decision boundary, mistakes against the bound, and XOR's regions."""
  page, (left, middle, right) = rung.figure(3)
  x, y, ratio = separable(np.random.default_rng(seed + 3), 2, 60, 0.1)
  w, made, _ = train(x, y)
  regions(left, lambda g: np.sign(g @ w), x, y, (-1.4, 1.4))
  left.set_title(f"{made} mistakes, bound {ratio**2:.0f}")
  middle.loglog(bounds, np.maximum(mistakes, 0.5), ".", alpha=0.4)
  ends = [bounds.min(), bounds.max()]
  middle.loglog(ends, ends, "--", color=rung.COLORS[5], label="the bound")
  middle.set(xlabel="(R / gamma)²", ylabel="mistakes", title="1962's theorem")
  middle.legend(frameon=False)
  regions(right, two_layers, XOR_X, XOR_Y, (-0.5, 1.5))
  right.set_title("XOR needs two lines: 2-2-1")
  rung.save(page, out, "perceptron")


def regions(ax, decide, x, y, ends: tuple[float, float]) -> None:
  """Colours a square by `decide` [n, 2] -> [n] and marks the examples."""
  line = np.linspace(*ends, 300)
  grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
  value = decide(grid).reshape(300, 300)
  ax.contourf(line, line, value, levels=1, colors=rung.COLORS[1::-1], alpha=0.2)
  for label, color in zip((-1, 1), rung.COLORS[1::-1], strict=True):
    ax.plot(*x[y == label].T, "o", color=color, markersize=4)


if __name__ == "__main__":
  rung.run(main)
