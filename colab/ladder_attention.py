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
# # Rung 9: attention
#
# A question, and everything that might answer it (Bahdanau et al., 2014;
# Vaswani et al., 2017).
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
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ladder import attention, largest
from jaxlm.ladder.exercise import check

# %% [markdown]
# ## Three tokens by hand

# %%
for name, value in attention.by_hand().items():
  print(name, np.round(value, 4).tolist())

# %% [markdown]
# ## Exercise 1
#
# The weights that a query `q` [d] gives to keys `k` [n, d].


# %%
def weights(q, k): ...


# %%
hand = attention.by_hand()
check(weights, [((hand["q"][2], hand["k"]), hand["weights"][2])])

# %% [markdown]
# ## Positions
#
# Shuffle the other tokens: does the last one notice?

# %%
print(attention.shuffle_test(0))

# %% [markdown]
# ## Exercise 2
#
# n scores lie between -c and c. What is the largest weight one of them can
# have? It goes to zero with n: a softmax over more items is softer.


# %%
def largest_weight(c, n): ...


# %%
check(
  largest_weight,
  [((0.0, 4), 0.25), ((1.0, 2), np.e / (np.e + 1 / np.e)), ((1.0, 1), 1.0)],
)

# %%
scores = jnp.array([[1.0, *[0.0] * 99]])
soft, sharp = jax.nn.softmax(scores), largest.sharpened(scores, jnp.float32(1))
print(float(soft[0, 0]), float(sharp[0, 0]))
