"""Tokenizers give every text back, and text cannot forge a special token."""

import json
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxlm.data import (
  EOT,
  ByteBPE,
  Bytes,
  Chars,
  SentencePiece,
  TextStream,
  Tokenizer,
  bytes_per_token,
  load,
)
from jaxlm.data.pieces import Pieces
from jaxlm.errors import UserError

LINES = [
  "The quick brown fox jumps over the lazy dog.",
  "A list is a mutable sequence, used to store items of one kind.",
  "Größe, naïve café, Ελλάδα, 日本語 and 🙂 are text as well.",
  "    indented(code, with=many) + punctuation [1, 2, 3]",
]
CORPUS = ["\n".join(random.Random(0).choices(LINES, k=200))]
KINDS = ["bytes", "bpe", "sentencepiece", "sentencepiece-bpe"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
  return {
    "bytes": Bytes([EOT]),
    "bpe": ByteBPE.train(CORPUS, 400),
    "sentencepiece": SentencePiece.train(CORPUS, 330),
    "sentencepiece-bpe": SentencePiece.train(CORPUS, 330, kind="bpe"),
    "pieces": unigram(),
  }


def unigram() -> Pieces:
  """Unigram pieces with Metaspace and byte fallback, as T5 and others have."""
  import tokenizers as hf

  pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁The", -3.0), ("a", -3.0)]
  pieces += [(f"<0x{b:02X}>", -9.0) for b in range(256)]
  tok = hf.Tokenizer(hf.models.Unigram(pieces, 0, byte_fallback=True))
  tok.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="never")
  return Pieces(tok.to_str())


def random_text(rng: random.Random) -> str:
  """Any code points but surrogates, with what breaks tokenizers made likely."""
  pools = (
    lambda: chr(rng.randrange(128)),
    lambda: chr(rng.randrange(0x800)),
    lambda: chr(rng.choice([rng.randrange(0xD800), 0xE000, 0xFFFF])),
    lambda: chr(rng.randrange(0x10000, 0x110000)),
    lambda: rng.choice("▁ \n\t\r\0\u00a0\u2028\u3000\ufeff\ufffd\u0301Ġ"),
    lambda: rng.choice([EOT, "<unk>", "<0x41>", "</s>", "  ", "\n\n", "''"]),
  )
  return "".join(rng.choice(pools)() for _ in range(rng.randrange(24)))


@pytest.mark.parametrize("kind", KINDS)
def test_lossless_on_random_unicode(kind: str, tokenizers) -> None:
  """decode(encode(text)) == text for 10,000 strings, none reaching a special.

  Among them are the marks that tokenizers use themselves, and the names of
  special tokens, which must come out as text.
  """
  rng = random.Random(1)
  tok = tokenizers[kind]
  texts = [random_text(rng) for _ in range(10_000)]
  special = set(tok.specials.values())
  for text, ids in zip(texts, tok.encode_many(texts), strict=True):
    assert tok.decode(ids) == text
    assert not special & set(ids.tolist())
    assert ids.dtype == np.int32
    assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tok.vocab_size


@hypothesis.given(st.text())
def test_lossless_shrunk(tokenizers, text: str) -> None:
  """The same law where a failure would be reduced to its smallest text."""
  for tok in tokenizers.values():
    assert tok.decode(tok.encode(text)) == text


@hypothesis.given(st.data())
def test_chars_lossless_on_their_alphabet(data) -> None:
  alphabet = data.draw(st.text(min_size=1))
  text = data.draw(st.text(alphabet=sorted(set(alphabet))))
  tok = Chars.train([alphabet])
  assert tok.decode(tok.encode(text)) == text
  assert tok.vocab_size == len(set(alphabet))


def test_chars_are_numbered_as_in_nanogpt() -> None:
  """Ids follow sorted(set(text)), so published character models fit."""
  tok = Chars.train(["hello, world"])
  assert tok.alphabet == " ,dehlorw"
  assert tok.encode("hello").tolist() == [4, 3, 5, 5, 6]


def test_unknown_character_is_named() -> None:
  with pytest.raises(UserError, match=r"'z' \(at position 2\).*9 that"):
    Chars.train(["hello, world"]).encode("hez")
  with pytest.raises(UserError, match="at position 0"):
    Chars("").encode("a")


