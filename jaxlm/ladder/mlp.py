"""A network by hand: 784-800-10 on MNIST, every gradient written out.

Rumelhart, Hinton and Williams, "Learning representations by back-propagating
errors", Nature 1986; Simard, Steinkraus and Platt (ICDAR 2003) report 1.6 %
for two layers with 800 hidden units. NumPy alone: no program derives anything
here. Forwards, each part leaves what its way back needs; backwards, they are
visited in reverse.

What it could not do: grow deep. Ten such layers on top of each other learn
nothing, or blow up: why, and what normalisation and residuals do about it, is
the next rung. And it sees a picture as a bag of pixels, a text not at all.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError
from jaxlm.ladder import components as c
from jaxlm.ladder import images, rung

Params = list[np.ndarray]  # w, b of each layer


@dataclass(frozen=True)
class Recipe:
  """How to train: momentum, a rate that falls to zero in a line, decay.

  Attributes:
    hidden: units between the layers.
    epochs: visits of every example.
    batch: examples a step.
    rate: the first step's.
    beta: of the momentum.
    decay: of weights and biases, times the rate, each step.
    dropout: part of the hidden units that is hidden; of the inputs, 0.4 of it.
  """

  hidden: int = 800
  epochs: int = 10
  batch: int = 128
  rate: float = 0.1
  beta: float = 0.9
  decay: float = 5e-4
  dropout: float = 0.0


def start(rng: np.random.Generator, *sizes: int) -> Params:
  """Normal weights of variance 2 / in (arXiv:1502.01852), zero biases."""
  params = []
  for n, m in itertools.pairwise(sizes):
    w = rng.normal(size=(n, m)) * np.sqrt(2 / n)
    params += [w.astype(np.float32), np.zeros(m, np.float32)]
  return params


def scores(params: Params, x: np.ndarray) -> np.ndarray:
  """What the network says of `x` [n, pixels], without dropout: [n, classes]."""
  for w, b in zip(params[:-2:2], params[1:-2:2], strict=True):
    x = c.relu(c.linear(x, w, b)[0])[0]
  return c.linear(x, *params[-2:])[0]


def gradients(
  params: Params,
  x: np.ndarray,
  y: np.ndarray,
  rng: np.random.Generator | None = None,
  drop: float = 0.0,
) -> tuple[float, Params]:
  """The mean loss of a batch, and its gradients, by the walk there and back."""
  way = []
  if drop:
    x, _ = c.dropout(rng, x, 0.4 * drop)
  for w, b in zip(params[:-2:2], params[1:-2:2], strict=True):
    x, line = c.linear(x, w, b)
    x, bend = c.relu(x)
    x, keep = c.dropout(rng, x, drop) if drop else (x, None)
    way.append((line, bend, keep))
  z, line = c.linear(x, *params[-2:])
  loss, saved = c.cross_entropy(z, y)

  dx, dw, db = c.linear_back(c.cross_entropy_back(saved), line)
  found = [dw, db]
  for line, bend, keep in reversed(way):
    dx = dx if keep is None else c.dropout_back(dx, keep)
    dz = c.relu_back(dx, bend)
    if line is way[0][0]:  # nothing below needs a gradient
      found = [line[0].T @ dz, dz.sum(0), *found]
    else:
      dx, dw, db = c.linear_back(dz, line)
      found = [dw, db, *found]
  return loss, found


def train(
  data: images.Images,
  recipe: Recipe,
  seed: int,
  told: Callable[[int, float], None] = lambda epoch, error: None,
) -> tuple[Params, list[float]]:
  """Trains one network; returns it and its test error after each epoch."""
  rng = np.random.default_rng(seed)
  params = start(rng, data.x.shape[1], recipe.hidden, int(data.y.max()) + 1)
  speed = [np.zeros_like(p) for p in params]
  batches = max(len(data.x) // recipe.batch, 1)
  steps, i, errors = recipe.epochs * batches, 0, []
  for epoch in range(recipe.epochs):
    order = rng.permutation(len(data.x))
    for rows in np.array_split(order, batches):
      rate = np.float32(recipe.rate * (1 - i / steps))
      _, slopes = gradients(
        params, data.x[rows], data.y[rows], rng, recipe.dropout
      )
      for p, v, g in zip(params, speed, slopes, strict=True):
        g += np.float32(recipe.decay) * p
        v *= np.float32(recipe.beta)
        v += g
        p -= rate * v
      i += 1
    errors.append(error(params, data))
    told(epoch, errors[-1])
  return params, errors


def error(params: Params, data: images.Images) -> float:
  """The part of the test images that is named wrongly."""
  wrong = scores(params, data.x_test).argmax(1) != data.y_test
  return float(np.mean(wrong))


def main(argv: list[str] | None = None) -> None:
  """Trains a network for each seed, and ends with the mean test error."""
  flags = rung.parser(__doc__)
  flags.add_argument("--data", type=Path, help="an .npz, or a folder of idx")
  flags.add_argument("--seeds", type=int, default=3, help="networks to train")
  flags.add_argument("--epochs", type=int, help="visits of every image")
  flags.add_argument("--dropout", type=float, nargs="?", const=0.3, default=0.0)
  args = flags.parse_args(argv)
  if args.seeds < 1 or not 0 <= args.dropout < 1 or (args.epochs or 1) < 1:
    raise UserError(
      "--seeds and --epochs must be at least 1, --dropout within 0 and 1"
    )
  data = images.load(args.data)
  epochs = args.epochs or (22 if args.dropout else 10)
  if args.epochs is None and len(data.x) < 10_000:
    epochs = 40  # a small set needs as many steps
  recipe = Recipe(epochs=epochs, dropout=args.dropout)
  print(f"{data.name}: {len(data.x)} to train, {len(data.x_test)} to test")
  begin, curves = time.perf_counter(), []
  for seed in range(args.seed, args.seed + args.seeds):
    params, errors = train(data, recipe, seed)
    curves.append(errors)
    took = time.perf_counter() - begin
    print(f"seed {seed}: {errors[-1]:.2%} wrong, {took:.0f} s", flush=True)
  draw(args.out, params, data, np.array(curves))
  print(f"test error: {100 * np.mean([e[-1] for e in curves]):.2f} %")


def draw(out: Path, params: Params, data, curves: np.ndarray) -> None:
  """Test error by epoch, what first units look for, and what is mistaken."""
  page, (left, middle, right) = rung.figure(3)
  left.plot(np.arange(1, curves.shape[1] + 1), 100 * curves.T)
  left.set(xlabel="epoch", ylabel="test error, %", title="each seed")
  said = scores(params, data.x_test).argmax(1)
  wrong = np.flatnonzero(said != data.y_test)
  units = params[0].T[np.argsort(-np.linalg.norm(params[0], axis=0))[:36]]
  size = 0.7 * np.abs(units).max()
  middle.imshow(tiles(units), cmap="RdBu", vmin=-size, vmax=size)
  middle.set_title("what the 36 strongest units look for")
  right.imshow(tiles(data.x_test[wrong[:36]]), cmap="Greys")
  right.set_title(f"named wrongly: 36 of {len(wrong)}")
  for ax in (middle, right):
    ax.set_axis_off()
  rung.save(page, out, "mlp")


def tiles(rows: np.ndarray) -> np.ndarray:
  """Square pictures [36 at most, pixels] as one of six by six."""
  side = int(np.sqrt(rows.shape[1]))
  wall = np.zeros((36, side + 2, side + 2))
  wall[: len(rows), 1:-1, 1:-1] = rows[:, : side**2].reshape(-1, side, side)
  wall = wall.reshape(6, 6, side + 2, side + 2).swapaxes(1, 2)
  return wall.reshape(6 * (side + 2), -1)


if __name__ == "__main__":
  rung.run(main)
