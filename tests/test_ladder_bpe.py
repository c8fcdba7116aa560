"""The readable tokenizer makes the joins and the tokens of the fast ones."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.ladder import bpe

GOLDEN = Path(__file__).parent / "golden" / "bpe_tiktoken.json"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  """Hugging Face's byte-level BPE, and our joins, of the same text."""
  from tokenizers import ByteLevelBPETokenizer

  text = bpe.read(None)[:60_000]
  theirs = ByteLevelBPETokenizer()
  theirs.train_from_iterator([text], vocab_size=500, show_progress=False)
  folder = tmp_path_factory.mktemp("bpe")
  theirs.save_model(str(folder))
  lines = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
  return theirs, [tuple(x.split(" ")) for x in lines], bpe.train(text, 500)


def visible(token: bytes) -> str:
  """A token as byte-level tokenizers write it."""
  return "".join(
    chr(b) if b in bpe.SEEN else chr(256 + bpe.RANK[b] - len(bpe.SEEN))
    for b in token
  )


def test_joins_equal_hugging_face(judge):
  """All 244 of them, in order, ties included."""
  _, theirs, merges = judge
  tokens = bpe.spelling(merges)
  ours = [(visible(tokens[a]), visible(tokens[b])) for a, b in merges]
  assert ours == theirs


HARD = st.sampled_from(
  ["a", "B", "é", "日", "½", "Ⅷ", "٣", "_", "-", "!", "'", "'s", "'ll", "'re"]
)
SPACES = st.sampled_from([" ", "  ", "\n", "\u3000", "\xa0", "\x1c", "\r\n"])


@given(st.lists(HARD | SPACES | st.text(max_size=3), max_size=20).map("".join))
def test_tokens_equal_hugging_face(judge, text):
  """Any text: words are cut at the same places, and nothing is lost."""
  theirs, _, merges = judge
  ids = bpe.encode(text, merges)
  assert ids == theirs.encode(text).ids
  assert bpe.decode(ids, merges) == text
  assert "".join(bpe.split(text)) == text


def test_tokens_equal_tiktoken():
  """The golden file holds what tiktoken makes of the same joins."""
  data = json.loads(GOLDEN.read_text("utf-8"))
  merges = [tuple(pair) for pair in data["merges"]]
  assert bpe.train(data["corpus"], 290) == merges
  for text, ids in zip(data["texts"], data["ids"], strict=True):
    assert bpe.encode(text, merges) == ids, text


def test_wrong_input(tmp_path):
  """A vocabulary below the bytes, a missing file, a file that is no text."""
  with pytest.raises(UserError, match="256 bytes"):
    bpe.train("text", 255)
  with pytest.raises(UserError, match="cannot read"):
    bpe.read(str(tmp_path / "none"))
  (tmp_path / "raw").write_bytes(b"\xff\xfe\xff")
  with pytest.raises(UserError, match="UTF-8"):
    bpe.read(str(tmp_path / "raw"))
