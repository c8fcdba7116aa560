"""Token streams on disk: tokenised once, memory-mapped ever after.

A stream is two files, NAME.ids.npy (uint16, or uint32 for a vocabulary above
65,536) and NAME.docs.npy (where its documents lie). They are written part by
part, so a corpus may be larger than memory.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxlm.data.cache import cache_dir, digest, whole_folder
from jaxlm.data.loader import Tokens
from jaxlm.data.tokenizer import Tokenizer, utf8
from jaxlm.errors import UserError

_VERSION = "1"  # of the files' form; raise it when their meaning changes
_PART = 1 << 20  # characters tokenised at a time
_LINE_END = re.compile(r"\S\n(?=\S)")


def tokens(
  key: str,
  side: Callable[[bool], Iterable[str | bytes]],
  tokenizer: Tokenizer,
  many: bool,
) -> tuple[Tokens, Tokens, dict[str, dict[str, int]]]:
  """Both streams of a split, from the cache or tokenised now.

  Args:
    key: hash of the text and of how it is split.
    side: gives the training texts for False, those for validation for True.
    tokenizer: makes the ids.
    many: whether documents are to be set apart by the end-of-text token.

  Returns:
    The training stream, the validation stream, and for 'train' and 'val' the
    number of `bytes` of text and of `tokens` that stand for them (all but the
    end-of-text tokens).
  """
  key = digest(_VERSION, key, tokenizer.fingerprint(), str(many))
  folder = cache_dir() / "tokens" / key
  for attempt in range(2):
    if not folder.is_dir():
      with whole_folder(folder) as temp:
        sizes = {
          name: _write(temp / name, side(name == "val"), tokenizer, many)
          for name in ("train", "val")
        }
        (temp / "sizes.json").write_text(json.dumps(sizes))
    try:
      sizes = json.loads((folder / "sizes.json").read_text())
      return _read(folder / "train"), _read(folder / "val"), sizes
    except (OSError, ValueError) as error:
      # Somebody damaged the cache: make it again, once.
      if attempt:
        raise UserError(f"cannot read the cache {folder}: {error}") from error
      shutil.rmtree(folder, ignore_errors=True)
  raise AssertionError("unreachable")


def _write(
  path: Path, texts: Iterable[str | bytes], tokenizer: Tokenizer, many: bool
) -> dict[str, int]:
  """Writes PATH.ids.npy and PATH.docs.npy; returns the sizes of the text."""
  sizes = {"bytes": 0, "tokens": 0}

  def counted() -> Iterator[str | bytes]:
    for text in texts:
      sizes["bytes"] += len(text if isinstance(text, bytes) else utf8(text))
      yield text

  eot = tokenizer.eot if many else None
  ends = [] if eot is None else [eot]
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
  docs, total, begin = [], 0, 0
  with open(f"{path}.ids.npy", "wb") as file:
    start = _header(file, dtype, 0)
    for number, (ids, last) in enumerate(_encoded(counted(), tokenizer)):
      if number == 0:
        total += _append(file, ends, dtype, tokenizer)
      sizes["tokens"] += _append(file, ids, dtype, tokenizer)
      total += len(ids)
      if last:
        total += _append(file, ends, dtype, tokenizer)
        docs.append((begin, total - 1))
        begin = total - len(ends)
    file.seek(0)
    assert _header(file, dtype, total) == start
  np.save(f"{path}.docs.npy", np.array(docs, np.int64).reshape(-1, 2))
  return sizes


def _encoded(
  texts: Iterable[str | bytes], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, bool]]:
  """Ids of the texts in parts, each with whether it ends its text."""
  waiting: list[str | bytes] = []
  lasts: list[bool] = []
  size = 0
  for part, last in (pair for text in texts for pair in parts(text)):
    waiting.append(part)
    lasts.append(last)
    size += len(part)
    if size >= 4 * _PART:
      yield from zip(tokenizer.encode_many(waiting), lasts, strict=True)
      waiting, lasts, size = [], [], 0
  yield from zip(tokenizer.encode_many(waiting), lasts, strict=True)


def parts(text: str | bytes) -> Iterator[tuple[str | bytes, bool]]:
  """Cuts a long text where no tokenizer's word can cross; marks the last part.

  That is after a newline between two visible characters: byte-level BPE keeps
  such a newline apart from what follows, and so does SentencePiece as it is
  trained here, so the ids are those of the whole text.
  """
  start = 0
  while len(text) - start > _PART:
    if isinstance(text, bytes):
      stop = start + _PART
    else:
      found = _LINE_END.search(text, start + _PART)
      if found is None:
        break
      stop = found.end()
    yield text[start:stop], False
    start = stop
  yield text[start:], True


def _append(
  file: BinaryIO, ids: Sequence[int], dtype: type, tokenizer: Tokenizer
) -> int:
  """Writes ids after checking that the vocabulary has them."""
  ids = np.asarray(ids, np.int64)
  if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
    raise UserError(
      f"the tokenizer gave id {ids.max()} with {tokenizer.vocab_size} tokens "
      "in its vocabulary; its file is inconsistent"
    )
  file.write(ids.astype(dtype).tobytes())
  return len(ids)


def _header(file: BinaryIO, dtype: type, count: int) -> int:
  """Writes the .npy header of a [count] array; returns where data begins.

  numpy pads headers so that a longer first axis fits the same bytes, which is
  what lets an array be appended to.
  """
  form = {
    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
    "fortran_order": False,
    "shape": (count,),
  }
  np.lib.format.write_array_header_1_0(file, form)
  return file.tell()


def _read(path: Path) -> Tokens:
  """Opens what `_write` wrote; ids are memory-mapped where they are many."""
  name = Path(f"{path}.ids.npy")
  mode = "r" if name.stat().st_size > 1 << 24 else None
  ids = np.load(name, mmap_mode=mode)
  return Tokens(ids, np.load(f"{path}.docs.npy"))
