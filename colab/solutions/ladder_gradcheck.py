"""Solutions of the exercises on checking gradients."""

import numpy as np


def fourth_order(f, x, h):
  near = (f(x + h) - f(x - h)) / (2 * h)
  far = (f(x + 2 * h) - f(x - 2 * h)) / (4 * h)
  return (4 * near - far) / 3


def softmax_jacobian(x):
  p = np.exp(x) / np.sum(np.exp(x))
  return np.diag(p) - np.outer(p, p)
