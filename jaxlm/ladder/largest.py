"""The largest of many: why a softmax blurs, and how to sharpen it.

Velickovic et al., 2024 (arXiv:2410.01104): scores of bounded size cannot stay
sharp over ever more items. Of n scores between -c and c no weight exceeds

    exp(2c) / (exp(2c) + n - 1)  ->  0.

A model learns to find the largest of 16 numbers, and to say what stands beside
it; its scores are as sharp as 16 items need. Among 1,024 the weight is spread
over many that are nearly as large. They also propose the cure: at test time,
multiply the scores by a number that depends on their entropy. Here it is the
one that gives the entropy back that training ended with.

What it could not do: the cure knows how sharp to be, because the task always
has one answer. A language model's heads do not say what theirs is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ladder import adam, rung

Array = jax.Array
CLASSES, DIM, TRAINED = 10, 32, 16
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
GAP = 0.05  # how far the largest number is above all others


def task(key: Array, n: int, rows: int) -> tuple[Array, Array, Array]:
  """Numbers [rows, n], classes [rows, n], and the class of the largest."""
  keys = jax.random.split(key, 3)
  x = jax.random.uniform(keys[0], (rows, n), jnp.float32, 0.0, 1.0 - GAP)
  top = jax.random.randint(keys[1], (rows,), 0, n)
  x = x.at[jnp.arange(rows), top].set(jnp.max(x, axis=1) + GAP)
  kind = jax.random.randint(keys[2], (rows, n), 0, CLASSES)
  return x, kind, kind[jnp.arange(rows), top]


def params(key: Array) -> dict:
  """A small network that scores numbers, a table of classes, a head."""
  keys = jax.random.split(key, 4)
  shapes = {"a": (1, DIM), "b": (DIM, 1), "v": (CLASSES, DIM)}
  shapes["head"] = (DIM, CLASSES)
  return {
    name: jax.random.normal(k, shape, jnp.float32) / shape[0] ** 0.5
    for k, (name, shape) in zip(keys, shapes.items(), strict=True)
  } | {"bias": jnp.zeros(DIM, jnp.float32)}


def raw(p: dict, x: Array) -> Array:
  """Scores of numbers: [rows, n] -> [rows, n]."""
  hidden = jnp.tanh(x[..., None] @ p["a"] + p["bias"][None, None])
  return (hidden @ p["b"])[..., 0]


def entropy(weights: Array) -> Array:
  """-sum w log w of each row, in nats."""
  return -jnp.sum(weights * jnp.log(jnp.maximum(weights, 1e-30)), axis=-1)


def sharpened(scores: Array, target: Array) -> Array:
  """Weights of entropy `target`, or sharper ones as they are.

  The entropy of softmax(b scores) falls as b grows, so halving an interval
  finds b, row by row; it is never below one.
  """
  low, high = jnp.zeros(len(scores)), jnp.full(len(scores), 10.0)
  for _ in range(40):
    b = (low + high) / 2  # of log b
    soft = entropy(jax.nn.softmax(jnp.exp(b)[:, None] * scores)) > target
    low, high = jnp.where(soft, b, low), jnp.where(soft, high, b)
  return jax.nn.softmax(jnp.exp(low)[:, None] * scores)


def answer(p: dict, weights: Array, kind: Array) -> Array:
  """Scores of the classes [rows, CLASSES]."""
  return jnp.einsum("bn,bnd->bd", weights, p["v"][kind]) @ p["head"]


@functools.partial(jax.jit, static_argnums=1)
def train(key: Array, steps: int) -> dict:
  """Parameters after `steps` of Adam on sets of 16."""
  start = params(key)

  def loss(p: dict, x: Array, kind: Array, y: Array) -> Array:
    s = jax.nn.log_softmax(answer(p, jax.nn.softmax(raw(p, x)), kind))
    return -jnp.mean(jnp.take_along_axis(s, y[:, None], 1))

  def step(state: tuple, t: Array) -> tuple:
    p, means = state
    key_t = jax.random.fold_in(key, t.astype(jnp.int32))
    g = jax.grad(loss)(p, *task(key_t, TRAINED, 256))
    lr = 0.02 * (1.0 - t / (steps + 1.0))
    return adam.step(p, g, means, t, lr), None

  times = jnp.arange(1.0, steps + 1.0)
  return jax.lax.scan(step, (start, adam.start(start)), times)[0][0]


def measure(p: dict, seed: int) -> dict[str, np.ndarray]:
  """Accuracy with and without the cure, and the largest weight, by length."""
  key, found = jax.random.key(seed + 77), {"plain": [], "cured": [], "top": []}
  x, kind, y = task(key, TRAINED, 2048)
  target = jnp.mean(entropy(jax.nn.softmax(raw(p, x))))
  for n in LENGTHS:
    x, kind, y = task(jax.random.fold_in(key, n), n, 1024)
    scores = raw(p, x)
    plain, cured = jax.nn.softmax(scores), sharpened(scores, target)
    for name, weights in (("plain", plain), ("cured", cured)):
      said = jnp.argmax(answer(p, weights, kind), axis=1)
      found[name].append(float(jnp.mean(said == y)))
    found["top"].append(float(jnp.mean(plain.max(1))))
  return {name: np.array(values) for name, values in found.items()}


def main(argv: list[str] | None = None) -> None:
  """Trains on 16, and measures up to 1,024."""
  flags = rung.parser(__doc__)
  flags.add_argument("--steps", type=int, default=1000)
  args = flags.parse_args(argv)
  found = measure(train(jax.random.key(args.seed), args.steps), args.seed)
  for i, n in enumerate(LENGTHS):
    plain, cured, top = (found[k][i] for k in ("plain", "cured", "top"))
    print(
      f"{n:5} numbers: {plain:.1%} right, sharpened {cured:.1%}; "
      f"largest weight {top:.2f}"
    )
  lost = found["plain"][0] - found["plain"][-1]
  back = (found["cured"][-1] - found["plain"][-1]) / max(lost, 1e-9)
  print(f"of what is lost at {LENGTHS[-1]:,}, {back:.0%} comes back")
  draw(args.out, found)


def draw(out, found: dict) -> None:
  """Accuracy and the largest weight by length."""
  page, (left, right) = rung.figure(2)
  for name in ("plain", "cured"):
    left.semilogx(LENGTHS, found[name], "o-", base=2, label=name)
  left.set(xlabel="numbers", title="The largest one's class is right")
  left.legend(frameon=False)
  right.semilogx(LENGTHS, found["top"], "o-", base=2)
  right.set(xlabel="numbers", title="Weight of the largest one")
  rung.save(page, out, "largest")


if __name__ == "__main__":
  rung.run(main)
