"""Tokenizers in GGUF files, both ways.

A file has the tokens by id, their types, and either merges and the name of a
rule that splits text into words (byte-level BPE), or scores (SentencePiece).
llama.cpp knows the rules by name; `SPLITS` has their expressions, which are
those of the tokenizers published with the models.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.data.chat import ChatTemplate, turn_ends
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizers import ByteBPE, SentencePiece
from jaxlm.errors import UserError
from jaxlm.interop import gguf_pieces as sp

_T = "tokenizer.ggml."

# --- How text is split into words -------------------------------------------

_GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
  r"|\s+(?!\S)|\s+"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = (
  r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
)
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_GPT4O = (
  rf"{_HEAD}{_UPPER}*{_LOWER}+{_SHORT}?|{_HEAD}{_UPPER}+{_LOWER}*{_SHORT}?"
  r"|\p{N}{1,3}" + _REST_SLASH
)
_TEKKEN = (
  rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}" + _REST_SLASH
)
_DEEPSEEK3 = (
  r"\p{N}{1,3}",
  "[一-龥぀-ゟ゠-ヿ]+",
  r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
  r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DIGITS = (r"\p{N}", _GPT2)

# Expressions by llama.cpp's name, each splitting what the last one left. The
# first name of equal ones is the one written.
SPLITS: dict[str, tuple[str, ...]] = {
  "gpt-2": (_GPT2,),
  "olmo": (_GPT2,),
  "mpt": (_GPT2,),
  "jina-v2-code": (_GPT2,),
  "llama-bpe": (_LLAMA3,),
  "llama3": (_LLAMA3,),
  "llama-v3": (_LLAMA3,),
  "dbrx": (_LLAMA3,),
  "smaug-bpe": (_LLAMA3,),
  "qwen2": (_QWEN2,),
  "stablelm2": (_QWEN2,),
  "deepseek-r1-qwen": (_QWEN2,),
  "gpt-4o": (_GPT4O,),
  "llama4": (_GPT4O,),
  "tekken": (_TEKKEN,),
  "smollm": _DIGITS,
  "starcoder": _DIGITS,
  "refact": _DIGITS,
  "command-r": _DIGITS,
  "codeshell": _DIGITS,
  "exaone": _DIGITS,
  "deepseek-v3": _DEEPSEEK3,
  "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # before merges


@dataclass(frozen=True)
class Vocabulary:
  """A tokenizer and what a GGUF file says beside it.

  Attributes:
    tokenizer: control tokens are its specials.
    template: how a conversation is written, or None.
    bos: id of the token that begins a text, or None.
    ends: ids of the tokens that end a text or a turn, the usual one first.
    add_bos: whether plain text is to begin with `bos`.
  """

  tokenizer: Tokenizer
  template: ChatTemplate | None
  bos: int | None
  ends: tuple[int, ...]
  add_bos: bool


def read(metadata: Mapping[str, Any]) -> Vocabulary:
  """The tokenizer of a file.

  Raises:
    UserError: if there is none, or of a kind that is not known here.
  """
  given = {
    key.removeprefix(_T): value
    for key, value in metadata.items()
    if key.startswith(_T)
  }
  kinds = {"gpt2": _read_bpe, "llama": _read_pieces, "t5": _read_pieces}
  kind = given.get("model")
  if kind not in kinds or "tokens" not in given:
    raise UserError(
      f"its tokenizer is of kind {kind!r}; known here: gpt2 (byte-level BPE), "
      "llama and t5 (SentencePiece)"
    )
  names, bos = given["tokens"], given.get("bos_token_id")
  ends = [given.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
  ends = [i for i in ends if i is not None]
  types = list(given.get("token_type") or [sp.NORMAL] * len(names))
  for i in ends if bos is None else [bos, *ends]:
    types[i] = sp.CONTROL  # some files call them user-defined: text, that is
  tokenizer = kinds[kind](given | {"token_type": types})
  ends += turn_ends(tokenizer)
  source = metadata.get("tokenizer.chat_template")
  return Vocabulary(
    tokenizer=tokenizer,
    template=source
    and ChatTemplate(
      source,
      "" if bos is None else names[bos],
      names[ends[0]] if ends else "",
    ),
    bos=bos,
    ends=tuple(dict.fromkeys(ends)),
    add_bos=given.get("add_bos_token", kind == "llama"),
  )


def entries(vocabulary: Vocabulary, size: int) -> Iterator[tuple[str, Any]]:
  """Keys and values that describe a tokenizer in a file.

  Args:
    vocabulary: what to write.
    size: rows of the model's embedding; rows without a token become unused.

  Raises:
    UserError: for a tokenizer that llama.cpp has no word for.
  """
  tokenizer = vocabulary.tokenizer
  if tokenizer.vocab_size > size:
    raise UserError(
      f"the tokenizer has {tokenizer.vocab_size} tokens, the model {size}; it "
      "is another model's"
    )
  if isinstance(tokenizer, ByteBPE):
    found = _bpe_entries(tokenizer, size)
  elif isinstance(tokenizer, SentencePiece):
    found = _piece_entries(tokenizer, size)
  else:
    raise UserError(
      "llama.cpp knows byte-level BPE and SentencePiece; a tokenizer of bytes "
      "or characters cannot be written as GGUF"
    )
  found["add_bos_token"] = vocabulary.add_bos
  if vocabulary.bos is not None:
    found["bos_token_id"] = vocabulary.bos
  found |= dict(
    zip(("eos_token_id", "eot_token_id"), vocabulary.ends, strict=False)
  )
  yield from ((_T + key, value) for key, value in found.items())
  if vocabulary.template is not None:
    yield "tokenizer.chat_template", vocabulary.template.source


# --- Byte-level BPE ---------------------------------------------------------


def _read_bpe(given: Mapping[str, Any]) -> ByteBPE:
  """A tokenizer.json of the file's tokens and merges."""
  tokens, pre = given["tokens"], given.get("pre", "gpt-2")
  if pre not in SPLITS:
    raise UserError(
      f"its tokenizer splits text by the rule {pre!r}, which is not known "
      f"here; known: {', '.join(sorted(SPLITS))}"
    )
  types = given["token_type"]
  form = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      _added(i, token, kind == sp.CONTROL)
      for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
      if kind in (sp.CONTROL, sp.USER)
    ],
    "normalizer": None,
    "pre_tokenizer": _splitter(SPLITS[pre]),
    "post_processor": None,
    "decoder": _BYTES,
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": pre in _WHOLE_WORDS,
      "vocab": {token: i for i, token in enumerate(tokens)},
      "merges": [merge.split(" ", 1) for merge in given.get("merges", ())],
    },
  }
  return ByteBPE(json.dumps(form, ensure_ascii=False))


