"""Solutions of colab/ladder_parallel.py."""


def operations_per_number(n, b):
  return 2 * n**3 / ((n // b) ** 3 * 2 * b * b)


def ring_traffic(n):
  return 2 * (n - 1) / n
