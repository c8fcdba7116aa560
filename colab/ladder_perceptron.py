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
# # Rung 1: the perceptron
#
# One neuron that learns from its mistakes (Rosenblatt, 1958), a theorem about
# how many it makes (Novikoff, 1962), and the function it cannot learn.
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

from jaxlm.ladder import perceptron
from jaxlm.ladder.exercise import check

# %% [markdown]
# ## Two hundred separable sets
#
# `bound_test` draws them and trains on each. Mistakes never exceed the bound.

# %%
mistakes, bounds = perceptron.bound_test(200, seed=1)
print(
  "most mistakes:", mistakes.max(), " over the bound:", sum(mistakes > bounds)
)

# %% [markdown]
# ## Exercise 1
#
# Write the bound (R / gamma)^2 of examples `x` [n, d] with labels `y` [n] and
# a separating vector `w` [d], which need not have length one.


# %%
def mistake_bound(x, y, w): ...


# %%
x = np.array([[3.0, 4.0], [-1.0, 0.0]])
y = np.array([1, -1])
w = np.array([2.0, 0.0])
check(mistake_bound, [((x, y, w), 25.0), ((x, y, 5 * w), 25.0)])

# %% [markdown]
# ## XOR
#
# The weights return to where they were, so the mistakes repeat forever.

# %%
x = perceptron.with_bias(perceptron.XOR_X)
print(perceptron.train(x, perceptron.XOR_Y))
print(perceptron.two_layers(perceptron.XOR_X))

# %% [markdown]
# ## Exercise 2
#
# One neuron for NAND: `x` [n, 2] of zeros and ones -> [n] of zeros and ones.
# All of logic follows from it, so two layers of neurons compute anything.


# %%
def nand(x): ...


# %%
check(nand, [((perceptron.XOR_X,), np.array([1.0, 1.0, 1.0, 0.0]))])
