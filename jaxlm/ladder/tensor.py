"""Arrays that remember what they were made of; `autograd` walks them back.

Each operation computes its value and says, for every operand, how a gradient
dy of the result becomes one of the operand. Where broadcasting repeated an
operand, the walk sums; no operation has to care.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlm.ladder import einsum_grad

Array = np.ndarray


class Tensor:
  """An array, and how its gradient reaches what it was made of.

  Attributes:
    value: float64.
    parents: pairs of (Tensor, function from dy to its gradient).
  """

  __array_ufunc__ = None  # so that array + Tensor asks Tensor

  def __init__(self, value: Any, *parents: tuple["Tensor", Callable]):
    self.value = np.asarray(value, np.float64)
    self.parents = parents
    self.shape, self.ndim = self.value.shape, self.value.ndim

  def __add__(self, other):
    other = tensor(other)
    return Tensor(
      self.value + other.value, (self, lambda d: d), (other, lambda d: d)
    )

  def __mul__(self, other):
    a, b = self.value, tensor(other).value
    return Tensor(
      a * b, (self, lambda d: d * b), (tensor(other), lambda d: d * a)
    )

  def __pow__(self, n: float):
    a = self.value
    return Tensor(a**n, (self, lambda d: d * n * a ** (n - 1)))

  def __matmul__(self, other):
    other = tensor(other)
    if other.ndim == 1:
      return (self @ other[:, None])[..., 0]
    if self.ndim == 1:
      return (self[None] @ other)[..., 0, :]
    a, b = self.value, other.value
    return Tensor(
      a @ b,
      (self, lambda d: d @ np.swapaxes(b, -1, -2)),
      (other, lambda d: np.swapaxes(a, -1, -2) @ d),
    )

  def __getitem__(self, index):
    def back(d: Array) -> Array:
      whole = np.zeros(self.shape)
      np.add.at(whole, index, d)  # an entry taken twice is paid twice
      return whole

    return Tensor(self.value[index], (self, back))

  def sum(self, axis=None, keepdims: bool = False) -> "Tensor":
    """The sum over `axis`; its gradient is the same for every term."""
    y = self.value.sum(axis, keepdims=True)
    out = y if keepdims else self.value.sum(axis)
    return Tensor(
      out, (self, lambda d: np.broadcast_to(d.reshape(y.shape), self.shape))
    )

  def max(self, axis=None, keepdims: bool = False) -> "Tensor":
    """The largest over `axis`; equals share the gradient equally."""
    y = self.value.max(axis, keepdims=True)
    top = self.value == y
    share = top / top.sum(axis, keepdims=True)
    out = y if keepdims else self.value.max(axis)
    return Tensor(out, (self, lambda d: d.reshape(y.shape) * share))

  def reshape(self, *shape: int) -> "Tensor":
    """The same numbers in another shape."""
    return Tensor(
      self.value.reshape(*shape), (self, lambda d: d.reshape(self.shape))
    )

  def transpose(self, *axes: int) -> "Tensor":
    """The axes in the order given."""
    back = np.argsort(axes)
    return Tensor(
      self.value.transpose(axes), (self, lambda d: d.transpose(back))
    )

  def mean(self, axis=None, keepdims: bool = False) -> "Tensor":
    """The mean over `axis`."""
    y = self.sum(axis, keepdims)
    return y * (max(y.value.size, 1) / self.value.size)

  # All else is made of these.
  __radd__ = __add__
  __rmul__ = __mul__

  def __neg__(self):
    return self * -1.0

  def __sub__(self, other):
    return self + -tensor(other)

  def __rsub__(self, other):
    return tensor(other) - self

  def __truediv__(self, other):
    return self * tensor(other) ** -1.0

  def __rtruediv__(self, other):
    return tensor(other) / self

  def __rmatmul__(self, other):
    return tensor(other) @ self


def tensor(x: Any) -> Tensor:
  """`x` itself, or a constant made of it."""
  return x if isinstance(x, Tensor) else Tensor(x)


def exp(x: Tensor) -> Tensor:
  """The exponential, its own derivative."""
  y = np.exp(x.value)
  return Tensor(y, (x, lambda d: d * y))


def log(x: Tensor) -> Tensor:
  """The natural logarithm."""
  return Tensor(np.log(x.value), (x, lambda d: d / x.value))


def tanh(x: Tensor) -> Tensor:
  """The hyperbolic tangent, with derivative 1 - y^2."""
  y = np.tanh(x.value)
  return Tensor(y, (x, lambda d: d * (1 - y * y)))


def relu(x: Tensor) -> Tensor:
  """max(x, 0), with derivative 0 at 0."""
  return Tensor(np.maximum(x.value, 0), (x, lambda d: d * (x.value > 0)))


def einsum(spec: str, *operands: Any) -> Tensor:
  """Any sum of products; the backward strings derive themselves."""
  xs = [tensor(x) for x in operands]
  values = [x.value for x in xs]

  def back(i: int) -> Callable[[Array], Array]:
    return lambda d: einsum_grad.gradient(spec, values, i, d)

  pulls = [(x, back(i)) for i, x in enumerate(xs)]
  return Tensor(np.einsum(spec, *values), *pulls)
