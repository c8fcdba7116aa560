"""Copy and reverse: what a fixed memory cannot carry, and a look back can.

Sutskever et al., 2014 (arXiv:1409.3215) read a sentence into one vector and
write another from it. Bahdanau et al. (arXiv:1409.0473) saw that this fails for
long ones, and let the writer look. Here both have the same number of parameters
and see the same examples: 30 random symbols, to be written again, forwards or
backwards.

    GRU        h_t = GRU(h_(t-1), x_t); the last h starts the writer
    attention  place t of the output asks all places of the input

What it could not do: positions are learned here for 30 places, and there are no
more. And a softmax over more places than in training spreads out, which the
next rung measures.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ladder import adam, rung

Array = jax.Array
SYMBOLS, LENGTH, BATCH = 10, 30, 64


def normal(key: Array, *shape: int) -> Array:
  """Normal numbers of standard deviation 1 / sqrt(first dimension)."""
  return jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5


# --- Two models -------------------------------------------------------------


def attention_params(key: Array, d: int) -> dict:
  """A table of symbols, places of input and output, q, k, v and the head."""
  keys = jax.random.split(key, 7)
  return {
    "symbols": jax.random.normal(keys[0], (SYMBOLS, d), jnp.float32),
    "read": jax.random.normal(keys[1], (LENGTH, d), jnp.float32),
    "write": jax.random.normal(keys[2], (LENGTH, d), jnp.float32),
    "q": normal(keys[3], d, d),
    "k": normal(keys[4], d, d),
    "v": normal(keys[5], d, d),
    "head": normal(keys[6], d, SYMBOLS),
  }


def attention(p: dict, tokens: Array) -> tuple[Array, Array]:
  """Scores [batch, seq, symbols], and who looked where [batch, seq, seq]."""
  x = p["symbols"][tokens] + p["read"][None]
  q, k, v = p["write"] @ p["q"], x @ p["k"], x @ p["v"]
  scores = jnp.einsum("td,bsd->bts", q, k) / q.shape[1] ** 0.5
  weights = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum("bts,bsd->btd", weights, v) @ p["head"], weights


def gru_params(key: Array, d: int, h: int) -> dict:
  """A reader and a writer, and the head."""
  keys = jax.random.split(key, 6)
  return {
    "symbols": jax.random.normal(keys[0], (SYMBOLS, d), jnp.float32),
    "read": {"x": normal(keys[1], d, 3 * h), "h": normal(keys[2], h, 3 * h)},
    "write": {"x": normal(keys[3], d, 3 * h), "h": normal(keys[4], h, 3 * h)},
    "head": normal(keys[5], h, SYMBOLS),
  }


def cell(p: dict, h: Array, x: Array) -> Array:
  """GRU (arXiv:1406.1078): gates r, z and a candidate n."""
  a, b = jnp.split(x @ p["x"], 3, axis=-1), jnp.split(h @ p["h"], 3, axis=-1)
  r, z = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
  n = jnp.tanh(a[2] + r * b[2])
  return (1.0 - z) * n + z * h


def gru(p: dict, tokens: Array, targets: Array) -> Array:
  """Scores [batch, seq, symbols]; the writer is told its last right symbol."""
  x = jnp.moveaxis(p["symbols"][tokens], 1, 0)
  before = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
  y = jnp.moveaxis(p["symbols"][before], 1, 0)
  h = jnp.zeros((len(tokens), len(p["head"])), jnp.float32)

  def step(part: str, h: Array, x: Array) -> tuple[Array, Array]:
    h = cell(p[part], h, x)
    return h, h

  h, _ = jax.lax.scan(functools.partial(step, "read"), h, x)
  _, out = jax.lax.scan(functools.partial(step, "write"), h, y)
  return jnp.moveaxis(out, 0, 1) @ p["head"]


def size(p: dict) -> int:
  """Number of parameters."""
  return sum(x.size for x in jax.tree.leaves(p))


# --- Training ---------------------------------------------------------------


def task(key: Array, reverse: bool, n: int = BATCH) -> tuple[Array, Array]:
  """Random symbols [n, LENGTH], and what is to be written."""
  x = jax.random.randint(key, (n, LENGTH), 0, SYMBOLS)
  return x, x[:, ::-1] if reverse else x


def scores(model: str, p: dict, x: Array, y: Array) -> Array:
  """Of the model of this name."""
  return attention(p, x)[0] if model == "attention" else gru(p, x, y)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def train(
  model: str, p: dict, reverse: bool, steps: int, lr: Array, key: Array
) -> tuple[dict, Array]:
  """Parameters after `steps` of Adam on fresh examples, and accuracies."""

  def loss(p: dict, x: Array, y: Array) -> tuple[Array, Array]:
    s = jax.nn.log_softmax(scores(model, p, x, y))
    right = jnp.mean((jnp.argmax(s, -1) == y).astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(s, y[..., None], -1)), right

  def step(state: tuple, t: Array) -> tuple:
    p, means = state
    x, y = task(jax.random.fold_in(key, t.astype(jnp.int32)), reverse)
    g, right = jax.grad(loss, has_aux=True)(p, x, y)
    return adam.step(p, g, means, t, lr), right

  times = jnp.arange(1.0, steps + 1.0)
  (p, _), right = jax.lax.scan(step, (p, adam.start(p)), times)
  return p, right


def accuracy(model: str, p: dict, reverse: bool, seed: int) -> float:
  """Share of symbols that are right, on 512 new rows."""
  x, y = task(jax.random.key(1000 + seed), reverse, 512)
  return float(jnp.mean(jnp.argmax(scores(model, p, x, y), -1) == y))


def main(argv: list[str] | None = None) -> None:
  """Trains both on both tasks, and shows who looked where."""
  flags = rung.parser(__doc__)
  flags.add_argument("--steps", type=int, default=500)
  args = flags.parse_args(argv)
  curves, maps = {}, {}
  for reverse in (False, True):
    name = "reverse" if reverse else "copy"
    keys = jax.random.split(jax.random.key(args.seed), 2)
    starts = {
      "attention": (attention_params(keys[0], 64), (3e-3,)),
      "GRU": (gru_params(keys[0], 24, 42), (1e-3, 3e-3, 1e-2)),
    }
    for model, (p, rates) in starts.items():
      best = (-1.0, None, None)
      for lr in rates:
        q, right = train(model, p, reverse, args.steps, lr, keys[1])
        found = accuracy(model, q, reverse, args.seed)
        best = max(best, (found, lr, q, right), key=lambda b: b[0])
      found, lr, q, curves[name, model] = best
      print(
        f"{name}, {model}, {size(p):,} parameters, rate {lr}: "
        f"{found:.1%} of symbols right"
      )
      if model == "attention":
        x, _ = task(jax.random.key(5), reverse, 1)
        maps[name] = np.asarray(attention(q, x)[1][0])
  draw(args.out, curves, maps)


def draw(out, curves: dict, maps: dict) -> None:
  """Accuracy by step, and two maps of attention."""
  page, (left, *rest) = rung.figure(3)
  for (name, model), right in curves.items():
    style = "-" if model == "attention" else "--"
    left.plot(np.asarray(right), style, label=f"{name}, {model}")
  left.axhline(1 / SYMBOLS, ls=":", color=rung.COLORS[5])
  left.set(xlabel="step", title="Symbols right, of 30")
  left.legend(frameon=False, fontsize=8)
  for ax, (name, weights) in zip(rest, maps.items(), strict=True):
    ax.imshow(weights, cmap="Blues", vmin=0)
    ax.set(xlabel="read", ylabel="written", title=name)
  rung.save(page, out, "copying")


if __name__ == "__main__":
  rung.run(main)
