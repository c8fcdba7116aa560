"""Six ways down a slope, written out.

SGD (Robbins and Monro, 1951), momentum (Polyak, 1964), Nesterov (1983),
RMSProp (Hinton's lecture 6e, 2012), Adam (arXiv:1412.6980) and AdamW
(arXiv:1711.05101). Each is a frozen value with `start(w)`, the state before
the first step, and `step(w, g, state)`, which returns new weights and state.

What they could not do: choose their own rate. Each is raced at the best rate
of a grid, because at one rate for all the winner is whoever it suits.
"""

from dataclasses import dataclass

import numpy as np

from jaxlm.ladder import rung

Array = np.ndarray
State = tuple[Array | float, ...]


@dataclass(frozen=True)
class SGD:
  """w <- w - rate g."""

  rate: float

  def start(self, w: Array) -> State:
    """Remembers nothing."""
    del w
    return ()

  def step(self, w: Array, g: Array, state: State) -> tuple[Array, State]:
    """One step against the gradient `g`."""
    return w - self.rate * g, state


@dataclass(frozen=True)
class Momentum:
  """m <- beta m + g; w <- w - rate m: a ball that rolls."""

  rate: float
  beta: float = 0.9

  def start(self, w: Array) -> State:
    """The velocity m, at rest."""
    return (np.zeros_like(w),)

  def step(self, w: Array, g: Array, state: State) -> tuple[Array, State]:
    """One step along the velocity."""
    m = self.beta * state[0] + g
    return w - self.rate * m, (m,)


@dataclass(frozen=True)
class Nesterov(Momentum):
  """m <- beta m + g; w <- w - rate (g + beta m): looks one step ahead."""

  def step(self, w: Array, g: Array, state: State) -> tuple[Array, State]:
    """One step to where the velocity is about to lead."""
    m = self.beta * state[0] + g
    return w - self.rate * (g + self.beta * m), (m,)


@dataclass(frozen=True)
class RMSProp:
  """v <- beta v + (1 - beta) g^2; w <- w - rate g / sqrt(v + eps)."""

  rate: float
  beta: float = 0.9
  eps: float = 1e-8

  def start(self, w: Array) -> State:
    """The mean square v."""
    return (np.zeros_like(w),)

  def step(self, w: Array, g: Array, state: State) -> tuple[Array, State]:
    """One step, each coordinate measured in its own typical size."""
    v = self.beta * state[0] + (1 - self.beta) * g**2
    return w - self.rate * g / np.sqrt(v + self.eps), (v,)


@dataclass(frozen=True)
class Adam:
  """w <- w - rate (m' / (sqrt(v') + eps) + decay w).

  m and v are running means of g and g^2; m' and v' are divided by what they
  lack from starting at zero, 1 - beta^t. `decay` over zero makes it AdamW:
  outside the division, so that all weights shrink at the same rate.
  """

  rate: float
  beta: float = 0.9
  beta2: float = 0.999
  eps: float = 1e-8
  decay: float = 0.0

  def start(self, w: Array) -> State:
    """Both means, and the number of steps."""
    return np.zeros_like(w), np.zeros_like(w), 0

  def step(self, w: Array, g: Array, state: State) -> tuple[Array, State]:
    """One step of about `rate` in each coordinate."""
    m, v, t = state[0], state[1], state[2] + 1
    m = self.beta * m + (1 - self.beta) * g
    v = self.beta2 * v + (1 - self.beta2) * g**2
    size = np.sqrt(v / (1 - self.beta2**t)) + self.eps
    way = m / (1 - self.beta**t) / size + self.decay * w
    return w - self.rate * way, (m, v, t)


@dataclass(frozen=True)
class AdamW(Adam):
  """Adam with its weight decay outside the division."""

  decay: float = 1e-2


ALL = (SGD, Momentum, Nesterov, RMSProp, Adam, AdamW)


def walk(optimizer, gradient, w: Array, steps: int) -> Array:
  """The points visited [steps + 1, ...], from `w` on."""
  state, path = optimizer.start(w), [w]
  for _ in range(steps):
    w, state = optimizer.step(w, gradient(w), state)
    path.append(w)
  return np.array(path)


def valley(w: Array) -> Array:
  """Rosenbrock's valley (1960), (1 - a)^2 + 20 (b - a^2)^2; `w` [..., 2]."""
  a, b = w[..., 0], w[..., 1]
  return (1 - a) ** 2 + 20 * (b - a**2) ** 2


def valley_gradient(w: Array) -> Array:
  """The gradient of `valley` at `w` [2]."""
  a, b = w
  return np.array([-2 * (1 - a) - 80 * a * (b - a**2), 40 * (b - a**2)])


def race(kind, steps: int = 300) -> tuple[float, Array]:
  """The rate of a grid that ends lowest in the valley, and its path."""
  start, paths = np.array([-1.2, 1.0]), {}
  with np.errstate(over="ignore", invalid="ignore"):
    for rate in 10 ** np.arange(-4, 0.01, 0.25):
      path = walk(kind(rate), valley_gradient, start, steps)
      if np.isfinite(path).all():
        paths[rate] = path
  best = min(paths, key=lambda rate: valley(paths[rate][-1]))
  return best, paths[best]


def main(argv: list[str] | None = None) -> None:
  """Races all six down one valley, each at its best rate."""
  args = rung.parser(__doc__).parse_args(argv)
  page, (left, right) = rung.figure(2, size=(5.2, 4))
  a, b = np.meshgrid(np.linspace(-1.7, 1.6, 200), np.linspace(-0.7, 1.9, 200))
  height = np.log10(valley(np.stack([a, b], axis=-1)) + 1e-3)
  left.contourf(a, b, height, 20, cmap="Greys", alpha=0.6)
  for kind, color in zip(ALL, rung.COLORS, strict=True):
    rate, path = race(kind)
    name = kind.__name__
    print(f"{name:9s} rate {rate:.1e}  height {valley(path[-1]):.1e}")
    left.plot(*path.T, ".-", markersize=2, linewidth=0.8, color=color)
    right.semilogy(valley(path), label=f"{name} {rate:.0e}", color=color)
  left.set(title="the valley", xlim=(-1.7, 1.6), ylim=(-0.7, 1.9))
  right.set(title="each at its best rate", xlabel="step", ylabel="height")
  right.legend(frameon=False)
  rung.save(page, args.out, "optimizers")


if __name__ == "__main__":
  rung.run(main)
