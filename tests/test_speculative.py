"""Speculation: the text of plain decoding, in fewer steps of the target."""

import dataclasses
import functools
import itertools
import re
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st
from tiny_models import (
  DIM,
  LENGTH,
  VOCAB,
  block,
  random_params,
  random_tokens,
)

from jaxlm import arrays, optim
from jaxlm.data.corpus import documents
from jaxlm.data.tokenizers import Bytes
from jaxlm.errors import UserError
from jaxlm.generate import constraints, speculative
from jaxlm.generate.decode import generate
from jaxlm.generate.drafts import DraftModel, Lookup, Medusa, Method
from jaxlm.generate.filters import (
  Frequency,
  NoRepeat,
  Presence,
  Seen,
  Temperature,
  TopP,
)
from jaxlm.generate.judge import Text, verify
from jaxlm.generate.samplers import Greedy, Sample, apply
from jaxlm.generate.speculative import speculate
from jaxlm.generate.step import UNROLLED
from jaxlm.layers.latent import LatentAttention
from jaxlm.layers.mask import Chunked, Sliding
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import init
from jaxlm.models.decoder import Block, Decoder, forward
from jaxlm.models.families import gpt2, llama, recurrent
from jaxlm.models.medusa import Heads
from jaxlm.objectives import next_token, tokens_ahead
from jaxlm.state import create, make_step

LATENT = LatentAttention(DIM, 3, rank=7, nope_dim=5, rope_dim=4, value_dim=6)


def small(*pattern: Block) -> Decoder:
  """These blocks once."""
  return Decoder(VOCAB, DIM, ((pattern, 1),), RMSNorm(DIM), LENGTH)


GPT2 = gpt2.decoder(VOCAB, DIM, 1, 2, LENGTH)
TARGETS = {
  "gpt2": GPT2,
  # Rings that the text goes around several times, and what has none.
  "windows": small(block(Sliding(5)), block(Sliding(4, sinks=2))),
  "chunks": small(block(Chunked(6)), block(position=None)),
  "latent": small(Block(LATENT, GLU(DIM, 24, silu), RMSNorm(DIM))),
}
GAMMA, NEW, LENGTHS = 3, 20, [7, 3, 1]
PROMPTS = np.asarray(random_tokens(3, 7))


def like(params, amount: float = 0.03, seed: int = 1):
  """Parameters of a draft that often says what the target says."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + amount * rng.normal(size=x.shape).astype(np.float32), params
  )


def run(model, params, draft, draft_params=None, **more):
  """New tokens of three unequal prompts, and figures."""
  given = {"lengths": LENGTHS, "gamma": GAMMA} | more
  n = given.pop("n", NEW)
  tokens = given.pop("tokens", PROMPTS)
  found, stats = speculate(
    model, params, tokens, n, draft, draft_params, **given
  )
  return np.asarray(found)[:, tokens.shape[1] :], stats


# --- Greedy -----------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_greedy_text_is_the_plain_one(name: str):
  """With a draft that is often right, over the end of windows and chunks.

  The draft has the target's own layers, so that its cache is taken back too;
  prompts differ in length, and rows accept different numbers of tokens.
  """
  model = TARGETS[name]
  params = random_params(model)
  plain = generate(model, params, PROMPTS, NEW, lengths=LENGTHS)
  found, stats = run(model, params, DraftModel(model), like(params))
  np.testing.assert_array_equal(found, np.asarray(plain)[:, 7:])
  assert (stats.accepted > 0).all()
  assert (stats.rejected > 0).any()
  assert len(set(stats.calls)) > 1
  np.testing.assert_array_equal(stats.made, NEW)


def by_whole_passes(model, params, draft_params, prompt: list[int]):
  """Calls, accepted and rejected of a greedy row, told without any cache."""

  @jax.jit
  def choices(params, row):
    return jnp.argmax(forward(model, params, row[None])[0], axis=-1)

  def best(params, text):
    row = jnp.zeros(LENGTH, jnp.int32).at[: len(text)].set(jnp.array(text))
    return int(choices(params, row)[len(text) - 1])

  text = [*prompt, best(params, prompt)]
  stop, found = len(prompt) + NEW, np.zeros(3, int)
  while len(text) < stop:
    found[0] += 1
    longer = text
    for _ in range(GAMMA):
      longer = [*longer, best(draft_params, longer)]
    for token in longer[len(text) : stop]:
      text = [*text, best(params, text)]
      found[1 if text[-1] == token else 2] += 1
      if text[-1] != token:
        break
    else:
      if len(text) < stop:
        text = [*text, best(params, text)]
  return found.tolist()


def test_figures_are_those_of_whole_passes():
  """So a draft's cache, too, forgets what was rejected, windows included."""
  model = TARGETS["windows"]
  params = random_params(model)
  _, stats = run(model, params, DraftModel(model), like(params))
  found = np.stack([stats.calls, stats.accepted, stats.rejected], axis=1)
  want = [
    by_whole_passes(model, params, like(params), row[-n:].tolist())
    for row, n in zip(PROMPTS, LENGTHS, strict=True)
  ]
  np.testing.assert_array_equal(found, want)


