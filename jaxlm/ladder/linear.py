"""Linear and logistic regression: learning by slope instead of by mistake.

Least squares: Legendre, 1805. Logistic regression: Cox, 1958. Gradient
descent: Cauchy, 1847. Scores are z = x w, a loss L(z, y) says how bad they
are, and everything is learned by the chain rule's shortest case:

    dL/dw = x' dL/dz,        w <- w - rate dL/dw

With a loss whose curvature is at most L, a rate under 2/L converges and one
over it does not. Penalties: L2 adds |w|^2 / 2 to the loss; L1 has a corner at
zero, so its step is exact instead (a proximal step, ISTA, 2004); dropout
hides inputs at random (arXiv:1207.0580), which on average is an L2 penalty.

What it could not do: its boundary is a straight line, whatever the loss. Two
moons stay mixed. Layers bend it, and a gradient must then find its way back
through them; before that, a rung about getting gradients right.
"""

import numpy as np

from jaxlm.ladder import rung, toys

# --- Losses: scores to (mean loss, its gradient) ----------------------------


def mse(z: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
  """Half the mean of (z - y)^2; `z` and `y` [n]."""
  return np.mean((z - y) ** 2) / 2, (z - y) / len(z)


def hinge(z: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
  """Mean of max(0, 1 - y z), with y -1 or 1: support vector machines."""
  lack = 1 - y * z
  return np.mean(np.maximum(lack, 0)), -y * (lack > 0) / len(z)


def logistic(z: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
  """Mean of log(1 + exp(-y z)), with y -1 or 1; no overflow at any size."""
  loss = np.logaddexp(0, -y * z)
  return np.mean(loss), -y * np.exp(-y * z - loss) / len(z)


def cross_entropy(z: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
  """Mean of -log softmax(z)[y]; `z` [n, k], `y` [n] in 0..k-1.

  The gradient is softmax(z) - onehot(y): what was said minus what is true.
  """
  rows = np.arange(len(z))
  log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
  dz = np.exp(log_p)
  dz[rows, y] -= 1
  return -np.mean(log_p[rows, y]), dz / len(z)


# --- Descent ----------------------------------------------------------------


def curvature(x: np.ndarray) -> float:
  """The largest eigenvalue of x'x / n: the L of `mse`; 4 L of `logistic`."""
  return np.linalg.norm(x, 2) ** 2 / len(x)


def shrink(w: np.ndarray, by: float) -> np.ndarray:
  """The proximal step of L1: towards zero by `by`, and to zero at most."""
  return np.sign(w) * np.maximum(np.abs(w) - by, 0)


def dropout(rng: np.random.Generator, x: np.ndarray, rate: float) -> np.ndarray:
  """Zeroes a part `rate` of `x` and scales the rest: the mean stays."""
  return x * (rng.random(x.shape) >= rate) / (1 - rate)


def fit(
  x: np.ndarray,
  y: np.ndarray,
  loss=mse,
  rate: float = 0.1,
  steps: int = 1000,
  l1: float = 0.0,
  l2: float = 0.0,
  classes: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Gradient descent from zero on loss(x w, y) + l1 |w|_1 + l2 |w|^2 / 2.

  Args:
    x: inputs [n, d].
    y: targets [n].
    loss: one of the above.
    rate: step size.
    steps: their number.
    l1: weight of the sum of absolute values.
    l2: weight of the sum of squares.
    classes: columns of the weights; 0 makes them a vector.

  Returns:
    Weights [d] or [d, classes], and the loss before each step [steps].
  """
  w = np.zeros((x.shape[1], classes) if classes else x.shape[1])
  seen = np.zeros(steps)
  for i in range(steps):
    seen[i], dz = loss(x @ w, y)
    w = shrink(w - rate * (x.T @ dz + l2 * w), rate * l1)
  return w, seen


# --- The rung ---------------------------------------------------------------


def line(rng: np.random.Generator, n: int = 200, d: int = 8) -> toys.Set:
  """A noisy linear map whose last weights are zero: `x` [n, d], `y` [n]."""
  x = rng.normal(size=(n, d)) * np.linspace(1, 2, d)
  w = np.where(np.arange(d) < d // 2, np.arange(d) + 1.0, 0)
  return x, x @ w + 0.5 * rng.normal(size=n)


def main(argv: list[str] | None = None) -> None:
  """Regression, rates around 2/L, classes, penalties."""
  args = rung.parser(__doc__).parse_args(argv)
  rng = np.random.default_rng(args.seed)
  x, y = line(rng)
  top = curvature(x)
  curves = {c: fit(x, y, rate=c / top, steps=60)[1] for c in (0.5, 1, 1.9, 2.1)}
  for c, seen in curves.items():
    print(f"rate {c} / L: loss {seen[0]:.2f} -> {seen[-1]:.3g}")
  gap = np.abs(fit(x, y, rate=1 / top)[0] - np.linalg.lstsq(x, y)[0]).max()
  print(f"largest difference from lstsq: {gap:.1e}")
  strengths = np.logspace(-2, 1.2, 30)
  path = [fit(x, y, rate=1 / top, l1=a, steps=300)[0] for a in strengths]
  zero = ", ".join(str(np.sum(path[i] == 0)) for i in (0, 15, 29))
  print(f"zero weights of 8 as L1 grows: {zero}")
  sets = {"blobs": toys.blobs(rng, 300), "moons": toys.moons(rng, 300)}
  weights = {}
  for name, (x, y) in sets.items():
    x, k = np.c_[x, np.ones(len(x))], y.max() + 1
    w, _ = fit(x, y, cross_entropy, 0.5, 2000, classes=k)
    weights[name] = w
    print(f"{name}: {np.mean((x @ w).argmax(1) == y):.1%} right")
  draw(args.out, sets, weights, curves, strengths, np.array(path))


def draw(out, sets, weights, curves, strengths, path) -> None:
  """Boundaries, rates, losses by margin, and weights under L1."""
  page, axes = rung.figure(5, size=(3.6, 3.2))
  for ax, name in zip(axes, sets, strict=False):
    (x, y), ends = sets[name], np.linspace(-5, 5, 300)
    grid = np.stack([*np.meshgrid(ends, ends), np.ones((300, 300))], axis=-1)
    shown = (grid @ weights[name]).argmax(-1)
    k = weights[name].shape[1]
    levels = np.arange(k + 1) - 0.5
    ax.contourf(ends, ends, shown, levels, colors=rung.COLORS[:k], alpha=0.2)
    for label in range(k):
      ax.plot(*x[y == label].T, ".", color=rung.COLORS[label])
    ax.set(xlim=(x.min(), x.max()), ylim=(x.min(), x.max()), title=name)
  for c, seen in curves.items():
    axes[2].semilogy(seen, label=f"{c} / L")
  axes[2].set(title="rates around 2/L", xlabel="step", ylabel="loss")
  margin = np.linspace(-2, 3, 200)
  for loss in (mse, hinge, logistic):
    values = [loss(np.array([z]), np.array([1]))[0] for z in margin]
    axes[3].plot(margin, values, label=loss.__name__)
  axes[3].set(title="loss of a margin y z", xlabel="y z")
  axes[4].semilogx(strengths, path)
  axes[4].set(title="eight weights under L1", xlabel="strength of L1")
  for ax in axes[2:4]:
    ax.legend(frameon=False)
  rung.save(page, out, "linear")


if __name__ == "__main__":
  rung.run(main)
