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
# # Rung 13: kernels, and a ring
#
# Programs for the blocks that fit on a chip, and sums over many chips.
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
# First: it asks for eight CPU devices, before JAX starts.
from jaxlm.ladder import kernels, parallel  # isort: skip

import jax
import jax.numpy as jnp

from jaxlm.ladder.exercise import check

# %%
x = jax.random.normal(jax.random.key(0), (16, 8), jnp.float32)
print(float(jnp.abs(kernels.softmax(x) - jax.nn.softmax(x, axis=1)).max()))

# %% [markdown]
# ## Exercise 1
#
# A matmul of n x n in blocks of b x b does 2 n^3 operations. How many for
# each number it reads, if each of its (n/b)^3 products reads two blocks?


# %%
def operations_per_number(n, b): ...


# %%
check(operations_per_number, [((8, 1), 1.0), ((8, 2), 2.0), ((1024, 128), 128)])

# %% [markdown]
# ## A ring

# %%
n = len(jax.devices())
parts = jnp.ones((n, 10), jnp.float32)
print(n, parallel.ring_sum(parts)[0])

# %% [markdown]
# ## Exercise 2
#
# How often is the array sent over one link, with n devices: 2 (n - 1) steps,
# each of an n-th of it?


# %%
def ring_traffic(n): ...


# %%
check(ring_traffic, [((2,), 1.0), ((8,), 1.75), ((1000,), 1.998)])