def test_a_draft_that_is_the_target_is_always_right():
  """Four tokens a call: 1 + 5 x 4 for the 20 that are wanted."""
  model = GPT2
  params = random_params(model)
  _, stats = run(model, params, DraftModel(model), params)
  assert stats.target_calls == 5
  assert stats.acceptance == 1.0
  np.testing.assert_array_equal(stats.accepted, stats.proposed)
  assert stats.tokens_per_call == pytest.approx(19 / 5)


def test_filters_see_the_text_with_its_proposals():
  """Penalties and n-grams count what has been proposed before a token."""
  model = GPT2
  params = random_params(model)
  sampler = Greedy((Frequency(0.7), NoRepeat(2)))
  plain = generate(model, params, PROMPTS, NEW, sampler, lengths=LENGTHS)
  found, stats = run(
    model, params, DraftModel(model), like(params), sampler=sampler
  )
  np.testing.assert_array_equal(found, np.asarray(plain)[:, 7:])
  assert stats.accepted.sum() > 0


def test_a_text_ends_within_an_accepted_run():
  """Whichever token ends it; several may. One program serves all."""
  model = GPT2
  params = random_params(model)
  plain = np.asarray(generate(model, params, PROMPTS, NEW, lengths=LENGTHS))
  size, inside = None, 0
  for token in sorted({*plain[:, 9:].flatten().tolist()})[:8]:
    eot = [int(token), int(plain[0, 15])]
    want = generate(model, params, PROMPTS, NEW, lengths=LENGTHS, eot=eot)
    found, stats = run(model, params, DraftModel(model), params, eot=eot)
    np.testing.assert_array_equal(found, np.asarray(want)[:, 7:])
    inside += ((stats.made - 1) % (GAMMA + 1) > 0).sum()
    size = size or speculative._go_on._cache_size()
  assert inside > 3
  assert speculative._go_on._cache_size() == size


def test_constraints_hold():
  """A table: valid, complete, and greedy as without speculation."""
  model = dataclasses.replace(GPT2, vocab=258)
  params = random_params(model)
  tokenizer = Bytes(["<|endoftext|>"])
  spec = constraints.compile(
    constraints.Regex("(ab|cd){2,9}-[0-9]{3}"), tokenizer
  )
  plain = generate(
    model, params, PROMPTS, NEW, lengths=LENGTHS, constraint=spec
  )
  found, _ = run(model, params, Lookup(), constraint=spec)
  np.testing.assert_array_equal(found, np.asarray(plain)[:, 7:])
  found, stats = run(
    model, params, Lookup(), constraint=spec, sampler=Sample(2.0)
  )
  assert stats.accepted.sum() > 0
  for row in found:
    text = tokenizer.decode(row[row != tokenizer.eot])
    assert re.fullmatch("(ab|cd){2,9}-[0-9]{3}", text), text


# --- Sampled ----------------------------------------------------------------

SIDES, ROWS, DEPTH = 4, 50_000, 4
SMALL = llama.decoder(
  SIDES, 8, layers=1, heads=2, kv_heads=1, mlp_dim=8, max_positions=32
)
START = [2, 0, 1]
PARAMS = jax.tree.map(lambda x: 2.0 * x, random_params(SMALL))
FILTERS = (Temperature(1.4), Presence(0.8), TopP(0.85))


