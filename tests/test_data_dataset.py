"""From a path to token streams: split, tokenised once, kept whole."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import (
  EOT,
  ByteBPE,
  Bytes,
  Chars,
  SentencePiece,
  batches,
  prepare,
  store,
  windows,
)
from jaxlm.data.dataset import held_out
from jaxlm.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
  """An empty cache folder for every test."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  return folder / "jaxlm"


def write_json(path: Path, texts: list[str]) -> str:
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  return str(path)


@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe", "sentencepiece"])
def test_single_text(kind: str, corpus: str) -> None:
  """The first 90 % of the characters train, the rest validates.

  Decoded, the two streams are the text again: nothing is added or lost.
  """
  data = prepare(corpus, tokenizer=kind, vocab=400)
  text = Path(corpus).read_text(encoding="utf-8")
  size = len(text.encode()) if kind == "bytes" else len(text)
  train, val = data.train[0], data.val[0]
  parts = [data.tokenizer.decode_bytes(s.ids) for s in (train, val)]
  assert b"".join(parts).decode() == text
  if kind != "bytes":
    assert len(parts[0].decode()) == int(0.9 * size)
  assert data.counts["characters"] == size
  assert data.counts["val_bytes"] == len(parts[1])
  assert data.counts["train_tokens"] == len(train.ids)
  assert train.docs.tolist() == [[0, len(train.ids) - 1]]
  assert data.tokenizer.eot is None  # there is no end of a document to learn
  tokens = len(train.ids) + len(val.ids)
  assert data.counts["bytes_per_token"] == len(text.encode()) / tokens


