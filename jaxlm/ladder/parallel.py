"""Many devices: a ring, and what it adds up.

Rabenseifner (2004) and Patarasuk and Yuan (2009) add arrays that lie on n
devices, so that each ends with the sum, in 2 (n - 1) steps. Every step moves
one n-th of the array to the next device of a ring, so each link carries

    2 (n - 1) / n  times the array,

hardly more for a thousand devices than for two, and no method carries less.
Data parallelism is little else: every device has the weights and a share of the
batch, gradients are added around the ring, and all take the same step.

What it could not do: weights and optimizer state are held n times over. Rule
tables (docs/parallelism.md) split those as well.
"""

import functools
import os

import numpy as np

from jaxlm.ladder import rung

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAG = "--xla_force_host_platform_device_count=8"
if FLAG not in os.environ.get("XLA_FLAGS", ""):  # before JAX starts
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

Array = jax.Array


def mesh() -> jax.sharding.Mesh:
  """All devices in a row; the axis is called 'ring'."""
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((len(jax.devices()),), ("ring",), axis_types=auto)


def all_reduce(x: Array, axis: str = "ring") -> Array:
  """The sum of `x` [size] over the devices of `axis`; inside shard_map.

  First the sums: in each step a device sends one chunk on, and adds what it
  gets to its own. After n - 1 steps device i has the whole sum of chunk i + 1.
  Then the sums go round in the same way, and are copied.
  """
  n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  size = x.size
  x = jnp.pad(x, (0, -size % n)).reshape(n, -1)
  ring = [(i, (i + 1) % n) for i in range(n)]
  for step in range(n - 1):
    sent = jax.lax.ppermute(x[(me - step) % n], axis, ring)
    x = x.at[(me - step - 1) % n].add(sent)
  for step in range(n - 1):
    sent = jax.lax.ppermute(x[(me - step + 1) % n], axis, ring)
    x = x.at[(me - step) % n].set(sent)
  return x.ravel()[:size]


def ring_sum(x: Array) -> Array:
  """`x` [devices, size], a row on each device -> the sum, on each."""

  @jax.jit
  @functools.partial(
    jax.shard_map, mesh=mesh(), in_specs=P("ring"), out_specs=P("ring")
  )
  def run(x: Array) -> Array:
    return all_reduce(x[0])[None]

  return run(x)


def loss(w: Array, x: Array, y: Array) -> Array:
  """Mean squared error of a linear model: `w` [d], `x` [n, d], `y` [n]."""
  return jnp.mean(jnp.square(x @ w - y))


def train(x: Array, y: Array, steps: int, lr: float = 0.1) -> Array:
  """Losses [steps] of gradient descent, each device with its own rows."""
  across = mesh()

  @functools.partial(
    jax.shard_map,
    mesh=across,
    in_specs=(P("ring"), P("ring"), P("ring")),
    out_specs=(P("ring"), P("ring")),
  )
  def step(w: Array, x: Array, y: Array) -> tuple[Array, Array]:
    value, grad = jax.value_and_grad(loss)(w[0], x, y)
    both = all_reduce(jnp.append(grad, value)) / jax.lax.axis_size("ring")
    return w - lr * both[None, :-1], both[-1:]

  n, losses = len(jax.devices()), []
  w, step = jnp.zeros((n, x.shape[1]), x.dtype), jax.jit(step)
  for _ in range(steps):
    w, value = step(w, x, y)
    losses.append(value[0])
  return jnp.stack(losses)


def alone(x: Array, y: Array, steps: int, lr: float = 0.1) -> Array:
  """The same on one device."""
  w, losses = jnp.zeros(x.shape[1], x.dtype), []
  grad = jax.jit(jax.value_and_grad(loss))
  for _ in range(steps):
    value, g = grad(w, x, y)
    w, losses = w - lr * g, [*losses, value]
  return jnp.stack(losses)


def main(argv: list[str] | None = None) -> None:
  """Adds around a ring, and trains on eight devices as on one."""
  flags = rung.parser(__doc__)
  args = flags.parse_args(argv)
  n = len(jax.devices())
  keys = jax.random.split(jax.random.key(args.seed), 3)
  parts = jax.random.normal(keys[0], (n, 1000), jnp.float32)
  gap = jnp.abs(ring_sum(parts) - parts.sum(0)[None]).max()
  print(f"ring of {n}: largest difference from the sum {float(gap):.1e}")
  x = jax.random.normal(keys[1], (64, 10), jnp.float32)
  y = x @ jnp.arange(10, dtype=jnp.float32) + jax.random.normal(
    keys[2], (64,), jnp.float32
  )
  together, single = train(x, y, 60), alone(x, y, 60)
  gap = float(jnp.abs(together / single - 1).max())
  print(
    f"60 steps on {n} devices and on one: losses within {gap:.1e} of theirs"
  )
  draw(args.out, np.asarray(together), np.asarray(single))


def draw(out, together: np.ndarray, single: np.ndarray) -> None:
  """Two curves that are one; bytes on a link by devices."""
  page, (left, right) = rung.figure(2)
  left.semilogy(single, lw=4, alpha=0.4, label="one device")
  left.semilogy(together, "--", label=f"{len(jax.devices())} devices")
  left.set(xlabel="step", ylabel="loss", title="The same steps")
  left.legend(frameon=False)
  n = np.arange(2, 65)
  right.plot(n, 2 * (n - 1) / n, label="ring")
  right.plot(n, 2 * (n - 1), label="all to one, and back")
  right.set(xlabel="devices", ylabel="times the array on the busiest link")
  right.set(ylim=(0, 12), title="Why a ring")
  right.legend(frameon=False)
  rung.save(page, out, "parallel")


if __name__ == "__main__":
  rung.run(main)
