"""A long memory: one bit, two hundred steps later.

Hochreiter and Schmidhuber, "Long short-term memory", 1997, section 5. The first
input is +1 or -1, then noise follows, and at the end the network must say which
it was. Nothing but memory helps. The RNN's gradient is gone after a few dozen
steps; the LSTM's survives where its forget gates start open (a bias, Gers et
al., 2000; of log(steps), Tallec and Ollivier, arXiv:1804.11188).

What it could not do: one bit is little. To copy a text a state would have to
hold all of it; attention leaves it where it is, and looks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ladder import adam, recurrent, rung

Array = jax.Array
HIDDEN, BATCH = 32, 64


def task(key: Array, steps: int, rows: int = BATCH) -> tuple[Array, Array]:
  """Inputs [rows, steps, 2], and which bit came first, [rows]."""
  keys = jax.random.split(key)
  bit = jax.random.bernoulli(keys[0], shape=(rows,)).astype(jnp.int32)
  x = jax.random.normal(keys[1], (rows, steps, 2), jnp.float32)
  x = x.at[:, :, 1].set(0.0)  # the second input is silent but at the start
  return x.at[:, 0, 1].set(2.0 * bit.astype(jnp.float32) - 1.0), bit


def fresh(kind: str, steps: int, key: Array) -> dict:
  """A cell and a head; an LSTM's forget gates remember `steps` steps or so."""
  keys = jax.random.split(key, 3)
  p = recurrent.params(kind, 2, HIDDEN, keys[0])
  if kind == "lstm":
    times = jax.random.uniform(keys[2], (HIDDEN,), minval=1.0, maxval=steps)
    gate = jnp.log(times)
    bias = p["h_bias"].at[HIDDEN : 2 * HIDDEN].set(gate)
    p = p | {"h_bias": bias.at[:HIDDEN].set(-gate)}
  head = jax.random.normal(keys[1], (HIDDEN, 2), jnp.float32) / HIDDEN**0.5
  return {"cell": p, "head": head}


def scores(kind: str, p: dict, x: Array) -> Array:
  """Of the two answers, [rows, 2]."""
  first = recurrent.start(kind, len(x), HIDDEN)
  h, _ = recurrent.run(kind, p["cell"], first, x)
  return h[:, -1] @ p["head"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train(
  kind: str, steps: int, updates: int, lr: Array, key: Array
) -> tuple[dict, Array]:
  """Parameters and accuracies [updates]; Adam, gradients clipped to one."""

  def loss(p: dict, x: Array, bit: Array) -> tuple[Array, Array]:
    s = scores(kind, p, x)
    right = jnp.mean((jnp.argmax(s, 1) == bit).astype(jnp.float32))
    picked = jnp.take_along_axis(jax.nn.log_softmax(s), bit[:, None], 1)
    return -jnp.mean(picked), right

  def update(state: tuple, t: Array) -> tuple:
    p, means = state
    x, bit = task(jax.random.fold_in(key, t.astype(jnp.int32)), steps)
    g, right = jax.grad(loss, has_aux=True)(p, x, bit)
    g, _ = recurrent.clip(g, 1.0)
    return adam.step(p, g, means, t, lr), right

  p = fresh(kind, steps, key)
  times = jnp.arange(1.0, updates + 1.0)
  (p, _), right = jax.lax.scan(update, (p, adam.start(p)), times)
  return p, right


def accuracy(kind: str, p: dict, steps: int) -> float:
  """On 1,000 new rows."""
  x, bit = task(jax.random.key(999), steps, 1000)
  return float(jnp.mean(jnp.argmax(scores(kind, p, x), 1) == bit))


def main(argv: list[str] | None = None) -> None:
  """Both cells, each at its best of three rates."""
  flags = rung.parser(__doc__)
  flags.add_argument("--steps", type=int, default=200)
  flags.add_argument("--updates", type=int, default=300)
  args = flags.parse_args(argv)
  curves = {}
  for kind in ("rnn", "lstm"):
    best = (-1.0, 0.0, None)
    for lr in (1e-3, 3e-3, 1e-2):
      key = jax.random.key(args.seed)
      p, right = train(kind, args.steps, args.updates, lr, key)
      found = accuracy(kind, p, args.steps), lr, np.asarray(right)
      best = max(best, found, key=lambda b: b[0])
    curves[kind] = best
    print(f"{kind}, {args.steps} steps, rate {best[1]}: {best[0]:.1%} right")
  draw(args.out, curves)


def draw(out, curves: dict) -> None:
  """Accuracy by update."""
  page, (ax,) = rung.figure(1)
  for kind, (_, _, right) in curves.items():
    smooth = np.convolve(right, np.ones(10) / 10, "valid")
    ax.plot(smooth, label=kind)
  ax.set(xlabel="update", title="The first bit, at the end", ylim=(0.3, 1.02))
  ax.legend(frameon=False)
  rung.save(page, out, "memory")


if __name__ == "__main__":
  rung.run(main)
