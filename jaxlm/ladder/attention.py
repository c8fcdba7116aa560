"""Attention: a question, and everything that might answer it.

Bahdanau et al., 2014 (arXiv:1409.0473) let a translator look back at all words
of the source, by a small network that compares (additive attention); Luong et
al. (arXiv:1508.04025) compare by a product; Vaswani et al. (arXiv:1706.03762)
divide it by sqrt(d), so that it stays of size one in any dimension:

    additive        score = v . tanh(W q + U k)
    multiplicative  score = q . k / sqrt(d)
    both            output = sum_j softmax(scores)_j v_j

A sum over a set knows no order. Positions must be put in: as vectors that are
added, or by turning queries and keys (RoPE, arXiv:2104.09864), pair i of
features by the angle m theta^(-2i/d): fast pairs tell neighbours apart, slow
ones hardly turn in a whole text and are free for meaning.

What it could not do: one such look chooses, and cannot compute with what it
found. The next rungs train it; BabyGPT stacks it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ladder import rung

Array = jax.Array

# --- By hand ----------------------------------------------------------------

# "cats chase mice": three tokens, two features, numbers one can check on paper.
X = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
WQ = np.array([[1.0, 0.0], [0.0, 2.0]])
WK = np.array([[0.0, 1.0], [1.0, 0.0]])
WV = np.array([[1.0, 2.0], [3.0, 0.0]])


def by_hand() -> dict[str, np.ndarray]:
  """Every intermediate of causal attention over `X`, by loops."""
  q, k, v = X @ WQ, X @ WK, X @ WV
  scores, weights, out = np.full((3, 3), -np.inf), np.zeros((3, 3)), []
  for i in range(3):
    for j in range(i + 1):  # a token sees itself and those before it
      scores[i, j] = (q[i, 0] * k[j, 0] + q[i, 1] * k[j, 1]) / np.sqrt(2)
    e = np.exp(scores[i])
    weights[i] = e / e.sum()
    out.append(sum(weights[i, j] * v[j] for j in range(3)))
  return {
    "q": q,
    "k": k,
    "v": v,
    "scores": scores,
    "weights": weights,
    "output": np.array(out),
  }


# --- As code ----------------------------------------------------------------


def attend(q: Array, k: Array, v: Array, causal: bool) -> tuple[Array, Array]:
  """softmax(q k' / sqrt(d)) v: [n, d], [m, d], [m, e] -> [n, e], weights."""
  scores = q @ k.T / jnp.sqrt(jnp.asarray(q.shape[1], q.dtype))
  if causal:
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape, bool)), scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1)
  return weights @ v, weights


def additive(p: dict, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """softmax(v . tanh(W q + U k)) v, for queries [n, d] and keys [m, d]."""
  hidden = jnp.tanh((q @ p["W"])[:, None] + (k @ p["U"])[None])
  weights = jax.nn.softmax(hidden @ p["v"], axis=-1)
  return weights @ v, weights


# --- Positions --------------------------------------------------------------


def turn(x: Array, positions: Array, theta: float = 1e4) -> Array:
  """RoPE: feature pair (i, i + d/2) of `x` [n, d] turned by its position."""
  half = x.shape[1] // 2
  freq = jnp.asarray(theta ** (-np.arange(half) / half), x.dtype)
  angle = positions.astype(x.dtype)[:, None] * freq[None]
  a, b = x[:, :half], x[:, half:]
  c, s = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([a * c - b * s, b * c + a * s], axis=1)


def shuffle_test(seed: int) -> dict[str, float]:
  """How far the output of the last token moves when the others are shuffled."""
  keys = jax.random.split(jax.random.key(seed), 3)
  x, places = jax.random.normal(keys[0], (2, 12, 16), jnp.float32)
  w = jax.random.normal(keys[1], (3, 16, 16), jnp.float32) / 4.0
  order = jnp.append(jax.random.permutation(keys[2], 11), 11)
  t = jnp.arange(12)

  def last(x: Array, kind: str) -> Array:
    if kind == "added":
      x = x + places
    q, k, v = (x @ w[i] for i in range(3))
    if kind == "turned":
      q, k = turn(q, t), turn(k, t)
    return attend(q, k, v, True)[0][-1]

  return {
    kind: float(jnp.abs(last(x, kind) - last(x[order], kind)).max())
    for kind in ("none", "added", "turned")
  }


def bands(d: int, distances: np.ndarray, theta: float = 1e4) -> np.ndarray:
  """What each pair of features adds to q . k at a distance, [d/2, n].

  For q = k of ones: 2 cos(distance theta^(-2i/d)).
  """
  freq = theta ** (-2 * np.arange(d // 2) / d)
  return 2 * np.cos(freq[:, None] * distances[None])


def main(argv: list[str] | None = None) -> None:
  """Prints the worked example, tests positions, measures bands."""
  flags = rung.parser(__doc__)
  args = flags.parse_args(argv)
  hand = by_hand()
  with np.printoptions(precision=4, suppress=True):
    for name, value in hand.items():
      print(f"{name}\n{value}")
  out, weights = attend(*(jnp.asarray(hand[n]) for n in "qkv"), True)
  gap = max(
    np.abs(out - hand["output"]).max(), np.abs(weights - hand["weights"]).max()
  )
  print(f"by hand and by code differ by {gap:.1e}")
  for kind, moved in shuffle_test(args.seed).items():
    print(f"positions {kind}: shuffling moves the last token by {moved:.1e}")
  turns = 64 * 1e4 ** (-2 * np.arange(32) / 64) / (2 * np.pi)
  print(
    f"RoPE, 64 features: in 64 tokens pair 0 turns {turns[0]:.1f} times, "
    f"pair 31 {turns[-1]:.4f}; {np.sum(turns < 0.25)} of 32 pairs turn "
    "less than a quarter"
  )
  draw(args.out, hand["weights"])


def draw(out, weights: np.ndarray) -> None:
  """The example's weights, and products by distance for some bands."""
  page, (left, right) = rung.figure(2)
  left.imshow(weights, cmap="Blues", vmin=0, vmax=1)
  words = ("cats", "chase", "mice")
  left.set_xticks(range(3), words)
  left.set_yticks(range(3), words)
  for i in range(3):
    for j in range(i + 1):
      left.text(j, i, f"{weights[i, j]:.2f}", ha="center", va="center")
  left.set(title="Who looks at whom")
  distances = np.arange(0, 128)
  found = bands(64, distances)
  for i in (0, 8, 16, 31):
    right.plot(distances, found[i], label=f"pair {i}")
  right.plot(distances, found.mean(0), "k", lw=2, label="mean of all")
  right.set(xlabel="distance", title="What RoPE makes of q = k")
  right.legend(frameon=False, fontsize=8)
  rung.save(page, out, "attention")


if __name__ == "__main__":
  rung.run(main)