@pytest.mark.parametrize("kind", KINDS)
def test_specials_only_if_allowed(kind: str, tokenizers) -> None:
  """The name of a special token is text, until the caller says otherwise."""
  tok = tokenizers[kind]
  text = f"one{EOT}two{EOT}"
  assert tok.eot is not None
  plain, marked = tok.encode(text), tok.encode(text, allow_special=True)
  assert tok.eot not in plain
  assert (marked == tok.eot).sum() == 2
  assert marked[-1] == tok.eot
  assert np.array_equal(marked, tok.encode(text, allow_special=[EOT]))
  assert np.array_equal(plain, tok.encode(text, allow_special=["<other>"]))
  assert tok.decode(marked) == tok.decode(plain) == text


def test_no_special_token_no_eot() -> None:
  assert Bytes().eot is None
  assert Bytes().vocab_size == 256
  assert ByteBPE.train(CORPUS, 300, specials=()).eot is None


@pytest.mark.parametrize("kind", [*KINDS, "chars"])
def test_save_and_load(kind: str, tokenizers, tmp_path: Path) -> None:
  """What comes back from a folder gives the same ids and fingerprint."""
  tok = Chars.train(CORPUS) if kind == "chars" else tokenizers[kind]
  tok.save(tmp_path)
  again = load(tmp_path)
  assert type(again) is type(tok)
  assert again.fingerprint() == tok.fingerprint()
  assert again.specials == tok.specials
  assert again.vocab_size == tok.vocab_size
  assert np.array_equal(again.encode(CORPUS[0]), tok.encode(CORPUS[0]))
  assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_save_on_a_full_disk(tmp_path: Path, monkeypatch) -> None:
  """The error is one sentence, and the old file stays whole."""
  Bytes().save(tmp_path)

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.replace", full)
  with pytest.raises(UserError, match=r"tokenizer\.json: No space left"):
    Chars("ab").save(tmp_path)
  assert isinstance(load(tmp_path), Bytes)
  assert [f.name for f in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_is_reproducible() -> None:
  """The same text gives the same vocabulary, byte for byte."""
  for kind in (ByteBPE, SentencePiece):
    one, two = kind.train(CORPUS, 330), kind.train(CORPUS, 330)
    assert one.fingerprint() == two.fingerprint()


def test_bpe_ids_are_those_of_the_library() -> None:
  """Our wrapper changes nothing about ordinary text."""
  import tokenizers as hf

  tok = ByteBPE.train(CORPUS, 400)
  reference = hf.Tokenizer.from_str(tok._content)
  for line in LINES:
    assert tok.encode(line).tolist() == reference.encode(line).ids
    assert tok.decode(tok.encode(line)) == line


def test_sentencepiece_with_added_space(tmp_path: Path) -> None:
  """Published models put a space before the text; decoding takes it off."""
  import sentencepiece

  prefix = tmp_path / "llama"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES * 20),
    model_prefix=str(prefix),
    vocab_size=330,
    byte_fallback=True,
    minloglevel=2,
  )
  tok = load(prefix.with_suffix(".model"))
  assert tok.specials == {"<s>": 1, "</s>": 2}
  assert tok.eot == 2
  ids = tok.encode("The quick dog")
  assert tok.decode(ids) == "The quick dog"
  assert tok.decode_bytes(ids, start=False) == b" The quick dog"


def test_pieces_of_a_tokenizer_json() -> None:
  """Llama 2's form: a space before the text, bytes for what has no piece."""
  vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
  vocab |= {f"<0x{b:02X}>": 3 + b for b in range(256)}
  pieces = ("▁", "a", "b", "▁a", "ab", "▁ab")
  vocab |= {piece: 259 + i for i, piece in enumerate(pieces)}
  form = _form_of(vocab, [["▁", "a"], ["a", "b"], ["▁a", "b"]])
  tok = Pieces(json.dumps(form))
  assert tok.specials == {"<unk>": 0, "<s>": 1, "</s>": 2}
  assert (tok.eot, tok.vocab_size, tok.start) == (2, 265, ())
  for text in ("ab a", "  ab", "é 🙂\n", "</s> a", ""):
    assert tok.decode(tok.encode(text)) == text
  assert tok.encode("ab").tolist() == [264]
  assert tok.decode_bytes(tok.encode("ab"), start=False) == b" ab"
  assert tok.encode("a</s>", allow_special=True).tolist() == [262, 2]


