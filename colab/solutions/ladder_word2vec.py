"""Solutions of colab/ladder_word2vec.py."""

import numpy as np


def pmi(both, word, context, total):
  return np.log(both * total / (word * context))


def cosine(a, b):
  return a @ b / np.sqrt((a @ a) * (b @ b))
