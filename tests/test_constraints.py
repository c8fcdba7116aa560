"""Constraints: every text is of the language, however it is drawn."""

import math
import random
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxlm.data.tokenizers import ByteBPE, Bytes, Chars
from jaxlm.errors import UserError
from jaxlm.generate import constraints, decode, dfa, regex
from jaxlm.generate.automaton import NEVER, advance, allowed, over_tokens
from jaxlm.generate.constraints import Regex, compile
from jaxlm.generate.decode import generate, scored, stream
from jaxlm.generate.filters import Bias
from jaxlm.generate.samplers import Greedy, Sample
from jaxlm.layers.param import init
from jaxlm.models.decoder import forward
from jaxlm.models.families import modern

EOT = "<|endoftext|>"
BYTES = Bytes([EOT])
WIDE = Bytes([EOT, *(f"<{i}>" for i in range(98))])
TEXT = ['the name of the cat is 12 and 1, 2, 3; {"name": "cat"} é 🙂 aabb'] * 3
BPE = ByteBPE.train(TEXT, 300)
ROOM = 48

# Two tokens more than any tokenizer here has, as published models often do.
MODEL = modern.decoder(302, 16, 1, 2, max_positions=128)
PARAMS = init(MODEL.params(), jax.random.key(0))


def texts(constraint, tokenizer, sampler, rows=8, n=ROOM, seed=0, **more):
  """What a model with random weights says, and whether each row has ended."""
  prompt = np.full((rows, 3), 65)
  key = jax.random.key(seed)
  found = generate(
    MODEL, PARAMS, prompt, n, sampler, key, constraint=constraint, **more
  )
  found = np.asarray(found)[:, 3:]
  ends = [*np.atleast_1d(more.get("eot", tokenizer.eot))]
  for row in found:
    is_end = np.isin(row, ends)
    stop = int(np.argmax(is_end)) if is_end.any() else n
    yield tokenizer.decode_bytes(row[:stop]).decode(), bool(is_end.any())


# --- Expressions ------------------------------------------------------------

LETTERS = "abé🙂\n"


@st.composite
def patterns(draw, depth=3):
  """Expressions over a few letters of one, two and four bytes."""
  kinds = ["letter", "class", "dot"]
  kinds += ["seq", "either", "repeat"] * (depth > 0)
  kind = draw(st.sampled_from(kinds))
  inner = patterns(depth=depth - 1)
  if kind == "letter":
    return re.escape(draw(st.sampled_from(LETTERS)))
  if kind == "class":
    members = draw(st.lists(st.sampled_from("abé🙂"), min_size=1))
    return f"[{draw(st.sampled_from(['', '^']))}{''.join(members)}]"
  if kind == "dot":
    return "."
  if kind == "seq":
    return "".join(draw(st.lists(inner, min_size=1, max_size=3)))
  if kind == "either":
    return f"(?:{'|'.join(draw(st.lists(inner, min_size=1, max_size=3)))})"
  marks = ["*", "+", "?", "{2}", "{1,3}", "{,2}", "{1,}"]
  return f"({draw(inner)}){draw(st.sampled_from(marks))}"


def automaton(pattern: str) -> dfa.Dfa:
  return dfa.automaton(regex.parse(pattern))


@hypothesis.settings(max_examples=300)
@hypothesis.given(patterns(), st.lists(st.text(LETTERS, max_size=5)))
def test_automaton_is_what_re_matches(pattern, words):
  """Python's own matcher is the judge, on words that do and do not match."""
  made = automaton(pattern)
  for word in words:
    fits = re.fullmatch(pattern, word, re.ASCII) is not None
    assert made.matches(word.encode()) == fits, word


