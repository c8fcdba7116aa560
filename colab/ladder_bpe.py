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
# # Rung 10: the tokenizer
#
# The most frequent pair of neighbours becomes one token, again and again
# (Gage, 1994; Sennrich et al., 2016).
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
from jaxlm.ladder import bpe
from jaxlm.ladder.exercise import check

# %%
text = "low lower lowest, new newer newest"
merges = bpe.train(text, 270)
tokens = bpe.spelling(merges)
print([t.decode() for t in tokens[256:]])
print([tokens[i].decode() for i in bpe.encode("slower", merges)])

# %% [markdown]
# ## Exercise 1
#
# Which pair of neighbours occurs most often in a list of numbers? (No ties
# here.)


# %%
def commonest(ids): ...


# %%
check(commonest, [(([1, 2, 3, 1, 2],), (1, 2)), (([5, 5, 5, 7],), (5, 5))])

# %% [markdown]
# ## Exercise 2
#
# Replace a pair in a list by a new number, from the left.


# %%
def joined(ids, pair, new): ...


# %%
check(
  joined,
  [(([1, 2, 1, 2, 3], (1, 2), 9), [9, 9, 3]), (([5, 5, 5], (5, 5), 9), [9, 5])],
)
