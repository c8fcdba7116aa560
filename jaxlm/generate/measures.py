"""What can be counted in generated texts: how varied, repetitive, likely.

Pure functions over lists of tokens and arrays; `benchmarks/knobs.py` draws with
them what each sampling knob does.
"""

import math
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError

Array = jax.Array
Text = Sequence[int]


def ngrams(text: Text, n: int) -> list[tuple[int, ...]]:
  """All runs of `n` tokens, in order, those that overlap included.

  >>> ngrams([5, 6, 7], 2)
  [(5, 6), (6, 7)]
  """
  if n < 1:
    raise UserError(f"n={n}: an n-gram has one token or more")
  return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def distinct(texts: Sequence[Text], n: int) -> float:
  """Share of different n-grams among all n-grams of all texts: distinct-n.

  distinct-n = |set of n-grams| / |n-grams| (Li et al., arXiv:1510.03055,
  section 5.3). It falls as texts grow longer or more, so only like amounts of
  text compare. 0 where there are no n-grams.
  """
  found = [gram for text in texts for gram in ngrams(text, n)]
  return len(set(found)) / len(found) if found else 0.0


def repetition(texts: Sequence[Text], n: int = 4) -> float:
  """Share of n-grams that their own text has had before, the mean of texts.

  1 - |set of n-grams| / |n-grams| of each text, the seq-rep-n of Welleck et
  al. (arXiv:1908.04319, section 6). Texts shorter than `n` do not count.
  """
  long = [text for text in texts if len(text) >= n]
  shares = [1.0 - distinct([text], n) for text in long]
  return sum(shares) / len(shares) if shares else 0.0


def unigram_entropy(texts: Sequence[Text]) -> float:
  """Entropy in nats of the tokens that were used: -sum f log f.

  f is how often a token comes, divided by how many tokens there are.
  """
  counts = Counter(token for text in texts for token in text)
  total = counts.total()
  return -sum(c / total * math.log(c / total) for c in counts.values())


def perplexity(logprobs: Sequence[float]) -> float:
  """exp(-mean of log-probabilities), those of the tokens that were chosen.

  Raises:
    UserError: if there are none.
  """
  if len(logprobs) == 0:
    raise UserError("perplexity of no tokens; give at least one")
  return math.exp(-math.fsum(logprobs) / len(logprobs))


def entropy(logits: Array) -> Array:
  """Entropy of softmax(logits) in nats, `[...]` of `[..., vocab]`.

  H = -sum p log p; tokens ruled out by -inf add nothing.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  p = jnp.exp(log_p)
  return -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
