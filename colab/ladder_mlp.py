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
# # Rung 5: a network by hand
#
# Every gradient of 784-800-10 written out in NumPy. Here on noise that has a
# rule in it; on MNIST by `python -m jaxlm.ladder.mlp --data=FILE.npz`.
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

from jaxlm.ladder import components, images, mlp
from jaxlm.ladder.exercise import check

# %% [markdown]
# ## Train one
#
# The label is the largest of ten random sums of the pixels.

# %%
rng = np.random.default_rng(0)
x = rng.normal(size=(1200, 16)).astype(np.float32)
y = (x @ rng.normal(size=(16, 10))).argmax(1)
data = images.Images(x[:1000], y[:1000], x[1000:], y[1000:], "noise")
params, errors = mlp.train(data, mlp.Recipe(hidden=64, epochs=5), seed=0)
print("test error after each epoch:", np.round(errors, 3))

# %% [markdown]
# ## Exercise 1
#
# The way back through softmax and cross entropy is shorter than the way there.
# For scores `z` [n, k] and labels `y` [n], the gradient of the mean loss.


# %%
def scores_gradient(z, y): ...


# %%
z, labels = rng.normal(size=(4, 3)), np.array([0, 2, 1, 1])
_, saved = components.cross_entropy(z, labels)
judge = components.cross_entropy_back(saved)
check(scores_gradient, [((z, labels), judge)])

# %% [markdown]
# ## Exercise 2
#
# An embedding reads rows of a table. Given the gradient `dy` [n, d] of what was
# read and the `ids` [n], the gradient of the table [vocab, d]. Mind the rows
# that are read twice.


# %%
def table_gradient(dy, ids, vocab): ...


# %%
dy, ids = rng.normal(size=(4, 2)), np.array([1, 0, 1, 1])
judge = components.embedding_back(dy, (ids, 3))
check(table_gradient, [((dy, ids, 3), judge)])

# %% [markdown]
# ## Exercise 3
#
# A layer norm without scale and bias: y = (x - mean) / sqrt(var + eps) over the
# columns of each row. Give dx for `x` and `dy` [n, d]. `batch_norm_back` does
# the same over rows.


# %%
def layer_norm_back(x, dy, eps): ...


# %%
x, dy = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
ones, zeros = np.ones(3), np.zeros(3)
_, saved = components.batch_norm(x.T, ones, zeros, 1e-5)
judge = components.batch_norm_back(dy.T, saved)[0].T
check(layer_norm_back, [((x, dy, 1e-5), judge)])
