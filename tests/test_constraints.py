"""Constraints: every text is of the language, however it is drawn."""

import ast
import json
import math
import random
import re
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxlm
from jaxlm.data.tokenizers import ByteBPE, Bytes, Chars
from jaxlm.errors import UserError
from jaxlm.generate import constraints, dfa, loop, regex, schema
from jaxlm.generate.__main__ import main
from jaxlm.generate.automaton import NEVER, advance, allowed, over_tokens
from jaxlm.generate.constraints import Grammar, JsonSchema, Regex, compile
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
    if token == tokenizer.eot:  # allowed where a text may end, and stays there
      state = np.where(made.accept, state, -1)
    expected = state if word or token == tokenizer.eot else -1 + 0 * state
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


@pytest.mark.slow
@hypothesis.settings(max_examples=12)
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
  sizes = loop.begin._cache_size(), loop.extend._cache_size()
  for pattern in ("[0-9]{3}", "(foo|bar) .*"):
    [*texts(compile(Regex(pattern), BYTES), BYTES, Greedy())]
  assert (loop.begin._cache_size(), loop.extend._cache_size()) == sizes


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


# --- JSON -------------------------------------------------------------------

STRINGS = st.sampled_from(
  [
    {"type": "string"},
    {"type": "string", "maxLength": 3},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": r"^[a-c\n\"\\]{1,4}$"},
    {"type": "string", "pattern": "b"},
    {"enum": ["x", 1, None, "é\n", [1, {"a": 2}]]},
    {"const": "y"},
  ]
)
SCALARS = st.sampled_from(
  [{"type": t} for t in ("integer", "number", "boolean", "null")]
  + [
    {"type": ["string", "null"]},
    {},
    True,
    {"enum": [1, "a"], "type": "string"},
  ]
)


@st.composite
def schemas(draw, depth=2):
  """Schemas that are regular."""
  kind = draw(st.sampled_from(["string", "scalar", "array", "object", "any"]))
  if kind == "string" or not depth:
    return draw(STRINGS)
  if kind == "scalar":
    return draw(SCALARS)
  inner = schemas(depth=depth - 1)
  if kind == "any":
    return {"anyOf": draw(st.lists(inner, min_size=1, max_size=2))}
  if kind == "array":
    most = draw(st.sampled_from([None, 0, 1, 3]))
    least = draw(st.integers(0, 2)) if most in (None, 3) else 0
    found = {"type": "array", "items": draw(inner), "minItems": least}
    return found if most is None else found | {"maxItems": most}
  names = draw(st.lists(st.sampled_from('abc"'), max_size=3, unique=True))
  return {
    "type": "object",
    "properties": {name: draw(inner) for name in names},
    "required": [name for name in names if draw(st.booleans())],
  }


def satisfies(value, wanted) -> bool:
  """What JSON schema says of the keywords that are used here."""
  if isinstance(wanted, bool):
    return wanted
  if "anyOf" in wanted:
    return any(satisfies(value, one) for one in wanted["anyOf"])
  if "enum" in wanted and not any(same(value, v) for v in wanted["enum"]):
    return False
  if "const" in wanted and not same(value, wanted["const"]):
    return False
  types = wanted.get("type", [])
  types = types if isinstance(types, list) else [types]
  if types and not any(is_a(value, t) for t in types):
    return False
  if isinstance(value, str):
    fits = wanted.get("minLength", 0) <= len(value)
    fits = fits and len(value) <= wanted.get("maxLength", math.inf)
    return fits and bool(re.search(wanted.get("pattern", ""), value, re.ASCII))
  if isinstance(value, list):
    fits = wanted.get("minItems", 0) <= len(value)
    fits = fits and len(value) <= wanted.get("maxItems", math.inf)
    return fits and all(satisfies(v, wanted.get("items", True)) for v in value)
  if isinstance(value, dict):
    named = wanted.get("properties", {})
    fits = all(name in value for name in wanted.get("required", []))
    return fits and all(
      satisfies(v, named.get(k, True)) for k, v in value.items()
    )
  if isinstance(value, int):
    fits = wanted.get("minimum", -math.inf) <= value
    return fits and value <= wanted.get("maximum", math.inf)
  return True


def same(a, b) -> bool:
  return json.dumps(a) == json.dumps(b)


def is_a(value, kind: str) -> bool:
  if isinstance(value, bool) or value is None:
    return kind == {True: "boolean", False: "boolean", None: "null"}[value]
  kinds = {str: "string", list: "array", dict: "object"}
  kinds |= {int: "integer number", float: "number"}
  return kind in kinds[type(value)].split()


