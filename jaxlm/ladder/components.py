"""The parts of a network, each with its backward pass by hand.

Backpropagation: Werbos, 1974; Rumelhart, Hinton and Williams, Nature 1986.
`part(...)` returns its result and what its backward pass must remember;
`part_back(dy, saved)` turns the gradient of the result into those of the
operands. Each was derived once on paper; the tests compare it with JAX.
"""

import numpy as np

Array = np.ndarray


def linear(x: Array, w: Array, b: Array) -> tuple[Array, tuple]:
  """The sum x w + b; `x` [n, in], `w` [in, out], `b` [out]."""
  return x @ w + b, (x, w)


def linear_back(dy: Array, saved: tuple) -> tuple[Array, Array, Array]:
  """Gives dx = dy w', dw = x' dy, db = the sum of dy over rows."""
  x, w = saved
  return dy @ w.T, x.T @ dy, dy.sum(0)


def relu(x: Array) -> tuple[Array, Array]:
  """max(x, 0) (Nair and Hinton, ICML 2010)."""
  y = np.maximum(x, 0)
  return y, y


def relu_back(dy: Array, y: Array) -> Array:
  """Passes what was positive."""
  return dy * (y > 0)


def dropout(
  rng: np.random.Generator, x: Array, rate: float
) -> tuple[Array, Array]:
  """Zeroes a part `rate` of `x`, scales the rest (arXiv:1207.0580)."""
  draw = rng.random(x.shape, np.float32)
  keep = (draw >= rate) * x.dtype.type(1 / (1 - rate))
  return x * keep, keep


def dropout_back(dy: Array, keep: Array) -> Array:
  """The same zeros, the same scale."""
  return dy * keep


def batch_norm(
  x: Array, scale: Array, bias: Array, eps: float = 1e-5
) -> tuple[Array, tuple]:
  """Gives (x - mean) / sqrt(var + eps) * scale + bias (arXiv:1502.03167).

  Mean and variance are over the rows of `x` [n, d].
  """
  rate = 1 / np.sqrt(x.var(0) + eps)
  normal = (x - x.mean(0)) * rate
  return normal * scale + bias, (normal, rate, scale)


def batch_norm_back(dy: Array, saved: tuple) -> tuple[Array, Array, Array]:
  """Gradients of `x`, `scale` and `bias`.

  The mean and the variance move with every row, so dx is what is left of dy
  once its mean and its part along the normalised x are taken out.
  """
  normal, rate, scale = saved
  dn = dy * scale
  dx = rate * (dn - dn.mean(0) - normal * (dn * normal).mean(0))
  return dx, (dy * normal).sum(0), dy.sum(0)


def embedding(table: Array, ids: Array) -> tuple[Array, tuple]:
  """Rows of `table` [vocab, d] by `ids` [...]: [..., d]."""
  return table[ids], (ids, len(table))


def embedding_back(dy: Array, saved: tuple) -> Array:
  """Adds each dy to its row; a row used twice is paid twice."""
  ids, vocab = saved
  dtable = np.zeros((vocab, dy.shape[-1]), dy.dtype)
  np.add.at(dtable, ids, dy)  # dtable[ids] += dy would keep only the last
  return dtable


def cross_entropy(z: Array, y: Array) -> tuple[float, tuple]:
  """Mean of -log softmax(z)[y]; `z` [n, k], `y` [n] in 0..k-1."""
  z = z - z.max(1, keepdims=True)
  log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
  return -log_p[np.arange(len(y)), y].mean(), (log_p, y)


def cross_entropy_back(saved: tuple) -> Array:
  """(softmax(z) - onehot(y)) / n: the exponentials cancel."""
  log_p, y = saved
  dz = np.exp(log_p)
  dz[np.arange(len(y)), y] -= 1
  return dz / dz.dtype.type(len(y))
