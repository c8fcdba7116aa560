"""Solutions of colab/ladder_bpe.py."""

import itertools
from collections import Counter


def commonest(ids):
  return Counter(itertools.pairwise(ids)).most_common(1)[0][0]


def joined(ids, pair, new):
  out, i = [], 0
  while i < len(ids):
    found = tuple(ids[i : i + 2]) == pair
    out.append(new if found else ids[i])
    i += 2 if found else 1
  return out