def exact(model, params, filters) -> np.ndarray:
  """Probability of each of the texts of `DEPTH` tokens, by whole passes."""
  texts = np.array(list(itertools.product(range(SIDES), repeat=DEPTH)))
  rows = np.concatenate([np.tile(START, (len(texts), 1)), texts], axis=1)
  scores, first = forward(model, params, jnp.asarray(rows)), len(START)
  total = np.ones(len(texts))
  for i in range(DEPTH):
    end = jnp.int32(first + i)
    seen = Seen(jnp.asarray(rows, jnp.int32), jnp.int32(first), end)
    p = jax.nn.softmax(apply(filters, scores[:, first + i - 1], seen), axis=-1)
    total *= np.asarray(p, np.float64)[np.arange(len(texts)), texts[:, i]]
  return total


def surprise(counts: np.ndarray, p: np.ndarray) -> float:
  """The p-value of a chi-square test; rare texts are one class."""
  expected = p * counts.sum()
  often = expected >= 5
  counts = np.append(counts[often], counts[~often].sum())
  expected = np.append(expected[often], expected[~often].sum())
  if expected[-1] < 5:  # too little even together
    if counts[-1] >= 25:
      return 0.0
    counts, expected = counts[:-1], expected[:-1]
  expected = expected * counts.sum() / expected.sum()
  return scipy.stats.chisquare(counts, expected).pvalue


HEADS = Heads.on(SMALL, 2)
DRAFTS = {
  "model": (DraftModel(SMALL), lambda: random_params(SMALL, 3)),
  "lookup": (Lookup(2), lambda: None),
  "heads": (Medusa(HEADS), lambda: random_params(HEADS, 4)),
}


@pytest.mark.parametrize(
  ("name", "filters"),
  [("model", ()), ("model", FILTERS), ("lookup", FILTERS), ("heads", ())],
)
def test_samples_are_distributed_as_the_target_says(name: str, filters: tuple):
  """50,000 texts of four tokens, 256 classes, against exact probabilities.

  Four tokens with gamma = 2 are made in every way there is: by the prompt, by
  acceptance, after a rejection, and behind two that were accepted.
  """
  draft, draft_params = DRAFTS[name]
  sampler = Sample(filters=filters)
  found, stats = speculate(
    SMALL,
    PARAMS,
    np.tile(START, (ROWS, 1)),
    DEPTH,
    draft,
    draft_params(),
    sampler,
    jax.random.key(11),
    gamma=2,
  )
  digits = np.asarray(found)[:, len(START) :] @ (
    SIDES ** np.arange(DEPTH)[::-1]
  )
  counts = np.bincount(digits, minlength=SIDES**DEPTH)
  assert stats.rejected.sum() > ROWS / 10
  assert stats.accepted.sum() > ROWS / 10
  p = exact(SMALL, PARAMS, filters)
  assert counts[p == 0].sum() == 0
  assert surprise(counts, p) > 1e-3
  # The same test sees what is wrong: the draft's own texts, other filters.
  other = exact(SMALL, random_params(SMALL, 3), filters)
  assert surprise(counts, np.maximum(other, 1e-9)) < 1e-9
  warm = exact(SMALL, PARAMS, (*filters, Temperature(1.1)))
  assert surprise(counts, np.maximum(warm, 1e-9)) < 1e-6


@hypothesis.given(st.integers(0, 10**6))
def test_the_judge_keeps_the_distribution(seed: int):
  """For all p, q: min(p, q) + (1 - sum(min(p, q))) left = p."""
  rng, chances = np.random.default_rng(seed), 200
  p, q = rng.dirichlet(np.full(5, 0.3), 2).astype(np.float32)
  # Every token is proposed with every chance.
  token = np.repeat(np.arange(5, dtype=np.int32), chances)[:, None]
  u = np.tile(np.linspace(0, 1, chances, endpoint=False), 5)[:, None]
  accepted, left = verify(
    jnp.asarray(np.broadcast_to(p, (len(u), 2, 5))),
    jnp.asarray(np.broadcast_to(q, (len(u), 1, 5))),
    token,
    jnp.asarray(u, jnp.float32),
  )
  both = np.minimum(p, q)
  rejected = (np.asarray(accepted) == 0) & (q[token[:, 0]] > 0)
  whole = both + (1 - both.sum()) * np.asarray(left)[rejected]
  np.testing.assert_allclose(whole, np.tile(p, (len(whole), 1)), atol=1e-5)
  share = np.asarray(accepted).reshape(5, chances).mean(1)
  want = np.minimum(1, p / np.maximum(q, 1e-30)) * (q > 0)
  np.testing.assert_allclose(share, want, atol=1.01 / chances)


