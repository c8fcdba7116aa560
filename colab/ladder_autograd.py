# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---


# %% [markdown]
# # Rung 4: gradients by themselves
#
# Automatic differentiation of arrays in a page, and the rule by which the
# gradient of an einsum is an einsum.
#
# On Colab, clone the repository and run this from its root.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxlm") is None:
  subprocess.run(
    [sys.executable, "-m", "pip", "install", "-e", "."], check=True
  )

# %%
import numpy as np

from jaxlm.ladder import autograd, einsum_grad, tensor
from jaxlm.ladder.exercise import check
from jaxlm.ladder.tensor import Tensor

# %% [markdown]
# ## A graph, walked back

# %%
x = Tensor([[1.0, 2.0], [3.0, 4.0]])
w = Tensor([0.5, -1.0])
y = tensor.tanh(x @ w).sum()
print(y.value)
print(autograd.grad(y, [x, w]))

# %% [markdown]
# ## Exercise 1
#
# A new operation: softplus, log(1 + exp(x)), for a Tensor `x`. Give its value
# and how dy becomes the gradient of `x`, without any other operation of
# `tensor`.


# %%
def softplus(x): ...


# %%
def softplus_slope(values):
  x = Tensor(values)
  y = softplus(x)
  return None if y is None else autograd.grad(y.sum(), [x])[0]


def right_slope(values):
  return 1 / (1 + np.exp(-values))


values = np.array([-3.0, 0.0, 2.0])
softplus_slope.__name__ = "softplus"
check(softplus_slope, [((values,), right_slope(values))])

# %% [markdown]
# ## Einsum strings
#
# Swap an operand's letters with the result's:

# %%
for spec in ("ab,bc->ac", "btd,dnh->btnh"):
  print(spec, [einsum_grad.backward(spec, i)[0] for i in range(2)])

# %% [markdown]
# ## Exercise 2
#
# Queries [b, q, d] meet keys [b, k, d]: scores [b, q, k]. Given the gradient of
# the scores, give that of the keys, by one einsum written by hand.


# %%
def keys_gradient(queries, dscores): ...


# %%
rng = np.random.default_rng(0)
queries, keys = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4))
dscores = rng.normal(size=(2, 3, 5))
judge = einsum_grad.gradient("bqd,bkd->bqk", [queries, keys], 1, dscores)
check(keys_gradient, [((queries, dscores), judge)])