@pytest.mark.parametrize(
  "pattern",
  [
    r"\d{2}:\d{2}", r"\w+\s?\S", r"[^\W\d_]+", r"[\]a-c-]+", r"[]a]", r"a{2,}?",
    r"\x41B\.\\\n\t\/", "", "a||b", "^(a|b)$", "^a|b$", r"[\n\s]\D",
  ],
)  # fmt: skip
def test_syntax_is_that_of_re(pattern):
  """Every form that the page promises, on all short texts of some letters."""
  made = automaton(pattern)
  rng = random.Random(0)
  letters = "ab01:_ ]-c\n\t./\\ABé"
  for _ in range(3000):
    word = "".join(rng.choices(letters, k=rng.randrange(6)))
    fits = re.fullmatch(pattern, word, re.ASCII) is not None
    assert made.matches(word.encode()) == fits, word


@hypothesis.given(patterns())
def test_automaton_is_the_smallest(pattern):
  """Any two states differ in some text; Moore's table is the judge."""
  made = automaton(pattern)
  states = len(made.accept)
  full = np.vstack([made.next, np.full((1, made.next.shape[1]), states)])
  full[full < 0] = states
  accept = np.append(made.accept, False)
  differ = accept[:, None] != accept[None]
  for _ in range(states + 1):
    differ = differ | differ[full[:, None], full[None]].any(axis=-1)
  assert differ[~np.eye(states + 1, dtype=bool)].all()


def test_a_textbook_automaton():
  """(a|b)*abb has four states (Aho, Sethi, Ullman, figure 3.29)."""
  made = automaton("(a|b)*abb")
  assert len(made.accept) == 4
  assert made.matches(b"ababb")
  assert not made.matches(b"abab")


@hypothesis.given(st.integers(0, 0x10FFFF), st.integers(0, 3000))
def test_utf8_ranges_spell_every_code_point_once(low, size):
  """Across all lengths of UTF-8, and around the surrogates."""
  for start, end in ((low, min(low + size, 0x10FFFF)), (0xD700, 0xE010)):
    found = [*regex_bytes(start, end)]
    points = [p for p in range(start, end + 1) if not 0xD800 <= p <= 0xDFFF]
    assert sorted(found) == [chr(p).encode() for p in points]


def regex_bytes(low, high):
  """All byte strings of the ranges."""
  for ranges in dfa.utf8_ranges(low, high):
    words = [b""]
    for first, last in ranges:
      words = [w + bytes([b]) for w in words for b in range(first, last + 1)]
    yield from words


@pytest.mark.parametrize(
  ("pattern", "problem"),
  [
    ("(a", "lacks a"), ("a)", "too many"), ("a**", "repeats"),
    ("*a", "nothing for it"), ("[b-a]", "range"), ("[a", "stops short"),
    (r"\1", "not read here"), (r"a\b", "not read here"), ("(?=a)", "(?:"),
    ("a{2,1}", "fewer"), ("a{", "without numbers"), ("a\\", "stops short"),
    (r"\x1", "stops short"), (r"\xzz", "unfinished"), ("a^b", "nothing for"),
    ("(^a)", "nothing for"), ("(" * 200, "groups within"), ("a++", "repeats"),
    (r"[^\s\S]", "no text at all"), ("(a|b)*a(a|b){20}", "20,000 states"),
    ("((a{999}){999}){999}", "20,000 states"),
  ],
)  # fmt: skip
def test_bad_expressions(pattern, problem):
  """One sentence for each."""
  with pytest.raises(UserError, match=re.escape(problem)):
    compile(Regex(pattern), BYTES)


# --- The table --------------------------------------------------------------


@hypothesis.given(patterns(), st.sampled_from([BYTES, BPE]))
def test_table_walks_as_the_bytes_do(pattern, tokenizer):
  """Every token from every state; special tokens nowhere."""
  made = automaton(pattern)
  words = constraints.text_of_tokens(tokenizer)
  try:
    found = over_tokens(made, words, (tokenizer.eot,))
  except UserError:  # all of it with bytes that this vocabulary cannot begin
    return
  table = np.asarray(found.table)[: len(made.accept), found.kind]
  for token, word in enumerate(words):
    state = np.arange(len(made.accept))
    for byte in word:
      to = made.next[np.maximum(state, 0), made.classes[byte]]
      state = np.where(state < 0, -1, to)
    expected = state if word else np.full_like(state, -1)
    np.testing.assert_array_equal(table[:, token], expected)


