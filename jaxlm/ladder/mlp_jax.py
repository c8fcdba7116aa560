"""The network of `mlp` again, its gradients by JAX: the same curve, compiled.

JAX (2018) traces a function once, derives its gradient and compiles both. The
hand-written walk is its judge, and it is that of the hand-written walk.

What it could not do: be read step by step. That is why `mlp` exists.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.ladder import images, mlp, rung


def loss(params: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
  """Mean cross entropy of a batch; `x` [n, pixels], `y` [n]."""
  for w, b in zip(params[:-2:2], params[1:-2:2], strict=True):
    x = jax.nn.relu(x @ w + b[None])
  log_p = jax.nn.log_softmax(x @ params[-2] + params[-1][None])
  return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], 1))


@jax.jit
def jax_step(params: list, x: jax.Array, y: jax.Array, rate: float) -> tuple:
  """One step of gradient descent, compiled: the loss, the new parameters."""
  value, slopes = jax.value_and_grad(loss)(params, x, y)
  return value, [p - rate * g for p, g in zip(params, slopes, strict=True)]


def hand_step(params: list, x: np.ndarray, y: np.ndarray, rate: float) -> tuple:
  """The same by the walk of `mlp`."""
  value, slopes = mlp.gradients(params, x, y)
  rate = params[0].dtype.type(rate)
  return value, [p - rate * g for p, g in zip(params, slopes, strict=True)]


def curve(
  step: Callable,
  data: images.Images,
  steps: int,
  batch: int,
  hidden: int = 800,
  dtype: type = np.float32,
) -> tuple[np.ndarray, float]:
  """Losses [steps] from one start, and the median seconds of a step."""
  start = mlp.start(np.random.default_rng(0), data.x.shape[1], hidden, 10)
  params, seen, times = [p.astype(dtype) for p in start], [], []
  for i in range(steps):
    rows = np.arange(i * batch, (i + 1) * batch) % len(data.x)
    x, y = data.x[rows].astype(dtype), data.y[rows]
    begin = time.perf_counter()
    value, params = step(params, x, y, 0.05)
    seen.append(float(value))  # waits for the device
    times.append(time.perf_counter() - begin)
  return np.array(seen), float(np.median(times))


def main(argv: list[str] | None = None) -> None:
  """Compares curves and speed at three batch sizes."""
  flags = rung.parser(__doc__)
  flags.add_argument("--data", type=Path, help="an .npz, or a folder of idx")
  flags.add_argument("--steps", type=int, default=100)
  args = flags.parse_args(argv)
  if args.steps < 1:
    raise UserError("--steps must be at least 1")
  data, gaps = images.load(args.data), []
  page, (ax,) = rung.figure(1, size=(5, 3.6))
  print("largest difference of two losses; milliseconds of a step in float32")
  print("batch   float64   float32   by hand     JAX")
  for batch in (32, 128, 512):
    mine, hand_time = curve(hand_step, data, args.steps, batch)
    judge, jax_time = curve(jax_step, data, args.steps, batch)
    drift = np.abs(mine - judge).max()
    mine, _ = curve(hand_step, data, args.steps, batch, dtype=np.float64)
    with jax.enable_x64(True):
      judge, _ = curve(jax_step, data, args.steps, batch, dtype=np.float64)
    gaps.append(np.abs(mine - judge).max())
    times = f"{1e3 * hand_time:7.2f} {1e3 * jax_time:7.2f}"
    print(f"{batch:5d}   {gaps[-1]:7.0e}   {drift:7.0e}   {times}")
    (line,) = ax.semilogy(mine, linewidth=4, alpha=0.3)
    color = line.get_color()
    ax.semilogy(judge, linewidth=1, color=color, label=f"batch {batch}")
  ax.set(xlabel="step", ylabel="loss", title="by hand (wide) and JAX (thin)")
  ax.legend(frameon=False)
  rung.save(page, args.out, "mlp_jax")
  print(f"largest difference: {max(gaps):.0e}")


if __name__ == "__main__":
  rung.run(main)