def test_nothing_proposed_is_a_plain_draw():
  """Where q is zero, all of p is left."""
  p = jnp.array([[[0.2, 0.8], [0.5, 0.5]]], jnp.float32)
  zero = jnp.zeros((1, 1, 2), jnp.float32)
  tokens, u = jnp.array([[1]], jnp.int32), jnp.zeros((1, 1), jnp.float32)
  accepted, left = verify(p, zero, tokens, u)
  assert accepted.tolist() == [0]
  np.testing.assert_allclose(left, [[0.2, 0.8]], rtol=1e-6)


def test_a_row_depends_on_its_prompt_and_key_alone():
  """The same row among other neighbours says the same."""
  model = GPT2
  params = random_params(model)
  keys = jax.random.split(jax.random.key(5), 6)
  draft = (DraftModel(model), like(params))
  more = {"sampler": Sample(1.3), "key": keys[:3]}
  first, _ = run(model, params, *draft, **more)
  other = np.array(random_tokens(3, 7, seed=9))
  other[2] = PROMPTS[0]
  more["key"] = jnp.stack([keys[3], keys[4], keys[0]])
  second, _ = run(
    model, params, *draft, tokens=other, lengths=[4, 6, 7], **more
  )
  np.testing.assert_array_equal(first[0], second[2])
  assert (first[1] != second[1]).any()


# --- How many ---------------------------------------------------------------


def fixed(p: list[float]):
  """GPT-2 whose next token does not depend on the text: softmax = p."""
  model = gpt2.decoder(len(p), 8, 1, 1, max_positions=512)
  params = dict(random_params(model))
  one = jnp.zeros(8).at[0].set(1.0)
  params["norm"] = {"scale": jnp.zeros(8), "bias": one}
  table = params["embed"]["tokens"].at[:, 0].set(jnp.log(jnp.array(p)))
  params["embed"] = params["embed"] | {"tokens": table}
  return model, params


@pytest.mark.parametrize(
  "q",
  [[0.1, 0.3, 0.6], [0.5, 0.35, 0.15]],  # accepted: 0.5, 0.85
)
def test_tokens_per_call_follow_the_formula(q: list[float]):
  """(1 - a^(g+1)) / (1 - a) for independent acceptance, within 5 %."""
  model, params = fixed([0.6, 0.2, 0.2])
  _, draft_params = fixed(q)
  a = float(np.minimum([0.6, 0.2, 0.2], q).sum())
  _, stats = speculate(
    model,
    params,
    np.ones((32, 1), int),
    400,
    DraftModel(model),
    draft_params,
    Sample(),
    gamma=4,
  )
  assert stats.acceptance == pytest.approx(a, abs=0.02)
  assert stats.tokens_per_call == pytest.approx((1 - a**5) / (1 - a), rel=0.05)


# --- Drafts -----------------------------------------------------------------


def propose(rows: list[list[int]], lookup: Lookup, gamma: int = 3):
  """What a lookup proposes for texts, and whether it does."""
  room = max(map(len, rows)) + gamma
  tokens = np.full((len(rows), room), -1, np.int32)
  for row, text in zip(tokens, rows, strict=True):
    row[: len(text)] = text
  text = Text(
    tokens=jnp.asarray(tokens),
    end=jnp.array([len(row) for row in rows], jnp.int32),
    start=jnp.int32(0),
    stop=jnp.int32(room),
    pad=jnp.zeros(len(rows), jnp.int32),
    keys=None,
  )
  how = Method(GPT2, lookup, gamma, Greedy(), UNROLLED)
  tokens, q, _ = lookup.propose(how, None, (), text)
  return np.asarray(tokens).tolist(), np.asarray(q).sum((1, 2)) == gamma


def by_hand(text: list[int], n: int, min_n: int, gamma: int):
  """The same, as one would write it in Python."""
  best, where = 0, None
  for place in range(len(text) - 1):
    same = 0
    while same < min(n, place + 1) and text[place - same] == text[-1 - same]:
      same += 1
    if same >= max(best, min_n):
      best, where = same, place
  if where is None:
    return None
  return [text[where + 1 :][i % (len(text) - 1 - where)] for i in range(gamma)]


