"""The keys of a config: one table, and the checks that are its views."""

import difflib
import re
from pathlib import Path

from hypothesis import assume, given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxlm import keys

NAMES = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)


def test_schema_is_small_and_keeps_its_names():
  """At most sixty keys, each with a meaning, and the promised names."""
  promised = "steps batch_size seed log_every eval_every checkpoint_every"
  promised = {*promised.split(), "data.path"}
  assert promised | {"parallel.preset", "parallel.mesh"} <= set(keys.KEYS)
  assert len(keys.KEYS) <= 60
  assert all(key.meaning for key in keys.KEYS.values())


def test_defaults_fit_their_own_keys():
  """A default that its type or range refuses would break every config."""
  for name, key in keys.KEYS.items():
    assert keys.fit(name, key.default, key) == key.default


def test_table_has_one_line_per_key():
  """--help shows every key."""
  lines = keys.table().splitlines()
  assert [line.split()[0] for line in lines] == [
    *keys.KEYS,
    *(f"{name}.*" for name in keys.OPEN),
  ]


def test_document_lists_every_key_as_it_is():
  """The table in docs/config.md is the schema: name, default and meaning."""
  path = Path(__file__).parent.parent / "docs" / "config.md"
  rows = [row for row in path.read_text("utf-8").splitlines() if "| " in row]
  want = [
    f"| `{name}` | `{key.default!r}` | {key.meaning} |"
    for name, key in keys.KEYS.items()
  ]
  assert rows[2:] == want, "the page should say:\n" + "\n".join(want)


def test_free_keys_exist():
  """A renamed key must not leave a dead name in the list."""
  for name in keys.FREE:
    section = name.removesuffix(".*")
    assert name in keys.KEYS or section in keys.SCHEMA


@given(
  st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(), min_size=1))
)
def test_nest_inverts_flatten(tree):
  """Dotted keys are another spelling of nested ones."""
  assert keys.nest(keys.flatten(tree)) == tree


def test_flatten_reads_config_dicts():
  """A ConfigDict is a tree like any other."""
  assert keys.flatten(ConfigDict({"a": {"b": 1}})) == {"a.b": 1}


@given(st.sampled_from(sorted(keys.KEYS)), st.data())
def test_a_lost_letter_is_answered_with_a_key_as_near(name, data):
  """The suggestion is at least as close to the slip as the key meant."""
  place = data.draw(st.integers(0, len(name) - 1))
  slip = name[:place] + name[place + 1 :]
  assume(slip not in keys.KEYS and not keys.is_open(slip))
  found = re.search(r"did you mean config\.(\S+)\?$", str(keys.unknown(slip)))
  assert found
  assert closeness(found[1], slip) >= closeness(name, slip)


def closeness(a: str, b: str) -> float:
  return difflib.SequenceMatcher(None, a, b).ratio()
