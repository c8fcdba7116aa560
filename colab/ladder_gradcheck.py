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
# # Rung 3: is this gradient right?
#
# Derivatives from values alone: differences, the complex step, Jacobians and
# Hessians.
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

from jaxlm.ladder import gradcheck
from jaxlm.ladder.exercise import check

# %% [markdown]
# ## How long a step?
#
# Too long and the curve bends, too short and rounding is all that is left.

# %%
f, exact = gradcheck.squire, gradcheck.squire_slope(1.5)
for h in 10.0 ** np.arange(-15, 0, 2):
  one = abs(gradcheck.forward_difference(f, 1.5, 1.0, h) / exact - 1)
  two = abs(gradcheck.central(f, 1.5, 1.0, h) / exact - 1)
  print(f"h = {h:.0e}: forward {one:.0e}, central {two:.0e}")

# %% [markdown]
# ## Exercise 1
#
# Differences at h and 2h combine to a rule whose error is O(h^4): the slope of
# `f` at a number `x`.


# %%
def fourth_order(f, x, h): ...


# %%
check(fourth_order, [((f, 1.5, 1e-3), exact)], tolerance=1e-9)

# %% [markdown]
# ## Exercise 2
#
# The Jacobian of softmax at `x` [n], from its values p: [n, n].


# %%
def softmax_jacobian(x): ...


# %%
x = np.array([0.0, 1.0, -2.0, 0.5])
judge = gradcheck.jacobian(gradcheck.softmax, x, gradcheck.complex_step)
check(softmax_jacobian, [((x,), judge)])

# %% [markdown]
# ## A tree of arrays
#
# `check` compares `jax.grad`, or your own claim, along every coordinate.

# %%
import jax
import jax.numpy as jnp

with jax.enable_x64(True):
  tree = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
  inputs = jnp.arange(8.0).reshape(4, 2)
  print(
    gradcheck.check(
      lambda p: jnp.sum(jnp.tanh(inputs @ p["w"] + p["b"][None])), tree
    )
  )
