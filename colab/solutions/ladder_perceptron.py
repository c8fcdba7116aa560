"""Solutions of the perceptron's exercises."""

import numpy as np


def mistake_bound(x, y, w):
  margin = np.min(y * (x @ w)) / np.linalg.norm(w)
  return (np.max(np.linalg.norm(x, axis=1)) / margin) ** 2


def nand(x):
  return (1.5 - x.sum(axis=1) > 0).astype(float)