@hypothesis.given(patterns())
def test_least_is_the_shortest_way(pattern):
  """Bellman's equation holds, and ends are at 0."""
  made = automaton(pattern)
  found = over_tokens(made, constraints.text_of_tokens(BPE))
  table, least = np.asarray(found.table)[:, found.kind], found.least
  best = np.where(table >= 0, least[table], NEVER).min(axis=1) + 1
  states = len(made.accept)
  expected = np.where(made.accept, 0, np.minimum(best[:states], NEVER))
  np.testing.assert_array_equal(least[:states], expected)


def test_allowed_and_advance_follow_a_text():
  """As speculation will use them: many rows, each where it is."""
  found = compile(Regex("ab*"), BYTES)
  state = jnp.zeros(2, jnp.int32)
  assert np.flatnonzero(allowed(found, state)[0]).tolist() == [ord("a")]
  state = advance(found, state, jnp.array([ord("a"), ord("a")]))
  fits = allowed(found, state)
  assert np.flatnonzero(fits[1]).tolist() == [ord("b"), BYTES.eot]
  ended = advance(found, state, jnp.array([ord("b"), BYTES.eot]))
  assert ended[1] == state[1]
  # With no token to follow, only what leads straight to an end.
  found = compile(Regex("a|bc"), BYTES)
  fits = allowed(found, jnp.zeros(1, jnp.int32), left=0)
  assert np.flatnonzero(fits[0]).tolist() == [ord("a")]


# --- Generation -------------------------------------------------------------


@hypothesis.settings(max_examples=25)
@hypothesis.given(
  patterns(), st.sampled_from([BYTES, BPE]), st.sampled_from([0.5, 3.0]),
  st.integers(0, 99),
)  # fmt: skip
def test_every_sample_matches(pattern, tokenizer, heat, seed):
  """All rows, those that are cut by the limit included."""
  constraint = compile(Regex(pattern), tokenizer)
  for room in (int(constraint.least[0]), ROOM):
    for sampler in (Sample(heat), Greedy()):
      for text, _ in texts(constraint, tokenizer, sampler, n=room, seed=seed):
        assert re.fullmatch(pattern, text, re.ASCII), text


def test_the_limit_steers():
  """Without an end in sight, the last tokens lead to one."""
  pattern = r"(\([a-z]*\)){2,}"
  constraint = compile(Regex(pattern), BYTES)
  for n in range(4, 20):
    for text, _ in texts(constraint, BYTES, Sample(), n=n):
      assert re.fullmatch(pattern, text)
  with pytest.raises(UserError, match=r"at least 4 tokens.*max_new_tokens=3"):
    [*texts(constraint, BYTES, Sample(), n=3)]


def test_the_constraint_does_not_choose_among_what_it_allows():
  """The distribution is the model's, over the tokens that are left."""
  constraint = compile(Regex("[ab]"), BYTES)
  rows = 4000
  found = [t for t, _ in texts(constraint, BYTES, Sample(), rows=rows, n=1)]
  logits = forward(MODEL, PARAMS, jnp.full((1, 3), 65, jnp.int32))[0, -1]
  p = float(jax.nn.softmax(logits[jnp.array([97, 98])])[0])
  assert abs(found.count("a") / rows - p) < 4 * math.sqrt(p * (1 - p) / rows)


def test_new_constraints_compile_nothing():
  """Their tables are rounded up, and are arguments."""
  [*texts(compile(Regex("a+"), BYTES), BYTES, Greedy())]
  sizes = decode._begin._cache_size(), decode._extend._cache_size()
  for pattern in ("[0-9]{3}", "(foo|bar) .*"):
    [*texts(compile(Regex(pattern), BYTES), BYTES, Greedy())]
  assert (decode._begin._cache_size(), decode._extend._cache_size()) == sizes


