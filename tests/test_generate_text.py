"""Stop strings, the ends of texts, and values written as text."""

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import Bytes
from jaxlm.errors import UserError
from jaxlm.generate import filters, methods, options
from jaxlm.generate.beam import Beam
from jaxlm.generate.drafts import Lookup
from jaxlm.generate.samplers import Greedy, Sample
from jaxlm.generate.text import StopStrings, Transcript

few = st.text(alphabet="ab", max_size=12)


def first_stop(text: str, stops: list[str]) -> int | None:
  """Where a text is cut: the plain definition, character by character."""
  for end in range(1, len(text) + 1):
    begins = [end - len(s) for s in stops if text[:end].endswith(s)]
    if begins:
      return min(begins)
  return None


@settings(max_examples=300, deadline=None)
@given(
  pieces=st.lists(few, max_size=8),
  stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(
  pieces: list[str], stops: list[str]
):
  """Any cut into pieces shows what the whole text shows, and never more.

  What is shown is at all times a beginning of the final text, so no part of a
  stop string was ever out; and no more is held back than could become one.
  """
  text = "".join(pieces)
  cut = first_stop(text, stops)
  want = text if cut is None else text[:cut]
  stop, shown, come = StopStrings(stops), "", ""
  for piece in pieces:
    shown, come = shown + stop.push(piece), come + piece
    assert want.startswith(shown)
    if not stop.stopped:
      held = come[len(shown) :]
      assert not held or any(s.startswith(held) for s in stops)
  assert stop.stopped == (cut is not None)
  assert shown + stop.flush() == want


def test_stop_strings_refuse_nothing():
  """An empty one would end every text at once."""
  with pytest.raises(UserError, match="empty"):
    StopStrings(["a", ""])


def read(tokens, n=10, ends=(), stops=()) -> tuple[list[str], Transcript]:
  told = Transcript(Bytes(), n, ends, stops)
  return [told.push([t]) for t in tokens], told


def test_a_text_ends_once():
  """By a token, a string or its length; what comes behind does not count."""
  pieces, told = read(b"abcdef", ends=(ord("c"),))
  assert pieces == ["a", "b", "", "", "", ""]
  assert (told.text, told.finish, len(told.tokens)) == ("ab", "stop", 3)

  pieces, told = read(b"abcdef", stops=("cd",))
  assert pieces == ["a", "b", "", "", "", ""]
  assert (told.text, told.finish, len(told.tokens)) == ("ab", "stop", 4)

  pieces, told = read(b"abcdef", n=3, stops=("cd",))
  assert pieces == ["a", "b", "c", "", "", ""]  # no longer held back
  assert (told.text, told.finish, len(told.tokens)) == ("abc", "length", 3)

  _, told = read(b"", n=0)
  assert told.finish == "length"


def test_a_stop_string_may_cut_through_characters():
  """Tokens are bytes here: 'é' is two, and is whole or not there."""
  pieces, told = read("né!né".encode(), stops=("!n",))
  assert pieces == ["n", "", "é", "", "", "", ""]
  assert told.finish == "stop"
  _, told = read("é".encode()[:1], n=1, stops=("x",))
  assert told.text == "\ufffd"  # a character that never came whole


# --- Values written as text -------------------------------------------------


def test_filters_as_text():
  """Order is kept; spaces and commas part; words may name the numbers."""
  text = "temperature(0.8) top_p(p=0.9,by=sort), no_repeat(3)\tpresence(1)"
  assert options.parse_filters(text) == (
    filters.Temperature(0.8),
    filters.TopP(0.9, "sort"),
    filters.NoRepeat(3),
    filters.Presence(1),
  )
  assert options.parse_filters("") == ()
  text = "at_least(4) bias(7,-2.5) banned(1,2)"
  assert options.parse_filters(text, ends=(3,), vocab=8) == (
    filters.AtLeast(4, (3,)),
    filters.Bias(((7, -2.5),)),
    filters.Banned(((1, 2),)),
  )


def test_every_filter_has_a_name():
  """A new filter in filters.py is to be reached from the command line."""
  made = {
    name
    for name, kind in vars(filters).items()
    if inspect.isclass(kind) and kind.__module__ == filters.__name__
  } - {"Seen"}
  text = "temperature(1) top_k(1) top_p(.5) min_p(.5) typical(.5) eta(.5)"
  text += " epsilon(.5) repetition(2) presence(1) frequency(1) no_repeat(2)"
  text += " bias(0,1) banned(0) at_least(1)"
  found = options.parse_filters(text)
  assert {type(f).__name__ for f in found} == made
  assert len(found) == len(options.makers())


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("temprature(1)", "did you mean temperature"),
    ("xyz(1)", "There are temperature, top_k"),
    ("top_k", "missing a required argument: 'k'; it is top_k"),
    ("top_k(1, 2)", "too many"),
    ("top_k(a)", "k='a' is not a whole number"),
    ("top_k(true)", "not a whole number"),
    ("min_p(a)", "p='a' is not a number"),
    ("top_p(0.5, by=1)", "by=1 is not a word"),
    ("top_k(1.5)", "k=1.5 is not a whole number"),
    ("top_p(0.5, q=1)", "unexpected"),
    ("top_p(p=0.5, 1)", "what has a name comes last"),
    ("top_p(p=0.5, p=1)", "given twice"),
    ("top_p(0.9", "cannot read"),
    ("top_p(__import__('os'))", "cannot read"),
    ("top_p('x')", "neither a number nor a word"),
    ("temperature(nan)", "nan"),
    ("bias(8, 1)", "outside the vocabulary of 8"),
    ("bias(0.5, 1)", "not a whole number"),
    ("banned(1, x)", "not a whole number"),
    ("banned(-1)", "outside the vocabulary"),
  ],
)
def test_wrong_filters_are_explained(text: str, words: str):
  """Each in a sentence."""
  with pytest.raises(UserError) as error:
    options.parse_filters(text, vocab=8)
  assert words in str(error.value)