def _form_of(vocab: dict[str, int], merges: list[list[str]]) -> dict:
  """A tokenizer.json of pieces, as Llama 2 has it."""
  import tokenizers as hf

  tok = hf.Tokenizer(
    hf.models.BPE(
      vocab=vocab,
      merges=[tuple(merge) for merge in merges],
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  tok.normalizer = hf.normalizers.Sequence(
    [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
  )
  tok.add_special_tokens(["<unk>", "<s>", "</s>"])
  return json.loads(tok.to_str())


@hypothesis.given(st.text(st.characters(exclude_characters="▁")))
def test_unigram_pieces_are_lossless(tokenizers, text: str) -> None:
  """Bytes stand in for what has no piece; "▁" alone comes back as a space."""
  tok = tokenizers["pieces"]
  assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_stream_never_splits_a_character(kind: str, tokenizers) -> None:
  """Ids pushed one by one give whole characters, in sum the whole text."""
  tok = tokenizers[kind]
  text = "naïve 日本語 🙂🙂 end▁"
  stream = TextStream(tok)
  pieces = [stream.push([i]) for i in tok.encode(text)]
  assert "".join(pieces) + stream.flush() == text
  assert all("\ufffd" not in piece for piece in pieces)


def test_stream_marks_what_never_came_whole() -> None:
  stream = TextStream(Bytes())
  assert stream.push("é".encode()[:1]) == ""
  assert stream.flush() == "\ufffd"


def test_bytes_per_token() -> None:
  """UTF-8 bytes over tokens, by hand: 5 bytes in 4 characters."""
  assert bytes_per_token(Bytes(), ["naïv"]) == 1.0
  assert bytes_per_token(Chars("naïv"), ["naïv"]) == 5 / 4
  with pytest.raises(UserError, match="empty"):
    bytes_per_token(Bytes(), [""])


def test_bytes_take_raw_bytes() -> None:
  every = bytes(range(256))
  ids = Bytes().encode_many([every])[0]
  assert ids.tolist() == list(every)
  assert Bytes().decode_bytes(ids) == every


def test_errors(tmp_path: Path) -> None:
  """Each wrong input is one sentence with a way out."""
  with pytest.raises(UserError, match=r"at least 257 tokens.*vocab is 100"):
    ByteBPE.train(CORPUS, 100)
  with pytest.raises(UserError, match=r"more than 258 tokens.*vocab is 258"):
    SentencePiece.train(CORPUS, 258)
  with pytest.raises(UserError, match="could not learn 9999"):
    SentencePiece.train(CORPUS, 9999, kind="bpe")
  with pytest.raises(UserError, match=r"id 300 is outside.*0..255"):
    Bytes().decode([300])
  with pytest.raises(UserError, match="lone surrogate at position 1"):
    ByteBPE.train(CORPUS, 300).encode("a\ud800")
  with pytest.raises(UserError, match=r"no tokenizer\.json"):
    load(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match="is not JSON"):
    load(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="not a usable tokenizer"):
    load(tmp_path)
  (tmp_path / "a.model").write_bytes(b"nonsense")
  with pytest.raises(UserError, match="not a usable SentencePiece"):
    load(tmp_path / "a.model")


def test_vocabularies_that_lose_text_are_refused() -> None:
  """A word-level vocabulary is told apart when read, an incomplete in use."""
  form = json.loads(ByteBPE.train(CORPUS, 300)._content)
  model = form["model"]
  with pytest.raises(UserError, match="not a byte-level BPE"):
    ByteBPE(json.dumps(form | {"pre_tokenizer": None, "decoder": None}))
  prefixed = form["pre_tokenizer"] | {"add_prefix_space": True}
  with pytest.raises(UserError, match="changes plain text"):
    ByteBPE(json.dumps(form | {"pre_tokenizer": prefixed}))
  vocab = {k: v for k, v in model["vocab"].items() if k not in ("!", "ĉ")}
  merges = [m for m in model["merges"] if "!" not in "".join(m)]
  poor = model | {"vocab": vocab, "merges": merges}
  poor = ByteBPE(json.dumps(form | {"model": poor}))
  assert poor.decode(poor.encode("as ever")) == "as ever"
  for text in ("no!", "a\tb"):  # the library would drop these silently
    with pytest.raises(UserError, match="no token"):
      poor.encode(text)
