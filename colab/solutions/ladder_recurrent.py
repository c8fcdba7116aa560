"""Solutions of colab/ladder_recurrent.py."""


def new_cell(c, f, i, g):
  return f * c + i * g


def left(f, n):
  return f**n


def gate_for_half(n):
  return 0.5 ** (1 / n)
