"""Exact and guided searches through the tree of all continuations.

Beams keep a fixed number of texts and may lose the best one. The searches here
look at single texts, in Python, with a heap: `most_likely` is Dijkstra's
algorithm over costs -log p (A* with a bound on what is to come), and provably
finds the likeliest text; `backtrack` goes depth first for one that a rule
accepts; `best_of` and `minimum_risk` choose among samples; `viterbi` finds the
best path through a trellis. For small problems and for learning: a real
vocabulary and ten tokens are beyond any exact search.
"""

import functools
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.generate.beam import best
from jaxlm.generate.decode import UNROLLED, scored
from jaxlm.generate.samplers import Sample, Sampler
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder, forward, head

Array = jax.Array
Tree = Any
Text = tuple[int, ...]
Expand = Callable[[Text], np.ndarray]  # new tokens -> log p of the next [vocab]


def expander(
  model: Decoder,
  params: Tree,
  prompt: Sequence[int],
  room: int,
  compute: Compute = UNROLLED,
) -> Expand:
  """What the searches ask: log p of the next token behind prompt and text.

  Each text is asked for once; the rows that the model reads are all of one
  length, so that nothing is compiled twice.

  Args:
    model: what is asked.
    params: its arrays.
    prompt: its tokens; at least one.
    room: the longest text that will be asked for.
    compute: how to run.
  """
  if len(prompt) == 0 or len(prompt) + room > model.max_positions:
    raise UserError(
      f"a prompt of {len(prompt)} tokens and {room} new ones do not fit the "
      f"model's {model.max_positions} positions; give at least one token"
    )

  @jax.jit
  def read(params: Tree, row: Array, last: Array) -> Array:
    y = forward(model, params, row, compute=compute)[0, last]
    return jax.nn.log_softmax(y)

  @functools.cache
  def expand(text: Text) -> np.ndarray:
    row = np.zeros((1, len(prompt) + room), np.int32)
    known = [*prompt, *text]
    row[0, : len(known)] = known
    return np.asarray(read(params, row, np.int32(len(known) - 1)), np.float64)

  return expand


@dataclass(frozen=True)
class Answer:
  """What a search found.

  Attributes:
    tokens: the new tokens, its end included.
    logprob: their log-probability.
    expanded: how many texts were asked for.
  """

  tokens: Text
  logprob: float
  expanded: int


# --- Best first -------------------------------------------------------------


def most_likely(
  expand: Expand,
  n: int,
  eot: int | None = None,
  bound: Callable[[int], float] = lambda left: 0.0,
  limit: int = 100_000,
) -> Answer:
  """The likeliest text of `n` tokens, or shorter where it ends with `eot`.

  Dijkstra (1959): the heap always gives the text of the lowest cost -log p,
  and costs never fall, so the first whole text it gives is the best of all.
  With a `bound` it is A* (Hart, Nilsson, Raphael 1968), and looks at fewer
  texts. Of a text's children only the likeliest waits in the heap; each brings
  its next sibling when it leaves.

  Args:
    expand: log-probabilities of the next token.
    n: the most tokens.
    eot: a text is whole after this token.
    bound: the least cost that a text which is not whole may still add, where
      it has `left` tokens to go; it must never be too high.
    limit: of texts expanded.

  Raises:
    UserError: if the limit is reached.
  """
  order = itertools.count()  # of equal costs, the first in comes first
  heap: list[tuple] = []
  ranked: dict[Text, tuple[np.ndarray, np.ndarray]] = {}

  def whole(text: Text) -> bool:
    return len(text) == n or (eot is not None and text[-1:] == (eot,))

  def push(parent: Text, cost: float, rank: int) -> None:
    scores, tokens = ranked[parent]
    if rank == len(tokens) or not np.isfinite(scores[rank]):
      return
    text = (*parent, int(tokens[rank]))
    here = cost - float(scores[rank])
    to_come = 0.0 if whole(text) else bound(n - len(text))
    entry = (here + to_come, next(order), here, text, parent, cost, rank)
    heapq.heappush(heap, entry)

  def grow(text: Text, cost: float) -> None:
    if len(ranked) == limit:
      raise UserError(
        f"no text is proved the likeliest after {limit} expansions; raise the "
        "limit, ask for fewer tokens, or use beam search"
      )
    scores = np.asarray(expand(text))
    tokens = np.argsort(-scores, kind="stable")
    ranked[text] = scores[tokens], tokens
    push(text, cost, 0)

  grow((), 0.0)
  while heap:
    _, _, cost, text, parent, before, rank = heapq.heappop(heap)
    if whole(text):
      return Answer(text, -cost, len(ranked))
    push(parent, before, rank + 1)
    grow(text, cost)
  raise UserError("every continuation has probability 0; is the model broken?")


