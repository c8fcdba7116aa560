"""What walks along a constraint while tokens are chosen.

An `Automaton` is a table on the device: decoding looks up which tokens may come
and where each leads, inside its compiled loop. A `Library` is a grammar that
llguidance follows on the host, one mask per step.

Both are made by `constraints.compile` for a tokenizer. `follow` fits one to a
model and to the tokens that are to be made, and gives what decoding asks.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxlm.errors import UserError
from jaxlm.generate.dfa import Dfa

Array = jax.Array

NEVER = 1 << 30  # tokens to an end that cannot be reached
_MOST_CELLS = 1 << 28  # of a table
_EXTRA = "install it: pip install 'jaxlm[constrain]'"


@struct.dataclass
class Automaton:
  """A constraint as a table over tokens; it starts in state 0.

  Tokens that lead alike from every state are of one kind, and share a column:
  of the tens of thousands in a vocabulary some hundreds remain.

  Attributes:
    table: the state that a kind of token leads to, -1 where it is forbidden,
      int16 or int32 [states, kinds]. Kind 0 is forbidden everywhere, kind 1
      ends the text: allowed where it may end, and leads nowhere else. Both
      sizes are powers of two, so that few programs are compiled.
    kind: of each token, int32 [vocab].
    least: how few tokens lead from a state to one where the text may end,
      int32 [states]; 0 where it may end here, `NEVER` where none do.
    ends: tokens that end the text, int32 [some].
    most: how many tokens there is room for, int32.
  """

  table: Any
  kind: Any
  least: Any
  ends: Any
  most: Any

  @property
  def nbytes(self) -> int:
    """Bytes of its arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(self))


def allowed(
  automaton: Automaton, state: Array, left: Array | int | None = None
) -> Array:
  """Which tokens may come next, bool `[rows, vocab]`.

  Args:
    automaton: the constraint.
    state: where each row stands, int32 `[rows]`.
    left: how many tokens can follow the next one: those are ruled out from
      which no end can be reached with so many, so that a text is complete when
      the room is used up. None: as many as it takes.
  """
  following = automaton.table[state].astype(jnp.int32)  # [rows, kinds]
  left = jnp.asarray(NEVER - 1 if left is None else left, jnp.int32)
  fits = (following >= 0) & (automaton.least[following] <= left)
  return fits[:, automaton.kind]


def advance(automaton: Automaton, state: Array, token: Array) -> Array:
  """The states int32 `[rows]` that allowed tokens int32 `[rows]` lead to.

  Other tokens leave their row where it is.
  """
  following = automaton.table[state, automaton.kind[token]].astype(jnp.int32)
  return jnp.where(following < 0, state, following)


def open_tokens(
  constraint: "Automaton | Masks | None", place: Array, made: Array, vocab: int
) -> Array | None:
  """Tokens that may be number `made` of rows at `place`, bool [rows, vocab].

  None without a constraint: then all may.
  """
  if constraint is None:
    return None
  if isinstance(constraint, Masks):
    return constraint.unpacked(vocab)
  return allowed(constraint, place, constraint.most - made - 1)


def keep_open(scores: Array, open_: Array | None) -> Array:
  """Logits [rows, vocab] of open tokens; those of others are -inf."""
  return scores if open_ is None else jnp.where(open_, scores, -jnp.inf)


def insist(token: Array, open_: Array | None, scores: Array) -> Array:
  """Tokens `[rows]`, or the likeliest open one where another was chosen.

  A sampler that forbids what the constraint leaves (banned words, a least
  length) has nothing to choose from; the constraint is the stronger.
  """
  if open_ is None:
    return token
  fine = jnp.take_along_axis(open_, token[:, None], axis=1)[:, 0]

  def likeliest() -> Array:
    floor = jnp.finfo(scores.dtype).min
    best = jnp.where(open_, jnp.maximum(scores, floor), -jnp.inf)
    return jnp.argmax(best, axis=-1).astype(token.dtype)

  # Seldom needed, and as slow as all else that a constraint costs.
  best = jax.lax.cond(jnp.all(fine), lambda: token, likeliest)
  return jnp.where(fine, token, best)


