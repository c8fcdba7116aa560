"""Why depth is hard, and what makes it easy.

Hochreiter (1991) and Bengio et al. (1994): a gradient that passes through L
layers is a product of L Jacobians, and a product vanishes or explodes unless
each factor keeps lengths. Glorot and Bengio (2010) and He et al. (2015,
arXiv:1502.01852) start the weights so that it does:

    std = gain / sqrt(n_in),   gain = 1 (tanh), sqrt(2) (ReLU)

Residual connections (arXiv:1512.03385) give every Jacobian an identity to hold
on to, and norms (arXiv:1607.06450, arXiv:1910.07467) keep what flows at size
one, however it started. `norm` here comes before each layer's weights.

What it could not do: each layer sees one input and forgets it. The next rung
has a memory, and depth in time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ladder import adam, rung

Array = jax.Array
ACTS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu}
GAINS = {"sigmoid": 1.0, "tanh": 1.0, "relu": 2.0**0.5}
DEPTHS = (2, 4, 8, 16, 32, 48)
WIDTH = 48


def normal(*shape: int, key: Array) -> Array:
  """Normal numbers, float32."""
  return jax.random.normal(key, shape, jnp.float32)


def layer_norm(x: Array) -> Array:
  """(x - mean) / std of each row of `x` [n, d]."""
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def rms_norm(x: Array) -> Array:
  """X / sqrt(mean(x^2)) of each row: the same without the mean."""
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def none(x: Array) -> Array:
  """Leaves `x` as it is."""
  return x


NORMS = {"none": none, "layer": layer_norm, "rms": rms_norm}


def weights(depth: int, gain: float, seed: int) -> Array:
  """[depth, WIDTH, WIDTH] of standard deviation gain / sqrt(WIDTH)."""
  w = normal(depth, WIDTH, WIDTH, key=jax.random.key(seed))
  return w * jnp.float32(gain / WIDTH**0.5)


def run(w: Array, x: Array, act: str, norm: str, residual: bool) -> Array:
  """A network of equal layers: `x` [n, WIDTH] -> the same shape."""

  def layer(x: Array, w: Array) -> tuple[Array, None]:
    y = ACTS[act](NORMS[norm](x) @ w)
    return (x + y if residual else y), None

  return jax.lax.scan(layer, x, w)[0]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def gradient_norms(
  w: Array, x: Array, act: str, norm: str, residual: bool
) -> Array:
  """Norm of the loss's gradient for each layer's weights, [depth].

  The loss is a random direction of the output, of size one.
  """
  r = normal(*x.shape, key=jax.random.key(99)) / jnp.float32(x.size**0.5)
  grad = jax.grad(lambda w: jnp.sum(r * run(w, x, act, norm, residual)))(w)
  return jnp.sqrt(jnp.sum(grad * grad, axis=(1, 2)))


def first_over_last(
  depth: int, act: str, norm: str, residual: bool, seed: int = 0
) -> float:
  """How much of the gradient reaches the first layer, over the last one's."""
  x = normal(32, WIDTH, key=jax.random.key(seed + 1))
  norms = gradient_norms(
    weights(depth, GAINS[act], seed), x, act, norm, residual
  )
  return float(norms[0] / norms[-1])


