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
# # Rung 12: choosing and searching
#
# Heaps, selection, a threshold and shortest paths, as decoding needs them.
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

from jaxlm.ladder import dijkstra, topk
from jaxlm.ladder.exercise import check

# %%
x = np.random.default_rng(0).normal(size=1000)
print(topk.largest(x, 3), topk.quickselect(x, 3))

# %% [markdown]
# ## Exercise 1
#
# Halving an interval `steps` times: how long is it at the end, if it had
# length one? And how many halvings make it shorter than `width`?


# %%
def width_after(steps): ...


# %%
def halvings(width): ...


# %%
check(width_after, [((0,), 1.0), ((10,), 2.0**-10)])
check(halvings, [((0.6,), 1), ((1e-6,), 20)])

# %% [markdown]
# ## The likeliest text
#
# A greedy choice is not always the best beginning.

# %%
step = dijkstra.chain(4, 1.0, seed=1)
print(dijkstra.likeliest(step, 5))

# %% [markdown]
# ## Exercise 2
#
# The tokens that greedy choice takes, as a tuple.


# %%
def greedy(step, length): ...


# %%
def sure(text):
  return np.log(np.roll([0.7, 0.2, 0.1], len(text)))


check(greedy, [((sure, 4), (0, 1, 2, 0))])
