"""Solutions of the exercises on automatic differentiation."""

import numpy as np

from jaxlm.ladder.tensor import Tensor


def softplus(x):
  slope = 1 / (1 + np.exp(-x.value))
  return Tensor(np.logaddexp(0, x.value), (x, lambda d: d * slope))


def keys_gradient(queries, dscores):
  return np.einsum("bqk,bqd->bkd", dscores, queries)