@hypothesis.settings(max_examples=25)
@hypothesis.given(
  st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=4, max_size=4
  ),
  st.sampled_from([(3, 1), (2, 2)]),
)
def test_lookup_is_what_it_says(rows, sizes):
  """The latest of the longest matches, and what comes behind it."""
  tokens, found = propose(rows, Lookup(*sizes))
  for text, got, there in zip(rows, tokens, found, strict=True):
    want = by_hand(text, *sizes, gamma=3)
    assert there == (want is not None)
    assert want is None or got == want


def test_lookup_by_hand():
  """`1 2` has come before, `5` never; a text of one token has no past."""
  rows = [[1, 2, 3, 4, 1, 2], [1, 2, 3, 5], [7], [8, 8]]
  tokens, found = propose(rows, Lookup())
  assert found.tolist() == [True, False, False, True]
  assert (tokens[0], tokens[3]) == ([3, 4, 1], [8, 8, 8])


def test_untrained_heads_say_what_the_trunk_says():
  """And their loss is its cross entropy, further ahead; it stays still."""
  model, heads = GPT2, Heads.on(GPT2, 2)
  params = random_params(model)
  both = {"trunk": params, "heads": heads.start(model, params)}
  tokens = random_tokens(2, 9)
  mask = np.ones((2, 8), np.int32)
  mask[1, 5:] = 0
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}

  def loss(both):
    return tokens_ahead(model, heads, both, batch)

  (found, metrics), grads = jax.value_and_grad(loss, has_aux=True)(both)
  log_p = jax.nn.log_softmax(forward(model, params, tokens[:, :-1]))
  want = 0.0
  for k in (1, 2):
    pairs = [
      -log_p[b, t, tokens[b, t + 1 + k]]
      for b, t in itertools.product(range(2), range(8 - k))
      if mask[b, t + k]
    ]
    want += 0.8**k * np.mean(pairs)
  assert float(found) == pytest.approx(want, rel=1e-5)
  assert metrics["right"].shape == (2,)
  assert all((g == 0).all() for g in jax.tree.leaves(grads["trunk"]))
  assert all((g != 0).any() for g in jax.tree.leaves(grads["heads"]))


def test_heads_do_not_look_into_another_document():
  """A packed row is two documents."""
  model, heads = GPT2, Heads.on(GPT2, 2)
  both = {"trunk": random_params(model), "heads": random_params(heads)}
  row = random_tokens(1, 13)

  def metrics(inputs, targets, segments, positions):
    batch = {"inputs": inputs, "targets": targets, "segments": segments}
    batch["positions"] = positions
    return tokens_ahead(model, heads, both, batch)[1]

  one = jnp.zeros((1, 6), jnp.int32)
  where = jnp.arange(6, dtype=jnp.int32)[None]
  parts = [
    metrics(row[:, a : a + 6], row[:, a + 1 : a + 7], one, where)
    for a in (0, 6)
  ]
  whole = metrics(
    row[:, :12],
    row[:, 1:],
    jnp.concatenate([one, one + 1], axis=1),
    jnp.concatenate([where, where], axis=1),
  )
  mean = (parts[0]["loss"] + parts[1]["loss"]) / 2
  assert float(whole["loss"]) == pytest.approx(float(mean), rel=1e-5)


# --- Bad input --------------------------------------------------------------


@functools.cache
def other_vocab():
  return gpt2.decoder(VOCAB + 1, 8, 1, 1, LENGTH)