def certainty(model: Decoder, params: Tree) -> float:
  """A probability that no token can exceed, whatever the context.

  The final norm keeps hidden states within a ball of radius sqrt(dim), scaled
  and shifted by its parameters. So the gap between the logits of v and u is at
  most |s (w_v - w_u)| sqrt(dim) + b (w_v - w_u), and with all gaps of a token
  known, so is the largest softmax. `-log` of it per token bounds A*:

      bound = lambda left: -left * math.log(certainty(model, params))

  (for texts without an end token, which all have `left` tokens to go).
  """
  w = np.asarray(head(model, params, UNROLLED), np.float64)
  norm = {k: np.asarray(v, np.float64) for k, v in params["norm"].items()}
  scale = norm.get("scale", np.ones(model.dim))
  scale = scale + getattr(model.norm, "offset", 0.0)
  shift = norm.get("bias", np.zeros(model.dim)) @ w
  turned = scale[:, None] * w
  top = 0.0
  for v in range(model.vocab):
    gap = np.linalg.norm(turned[:, [v]] - turned, axis=0) * math.sqrt(model.dim)
    gap = gap + shift[v] - shift
    if model.softcap is not None:
      gap = np.minimum(gap, 2 * model.softcap)
    others = np.exp(-np.delete(gap, v)).sum()
    top = max(top, 1.0 / (1.0 + others))
  return top


# --- Depth first ------------------------------------------------------------


def backtrack(
  expand: Expand,
  accepts: Callable[[Text], bool],
  n: int,
  *,
  allows: Callable[[Text], bool] = lambda text: True,
  width: int = 8,
  eot: int | None = None,
  limit: int = 10_000,
) -> Answer:
  """The first whole text that a rule accepts, likelier branches first.

  Depth first: the likeliest token is followed until the text is whole or not
  allowed; then the last choice is undone and the next one tried.

  Args:
    expand: log-probabilities of the next token.
    accepts: the rule for whole texts, of `n` tokens or ending with `eot`.
    n: the most tokens.
    allows: whether a text may still become one that is accepted.
    width: how many tokens are tried in each place.
    eot: a text is whole after this token.
    limit: of texts expanded.

  Raises:
    UserError: if there is none among those tried, or the limit is reached.
  """
  expanded = 0

  def children(text: Text, logprob: float) -> Iterator[tuple[Text, float]]:
    nonlocal expanded
    if expanded == limit:
      raise UserError(
        f"no text is accepted after {limit} expansions; raise the limit, or "
        "rule out hopeless texts with `allows`"
      )
    expanded += 1
    scores, _, tokens = best(jnp.asarray(expand(text))[None], width)
    for score, token in zip(scores.tolist(), tokens.tolist(), strict=True):
      yield (*text, token), logprob + score

  stack = [children((), 0.0)]
  while stack:
    text, logprob = next(stack[-1], (None, 0.0))
    if text is None:
      stack.pop()
    elif len(text) == n or text[-1] == eot:
      if accepts(text):
        return Answer(text, logprob, expanded)
    elif allows(text):
      stack.append(children(text, logprob))
  raise UserError(
    f"none of the texts of {n} tokens is accepted, trying {width} tokens in "
    "each place; raise width"
  )


# --- Choosing among samples -------------------------------------------------


