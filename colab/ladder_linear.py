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
# # Rung 2: regression
#
# Learning by slope: losses with gradients by hand, rates, penalties, and six
# optimizers written out.
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

from jaxlm.ladder import linear, optimizers
from jaxlm.ladder.exercise import check

# %% [markdown]
# ## Two over L
#
# The curvature of least squares is the largest eigenvalue L of x'x / n. Rates
# on both sides of 2 / L:

# %%
x, y = linear.line(np.random.default_rng(0))
L = linear.curvature(x)
for times in (0.5, 1.0, 1.99, 2.01):
  _, seen = linear.fit(x, y, rate=times / L, steps=500)
  print(f"{times} / L: {seen[0]:.2f} -> {seen[-1]:.3g}")

# %% [markdown]
# ## Exercise 1
#
# The gradient of the mean of log(1 + exp(-y z)) with respect to `z` [n], for
# labels `y` [n] of -1 and 1.


# %%
def logistic_gradient(z, y): ...


# %%
z, sign = np.array([0.0, 2.0, -1.0]), np.array([1, -1, 1])
check(logistic_gradient, [((z, sign), linear.logistic(z, sign)[1])])

# %% [markdown]
# ## Exercise 2
#
# The proximal step of L1 moves each weight towards zero by `by`, and never
# past it.


# %%
def shrink(w, by): ...


# %%
w = np.array([3.0, -0.5, 0.0, -2.0])
check(shrink, [((w, 1.0), np.array([2.0, 0.0, 0.0, -1.0]))])

# %% [markdown]
# ## A race
#
# Six optimizers down one valley, each at the best rate of a grid.

# %%
for kind in optimizers.ALL:
  rate, path = optimizers.race(kind, steps=100)
  print(f"{kind.__name__:9s} {rate:.0e} {optimizers.valley(path[-1]):.1e}")

# %% [markdown]
# ## Exercise 3
#
# Adam's first step has about the size of its rate, whatever the gradient. Give
# the new weight after one step from `w` with gradient `g`, without decay, with
# both means corrected and eps = 0.


# %%
def first_adam_step(w, g, rate): ...


# %%
check(first_adam_step, [((5.0, 1e-3, 0.1), 4.9), ((5.0, -1e6, 0.25), 5.25)])