def test_stream_scored_and_samples_agree():
  """One at a time, with log-probabilities, many of a prompt: the same text."""
  constraint = compile(Regex("[a-f]{3,30}"), BYTES)
  tokens, key = np.full((4, 3), 65), jax.random.key(1)
  arguments = (MODEL, PARAMS, tokens, ROOM, Sample(), key)
  whole = np.asarray(generate(*arguments, constraint=constraint))[:, 3:]
  parts = np.stack([*stream(*arguments, constraint=constraint, pace=0)], axis=1)
  np.testing.assert_array_equal(whole[:, : parts.shape[1]], parts)
  told = scored(*arguments, constraint=constraint, top=1)
  np.testing.assert_array_equal(told.tokens, whole)
  assert (told.logprobs < np.log(0.5)).any()  # the model's, not the mask's
  one = (MODEL, PARAMS, tokens[:1], ROOM, Sample(), key)
  np.testing.assert_array_equal(
    np.asarray(generate(*one, samples=4, constraint=constraint))[:, 3:], whole
  )


def test_a_text_that_slides_stays_in_its_place():
  """The state outlives the window of positions."""
  small = modern.decoder(302, 16, 1, 2, max_positions=16)
  pattern = "(abcdefghij){4}"
  found = generate(
    small, init(small.params(), jax.random.key(0)), np.full((1, 3), 65), 60,
    slide=True, constraint=compile(Regex(pattern), BYTES),
  )  # fmt: skip
  text = BYTES.decode(found[0, 3:43])
  assert text == "abcdefghij" * 4
  assert (np.asarray(found)[0, 43:] == BYTES.eot).all()


def test_the_constraint_is_stronger_than_the_sampler():
  """A filter that bans all that is left does not lead out of the language."""
  constraint = compile(Regex("a{5}"), BYTES)
  for sampler in (Sample, Greedy):
    banned = sampler(filters=(Bias(((97, -math.inf),)),))
    assert {t for t, _ in texts(constraint, BYTES, banned)} == {"aaaaa"}


def test_an_end_may_be_a_token_with_a_text():
  """A newline that ends a row is no part of it."""
  constraint = compile(Regex(r"[a-c\n]{2,5}"), BYTES)
  eot = [BYTES.eot, 10]
  for text, _ in texts(constraint, BYTES, Sample(), eot=eot):
    assert re.fullmatch("[a-c]{2,5}", text)
  with pytest.raises(UserError, match="choose another eot"):
    [*texts(compile(Regex(r"a\n"), BYTES), BYTES, Sample(), eot=10)]


def test_unconstrained_rows_are_as_before():
  """Everything allowed is nothing changed."""
  constraint = compile(Regex(r"[\s\S]*"), BYTES)
  tokens, key = np.full((4, 3), 65), jax.random.key(1)
  free = scored(MODEL, PARAMS, tokens, 1, Sample(), key, top=302)
  bound = scored(
    MODEL, PARAMS, tokens, 1, Sample(), key, top=302, constraint=constraint
  )
  np.testing.assert_array_equal(free.top_logprobs, bound.top_logprobs)


@pytest.mark.parametrize(
  ("call", "problem"),
  [
    (lambda: compile(Regex("é"), Chars("ab", [EOT])), "no sequence"),
    (lambda: run(Regex("a")), "not compiled"),
    (lambda: run(compile(Regex("a"), Bytes())), "no end-of-text token"),
    (lambda: run(compile(Regex("a"), BYTES), eot=999), "none of the tokens"),
    (
      lambda: run(
        compile(Regex("a"), Bytes([EOT, *(f"<{i}>" for i in range(98))]))
      ),
      "355 tokens, and the model knows 302",
    ),
    (lambda: run(compile(Regex("a"), BYTES), n=0), "at least 1 tokens"),
  ],
)
def test_impossible_constraints(call, problem):
  """Said before anything is made."""
  with pytest.raises(UserError, match=problem):
    call()


def run(constraint, n=5, eot=None):
  prompt = np.full((1, 3), 65)
  return generate(MODEL, PARAMS, prompt, n, eot=eot, constraint=constraint)