def signal(depth: int, gain: float, act: str, seed: int = 0) -> float:
  """Root mean square after `depth` layers, of an input of size one."""
  x = normal(64, WIDTH, key=jax.random.key(seed + 1))
  y = run(weights(depth, gain, seed), x, act, "none", False)
  return float(jnp.sqrt(jnp.mean(y * y)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def train(
  key: Array, norm: str, act: str, residual: bool, depth: int, lr: Array
) -> Array:
  """Losses [200] of a deep network that learns a random teacher's function."""
  keys = jax.random.split(key, 3)
  x = normal(128, WIDTH, key=keys[0])
  y = jnp.tanh(x @ normal(WIDTH, WIDTH, key=keys[1]) / 7.0)
  w = normal(depth, WIDTH, WIDTH, key=keys[2]) * jnp.float32(
    GAINS[act] / WIDTH**0.5
  )

  def loss(w: Array) -> Array:
    return jnp.mean(jnp.square(run(w, x, act, norm, residual) - y))

  def step(state: tuple, t: Array) -> tuple:
    w, means = state
    value, g = jax.value_and_grad(loss)(w)
    return adam.step(w, g, means, t, lr), value

  return jax.lax.scan(step, (w, adam.start(w)), jnp.arange(1.0, 201.0))[1]


def compare(
  cases: list[tuple[str, str, bool]], depth: int, seeds: int
) -> dict[tuple, tuple[float, float]]:
  """Mean and spread over seeds of the last loss, each at its best rate."""
  out = {}
  for norm, act, residual in cases:
    best = (np.inf, 0.0)
    for lr in (1e-3, 3e-3, 1e-2):
      last = [
        float(train(jax.random.key(s), norm, act, residual, depth, lr)[-1])
        for s in range(seeds)
      ]
      best = min(best, (float(np.mean(last)), float(np.std(last))))
    out[norm, act, residual] = best
  return out


def main(argv: list[str] | None = None) -> None:
  """Measures gradients by depth, signals by gain, and norms against norms."""
  flags = rung.parser(__doc__)
  flags.add_argument("--seeds", type=int, default=3)
  args = flags.parse_args(argv)
  print(f"gradient of the first layer over the last, depths {DEPTHS}:")
  curves = {}
  for norm, residual in (("none", False), ("none", True), ("rms", True)):
    for act in ACTS:
      name = f"{act}{', residual' * residual}{', norm' * (norm != 'none')}"
      curves[name] = [
        first_over_last(d, act, norm, residual, args.seed) for d in DEPTHS
      ]
      shown = " ".join(
        f"{d}: {v:.1e}" for d, v in zip(DEPTHS, curves[name], strict=False)
      )
      print(f"  {name:24} {shown}")
  print("size after 32 layers, by gain:")
  gains = np.linspace(0.6, 2.2, 9)
  sizes = {a: [signal(32, g, a) for g in gains] for a in ("tanh", "relu")}
  for act, size in sizes.items():
    print(f"  {act:5} " + " ".join(f"{s:.1e}" for s in size))
  cases = [("none", "relu", False), ("layer", "relu", False)]
  cases += [("rms", "relu", False), ("rms", "relu", True)]
  cases += [("layer", "tanh", True), ("rms", "tanh", True)]
  print(f"16 layers, 200 steps, each at its best rate, {args.seeds} seeds:")
  for (norm, act, residual), (mean, spread) in compare(
    cases, 16, args.seeds
  ).items():
    name = f"{act}, norm {norm}{', residual' * residual}"
    print(f"  {name:26} loss {mean:.4f} +- {spread:.4f}")
  x = rms_norm(3.0 * normal(1000, WIDTH, key=jax.random.key(0)))
  inside = float(jnp.mean((x >= 0) & (x <= 1)))
  print(f"after RMSNorm {inside:.0%} of the values are between 0 and 1")
  draw(args.out, curves, gains, sizes)


def draw(out, curves: dict, gains: np.ndarray, sizes: dict) -> None:
  """Gradients by depth, signals by gain."""
  page, (left, right) = rung.figure(2, size=(5.2, 3.8))
  for i, (name, values) in enumerate(curves.items()):
    style = ("--", "-.", "-")[i // 3]
    left.semilogy(DEPTHS, values, style, color=rung.COLORS[i % 3], label=name)
  left.set(xlabel="layers", title="First gradient over last")
  left.legend(frameon=False, fontsize=7)
  for act, size in sizes.items():
    right.semilogy(gains, size, "o-", label=act)
  right.axvline(2**0.5, ls="--", color=rung.COLORS[5])
  right.set(xlabel="gain", title="Size after 32 layers")
  right.legend(frameon=False)
  rung.save(page, out, "depth")


if __name__ == "__main__":
  rung.run(main)