_BYTES = {
  "type": "ByteLevel",
  "add_prefix_space": False,
  "trim_offsets": True,
  "use_regex": False,
}


def _splitter(expressions: tuple[str, ...]) -> dict[str, Any]:
  """The pre-tokenizer that splits by one expression after another."""
  splits = [
    {
      "type": "Split",
      "pattern": {"Regex": expression},
      "behavior": "Isolated",
      "invert": False,
    }
    for expression in expressions
  ]
  return {"type": "Sequence", "pretokenizers": [*splits, _BYTES]}


def _added(i: int, content: str, special: bool) -> dict[str, Any]:
  """A token that is no product of merges."""
  return {
    "id": i,
    "content": content,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": special,
  }


def _bpe_entries(tokenizer: ByteBPE, size: int) -> dict[str, Any]:
  """What a file says of a byte-level BPE."""
  form = json.loads(_saved(tokenizer))
  vocab = dict(form["model"]["vocab"])
  types = dict.fromkeys(vocab.values(), sp.NORMAL)
  for added in form.get("added_tokens") or ():
    vocab[added["content"]] = added["id"]
    types[added["id"]] = sp.CONTROL if added["special"] else sp.USER
  names = {i: token for token, i in vocab.items()}
  return {
    "model": "gpt2",
    "pre": _rule(form.get("pre_tokenizer"), form["model"]),
    "tokens": [names.get(i, f"[PAD{i}]") for i in range(size)],
    "token_type": [types.get(i, sp.UNUSED) for i in range(size)],
    "merges": [
      merge if isinstance(merge, str) else " ".join(merge)
      for merge in form["model"]["merges"]
    ],
  }


