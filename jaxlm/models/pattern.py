"""Layers that differ: the pattern that repeats in a list of blocks."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def segments(blocks: Sequence[T]) -> tuple[tuple[tuple[T, ...], int], ...]:
  """A list of blocks, one per layer, as patterns and their repeats.

  At each place the pattern that covers most layers is taken, the shortest of
  those that cover as many: equal blocks become one pattern of one, and
  `LLLGLLLGL` becomes `LLLG` twice and `L` once.
  """
  found, at = [], 0
  while at < len(blocks):
    best = max(
      ((_repeats(blocks[at:], size), size) for size in range(1, 17)),
      key=lambda pair: (_covered(*pair), -pair[1]),
    )
    n, size = best
    found.append((tuple(blocks[at : at + size]), n))
    at += n * size
  return tuple(found)


def _repeats(blocks: Sequence[T], size: int) -> int:
  """How often the first `size` blocks stand one after another; 0 if short."""
  pattern, n = blocks[:size], 0
  while len(pattern) == size and blocks[n * size : (n + 1) * size] == pattern:
    n += 1
  return n


def _covered(n: int, size: int) -> int:
  """Layers a pattern covers by repeating; a single pattern counts as one."""
  return n * size if n > 1 else min(n, 1)
