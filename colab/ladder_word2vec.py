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
# # Rung 8: word2vec
#
# A word is the company it keeps (Mikolov et al., 2013), and its vector is a
# factorisation of counts (Levy and Goldberg, 2014).
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

from jaxlm.ladder import word2vec
from jaxlm.ladder.exercise import check

# %% [markdown]
# ## A small language
#
# Number, gender and kind of a noun each show in a word beside it.

# %%
texts, words = word2vec.corpus(2000, seed=0)
for text in texts[:5]:
  print(" ".join(words[i] for i in text))

# %%
seen = word2vec.pairs(texts)
v, losses = word2vec.train(
  word2vec.skip_gram, seen[:, 0], seen[:, 1], texts.ravel(), len(words), 600
)
print(word2vec.analogies(np.asarray(v["words"]), words))

# %% [markdown]
# ## Exercise 1
#
# PMI of a pair: how much likelier than by chance, log p(w, c) / (p(w) p(c)),
# from four counts: of the pair, of the word, of the context, and of all
# pairs.


# %%
def pmi(both, word, context, total): ...


# %%
check(pmi, [((25, 50, 50, 100), 0.0), ((50, 50, 50, 100), np.log(2))])

# %% [markdown]
# ## Exercise 2
#
# The cosine of the angle between two vectors.


# %%
def cosine(a, b): ...


# %%
a, b = np.array([1.0, 0.0]), np.array([3.0, 4.0])
check(cosine, [((a, b), 0.6), ((a, -7 * a), -1.0), ((b, 2 * b), 1.0)])
