"""Solutions of colab/ladder_babygpt.py."""

import math


def block_size(dim):
  return 4 * dim * dim + 2 * dim * 4 * dim + 2 * dim


def loss_of_ignorance(vocab):
  return math.log(vocab)