def moved(
  constraint: "Automaton | Masks | None", place: Array, token: Array
) -> Array:
  """Where rows at `place` [rows] are after these tokens [rows]."""
  if not isinstance(constraint, Automaton):
    return place
  return advance(constraint, place, token)


# --- From a byte automaton to a table over tokens ---------------------------


def over_tokens(
  dfa: Dfa, words: Sequence[bytes], ends: Sequence[int] = ()
) -> Automaton:
  """An automaton over the tokens that stand for these bytes.

  Args:
    dfa: the language.
    words: what each token stands for, [vocab]; an empty one is no text and is
      never allowed.
    ends: tokens that end a text.

  Raises:
    UserError: if no sequence of these tokens satisfies it.
  """
  functions, kind = _kinds(dfa, words)
  kinds, states = functions.shape[0], functions.shape[1] - 1
  rows, columns = (1 << max(6, (n - 1).bit_length()) for n in (states, kinds))
  small = rows <= np.iinfo(np.int16).max
  table = np.full((rows, columns), -1, np.int16 if small else np.int32)
  functions = functions[:, :-1].T
  table[:states, :kinds] = np.where(functions == states, -1, functions)
  least = np.full(rows, NEVER, np.int32)
  least[:states][dfa.accept] = 0
  table[:, 1] = np.where(least == 0, np.arange(rows), -1)
  kind[list(ends)] = 1
  found = Automaton(
    table, kind, least, np.array(ends, np.int32), np.int32(NEVER)
  )
  found = found.replace(least=_least(found))
  if found.least[0] == NEVER:
    raise UserError(
      "no sequence of this tokenizer's tokens satisfies the constraint; it "
      "asks for characters that the tokenizer cannot write"
    )
  return found.replace(table=jnp.asarray(found.table))


