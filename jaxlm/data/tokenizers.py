"""Five ways between text and token ids.

    Bytes           the 256 bytes of UTF-8; nothing to train, encodes anything
    Chars           the characters of one corpus, as in char-rnn and nanoGPT
    ByteBPE         byte-level BPE of Hugging Face `tokenizers`
    SentencePiece   unigram or BPE pieces with byte fallback
    Pieces          the same in a tokenizer.json (in pieces.py; read only)

Those made here are lossless: `decode(encode(text)) == text` for every string
(Chars: of its own alphabet). A vocabulary from elsewhere is as lossless as its
normaliser.
"""

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxlm.data.pieces import Pieces, read_json, start_of
from jaxlm.data.tokenizer import BESIDE, EOT, Tokenizer, utf8
from jaxlm.errors import UserError


class Bytes(Tokenizer):
  """Ids 0..255 are the bytes of UTF-8; special tokens follow.

  Alone among the four it also takes raw bytes, so it trains on any file.
  """

  def __init__(self, specials: Sequence[str] = ()):
    self.specials = {name: 256 + i for i, name in enumerate(specials)}
    self.vocab_size = 256 + len(self.specials)
    self._table = _table(self, [bytes([i]) for i in range(256)])

  def _encode(self, texts: list[str | bytes]) -> list[np.ndarray]:
    raw = [t if isinstance(t, bytes) else utf8(t) for t in texts]
    return [np.frombuffer(r, np.uint8).astype(np.int32) for r in raw]

  def _decode(self, ids: np.ndarray, start: bool) -> bytes:
    return b"".join([self._table[i] for i in ids])

  def _files(self) -> dict[str, bytes]:
    return _json_file({"type": "bytes", "specials": list(self.specials)})


class Chars(Tokenizer):
  """One id per character of an alphabet, in code point order."""

  _NONE = np.uint32(0xFFFFFFFF)  # no character has this code point

  def __init__(self, alphabet: str, specials: Sequence[str] = ()):
    self.alphabet = "".join(sorted(set(alphabet)))
    n = len(self.alphabet)
    self.specials = {name: n + i for i, name in enumerate(specials)}
    self.vocab_size = n + len(self.specials)
    self._points = _code_points(self.alphabet)
    self._table = _table(self, [utf8(c) for c in self.alphabet])

  @classmethod
  def train(cls, texts: Iterable[str], specials: Sequence[str] = ()) -> "Chars":
    """The tokenizer of exactly the characters that occur in the texts."""
    alphabet: set[str] = set()
    for text in texts:
      alphabet.update(text)
    return cls("".join(alphabet), specials)

  def _encode(self, texts: list[str]) -> list[np.ndarray]:
    return [self._encode_one(text) for text in texts]

  def _encode_one(self, text: str) -> np.ndarray:
    points = _code_points(text)
    ids = np.searchsorted(self._points, points)
    known = np.append(self._points, self._NONE)[ids] == points
    if not known.all():
      at = int(np.argmin(known))
      raise UserError(
        f"character {text[at]!r} (at position {at}) is not among the "
        f"{len(self.alphabet)} that this character tokenizer knows; leave it "
        "out, or train with tokenizer='bpe' or 'bytes', which encode any text"
      )
    return ids.astype(np.int32)

  def _decode(self, ids: np.ndarray, start: bool) -> bytes:
    return b"".join([self._table[i] for i in ids])

  def _files(self) -> dict[str, bytes]:
    return _json_file(
      {
        "type": "chars",
        "alphabet": self.alphabet,
        "specials": list(self.specials),
      }
    )