@pytest.mark.slow
@hypothesis.settings(max_examples=12)
@hypothesis.given(schemas(), st.sampled_from([BYTES, BPE]), st.integers(0, 99))
def test_every_sample_is_json_of_the_schema(wanted, tokenizer, seed):
  """Also where the limit cuts: it is met by closing what is open."""
  constraint = compile(JsonSchema(json.dumps(wanted)), tokenizer)
  n = max(ROOM, int(constraint.least[0]))
  for text, _ in texts(constraint, tokenizer, Sample(), n=n, seed=seed):
    assert satisfies(json.loads(text), wanted), text


@hypothesis.given(st.text(max_size=6))
def test_any_string_can_be_spelled(text):
  """As Python spells it, or with a character of one of our escapes."""
  found = dfa.automaton(schema.tree({"type": "string"}))
  spelled = json.dumps(text, ensure_ascii=False)
  try:
    assert found.matches(spelled.encode())
  except UnicodeEncodeError:  # a lone surrogate
    return


@pytest.mark.parametrize(
  ("wanted", "yes", "no"),
  [
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}},
     ['{}', '{"a": 1}', '{"a":1,"b":{"c": [1.5e3, null]}}', '{"b": "x"}'],
     ['{"a": 1.5}', '{"a": 1,}', '{"b": 1, "a": 1}', '{"c": 1}', "{", ""]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1},
     ["[true]", "[true, false]", "[true,false]"], ["[]", "[1]", "[true,]"]),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}},
     ["null"], ["0"]),
    ({"additionalProperties": {"type": "integer"}},
     ["{}", '{"x": 1}', '{"x": 1, "y": 2}'], ['{"x": "1"}']),
    ({"type": "number"}, ["0", "-1.5", "1e9", "10"], ["01", "1.", ".5", "+1"]),
    ({"type": "string"},
     ['"\\u001f"', '"\\""', '"é"'], ['"\n"', '"""', '"\\x"']),
  ],
)  # fmt: skip
def test_what_a_schema_lets_through(wanted, yes, no):
  """Some texts that are, and some that are not."""
  found = dfa.automaton(schema.tree(wanted))
  for text in yes:
    assert found.matches(text.encode()), text
    json.loads(text)
  for text in no:
    assert not found.matches(text.encode()), text


@pytest.mark.parametrize(
  ("wanted", "problem"),
  [
    ("{", "not JSON"), ("3", "is an object"), ("false", "no text at all"),
    ('{"type": "text"}', "one or a list of"),
    ('{"items": 3}', "where a schema"),
    ('{"type": "string", "minLength": 3, "maxLength": 2}', "above"),
    ('{"type": "array", "minItems": -1}', "not negative"),
    ('{"$ref": "#/nowhere"}', "not in it"), ('{"enum": 3}', "has to be a list"),
    ('{"pattern": "("}', "lacks a"), ('{"required": "a"}', "a list of names"),
    ('{"properties": []}', "an object of schemas"),
    ('{"enum": [1], "type": "string"}', "no text at all"),
    ('{"required": ["a"], "additionalProperties": false}', "no text at all"),
  ],
)  # fmt: skip
def test_bad_schemas(wanted, problem):
  """One sentence for each."""
  with pytest.raises(UserError, match=problem):
    compile(JsonSchema(wanted), BYTES)


# --- What the library follows -----------------------------------------------

ARITHMETIC = """
start: sum
sum: product (("+" | "-") product)*
product: atom ("*" atom)*
atom: /[0-9]{1,3}/ | "(" sum ")"
"""
ENDING = Sample(filters=(Bias(((BYTES.eot, 2.0), (ord(")"), 1.0))),))


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
@pytest.mark.parametrize("sampler", [ENDING, Greedy(), Sample(2.0)])
def test_a_grammar_parses(tokenizer, sampler):
  """Rows that have ended are expressions; Python's parser is the judge."""
  constraint = compile(Grammar(ARITHMETIC), tokenizer)
  found = [*texts(constraint, tokenizer, sampler)]
  for text, ended in found:
    assert re.fullmatch("[-+*()0-9]+", text)
    if ended:
      ast.parse(re.sub("[0-9]+", "1", text), mode="eval")
  assert sampler != ENDING or tokenizer != BYTES or any(e for _, e in found)


