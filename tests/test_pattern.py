"""Patterns found in lists of layers."""

from hypothesis import given
from hypothesis import strategies as st

from jaxlm.models.pattern import segments


def written(blocks: str) -> str:
  """Segments as text: `3(LLG)1(L)`."""
  return "".join(f"{n}({''.join(p)})" for p, n in segments(list(blocks)))


def test_patterns_of_published_models():
  """Equal layers, five to one with a rest, a dense start, two periods."""
  assert written("A" * 32) == "32(A)"
  assert written("LLLLLG" * 4 + "LL") == "4(LLLLLG)2(L)"
  assert written("D" * 3 + "M" * 58) == "3(D)58(M)"
  assert written("abac" * 12) == "12(abac)"
  assert written("G") == "1(G)"
  assert written("") == ""


@given(st.text("ab", max_size=24))
def test_patterns_are_the_list_again(blocks: str):
  """Repeats written out, in order; no pattern repeats zero times."""
  found = segments(list(blocks))
  assert [b for pattern, n in found for b in pattern * n] == list(blocks)
  assert all(n > 0 for _, n in found)