class ByteBPE(Tokenizer):
  """Byte-level BPE, in the `tokenizer.json` format of Hugging Face.

  Its alphabet is the 256 bytes, so it encodes any text.
  """

  def __init__(self, content: str):
    """`content` is the text of a tokenizer.json; see `train` and `load`."""
    self._hf, form = read_json(content)
    if form["model"].get("type") != "BPE" or "ByteLevel" not in content:
      raise UserError("this tokenizer.json is not a byte-level BPE")
    added = form.get("added_tokens") or []
    self.specials = {a["content"]: a["id"] for a in added if a["special"]}
    vocab = self._hf.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    self._content = content
    self.start = start_of(self._hf)
    self._table = self._bytes_of(vocab, {a["content"] for a in added})
    # Of most vocabularies nothing; the library would drop such bytes silently.
    lacking = set(range(256)) - {b[0] for b in self._table if len(b) == 1}
    self._lacking = re.compile(
      b"|".join(re.escape(bytes([b])) for b in sorted(lacking)) or b"(?!)"
    )
    if self.decode(self.encode("A b")) != "A b":
      raise UserError(
        "this tokenizer.json changes plain text (perhaps by add_prefix_space "
        "or a lowercasing normalizer), so it cannot be read back; turn that off"
      )

  @classmethod
  def train(
    cls, texts: Iterable[str], vocab: int, specials: Sequence[str] = (EOT,)
  ) -> "ByteBPE":
    """Learns merges until there are `vocab` tokens or no pair occurs twice."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel

    least = 256 + len(specials)
    if vocab < least:
      raise UserError(
        f"a byte-level BPE needs at least {least} tokens (256 bytes and "
        f"{len(specials)} special), but vocab is {vocab}; raise it, or use "
        "tokenizer='bytes'"
      )
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab,
      min_frequency=2,
      special_tokens=list(specials),
      initial_alphabet=sorted(ByteLevel.alphabet()),
      show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return cls(tok.to_str(pretty=True))

  def _bytes_of(self, vocab: dict[str, int], added: set[str]) -> list[bytes]:
    """Bytes of every id, from the printable stand-ins of the vocabulary."""
    stand_ins = _byte_stand_ins()
    table = [b""] * self.vocab_size
    for token, i in vocab.items():
      plain = token not in added and all(c in stand_ins for c in token)
      table[i] = bytes(stand_ins[c] for c in token) if plain else utf8(token)
    return table

  def _encode(self, texts: list[str]) -> list[np.ndarray]:
    for text in texts:
      lacking = self._lacking.search(utf8(text))
      if lacking:
        raise UserError(
          f"the text has a character with the byte {lacking[0][0]:#04x} of "
          "UTF-8, for which this vocabulary has no token (those of some "
          "published models lack rare control characters); leave it out"
        )
    found = self._hf.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in found]

  def _decode(self, ids: np.ndarray, start: bool) -> bytes:
    return b"".join([self._table[i] for i in ids])

  def _files(self) -> dict[str, bytes]:
    return {"tokenizer.json": self._content.encode("utf-8")}


class SentencePiece(Tokenizer):
  """A SentencePiece model: its own `tokenizer.model`, trained or loaded.

  Its word mark U+2581 stands for a space, so a U+2581 in the text would come
  back as a space; those few are spelled in byte pieces where there are some.
  """

  def __init__(self, proto: bytes):
    """`proto` is the content of a .model file; see `train` and `load`."""
    import sentencepiece

    self._sp = sentencepiece.SentencePieceProcessor()
    try:
      self._sp.LoadFromSerializedProto(proto)
    except Exception as error:
      raise UserError(f"not a usable SentencePiece model: {error}") from error
    self._proto = proto
    self.vocab_size = self._sp.vocab_size()
    pieces = [self._sp.id_to_piece(i) for i in range(self.vocab_size)]
    self.specials = {
      p: i for i, p in enumerate(pieces) if self._sp.is_control(i)
    }
    self._table = [
      bytes([int(p[3:5], 16)])
      if self._sp.is_byte(i)
      else utf8(p if p in self.specials else p.replace("▁", " "))
      for i, p in enumerate(pieces)
    ]
    mark = [self._sp.piece_to_id(f"<0x{b:02X}>") for b in utf8("▁")]
    self._mark = mark if all(self._sp.is_byte(i) for i in mark) else None
    # Most published models put a space before the text; ours do not.
    self._adds_space = self._sp.encode_as_pieces("a")[0].startswith("▁")

  @classmethod
  def train(
    cls,
    texts: Iterable[str],
    vocab: int,
    specials: Sequence[str] = (EOT,),
    kind: str = "unigram",
  ) -> "SentencePiece":
    """Learns `vocab` pieces (kind 'unigram' or 'bpe'), lossless by choice:

    no normalisation, no added space, byte fallback for what is rare. Lines
    are the units, so a newline is always the byte piece <0x0A>.
    """
    import sentencepiece

    least = 257 + len(specials)
    if vocab <= least:
      raise UserError(
        f"SentencePiece with byte fallback needs more than {least} tokens, "
        f"but vocab is {vocab}; raise it, or use tokenizer='bytes'"
      )
    model = io.BytesIO()
    lines = (x for t in texts for x in t.split("\n") if x and "\0" not in x)
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=vocab,
        model_type=kind,
        hard_vocab_limit=kind != "unigram",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        character_coverage=0.9995,
        max_sentence_length=1 << 20,
        control_symbols=list(specials),
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
      )
    except (RuntimeError, OSError) as error:
      raise UserError(
        f"SentencePiece could not learn {vocab} pieces from this text "
        f"({error}); try another vocab or tokenizer='bpe'"
      ) from error
    return cls(model.getvalue())

  def _encode(self, texts: list[str]) -> list[np.ndarray]:
    return [np.array(self._encode_one(text), np.int32) for text in texts]

  def _encode_one(self, text: str) -> list[int]:
    utf8(text)
    if self._mark is None or self._adds_space or "▁" not in text:
      return self._sp.encode(text)
    head, *rest = text.split("▁")
    ids = self._sp.encode(head)
    for part in rest:
      ids += self._mark + self._sp.encode(part)
    return ids

  def _decode(self, ids: np.ndarray, start: bool) -> bytes:
    out = b"".join([self._table[i] for i in ids])
    return out[1:] if start and self._adds_space and out[:1] == b" " else out

  def _files(self) -> dict[str, bytes]:
    return {"tokenizer.model": self._proto}


_FILES = ("tokenizer.json", "tokenizer.model")


def is_in(folder: Path) -> bool:
  """Whether a folder has a tokenizer that `load` would read."""
  return any((folder / name).is_file() for name in _FILES)


def load(path: str | Path) -> Tokenizer:
  """Reads a tokenizer from a file, or from the folder that `save` wrote to.

  Args:
    path: a Hugging Face tokenizer.json, a SentencePiece .model, or a folder
      with tokenizer.json or tokenizer.model in it; what lies beside it there
      is kept in `beside`.

  Raises:
    UserError: if there is none, or it is of a kind that is not supported.
  """
  path = Path(path)
  if path.is_dir():
    found = [path / name for name in _FILES if (path / name).is_file()]
    if not found:
      raise UserError(f"no tokenizer.json or tokenizer.model in {path}")
    tokenizer = load(found[0])
    tokenizer.beside = {
      name: (path / name).read_bytes()
      for name in BESIDE
      if (path / name).is_file()
    }
    return tokenizer
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UserError(
      f"cannot read tokenizer {path}: {error.strerror}"
    ) from error
  if path.suffix == ".model":
    return SentencePiece(content)
  try:
    form = json.loads(content)
    kind = form.get("type", "huggingface")
  except (ValueError, AttributeError) as error:
    raise UserError(f"tokenizer {path} is not JSON: {error}") from error
  if kind == "bytes":
    return Bytes(form["specials"])
  if kind == "chars":
    return Chars(form["alphabet"], form["specials"])
  made = ByteBPE if b'"ByteLevel"' in content else Pieces
  return made(content.decode("utf-8"))


def _code_points(text: str) -> np.ndarray:
  """Unicode code points of a string, uint32 [n]."""
  utf8(text)
  return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _table(tokenizer: Tokenizer, table: list[bytes]) -> list[bytes]:
  """Bytes of every id: the given ones, then the special tokens' names."""
  return table + [utf8(name) for name in tokenizer.specials]


def _json_file(form: dict) -> dict[str, bytes]:
  return {"tokenizer.json": json.dumps(form, indent=1).encode("utf-8")}


def _byte_stand_ins() -> dict[str, int]:
  """GPT-2's printable character for every byte, as character -> byte.

  Printable Latin-1 stands for itself; the other 68 bytes take the code points
  from 256 on, in order (encoder.py of https://github.com/openai/gpt-2).
  """
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [b for b in range(256) if b not in shown]
  pairs = [(b, b) for b in shown]
  pairs += [(b, 256 + i) for i, b in enumerate(hidden)]
  return {chr(point): byte for byte, point in pairs}
