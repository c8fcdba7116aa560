"""Shortest paths: the likeliest text, for certain.

Dijkstra, "A note on two problems in connexion with graphs", 1959. A text is a
path, and a token costs -log p, which is never negative. So the first text of
full length that leaves the queue is the likeliest of all:

    cost(text + token) = cost(text) - log p(token | text)

What it could not do: a model that is unsure makes all texts cost alike, and
then nearly every prefix is expanded. And the likeliest text is often a dull
one, or empty (Stahlberg and Byrne, arXiv:1908.10090), so decoders sample, or
keep a few beams and hope.
"""

from collections.abc import Callable

import numpy as np

from jaxlm.ladder import rung
from jaxlm.ladder.topk import sift_down

VOCAB, LENGTH = 6, 8
PREFIXES = sum(VOCAB**n for n in range(LENGTH))


def likeliest(
  step: Callable[[tuple[int, ...]], np.ndarray], length: int
) -> tuple[tuple[int, ...], float, int]:
  """The likeliest text of `length` tokens; the queue is a heap.

  Args:
    step: tokens so far -> log-probabilities of the next one, [vocab].
    length: of the text.

  Returns:
    The tokens, their log-probability, and how many prefixes were expanded.
  """
  queue: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
  expanded = 0
  while True:
    cost, text = queue[0]
    queue[0] = queue[-1]
    queue.pop()
    sift_down(queue, 0) if queue else None
    if len(text) == length:
      return text, -cost, expanded
    expanded += 1
    for token, logp in enumerate(step(text)):
      queue.append((cost - float(logp), (*text, token)))
      sift_up(queue)


def sift_up(heap: list) -> None:
  """Moves the last item up until its parent is not larger."""
  i = len(heap) - 1
  while i and heap[i] < heap[(i - 1) // 2]:
    heap[i], heap[(i - 1) // 2] = heap[(i - 1) // 2], heap[i]
    i = (i - 1) // 2


def chain(vocab: int, sharp: float, seed: int) -> Callable:
  """A language of random transitions; a larger `sharp` is more certain."""
  rng = np.random.default_rng(seed)
  table = sharp * rng.normal(size=(vocab + 1, vocab))
  table -= np.log(np.exp(table).sum(1, keepdims=True))
  return lambda text: table[text[-1] if text else vocab]


def search(seed: int) -> list[tuple[float, float, float, int]]:
  """(certainty, best, greedy, expanded) in languages of a few tokens."""
  rows = []
  for sharp in (0.5, 1.0, 2.0, 4.0):
    step, greedy, text = chain(VOCAB, sharp, seed), 0.0, ()
    _, best, expanded = likeliest(step, LENGTH)
    for _ in range(LENGTH):
      token = int(np.argmax(step(text)))
      greedy += float(step(text)[token])
      text = (*text, token)
    rows.append((sharp, best, greedy, expanded))
  return rows


def main(argv: list[str] | None = None) -> None:
  """Searches four languages, from unsure to certain."""
  flags = rung.parser(__doc__)
  args = flags.parse_args(argv)
  found = search(args.seed)
  for sharp, best, greedy, expanded in found:
    print(
      f"certainty {sharp}: greedy {greedy:.2f}, likeliest {best:.2f} nats, "
      f"{expanded:,} of {PREFIXES:,} prefixes expanded"
    )
  draw(args.out, found)


def draw(out, found: list) -> None:
  """What a search expands, and what greedy choice loses."""
  page, (left, right) = rung.figure(2)
  sharp, best, greedy, expanded = zip(*found, strict=True)
  left.semilogy(sharp, expanded, "o-")
  left.axhline(PREFIXES, ls="--", color=rung.COLORS[5])
  left.set(xlabel="certainty of the language", ylabel="prefixes expanded")
  left.set_title("Dijkstra (dashed: all of them)")
  right.plot(sharp, best, "o-", label="likeliest")
  right.plot(sharp, greedy, "o-", label="greedy")
  right.set(xlabel="certainty of the language", ylabel="log-probability")
  right.legend(frameon=False)
  rung.save(page, out, "dijkstra")


if __name__ == "__main__":
  rung.run(main)
