"""Top-k: choosing the best few of many.

Williams, "Algorithm 232: heapsort", 1964; Hoare, "Algorithm 65: find", 1961. A
model says how likely each of 50,000 tokens is, and something has to choose:

    top-k sampling     the k largest of n         a heap of size k, quickselect
    several devices    each has its own k         a k-way merge
    nucleus (top-p)    a threshold                bisection
    nearest neighbours the k smallest distances   the same heap

What they could not do: the best token now need not begin the best text. The
next rung searches among texts.
"""

import time
from collections.abc import Iterable

import numpy as np

from jaxlm.ladder import rung

Item = tuple[float, int]

# --- Selection --------------------------------------------------------------


def sift_down(heap: list[Item], i: int) -> None:
  """Moves item `i` down until no child is smaller."""
  while True:
    least = i
    for child in (2 * i + 1, 2 * i + 2):
      if child < len(heap) and heap[child] < heap[least]:
        least = child
    if least == i:
      return
    heap[i], heap[least] = heap[least], heap[i]
    i = least


def largest(values: Iterable[float], k: int) -> list[Item]:
  """The `k` largest (value, index), largest first: O(n log k), O(k) memory.

  The heap's root is the smallest of the best k so far: what a newcomer must
  beat.
  """
  heap: list[Item] = []
  for index, value in enumerate(values):
    item = (float(value), -index)  # of equal values, the first one wins
    if len(heap) < k:
      heap.append(item)
      if len(heap) == k:
        for i in reversed(range(k // 2)):
          sift_down(heap, i)
    elif k and item > heap[0]:
      heap[0] = item
      sift_down(heap, 0)
  return [(value, -index) for value, index in sorted(heap, reverse=True)]


def quickselect(values: np.ndarray, k: int, seed: int = 0) -> float:
  """The k-th largest value (k from 1): O(n) on average, no order needed."""
  rng = np.random.default_rng(seed)
  while True:
    pivot = values[rng.integers(len(values))]
    above, equal = values[values > pivot], int(np.sum(values == pivot))
    if k <= len(above):
      values = above
    elif k <= len(above) + equal:
      return float(pivot)
    else:
      k -= len(above) + equal
      values = values[values < pivot]


def merge(lists: list[list[Item]], k: int) -> list[Item]:
  """The `k` largest items of lists that are sorted, largest first.

  What devices do that hold a part of the vocabulary each: O(k log lists).
  """
  heap = [(-rows[0][0], i, 0) for i, rows in enumerate(lists) if rows]
  heap.sort()
  out = []
  while heap and len(out) < k:
    _, i, j = heap[0]
    out.append(lists[i][j])
    if j + 1 < len(lists[i]):
      heap[0] = (-lists[i][j + 1][0], i, j + 1)
    else:
      heap[0] = heap[-1]
      heap.pop()
    sift_down(heap, 0) if heap else None
  return out


def nearest(points: np.ndarray, query: np.ndarray, k: int) -> list[int]:
  """Numbers of the `k` points [n, d] nearest to `query` [d]."""
  away = np.sum(np.square(points - query), axis=1)
  return [index for _, index in largest(-away, k)]


# --- A threshold ------------------------------------------------------------


def nucleus(probs: np.ndarray, p: float, steps: int = 50) -> float:
  """The largest threshold t so that tokens of probability >= t have mass p.

  Halving an interval needs no sorting: 50 sums over the vocabulary, which any
  parallel machine does at once (Holtzman et al., arXiv:1904.09751, define the
  set). `low` always keeps enough, `high` never does.
  """
  low, high = 0.0, 1.0 + 1e-12
  for _ in range(steps):
    middle = (low + high) / 2
    if probs[probs >= middle].sum() >= p:
      low = middle
    else:
      high = middle
  return low


# --- The program ------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
  """Selects in four ways, and finds a nucleus."""
  flags = rung.parser(__doc__)
  args = flags.parse_args(argv)
  rng = np.random.default_rng(args.seed)
  logits = rng.normal(size=50_000)
  top = largest(logits, 40)
  assert [i for _, i in top] == list(np.argsort(-logits)[:40])
  print(f"the 40th of 50,000: {top[-1][0]:.6f}, {quickselect(logits, 40):.6f}")
  parts = [largest(part, 40) for part in np.split(logits, 8)]
  print(f"merged from 8 parts: {merge(parts, 40)[-1][0]:.6f}")
  probs = np.exp(3 * logits) / np.exp(3 * logits).sum()
  t = nucleus(probs, 0.9)
  kept = probs[probs >= t]
  print(f"nucleus of 0.9: {len(kept)} tokens with {kept.sum():.6f} of the mass")
  draw(args.out, probs)


def draw(out, probs: np.ndarray) -> None:
  """Cost of selection by n; size of the nucleus by p."""
  page, (left, right) = rung.figure(2)
  sizes = [1000, 4000, 16_000, 64_000]
  for name, pick in (("heap", largest), ("quickselect", quickselect)):
    times = []
    for n in sizes:
      x, each = np.random.default_rng(n).normal(size=n), []
      for _ in range(7):
        begin = time.perf_counter()
        pick(x, 40)
        each.append(1e3 * (time.perf_counter() - begin))
      times.append(min(each))
    left.loglog(sizes, times, "o-", label=f"{name}, k = 40")
  left.set(xlabel="n", ylabel="milliseconds", title="The k largest of n")
  left.legend(frameon=False)
  p = np.linspace(0.05, 0.99, 30)
  kept = [int(np.sum(probs >= nucleus(probs, share))) for share in p]
  right.semilogy(p, kept)
  right.set(xlabel="p", ylabel="tokens kept", title="The nucleus")
  rung.save(page, out, "topk")


if __name__ == "__main__":
  rung.run(main)
