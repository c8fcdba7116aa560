"""Recurrent cells: a state that every step reads and rewrites.

Elman, "Finding structure in time", 1990; Hochreiter and Schmidhuber, "Long
short-term memory", 1997; Cho et al., 2014 (arXiv:1406.1078).

    RNN    h' = tanh(W x + b + U h + c)
    LSTM   i, f, o = s(...), g = tanh(...);  c' = f c + i g,  h' = o tanh(c')
    GRU    r, z = s(...);  n = tanh(W x + b + r (U h + c)),  h' = (1-z) n + z h

An RNN's gradient through time is a product of Jacobians diag(1 - h'^2) U: it
shrinks or grows by a factor at each step (Pascanu et al., arXiv:1211.5063).
What carries the LSTM's c from one step to the next is f alone, a number near
one if the cell decides so. Growth is cut by clipping: a gradient g longer than
a limit is scaled to that length.

What it could not do: keep more than its state holds, and be trained in parallel
over time, since every step waits for the one before it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ladder import rung

Array = jax.Array
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
Params = dict[str, Array]


def params(kind: str, n_in: int, hidden: int, key: Array) -> Params:
  """`x` [in, gates * hidden], `h` [hidden, gates * hidden], a bias for each.

  Gates stand in torch's order: i f g o in an LSTM, r z n in a GRU. Uniform in
  +-1 / sqrt(hidden), as torch starts them.
  """
  n, keys, bound = GATES[kind] * hidden, jax.random.split(key, 4), hidden**-0.5
  shapes = {"x": (n_in, n), "h": (hidden, n), "x_bias": (n,), "h_bias": (n,)}
  return {
    name: jax.random.uniform(k, shape, jnp.float32, -bound, bound)
    for k, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def start(kind: str, rows: int, hidden: int) -> tuple[Array, ...]:
  """The state before the first step: `(h,)`, of an LSTM `(h, c)`."""
  zeros = jnp.zeros((rows, hidden), jnp.float32)
  return (zeros, zeros) if kind == "lstm" else (zeros,)


def cell(kind: str, p: Params, state: tuple, x: Array) -> tuple[Array, ...]:
  """One step: the state after reading `x` [rows, in]."""
  h = state[0]
  a, b = x @ p["x"] + p["x_bias"][None], h @ p["h"] + p["h_bias"][None]
  if kind == "rnn":
    return (jnp.tanh(a + b),)
  if kind == "gru":
    (ar, az, an), (br, bz, bn) = jnp.split(a, 3, 1), jnp.split(b, 3, 1)
    r, z = jax.nn.sigmoid(ar + br), jax.nn.sigmoid(az + bz)
    n = jnp.tanh(an + r * bn)  # torch's: the reset acts on the product
    return ((1.0 - z) * n + z * h,)
  i, f, g, o = jnp.split(a + b, 4, axis=1)
  c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
  return jax.nn.sigmoid(o) * jnp.tanh(c), c


def run(kind: str, p: Params, state: tuple, x: Array) -> tuple[Array, tuple]:
  """All h of `x` [rows, seq, in], [rows, seq, hidden], and the last state."""

  def step(state: tuple, x: Array) -> tuple:
    state = cell(kind, p, state, x)
    return state, state[0]

  state, h = jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))
  return jnp.moveaxis(h, 0, 1), state


def clip(grads: Params, limit: float) -> tuple[Params, Array]:
  """Gradients of norm `limit` at most, and the norm they had."""
  norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
  factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
  return jax.tree.map(lambda g: g * factor, grads), norm


# --- Gradients through time -------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def by_lag(kind: str, p: Params, x: Array) -> Array:
  """Norm of d h_T / d x_t in a random direction, by T - t, [seq]."""
  hidden = p["h"].shape[0]
  r = jax.random.normal(jax.random.key(3), (hidden,), jnp.float32)

  def last(x: Array) -> Array:
    h, _ = run(kind, p, start(kind, len(x), hidden), x)
    return jnp.sum(h[:, -1] @ r)

  g = jax.grad(last)(x)
  return jnp.sqrt(jnp.mean(jnp.sum(g * g, -1), axis=0))[::-1]


def lags(seed: int, seq: int = 100) -> dict[str, np.ndarray]:
  """Gradients by lag for cells as they start, and for changed ones."""
  keys = jax.random.split(jax.random.key(seed), 2)
  x, found = jax.random.normal(keys[0], (16, seq, 8), jnp.float32), {}
  for kind in GATES:
    p = params(kind, 8, 32, keys[1])
    found[kind] = p
    if kind == "rnn":
      # Orthogonal, times 1.6: more than tanh takes away.
      q, _ = jnp.linalg.qr(p["h"])
      found["rnn, U x 1.6"] = p | {"h": 1.6 * q, "x": 0.1 * p["x"]}
    if kind == "lstm":
      ones = jnp.zeros(128, jnp.float32).at[32:64].set(4.0)
      found["lstm, f bias 4"] = p | {"h_bias": p["h_bias"] + ones}
  return {
    name: np.asarray(by_lag(name.split(",")[0], p, x))
    for name, p in found.items()
  }


def main(argv: list[str] | None = None) -> None:
  """Gradients by lag; what clipping does to one that explodes."""
  flags = rung.parser(__doc__)
  args = flags.parse_args(argv)
  found = lags(args.seed)
  print("gradient of the last state for an input so many steps before:")
  for name, norms in found.items():
    shown = ", ".join(f"{t}: {norms[t]:.1e}" for t in (0, 10, 30, 99))
    print(f"  {name:16} {shown}")
  grads = {"w": jnp.array([3e3, 4e3], jnp.float32)}
  short, norm = clip(grads, 1.0)
  print(f"a gradient of norm {float(norm):,.0f} clipped to 1: {short['w']}")
  draw(args.out, found)


def draw(out, found: dict[str, np.ndarray]) -> None:
  """Gradients by lag."""
  page, (ax,) = rung.figure(1, size=(5.4, 3.8))
  for name, norms in found.items():
    ax.semilogy(np.maximum(norms, 1e-30), label=name)
  ax.set(xlabel="steps back", title="What reaches the past", ylim=(1e-16, None))
  ax.legend(frameon=False, fontsize=8)
  rung.save(page, out, "recurrent")


if __name__ == "__main__":
  rung.run(main)