def best_of(
  model: Decoder,
  params: Tree,
  prompt: Sequence[int],
  max_new_tokens: int,
  n: int,
  *,
  keep: int = 1,
  score: Callable[[Text, float], float] | None = None,
  sampler: Sampler = Sample(),
  key: Array | None = None,
  eot: int | Sequence[int] | None = None,
  batch: int = 16,
  compute: Compute = UNROLLED,
) -> list[tuple[float, Text]]:
  """The best `keep` of `n` samples, best first; only so many are ever held.

  Args:
    model: as of `decode.generate`, like all that is not explained here.
    params: its arrays.
    prompt: the tokens of one prompt.
    max_new_tokens: the longest text.
    n: how many are drawn.
    keep: how many are kept, in a heap whose root is the worst of them.
    score: of new tokens and their log-probability (a reward model, a
      verifier); None means log p per token.
    sampler: how they are drawn.
    key: their randomness.
    eot: ends a text; one token, or several.
    batch: how many are drawn at a time.
    compute: how to run.

  Raises:
    UserError: as `decode.generate`; or for numbers below 1.
  """
  if min(n, keep, batch) < 1:
    raise UserError(f"n={n}, keep={keep}, batch={batch}: use 1 or more")
  key = jax.random.key(0) if key is None else key
  heap: list[tuple[float, int, Text]] = []
  for start in range(0, n, batch):
    rows = jnp.arange(start, start + batch, dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    new = scored(
      model,
      params,
      np.asarray([prompt], np.int32),
      max_new_tokens,
      sampler,
      keys,
      eot=eot,
      samples=batch,
      compute=compute,
    )
    for i in range(min(batch, n - start)):
      text = _whole(new.tokens[i], eot)
      logprob = float(new.logprobs[i, : len(text)].sum())
      value = logprob / len(text) if score is None else score(text, logprob)
      entry = (float(value), -(start + i), text)  # of equals, the first drawn
      if len(heap) < keep:
        heapq.heappush(heap, entry)
      else:
        heapq.heappushpop(heap, entry)
  return [(value, text) for value, _, text in sorted(heap, reverse=True)]


def _whole(row: np.ndarray, eot: int | Sequence[int] | None) -> Text:
  """The tokens up to and with the first end."""
  ends = () if eot is None else np.atleast_1d(np.asarray(eot))
  last = np.flatnonzero(np.isin(row, ends))[:1].tolist() or [len(row)]
  return tuple(row[: last[0] + 1].tolist())


def token_f1(a: Text, b: Text) -> float:
  """Harmonic mean of the shares of tokens that each has of the other."""
  common = sum((Counter(a) & Counter(b)).values())
  return 2 * common / (len(a) + len(b)) if len(a) + len(b) else 1.0


def minimum_risk(
  texts: Sequence[Text],
  utility: Callable[[Text, Text], float] = token_f1,
  weights: Sequence[float] | None = None,
) -> int:
  """Which text has the highest mean utility against all others as references.

  Minimum Bayes risk decoding (Kumar and Byrne 2004; Eikema and Aziz,
  arXiv:2005.10283) with the samples as the model's belief.

  Args:
    texts: samples.
    utility: of a candidate, given a reference.
    weights: of each text as a reference; None means equal.
  """
  if not texts:
    raise UserError("there are no texts to choose from")
  weights = [1.0] * len(texts) if weights is None else weights
  gain = [
    sum(w * utility(a, b) for b, w in zip(texts, weights, strict=True))
    for a in texts
  ]
  return int(np.argmax(gain))


# --- Trellis ----------------------------------------------------------------


def viterbi(
  start: Array, transitions: Array, emissions: Array
) -> tuple[Array, Array]:
  """The best path through a trellis (Viterbi 1967).

  Args:
    start: log-probabilities of the first state, `[states]`.
    transitions: from state i to state j, `[states, states]`.
    emissions: of what was seen at each time in each state, `[time, states]`.

  Returns:
    The path int32 `[time]`, and its log-probability.
  """

  def forward(score: Array, seen: Array) -> tuple[Array, Array]:
    through = score[:, None] + transitions
    return jnp.max(through, axis=0) + seen, jnp.argmax(through, axis=0)

  def backward(state: Array, came_from: Array) -> tuple[Array, Array]:
    before = came_from[state]
    return before, before

  score, came_from = jax.lax.scan(forward, start + emissions[0], emissions[1:])
  last = jnp.argmax(score)
  _, path = jax.lax.scan(backward, last, came_from, reverse=True)
  path = jnp.concatenate([path, last[None]]).astype(jnp.int32)
  return path, jnp.max(score)