RECURSIVE = {
  "type": "object",
  "properties": {
    "n": {"type": "integer", "minimum": 3, "maximum": 40},
    "next": {"$ref": "#"},
  },
  "required": ["n"],
}


def test_schemas_that_are_not_regular_go_to_the_library():
  """Numbers between bounds, and a list of any depth."""
  constraint = compile(JsonSchema(json.dumps(RECURSIVE)), BYTES)
  sampler = Sample(filters=(Bias(((BYTES.eot, 2.0), (ord("}"), 2.0))),))
  found = [*texts(constraint, BYTES, sampler, rows=16, n=96)]
  assert sum(ended for _, ended in found) > 4
  for text, ended in found:
    if ended:
      value = json.loads(text)
      while value:
        assert satisfies(value, {k: RECURSIVE[k] for k in ("type", "required")})
        assert satisfies(value["n"], RECURSIVE["properties"]["n"])
        value = value.get("next")


def test_the_library_and_the_automaton_agree():
  """The same tokens with the same keys: their masks are the same."""
  pattern, key = "(ab|[0-9]{2}c?)*x", jax.random.key(3)
  arguments = (MODEL, PARAMS, np.full((4, 3), 65), 200, Sample(), key)
  ours = compile(Regex(pattern), BYTES)
  theirs = compile(Regex(pattern), BYTES, library=True)
  ours, theirs = (
    np.asarray(generate(*arguments[:3], 100, *arguments[4:], constraint=c))
    for c in (ours, theirs)
  )
  for a, b in zip(ours, theirs, strict=True):
    if (b == BYTES.eot).any():  # the library is not steered to an end
      np.testing.assert_array_equal(a, b)
  assert (theirs == BYTES.eot).any()


def test_a_grammar_streams_and_slides():
  """The matchers read what is yielded, window after window."""
  small = modern.decoder(302, 16, 1, 2, max_positions=16)
  params = init(small.params(), jax.random.key(0))
  constraint = compile(Grammar('start: "abcdefghij" "0123456789" "x"'), BYTES)
  found = stream(
    small, params, np.full((2, 3), 65), 40, slide=True, constraint=constraint
  )
  rows = np.stack([*found], axis=1)
  assert rows.shape == (2, 22)
  for row in rows:
    assert BYTES.decode(row[:-1]) == "abcdefghij0123456789x"


@pytest.mark.parametrize(
  ("spec", "problem"),
  [
    (Grammar("start: ("), "cannot be followed"),
    (Grammar('begin: "a"'), "cannot be followed"),
    (Regex("(?=a)b"), "cannot be followed"),
    (JsonSchema('{"allOf": [{"type": 3}]}'), "cannot be followed"),
  ],
)
def test_bad_grammars(spec, problem):
  """What the library says, as an error of ours."""
  with pytest.raises(UserError, match=problem):
    compile(spec, BYTES, library=True)


def test_a_library_that_is_not_there(monkeypatch):
  """The sentence says what to install."""
  monkeypatch.setitem(sys.modules, "llguidance", None)
  for spec in (
    Grammar(ARITHMETIC),
    JsonSchema('{"type": "integer", "minimum": 2}'),
  ):
    with pytest.raises(UserError, match=r"jaxlm\[constrain\]"):
      compile(spec, BYTES)


# --- The program ------------------------------------------------------------


def test_the_program_is_constrained(tmp_path, capsys):
  """Each flag; the new text is what was asked for."""
  jaxlm.save(tmp_path, MODEL, PARAMS, BYTES)
  (tmp_path / "schema.json").write_text('{"type": "boolean"}')
  (tmp_path / "grammar.lark").write_text('start: ("x" | "y") "z"')

  def said(flag: str) -> str:
    main([f"--workdir={tmp_path}", "--prompt=A", "--max_new_tokens=9", flag])
    return capsys.readouterr().out.removeprefix("A").removesuffix("\n")

  assert re.fullmatch("[0-9]{4}", said("--regex=[0-9]{4}"))
  assert said('--json_schema={"const": 1}') == "1"
  assert said(f"--json_schema={tmp_path}/schema.json") in ("true", "false")
  assert said(f"--grammar={tmp_path}/grammar.lark") in ("xz", "yz")
  for flags, problem in (
    (["--regex=a", '--json_schema={"const": 1}'], "one constraint"),
    (["--grammar=nowhere"], "cannot read nowhere"),
    (["--regex=a", "--method=beam"], "follows no constraint"),
  ):
    with pytest.raises(UserError, match=problem):
      main([f"--workdir={tmp_path}", "--prompt=A", *flags])