def test_nanogpt_split(tmp_path: Path) -> None:
  """1,115,394 characters split as in nanoGPT: 1,003,854 and 111,540."""
  path = tmp_path / "a.txt"
  path.write_text("ab" * (1_115_394 // 2))
  data = prepare(path, tokenizer="chars")
  assert len(data.train[0].ids) == 1_003_854
  assert len(data.val[0].ids) == 111_540


def test_documents_are_set_apart(tmp_path: Path) -> None:
  """Streams are eot doc eot doc eot; whole documents are held out."""
  texts = [f"document {i} " * (i % 7 + 1) for i in range(40)]
  path = write_json(tmp_path / "a.jsonl", texts)
  data = prepare(path, tokenizer="bytes", val_fraction=0.2)
  found = []
  for split in (data.train[0], data.val[0]):
    ids, eot = split.ids, data.tokenizer.eot
    assert ids[0] == ids[-1] == eot
    assert (ids == eot).sum() == len(split.docs) + 1
    for begin, end in split.docs:
      assert ids[begin] == ids[end] == eot
      found.append(data.tokenizer.decode(ids[begin + 1 : end]))
  assert sorted(found) == sorted(texts)
  held = sum(map(len, texts)) - sum(map(len, found[: len(data.train[0].docs)]))
  assert 0.15 < held / sum(map(len, texts)) <= 0.2


def test_documents_without_an_end_token(tmp_path: Path) -> None:
  """With a tokenizer that has no eot, no pair crosses a border either."""
  Bytes().save(tmp_path)
  path = write_json(tmp_path / "a.jsonl", ["abc", "defg", "h", "ij"])
  data = prepare(path, tokenizer=str(tmp_path), val_fraction=0)
  split = data.train[0]
  assert bytes(split.ids.tolist()) == b"abcdefghij"
  assert split.docs.tolist() == [[0, 2], [3, 6], [7, 7], [8, 9]]
  assert data.val == ()
  targets = [b["targets"][b["mask"] > 0] for b in windows(split, 4, 2, True)]
  assert bytes(np.sort(np.concatenate(targets)).tolist()) == b"bcefgj"


def test_second_run_reads_the_cache(corpus: str, monkeypatch) -> None:
  """Nothing is trained or tokenised again; the ids are the same."""
  for kind, maker in (("bpe", ByteBPE), ("sentencepiece", SentencePiece)):
    one = prepare(corpus, tokenizer=kind, vocab=400)
    with monkeypatch.context() as patch:
      patch.setattr(maker, "train", None)
      patch.setattr(store, "_write", None)
      two = prepare(corpus, tokenizer=kind, vocab=400)
    assert np.array_equal(one.train[0].ids, two.train[0].ids)
    assert one.tokenizer.fingerprint() == two.tokenizer.fingerprint()


def test_cache_key_has_everything(corpus: str, tmp_path: Path) -> None:
  """Another vocabulary, split or text never meets the old tokens."""
  base = prepare(corpus, tokenizer="bpe", vocab=400)
  other = prepare(corpus, tokenizer="bpe", vocab=350)
  assert other.tokenizer.vocab_size == 350
  half = prepare(corpus, tokenizer="bpe", vocab=400, val_fraction=0.5)
  assert len(half.train[0].ids) < len(base.train[0].ids)
  changed = tmp_path / "changed.txt"
  changed.write_text(Path(corpus).read_text().replace("fox", "cat"))
  new = prepare(changed, tokenizer="bpe", vocab=400)
  assert "cat" in new.tokenizer.decode(new.train[0].ids)


def test_damaged_cache_is_made_again(corpus: str, cache: Path) -> None:
  """A truncated or missing file costs time, not the run."""
  good = prepare(corpus, tokenizer="bpe", vocab=300)
  for name in ("tokens/*/train.ids.npy", "tokenizers/*/tokenizer.json"):
    file = next(cache.glob(name))
    cut = file.read_bytes()[:50]
    for harm in (lambda f=file, c=cut: f.write_bytes(c), file.unlink):
      harm()
      again = prepare(corpus, tokenizer="bpe", vocab=300)
      assert np.array_equal(again.train[0].ids, good.train[0].ids)


def test_kill_while_writing_leaves_nothing(corpus: str, monkeypatch) -> None:
  """What is not complete never appears under its name."""
  with monkeypatch.context() as patch:
    patch.setattr(store, "_append", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      prepare(corpus, tokenizer="chars")
  assert len(prepare(corpus, tokenizer="chars").train[0].ids) > 0


def test_full_disk_is_an_error_of_its_own(corpus: str, monkeypatch) -> None:
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(store, "_append", full)
  with pytest.raises(UserError, match=r"No space left on device.*XDG_CACHE"):
    prepare(corpus, tokenizer="chars")


def test_unwritable_cache(corpus: str, tmp_path: Path, monkeypatch) -> None:
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with pytest.raises(UserError, match="XDG_CACHE_HOME"):
    prepare(corpus, tokenizer="chars")


@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe", "sentencepiece"])
def test_parts_do_not_change_the_ids(kind, corpus, monkeypatch, cache) -> None:
  """Tokenised in small parts, a text gives the ids of the whole."""
  whole = prepare(corpus, tokenizer=kind, vocab=400)
  folder = cache.parent / "tokenizer"
  whole.tokenizer.save(folder)
  monkeypatch.setattr(store, "_PART", 50)
  for path in cache.glob("tokens/*/*"):
    path.unlink()
  parts = prepare(corpus, tokenizer=str(folder))
  assert np.array_equal(parts.train[0].ids, whole.train[0].ids)
  text = Path(corpus).read_text(encoding="utf-8")
  cut = [part for part, _ in store.parts(text)]
  assert "".join(cut) == text
  assert len(cut) > 50


def test_mixture(tmp_path: Path) -> None:
  """One stream per path with weights, one stream for all without."""
  a = write_json(tmp_path / "a.jsonl", ["aaaa" * 9] * 30)
  b = write_json(tmp_path / "b.jsonl", ["bbbb" * 5] * 20)
  data = prepare([a, b], tokenizer="bytes", weights=(0.8, 0.2))
  assert len(data.train) == len(data.val) == 2
  assert data.weights == (0.8, 0.2)
  mixed = batches(data.train, 4, 100, windows="packed", weights=data.weights)
  of_b = (mixed[0]["inputs"] == ord("b")).any(1)
  assert of_b.sum() == 20
  joined = prepare(f"{a},{b}", tokenizer="bytes")
  assert len(joined.train) == 1
  assert joined.counts["documents"] == 50


def test_any_file_trains_on_bytes(tmp_path: Path) -> None:
  """What is not UTF-8 is an error that names the way: tokenizer='bytes'."""
  path = tmp_path / "latin.txt"
  path.write_bytes("Größe ".encode("latin-1") * 100)
  with pytest.raises(UserError, match="tokenizer='bytes'"):
    prepare(path, tokenizer="bpe")
  data = prepare(path, tokenizer="bytes")
  assert data.counts["bytes"] == 600
  Bytes().save(tmp_path / "run")  # as a continued run gives it
  again = prepare(path, tokenizer=str(tmp_path / "run"))
  assert np.array_equal(again.train[0].ids, data.train[0].ids)


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
  """uint16 up to 65,536 ids, then uint32, without wrapping around."""
  alphabet = "".join(map(chr, [*range(0xD800), *range(0x10000, 0x14000)]))
  for chars, dtype in ((alphabet[: 1 << 16], "uint16"), (alphabet, "uint32")):
    Chars(chars).save(tmp_path)
    path = tmp_path / "a.txt"
    path.write_text(chars[:9] + chars[-9:], encoding="utf-8", newline="")
    data = prepare(path, tokenizer=str(tmp_path), val_fraction=0)
    assert data.train[0].ids.dtype == dtype
    assert data.train[0].ids[-1] == len(chars) - 1


def test_held_out_share() -> None:
  """Close to the fraction of the characters, from below; never everything."""
  lengths = np.random.default_rng(0).integers(1, 1000, 500)
  for fraction in (0.01, 0.1, 0.5):
    share = lengths[held_out(lengths, fraction)].sum() / lengths.sum()
    assert 0.97 * fraction < share <= fraction
  assert held_out(np.array([5, 9]), 0.1).tolist() == [True, False]
  assert not held_out(lengths, 0).any()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"val_fraction": 1.0}, "val_fraction is 1.0"),
    ({"tokenizer": "wordpiece"}, "'wordpiece', which is neither"),
    ({"weights": (1, 2)}, "2 numbers for 1 paths"),
    ({"path": None, "weights": (1,)}, "needs data.path"),
    ({"path": "absent.txt"}, "no such data file: absent.txt"),
    ({"tokenizer": "bpe", "vocab": 10}, "at least 256 tokens"),
  ],
)
def test_errors(change: dict, message: str, corpus: str) -> None:
  with pytest.raises(UserError, match=message):
    prepare(**({"path": corpus, "tokenizer": "chars"} | change))


def test_no_documents(tmp_path: Path) -> None:
  path = write_json(tmp_path / "a.jsonl", ["", ""])
  with pytest.raises(UserError, match="no documents in"):
    prepare(path)


def test_text_cannot_end_a_document(tmp_path: Path) -> None:
  """The name of the end-of-text token in a document is ordinary text."""
  texts = [f"before {EOT} after"] * 10
  path = write_json(tmp_path / "a.jsonl", texts)
  data = prepare(path, tokenizer="bpe", vocab=300, val_fraction=0)
  assert (data.train[0].ids == data.tokenizer.eot).sum() == 11


def test_token_outside_the_vocabulary(corpus: str, monkeypatch) -> None:
  """A tokenizer that gives ids it does not have is found out at once."""
  bad = lambda self, texts: [np.array([256], np.int32) for _ in texts]  # noqa: E731
  monkeypatch.setattr(Bytes, "_encode", bad)
  with pytest.raises(UserError, match="id 256 with 256 tokens"):
    prepare(corpus, tokenizer="bytes")
