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
# # Rung 11: BabyGPT
#
# The whole model on one page; its arrays are those of `jaxlm`'s own decoder.
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
import numpy as np

from jaxlm.ladder import babygpt
from jaxlm.ladder.exercise import check
from jaxlm.layers.param import count, init

# %%
tree = babygpt.declare(vocab=30, dim=32, layers=2, heads=4, length=16)
params = init(tree, jax.random.key(0))
tokens = jax.random.randint(jax.random.key(1), (4, 17), 0, 30)
print(count(tree), float(babygpt.loss(params, tokens)), np.log(30))

# %% [markdown]
# ## Exercise 1
#
# How many parameters has a block: four attention matrices, two of the MLP
# (four times as wide), two norms with a scale for each feature?


# %%
def block_size(dim): ...


# %%
block = babygpt.declare(1, 32, 1, 4, 1)["layers"]
check(block_size, [((32,), count(block)), ((1,), 14)])

# %% [markdown]
# ## Exercise 2
#
# What loss has a model that thinks all `vocab` tokens equally likely?


# %%
def loss_of_ignorance(vocab): ...


# %%
check(
  loss_of_ignorance,
  [
    ((2,), np.log(2)),
    (
      (50257,),
      10.824905,
    ),
  ],
  1e-6,
)

# %% [markdown]
# Now the main job: `python -m jaxlm.train --config=configs/tiny.py`.
