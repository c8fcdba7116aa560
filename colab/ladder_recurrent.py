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
# # Rung 7: RNN, LSTM, GRU
#
# A state that every step reads and rewrites (Elman, 1990; Hochreiter and
# Schmidhuber, 1997; Cho et al., 2014), and what reaches the past.
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
import jax.numpy as jnp

from jaxlm.ladder import recurrent
from jaxlm.ladder.exercise import check

# %% [markdown]
# ## Gradients through time

# %%
for name, norms in recurrent.lags(0, seq=40).items():
  print(f"{name:16} now {norms[0]:.1e}, 30 steps back {norms[30]:.1e}")

# %% [markdown]
# ## Exercise 1
#
# What does an LSTM's cell c become? Gates are numbers between 0 and 1: forget
# `f`, input `i`, and a candidate `g`.


# %%
def new_cell(c, f, i, g): ...


# %%
check(new_cell, [((2.0, 1.0, 0.0, 9.0), 2.0), ((2.0, 0.5, 1.0, -1.0), 0.0)])

# %% [markdown]
# ## Exercise 2
#
# With a constant forget gate f, how much of c is left after n steps of
# silence? And which f leaves half of it after n?


# %%
def left(f, n): ...


# %%
def gate_for_half(n): ...


# %%
check(left, [((0.9, 10), 0.9**10), ((1.0, 500), 1.0)])
check(gate_for_half, [((1,), 0.5), ((200,), 0.5 ** (1 / 200))])

# %% [markdown]
# ## Clipping
#
# A gradient longer than the limit keeps its direction.

# %%
print(recurrent.clip({"w": jnp.array([30.0, 40.0])}, 1.0))
