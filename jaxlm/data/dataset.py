"""From a path to token streams: read, split, tokenise once, keep.

`prepare` is what a training program calls. The token ids end as uint16 or
uint32 arrays in the cache folder, under a hash of the text, the tokenizer and
the split, and are memory-mapped from there by every later run.
"""

import dataclasses
import hashlib
import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxlm.data import corpus, sources, store
from jaxlm.data.cache import cache_dir, digest, whole_folder
from jaxlm.data.loader import Tokens
from jaxlm.data.tokenizer import EOT, Tokenizer, utf8
from jaxlm.data.tokenizers import ByteBPE, Bytes, Chars, SentencePiece, load
from jaxlm.errors import UserError

_VERSION = "1"  # of splits and trained tokenizers, as they are cached


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Tokenised text, ready for `batches` and `windows`.

  Attributes:
    train, val: one stream per source of a mixture (one, without weights).
    tokenizer: what made the ids.
    weights: share of each source in training, or None.
    counts: documents, characters (bytes, if the text was read as bytes),
      bytes, val_bytes, train_tokens, val_tokens, vocab, bytes_per_token.
  """

  train: tuple[Tokens, ...]
  val: tuple[Tokens, ...]
  tokenizer: Tokenizer
  weights: tuple[float, ...] | None
  counts: dict[str, int | float]

  def describe(self) -> str:
    """One line for the log."""
    c = self.counts
    return (
      f"{c['characters']:,} characters in {c['documents']:,} documents; "
      f"{c['train_tokens']:,} training and {c['val_tokens']:,} validation "
      f"tokens of {c['vocab']:,} kinds, {c['bytes_per_token']:.2f} bytes each"
    )


def prepare(
  path: str | Path | Sequence[str | Path] | None = None,
  tokenizer: str | Tokenizer = "bpe",
  vocab: int = 4096,
  val_fraction: float = 0.1,
  text_key: str = "text",
  weights: Sequence[float] | None = None,
) -> Dataset:
  """Reads, splits and tokenises a corpus, or finds it in the cache.

  A single text is split by characters: the last `val_fraction` of it is for
  validation, as nanoGPT does. Several documents are split as wholes, chosen by
  a fixed shuffle, and end with the tokenizer's end-of-text token.

  Args:
    path: files, folders or glob patterns (a string may hold several, with
      commas between); None is the documentation that Python carries.
    tokenizer: 'bytes', 'chars', 'bpe' or 'sentencepiece', made from the
      training text (chars: from all text); or a tokenizer, its file or
      folder.
    vocab: tokens that 'bpe' or 'sentencepiece' may have.
    val_fraction: share of the text held out, 0 <= f < 1.
    text_key: key or column of the text in JSON lines and tables.
    weights: one number per path makes a mixture of the paths; without it they
      are one corpus.

  Raises:
    UserError: about anything wrong with the arguments or the files.
  """
  if not 0 <= val_fraction < 1:
    raise UserError(
      f"data.val_fraction is {val_fraction}; it must be at least 0 and below 1"
    )
  groups = _groups(path, weights)
  given = _given(tokenizer)
  raw = isinstance(given, Bytes) or tokenizer == "bytes"
  splits = tuple(
    _split(_documents(group, text_key, raw), group, val_fraction)
    for group in groups
  )
  many = len(splits) > 1 or len(splits[0].lengths) > 1
  made = given or _made(tokenizer, vocab, splits, (EOT,) if many else ())
  found = [store.tokens(split.key, split.side, made, many) for split in splits]
  train, val, sizes = zip(*found, strict=True)
  val = tuple(v for v in val if len(v.ids))
  of_text = sum(s[side]["tokens"] for s in sizes for side in s)
  counts = {
    "documents": sum(len(s.lengths) for s in splits),
    "characters": int(sum(s.lengths.sum() for s in splits)),
    "bytes": sum(s.bytes for s in splits),
    "val_bytes": sum(s["val"]["bytes"] for s in sizes),
    "train_tokens": sum(len(t.ids) for t in train),
    "val_tokens": sum(len(v.ids) for v in val),
    "vocab": made.vocab_size,
    "bytes_per_token": sum(s.bytes for s in splits) / of_text,
  }
  return Dataset(train, val, made, tuple(weights) if weights else None, counts)


# --- Reading and splitting --------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Split:
  """Documents that can be iterated over again, and where the line is drawn.

  Either `held` tells the documents for validation apart, or (`cut` >= 0) the
  one document is cut at that character.
  """

  documents: Iterable[str | bytes]
  lengths: np.ndarray
  bytes: int
  key: str
  held: np.ndarray
  cut: int

  def side(self, val: bool) -> Iterator[str | bytes]:
    """The texts for training, or those for validation."""
    for text, held in zip(self.documents, self.held, strict=True):
      if self.cut >= 0:
        text = text[self.cut :] if val else text[: self.cut]
      elif held != val:
        continue
      if text:
        yield text


def _groups(
  path: str | Path | Sequence[str | Path] | None,
  weights: Sequence[float] | None,
) -> list[list[str] | None]:
  """The paths of each source; None stands for the default corpus."""
  if path is None or path == "" or path == ():
    if weights:
      raise UserError("data.weights needs data.path: one path per weight")
    return [None]
  if isinstance(path, str) and "," in path and not Path(path).exists():
    path = [part.strip() for part in path.split(",")]
  paths = [path] if isinstance(path, str | Path) else list(path)
  paths = [str(p) for p in paths]
  if not weights:
    return [paths]
  if len(weights) != len(paths):
    raise UserError(
      f"data.weights has {len(weights)} numbers for {len(paths)} paths; give "
      "one per path"
    )
  return [[p] for p in paths]


def _documents(
  group: list[str] | None, text_key: str, raw: bool
) -> Iterable[str | bytes]:
  return (
    corpus.documents() if group is None else sources.read(group, text_key, raw)
  )


def _split(
  documents: Iterable[str | bytes], group: list[str] | None, fraction: float
) -> _Split:
  """Reads the documents once, for their lengths and their hash."""
  h = hashlib.blake2b(digest_size=16)
  lengths, total = [], 0
  for text in documents:
    content = text if isinstance(text, bytes) else utf8(text)
    lengths.append(len(text))
    total += len(content)
    h.update(len(content).to_bytes(8, "little"))
    h.update(content)
  if not lengths:
    raise UserError(f"no documents in {', '.join(group or [])}: all are empty")
  sizes = np.array(lengths, np.int64)
  single = len(lengths) == 1
  # int(n * 0.9), not n - int(n * 0.1): tiny Shakespeare's 1,003,854.
  cut = int(lengths[0] * (1 - fraction)) if single else -1
  held = np.zeros(1, bool) if single else held_out(sizes, fraction)
  key = digest(h.hexdigest(), str(fraction), _VERSION)
  return _Split(documents, sizes, total, key, held, cut)


def held_out(lengths: np.ndarray, fraction: float) -> np.ndarray:
  """Which documents are for validation, bool [D].

  Documents in a fixed random order, each taken if it still fits under
  `fraction` of all characters; at least one, but never all.
  """
  held = np.zeros(len(lengths), bool)
  if not fraction:
    return held
  room = fraction * lengths.sum()
  bits = np.random.Philox(key=0).random_raw(len(lengths))
  for i in np.argsort(bits, kind="stable"):
    if lengths[i] <= room:
      held[i], room = True, room - lengths[i]
  if not held.any():
    held[np.argmin(lengths)] = True
  return held


# --- Tokenizers -------------------------------------------------------------


def tokenizer_for(
  texts: Sequence[str],
  tokenizer: str | Tokenizer = "bpe",
  vocab: int = 4096,
  specials: Sequence[str] = (EOT,),
) -> Tokenizer:
  """A tokenizer that is given, or one that is made from some texts.

  Args:
    texts: what it is trained on, or has the characters of.
    tokenizer: as for `prepare`.
    vocab: as for `prepare`.
    specials: special tokens of one that is made.

  Raises:
    UserError: as `prepare`.
  """
  given = _given(tokenizer)
  return given or _made(tokenizer, vocab, (_split(texts, None, 0.0),), specials)


def _given(name: str | Tokenizer) -> Tokenizer | None:
  """The tokenizer in a file or folder; None for the kinds that are made."""
  if isinstance(name, Tokenizer):
    return name
  if name in ("bytes", "chars", "bpe", "sentencepiece"):
    return None
  if not Path(name).expanduser().exists():
    raise UserError(
      f"data.tokenizer is {name!r}, which is neither 'bytes', 'chars', 'bpe', "
      "'sentencepiece' nor an existing tokenizer file"
    )
  return load(Path(name).expanduser())


def _made(
  name: str, vocab: int, splits: Sequence[_Split], specials: Sequence[str]
) -> Tokenizer:
  """The tokenizer of that kind for this text."""
  if name == "bytes":
    return Bytes(specials)
  if name == "chars":
    # All the text, as nanoGPT: validation may hold a character of its own.
    texts = itertools.chain(*(s.documents for s in splits))
    return Chars.train(texts, specials)
  return _trained(name, vocab, splits, specials)


def _trained(
  name: str, vocab: int, splits: Sequence[_Split], specials: Sequence[str]
) -> Tokenizer:
  """Trains on the training texts, or loads what an earlier run trained."""
  import sentencepiece
  import tokenizers

  kind, library = {
    "bpe": (ByteBPE, tokenizers),
    "sentencepiece": (SentencePiece, sentencepiece),
  }[name]
  keys = [s.key for s in splits]
  form = (_VERSION, name, str(vocab), str(specials), library.__version__)
  key = digest(*form, *keys)
  folder = cache_dir() / "tokenizers" / key
  try:
    return load(folder)
  except UserError:
    shutil.rmtree(folder, ignore_errors=True)  # there only if it was damaged
  texts = itertools.chain(*(s.side(val=False) for s in splits))
  made = kind.train(
    (p for t in texts for p, _ in store.parts(t)), vocab, specials
  )
  with whole_folder(folder) as temp:
    made.save(temp)
  return made