def _kinds(dfa: Dfa, words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
  """Functions `[kinds, states + 1]` between states, and the kind of each word.

  A word takes every state somewhere: it is a function, the composition of
  those of its bytes. All words are read at once, byte by byte, and those that
  are the same function so far go on as one: a trie whose like branches have
  grown together. The last state is that of what is forbidden; kinds 0 and 1
  lead there.
  """
  states, classes = dfa.next.shape
  dead = np.where(dfa.next < 0, states, dfa.next)
  step = np.vstack([dead, np.full((1, classes), states)]).astype(np.int32)
  functions = [np.arange(states + 1, dtype=np.int32)]  # that of the empty word
  known = {functions[0].tobytes(): 0}
  lengths = np.array([len(word) for word in words])
  starts = np.cumsum(lengths) - lengths
  text = dfa.classes[np.frombuffer(b"".join(words), np.uint8)]
  kind = np.zeros(len(words), np.int64)
  nowhere = _number(known, functions, np.full_like(functions[0], states))
  for i in range(lengths.max(initial=0)):
    who = np.flatnonzero((lengths > i) & (kind != nowhere))
    pairs = kind[who] * classes + text[starts[who] + i]
    pairs, which = np.unique(pairs, return_inverse=True)
    before, byte = pairs // classes, pairs % classes
    new = [
      _number(known, functions, step[functions[f], b])
      for f, b in zip(before, byte, strict=True)
    ]
    kind[who] = np.array(new, np.int64)[which] if new else 0
  kind[lengths == 0] = nowhere
  used = [f for f in np.unique(kind) if f != nowhere]
  number = np.zeros(len(functions), np.int32)  # of what is used: from 2 on
  number[used] = np.arange(2, len(used) + 2)
  both = [functions[nowhere]] * 2
  return np.stack([*both, *(functions[f] for f in used)]), number[kind]


def _number(known: dict, functions: list, function: np.ndarray) -> int:
  """The number of a function, perhaps a new one."""
  number = known.setdefault(function.tobytes(), len(functions))
  if number == len(functions):
    if len(functions) * len(function) > _MOST_CELLS:
      raise UserError(
        f"the constraint has {len(function):,} states and more than "
        f"{len(functions):,} kinds of tokens, which is too large a table; make "
        "its bounds smaller, or compile it with library=True"
      )
    functions.append(function)
  return number


def _least(automaton: Automaton) -> np.ndarray:
  """How few tokens lead from each state to an end, breadth first."""
  table = np.asarray(automaton.table)[:, np.unique(automaton.kind)]
  least = np.where(np.asarray(automaton.least) == 0, 0, NEVER).astype(np.int32)
  from_, to = np.nonzero(table >= 0)[0], table[table >= 0].astype(np.int64)
  edges = np.unique(from_ * len(table) + to)
  edges = edges[least[edges // len(table)] > 0]
  for steps in range(1, len(table) + 1):
    near = least[edges % len(table)] < steps
    least[edges[near] // len(table)] = steps
    edges = edges[least[edges // len(table)] == NEVER]
    if not near.any():
      break
  return least


# --- A grammar that a library follows ---------------------------------------


@dataclass(frozen=True, eq=False)
class Library:
  """A grammar for llguidance (https://github.com/guidance-ai/llguidance).

  Attributes:
    grammar: as the library writes it.
    words: what each token stands for; empty for special ones.
    ends: tokens that end a text.
  """

  grammar: str
  words: tuple[bytes, ...]
  ends: tuple[int, ...]

  @functools.lru_cache(maxsize=8)  # noqa: B019, few live, and for long
  def tokenizer(self, vocab: int, ends: tuple[int, ...]) -> Any:
    """The library's view of the tokens of a model."""
    library = llguidance()
    special = [i for i, w in enumerate(self.words) if not w or i in ends]
    spare = range(len(self.words), vocab)
    wrapped = library.TokenizerWrapper(
      _Words([*self.words, *(b"" for _ in spare)], [*special, *spare], ends[0])
    )
    return library.LLTokenizer(wrapped, n_vocab=vocab, eos_token=list(ends))

  def matcher(self, vocab: int, ends: tuple[int, ...]) -> Any:
    """One text's way through the grammar.

    Raises:
      UserError: if the library cannot use the grammar.
    """
    found = llguidance().LLMatcher(
      self.tokenizer(vocab, ends), self.grammar, log_level=0
    )
    return _sound(found)


class _Words:
  """What llguidance's wrapper asks of a tokenizer."""

  bos_token_id = None

  def __init__(self, tokens: list[bytes], special: list[int], end: int):
    self.tokens, self.special_token_ids, self.eos_token_id = (
      tokens,
      special,
      end,
    )
    known = {word: i for i, word in enumerate(tokens) if len(word) == 1}
    self._single = [known.get(bytes([b]), end) for b in range(256)]

  def __call__(self, text: bytes) -> list[int]:
    """Tokens of a text; the library asks only where a grammar forces some."""
    return [self._single[byte] for byte in text]


def llguidance(what: str = "this constraint") -> Any:
  """The library, which `what` needs.

  Raises:
    UserError: if it is not installed.
  """
  try:
    import llguidance as library
  except ImportError as error:
    raise UserError(f"{what} needs the package llguidance; {_EXTRA}") from error
  return library


def _sound(matcher: Any) -> Any:
  """A matcher that has met no error."""
  if matcher.is_error():
    said = " ".join(matcher.get_error().split())
    raise UserError(f"the grammar cannot be followed: {said}")
  return matcher


@struct.dataclass
class Masks:
  """The tokens that may come next, as bits: int32 `[rows, vocab / 32]`."""

  bits: Any

  def unpacked(self, vocab: int) -> Array:
    """The same, bool `[rows, vocab]`."""
    i = jnp.arange(vocab, dtype=jnp.int32)
    return (self.bits[:, i >> 5] >> (i & 31)[None]) & 1 == 1


# --- What decoding asks -----------------------------------------------------


@dataclass(frozen=True)
class Table:
  """An automaton, or none at all: the device does it, in blocks of any size."""

  automaton: Automaton | None
  stride: int | None = None

  def now(self) -> Automaton | None:
    """What the compiled step needs."""
    return self.automaton

  def read(self, tokens: np.ndarray) -> None:
    """Takes note of new tokens `[rows, some]`."""


@dataclass(frozen=True)
class Matchers:
  """A grammar on its way in every row: one mask and one token at a time."""

  matchers: list
  stride: int | None = 1

  def now(self) -> Masks:
    """The masks of the next token.

    Raises:
      UserError: if the grammar has become too much for the library, or none of
        the tokens can go on.
    """
    return Masks(np.stack([self._bits(m) for m in self.matchers]))

  def _bits(self, matcher: Any) -> np.ndarray:
    bits = np.frombuffer(matcher.compute_bitmask(), np.int32)
    _sound(matcher)
    if not bits.any():
      raise UserError(
        "no sequence of this tokenizer's tokens satisfies the constraint; it "
        "asks for characters that the tokenizer cannot write"
      )
    return bits

  def read(self, tokens: np.ndarray) -> None:
    """Takes note of new tokens `[rows, some]`."""
    for matcher, row in zip(self.matchers, tokens.tolist(), strict=True):
      for token in row:
        if not matcher.is_stopped():
          matcher.consume_token(token)
          _sound(matcher)


Constraint = Automaton | Library
Course = Table | Matchers


def ends_of(
  constraint: Constraint | None, eot: int | Sequence[int] | None
) -> int | Sequence[int] | None:
  """The tokens that end a row: those given, or the constraint's own.

  Raises:
    UserError: if neither says.
  """
  if constraint is None or eot is not None:
    return eot
  if not isinstance(constraint, Constraint):
    raise UserError(
      f"constraint={constraint!r} is not compiled; use "
      "constraint=jaxlm.generate.constraints.compile(spec, tokenizer)"
    )
  if not len(constraint.ends):
    raise UserError(
      "this tokenizer has no end-of-text token, so a constrained text could "
      "not end; say with eot= which token ends it"
    )
  return tuple(int(token) for token in constraint.ends)


def follow(
  constraint: Constraint | None, vocab: int, ends: np.ndarray, n: int, rows: int
) -> Course:
  """A constraint fitted to a call of `generate`.

  Args:
    constraint: what the text has to satisfy.
    vocab: of the model; what the tokenizer does not have is forbidden.
    ends: tokens that end a row, int32 [some].
    n: how many tokens there is room for.
    rows: how many texts are made.

  Raises:
    UserError: if it does not fit the model, or not into the room.
  """
  if constraint is None:
    return Table(None)
  ends = tuple(int(token) for token in ends if 0 <= token < vocab)
  if not ends:
    raise UserError(
      "none of the tokens that end a text is in the model's vocabulary, so a "
      "constrained text could not end; choose another eot"
    )
  if isinstance(constraint, Library):
    _check_vocab(len(constraint.words), vocab)
    new = constraint.matcher(vocab, ends)
    return Matchers([new.deep_copy() for _ in range(rows)])
  _check_vocab(len(constraint.kind), vocab)
  return Table(_fitted(constraint, vocab, ends, n))


def _check_vocab(of_tokenizer: int, of_model: int) -> None:
  if of_tokenizer > of_model:
    raise UserError(
      f"the constraint was compiled for a tokenizer of {of_tokenizer} tokens, "
      f"and the model knows {of_model}; compile it for the tokenizer this "
      "model was trained with"
    )


def _fitted(
  automaton: Automaton, vocab: int, ends: tuple[int, ...], n: int
) -> Automaton:
  """With kinds for all of the model's tokens; what ends a text is no text."""
  kind = np.zeros(vocab, np.int32)
  kind[: len(automaton.kind)] = automaton.kind
  kind[kind == 1] = 0  # the tokenizer's own ends, if they are not these
  as_text = kind[list(ends)].any()
  kind[list(ends)] = 1
  found = automaton.replace(
    kind=kind, ends=np.array(ends, np.int32), most=np.int32(n)
  )
  if as_text:
    found = found.replace(least=_least(found))
  needed = int(found.least[0])
  if needed == NEVER:
    raise UserError(
      f"every text that satisfies the constraint has one of the tokens {ends}, "
      "which end a row; choose another eot"
    )
  if needed > n:
    raise UserError(
      f"the constraint needs at least {needed} tokens, and max_new_tokens={n}; "
      "raise it, or allow shorter texts"
    )
  return jax.tree.map(jnp.asarray, found)
