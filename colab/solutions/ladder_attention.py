"""Solutions of colab/ladder_attention.py."""

import numpy as np


def weights(q, k):
  e = np.exp(k @ q / np.sqrt(len(q)))
  return e / e.sum()


def largest_weight(c, n):
  return np.exp(c) / (np.exp(c) + (n - 1) * np.exp(-c))
