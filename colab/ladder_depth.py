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
# # Rung 6: why depth is hard
#
# A gradient that passes through many layers is a product of Jacobians
# (Hochreiter, 1991). Starting well, residual connections and norms keep it
# alive.
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

from jaxlm.ladder import depth
from jaxlm.ladder.exercise import check

# %% [markdown]
# ## What reaches the first layer
#
# The gradient of the first layer's weights over that of the last's.

# %%
for act in depth.ACTS:
  plain = depth.first_over_last(16, act, "none", False)
  kept = depth.first_over_last(16, act, "rms", True)
  print(f"{act:8} plain {plain:.1e}, with residuals and norms {kept:.1e}")

# %% [markdown]
# ## Exercise 1
#
# A layer multiplies the gradient by `factor`. How many layers does it take
# until less than `share` of it is left? (`math.log`, rounded up.)


# %%
def layers_until(factor, share): ...


# %%
check(layers_until, [((0.25, 1e-3), 5), ((0.5, 0.5), 1), ((0.9, 0.01), 44)])

# %% [markdown]
# ## Exercise 2
#
# RMSNorm of a row `x` [n]: divided by the root of the mean of its squares. No
# epsilon.


# %%
def rms(x): ...


# %%
x = jnp.array([3.0, 4.0])
check(rms, [((x,), x / (12.5**0.5)), ((-2 * x,), -x / (12.5**0.5))], 1e-6)

# %% [markdown]
# Does it keep values between 0 and 1, as one can read?

# %%
y = depth.rms_norm(depth.normal(1000, 48, key=jax.random.key(0)))
print(f"{float(jnp.mean((y >= 0) & (y <= 1))):.0%} of them are")