def test_methods_as_text():
  """Names, with numbers in brackets; filters go where they work."""
  usual, kept = Sample(0.7), (filters.TopK(5),)

  def made(text: str, filters=None) -> methods.Method:
    return methods.parse_method(text, filters, usual)

  assert made("sample") == methods.Draw(usual)
  assert made("sample()", kept) == methods.Draw(Sample(filters=kept))
  assert made("greedy", kept) == methods.Draw(Greedy(kept))
  beam = made("beam(beams=5, length_penalty=0.8, early_stopping=never)", kept)
  assert beam == methods.Beams(Beam(5, 0.8, "never", filters=kept))
  diverse = methods.Beams(Beam(4, groups=2, diversity=0.3))
  assert made("diverse_beam(4, 2, diversity=0.3)") == diverse
  assert made("diverse_beam").beam.groups == 4
  assert made("contrastive(k=3)").how.k == 3
  assert made("best_of(5)") == methods.Best(usual, 5)
  fast = methods.Speculate(usual, Lookup(2, 1), 3)
  assert made("speculative(gamma=3, n=2)") == fast


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("beem", "did you mean beam"),
    ("beam greedy", "names 2 methods"),
    ("", "names 0 methods"),
    ("beam(bems=2)", "beam(beams=4, length_penalty=1.0"),
    ("beam(beams=x)", "not a whole number"),
    ("beam(4.0)", "not a whole number"),
    ("diverse_beam(4, 2.0)", "not a whole number"),
    ("beam(beams=0)", "0 beams"),
    ("diverse_beam(4, 3)", "3 groups"),
    ("beam(early_stopping=maybe)", "early_stopping='maybe'"),
    ("best_of(0)", "whole number from 1"),
    ("contrastive(alpha=2)", "alpha"),
  ],
)
def test_wrong_methods_are_explained(text: str, words: str):
  """Each in a sentence."""
  with pytest.raises(UserError) as error:
    methods.parse_method(text, None, Sample())
  assert words in str(error.value)