BAD = {
  "gamma=0": (Lookup(), None, {"gamma": 0}),
  "share one tokenizer": (DraftModel(other_vocab()), {}, {}),
  "has been made for 8": (
    DraftModel(gpt2.decoder(VOCAB, 8, 1, 1, 8)),
    {},
    {},
  ),
  "pass draft_params": (DraftModel(GPT2), None, {}),
  "no parameters": (Lookup(), {}, {}),
  "from 2 heads": (Medusa(Heads(2, DIM, VOCAB)), {}, {}),
  "train heads for it": (Medusa(Heads(4, DIM + 1, VOCAB)), {}, {}),
  "does not tell": (Lookup(), None, {"sampler": lambda y, k, s: 0}),
  "recurrent layers": (
    DraftModel(recurrent.decoder(VOCAB, 8, 1, 1, max_positions=LENGTH)),
    {},
    {},
  ),
  "outside the vocabulary": (Lookup(), None, {"tokens": PROMPTS + VOCAB}),
  "need 46 positions": (Lookup(), None, {"n": 40}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_error(message: str):
  """Before anything is compiled."""
  draft, draft_params, more = BAD[message]
  model = GPT2
  with pytest.raises(UserError, match=message):
    run(model, random_params(model), draft, draft_params, **more)


def test_more_bad_input():
  """Values that cannot be, a target that cannot go back, damaged weights."""
  with pytest.raises(UserError, match="min_n"):
    Lookup(2, 3)
  with pytest.raises(UserError, match="0 heads"):
    Heads(0, 8, 8)
  model = recurrent.decoder(VOCAB, 8, 1, 1, mixer="rglru", max_positions=LENGTH)
  with pytest.raises(UserError, match="the target has recurrent layers"):
    run(model, {}, Lookup())
  model = GPT2
  params = jax.tree.map(lambda x: x * jnp.nan, random_params(model))
  with pytest.raises(UserError, match="NaN"):
    run(model, params, DraftModel(model), params)


def test_nothing_to_do():
  """No new tokens are no steps; one new token is none either."""
  model = GPT2
  params = random_params(model)
  found, stats = run(model, params, DraftModel(model), params, n=0)
  assert found.shape == (3, 0)
  assert (stats.target_calls, stats.tokens_per_call) == (0, 0.0)
  found, stats = run(model, params, DraftModel(model), params, n=1)
  plain = generate(model, params, PROMPTS, NEW, lengths=LENGTHS)
  np.testing.assert_array_equal(found, np.asarray(plain)[:, 7:8])
  assert stats.target_calls == 0


# --- Training, and the page -------------------------------------------------


@pytest.mark.slow
def test_training_raises_the_acceptance_of_heads():
  """On the documentation that Python carries, letter by letter.

  Untrained heads repeat the trunk's guess of the next token, which is seldom
  the one after it.
  """
  letters = "".join(documents()[:40]).encode("ascii", "ignore")
  ids = np.frombuffer(letters, np.uint8).astype(np.int32)
  model = llama.decoder(128, 48, 2, 2, 2, mlp_dim=96, max_positions=128)
  heads, rng = Heads.on(model, 3), np.random.default_rng(0)

  def trained(objective, params, tree, frozen=()):
    how = optim.Optimizer(freeze_table=frozen)
    tx = optim.make(tree, 5e-3, how)
    state, step = create(params, tx), make_step(objective, tx)
    for _ in range(150):
      where = rng.integers(0, len(ids) - 65, 16)[:, None] + np.arange(65)
      rows = ids[where][None, None]
      batch = {"inputs": rows[..., :-1], "targets": rows[..., 1:]}
      state, _ = step(state, batch)
    return state.params

  tree = model.params()
  params = init(tree, jax.random.key(0))
  params = trained(functools.partial(next_token, model), params, tree)
  fresh = heads.start(model, params)
  both = trained(
    functools.partial(tokens_ahead, model, heads),
    jax.tree.map(jnp.copy, {"trunk": params, "heads": fresh}),
    {"trunk": tree, "heads": heads.params()},
    (("trunk/.*", True), (".*", False)),
  )
  same = jax.tree.map(lambda a, b: (a == b).all(), both["trunk"], params)
  assert all(jax.tree.leaves(same))
  prompts = ids[np.arange(8)[:, None] * 500 + np.arange(24)]
  before, after = (
    speculate(model, params, prompts, 60, Medusa(heads), p, Sample(), gamma=3)
    for p in (fresh, both["heads"])
  )
  assert after[1].acceptance > 1.3 * before[1].acceptance
  assert after[1].tokens_per_call > before[1].tokens_per_call + 0.1


def test_examples_of_the_page(tmp_path):
  """Each block of docs/speculative.md runs; heads come back from a folder."""
  page = Path(__file__).parents[1] / "docs" / "speculative.md"
  names: dict = {}
  for code in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S):
    exec(compile(code, str(page), "exec"), names)
  assert names["tokens"].shape == (1, 45)
  arrays.start_write(tmp_path / "heads", names["trained"])()
  again = arrays.read(tmp_path / "heads", names["trained"])
  assert (again["block"] == names["trained"]["block"]).all()