def _rule(splitter: Any, model: Mapping[str, Any]) -> str:
  """llama.cpp's name of the rule by which a tokenizer.json splits text."""
  found = tuple(_expressions(splitter or {}))
  whole = bool(model.get("ignore_merges"))
  for name, expressions in SPLITS.items():
    if expressions == found and (name in _WHOLE_WORDS) == whole:
      return name
  raise UserError(
    "llama.cpp has no name for the rule by which this tokenizer splits text "
    f"({' then '.join(map(repr, found)) or 'none'}), so it cannot be written "
    "as GGUF"
  )


def _expressions(splitter: Mapping[str, Any]) -> Iterator[str]:
  """The expressions by which a pre-tokenizer splits, in order."""
  kind = splitter.get("type")
  if kind == "Sequence":
    for part in splitter["pretokenizers"]:
      yield from _expressions(part)
  elif kind == "Split":
    yield splitter["pattern"].get("Regex", "")
  elif kind == "Digits" and splitter["individual_digits"]:
    yield r"\p{N}"
  elif kind == "ByteLevel" and splitter.get("use_regex", True):
    yield _GPT2


# --- SentencePiece ----------------------------------------------------------


def _read_pieces(given: Mapping[str, Any]) -> SentencePiece:
  """A SentencePiece model of the file's pieces."""
  names, types = given["tokens"], given["token_type"]
  if sp.UNKNOWN not in types:
    types[given.get("unknown_token_id", 0)] = sp.UNKNOWN
  kind = sp.BPE if given["model"] == "llama" else sp.UNIGRAM
  pieces = sp.Pieces(
    kind=kind,
    names=names,
    scores=given.get("scores") or [0.0] * len(names),
    types=types,
    adds_space=given.get("add_space_prefix", True),
    trims=given.get("remove_extra_whitespaces", False),
    charsmap=bytes(given.get("precompiled_charsmap", ())),
  )
  return SentencePiece(sp.to_proto(pieces))


def _piece_entries(tokenizer: SentencePiece, size: int) -> dict[str, Any]:
  """What a file says of a SentencePiece vocabulary."""
  pieces = sp.from_proto(_saved(tokenizer))
  if pieces.kind not in (sp.UNIGRAM, sp.BPE):
    raise UserError("llama.cpp knows SentencePiece models of BPE and unigram")
  if pieces.charsmap and pieces.kind == sp.BPE:
    raise UserError(
      "this SentencePiece BPE model normalises characters, which llama.cpp "
      "does not, so it cannot be written as GGUF"
    )
  spare = range(len(pieces.names), size)
  found = {
    "model": "llama" if pieces.kind == sp.BPE else "t5",
    "pre": "default",
    "tokens": [*pieces.names, *(f"[PAD{i}]" for i in spare)],
    "scores": [*pieces.scores, *(-1000.0 for _ in spare)],
    "token_type": [*pieces.types, *(sp.UNUSED for _ in spare)],
    "unknown_token_id": pieces.types.index(sp.UNKNOWN),
    "add_space_prefix": pieces.adds_space,
    "remove_extra_whitespaces": pieces.trims,
  }
  if pieces.charsmap:
    found["precompiled_charsmap"] = pieces.charsmap
  return found


def _saved(tokenizer: Tokenizer) -> bytes:
  """The one file that a tokenizer is saved as."""
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder)
    (path,) = Path(folder).glob("tokenizer.*")  # not what is beside it
    return path.read_bytes()
