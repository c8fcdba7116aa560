"""Small data sets, drawn from a generator: moons and blobs."""

import numpy as np

Set = tuple[np.ndarray, np.ndarray]


def moons(rng: np.random.Generator, n: int, noise: float = 0.1) -> Set:
  """Two half circles that reach into each other.

  Args:
    rng: where the randomness comes from.
    n: number of points.
    noise: standard deviation of what is added to both coordinates.

  Returns:
    `x` [n, 2], and `y` [n] of zeros and ones in equal number.
  """
  y = np.arange(n) % 2
  angle = rng.uniform(0, np.pi, n)
  x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
  x = np.where(y[:, None] == 0, x, [1.0, 0.5] - x)
  return x + noise * rng.normal(size=(n, 2)), y


def blobs(
  rng: np.random.Generator, n: int, k: int = 3, spread: float = 0.9
) -> Set:
  """Normal clouds around `k` centres on a circle of radius two.

  Returns:
    `x` [n, 2], and `y` [n] in 0..k-1.
  """
  y = np.arange(n) % k
  angle = 2 * np.pi * y / k + 0.5
  centre = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
  return centre + spread * rng.normal(size=(n, 2)), y
