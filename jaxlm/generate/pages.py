"""Who owns which block of a paged cache, and generation that shares prefixes.

`Pages` is the host's side of `layers.paged.Paged`: a frozen value that says
which blocks are in use, by how many rows, and what the full ones hold. Every
change gives a new value. Rows that begin with the same tokens share the full
blocks of that beginning; a block is known by all tokens up to its end, so that
equal tokens after another beginning are another block. Only full blocks are
shared, and nobody writes to those: nothing is ever copied.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.generate.decode import GREEDY, check_scores, ready, rounded
from jaxlm.generate.loop import Given, Method, State, extend, first
from jaxlm.generate.prompts import check, pad_left
from jaxlm.generate.samplers import Sampler
from jaxlm.generate.step import UNROLLED, new_cache, whole
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute
from jaxlm.layers.paged import Paged, with_table
from jaxlm.models.decoder import Decoder, hidden

Array = jax.Array
Tree = Any


# --- Who owns what ----------------------------------------------------------


@dataclass(frozen=True)
class Pages:
  """The blocks of a pool.

  Attributes:
    block: tokens in each.
    uses: how many rows own each block.
    idle: blocks that no row owns, those that were left first in front. They
      may still hold a prefix, until they are needed for something else.
    known: the block that holds the prefix of a digest.
  """

  block: int
  uses: tuple[int, ...]
  idle: tuple[int, ...]
  known: dict[bytes, int] = field(default_factory=dict)

  @classmethod
  def of(cls, kind: Paged) -> "Pages":
    """All blocks of an empty pool."""
    n = kind.blocks or 0
    return cls(kind.block, (0,) * n, tuple(range(n)))

  @property
  def used(self) -> int:
    """How many blocks rows own."""
    return len(self.uses) - len(self.idle)

  def allocate(
    self, tokens: Sequence[int], length: int
  ) -> tuple["Pages", tuple[int, ...], int]:
    """Blocks for a row that begins with `tokens` and grows to `length`.

    Args:
      tokens: its prompt.
      length: positions it needs in all.

    Returns:
      The pages, the row's blocks in order, and how many of its first tokens
      these hold already; never all of them, since the last has to be read for
      what comes next.

    Raises:
      UserError: if there are too few idle blocks.
    """
    digests = self.digests(tokens[: len(tokens) - 1])
    shared = []
    while len(shared) < len(digests) and digests[len(shared)] in self.known:
      shared.append(self.known[digests[len(shared)]])
    needed = -(-max(length, len(tokens)) // self.block) - len(shared)
    free = [b for b in self.idle if b not in shared]
    if needed > len(free):
      raise UserError(
        f"a row of {length} positions needs {needed} more blocks of "
        f"{self.block}, and {len(free)} of {len(self.uses)} are idle; use a "
        "larger pool, or free rows that have ended"
      )
    row = (*shared, *free[:needed])
    taken = set(row[len(shared) :])
    return (
      replace(
        self,
        uses=tuple(n + (b in row) for b, n in enumerate(self.uses)),
        idle=tuple(b for b in self.idle if b not in row),
        known={d: b for d, b in self.known.items() if b not in taken},
      ),
      row,
      len(shared) * self.block,
    )

  def learn(self, tokens: Sequence[int], row: Sequence[int]) -> "Pages":
    """Notes what the full blocks of a row hold, once it has been read."""
    pairs = zip(self.digests(tokens), row, strict=False)
    new = {d: b for d, b in pairs if d not in self.known}
    return replace(self, known=self.known | new)

  def free(self, row: Sequence[int]) -> "Pages":
    """The pages without this row; its last blocks are given away first.

    Raises:
      UserError: if it does not own them.
    """
    if any(self.uses[b] < 1 for b in row) or len(set(row)) < len(row):
      raise UserError(f"blocks {[*row]} are not all in use; free a row once")
    uses = [n - (b in row) for b, n in enumerate(self.uses)]
    left = tuple(b for b in reversed(row) if not uses[b])
    return replace(self, uses=tuple(uses), idle=self.idle + left)

  def digests(self, tokens: Sequence[int]) -> list[bytes]:
    """One for each full block: of all tokens up to its end."""
    out, digest = [], b""
    for end in range(self.block, len(tokens) + 1, self.block):
      part = np.asarray(tokens[end - self.block : end], np.int32).tobytes()
      digest = hashlib.sha256(digest + part).digest()
      out.append(digest)
    return out


# --- Generation -------------------------------------------------------------


@dataclass
class Pool:
  """A pool and its pages: what outlives a call of `generate_paged`.

  Attributes:
    pages: who owns what.
    kind: its sizes.
    length: the most positions of a row.
    cache: the arrays, of one row; given away and replaced by each call.
  """

  pages: Pages
  kind: Paged
  length: int
  cache: Tree


def make_pool(
  model: Decoder, length: int, kind: Paged, compute: Compute = UNROLLED
) -> Pool:
  """An empty pool for rows of up to `length` positions.

  Raises:
    UserError: if `kind` does not say how many blocks there are, or the model
      remembers what has no pages.
  """
  if kind.blocks is None:
    raise UserError("a pool needs a size: Paged(block, blocks=...)")
  declared = model.cache(1, length, kind).values()
  if not all("table" in layer for part in declared for layer in part.values()):
    raise UserError(
      "prefixes can be shared where every layer has a paged cache, and this "
      "model remembers states as well; use jaxlm.generate with a full cache"
    )
  return Pool(
    Pages.of(kind), kind, length, new_cache(model, 1, length, compute, kind)
  )


def generate_paged(
  model: Decoder,
  params: Tree,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
  key: Array | None = None,
  *,
  pool: Pool,
  eot: int | Sequence[int] | None = None,
  compute: Compute = UNROLLED,
) -> np.ndarray:
  """Continues prompts; what they begin with is read once, and held once.

  That holds within a call, and between the calls that use one pool.

  Args:
    model: what to run.
    params: its arrays.
    prompts: tokens of each row, of any lengths.
    max_new_tokens: how many to add to each.
    sampler: chooses a token from the logits.
    key: randomness, as in `generate`.
    pool: from `make_pool`, for the same model and `compute`; it forgets these
      rows, but not what their prompts began with.
    eot: a row ends with this token, or any of these.
    compute: how to run.

  Returns:
    The new tokens `[rows, max_new_tokens]`, those of `generate`.

  Raises:
    UserError: as `generate`, and if the pool is too small for these rows; it
      is then as it was.
  """
  tokens, lengths = pad_left(prompts)
  n = max_new_tokens
  asked = check(model, tokens, n, key, lengths, eot, slide=False)
  pages, rows, known = _plan(pool, prompts, max(n - 1, 0))
  if n == 0:
    return np.zeros((len(rows), 0), np.int32)
  method = Method(model, sampler, compute, kind=pool.kind)
  given = Given(ready(model, params, compute), asked.course.now())
  table = np.full((len(rows), pool.kind.columns(pool.length)), -1, np.int32)
  for entry, row in zip(table, rows, strict=True):
    entry[: len(row)] = row
  read = _read_all(method, given, pool.cache, prompts, known, table)
  tokens = _padded(tokens, 0)
  rest = (tokens, lengths, asked.rows)
  state = _first(method, rounded(n), given, read, table, *rest)
  state = extend(method, given, state, np.int32(n))
  pool.cache = with_table(state.cache, jnp.asarray(table[:1]))
  for row in rows:
    pages = pages.free(row)
  pool.pages = pages
  check_scores(state)
  return np.array(state.new.tokens)[:, :n]


def _plan(
  pool: Pool, prompts: Sequence[Sequence[int]], more: int
) -> tuple[Pages, list[tuple[int, ...]], list[int]]:
  """Blocks for prompts that grow by `more`, and what of each need not be read.

  They are read in their order, so that a row may begin as one before it.
  """
  pages, rows, known = pool.pages, [], []
  for prompt in prompts:
    length = len(prompt) + more
    if length > pool.length:
      raise UserError(
        f"a prompt of {len(prompt)} tokens and {more + 1} new ones need "
        f"{length} positions, and the pool was made for rows of {pool.length}"
      )
    pages, row, held = pages.allocate(prompt, length)
    pages = pages.learn(prompt, row)
    rows.append(row)
    known.append(held)
  return pages, rows, known


def _read_all(
  method: Method,
  given: Given,
  cache: Tree,
  prompts: Sequence[Sequence[int]],
  known: Sequence[int],
  table: np.ndarray,
) -> tuple[Array, Tree]:
  """Reads of each prompt what is not known; as `prefill` of them all."""
  out = []
  for i, (prompt, start) in enumerate(zip(prompts, known, strict=True)):
    rest = np.asarray(prompt[start:], np.int32)[None]
    where = np.arange(start, len(prompt), dtype=np.int32)[None]
    x, cache = _read(
      *(method, given, cache, table[i : i + 1]),
      _padded(rest, 0),
      _padded(where, -1),
    )
    out.append(x)
  return jnp.concatenate(out), cache


def _padded(x: np.ndarray, value: int) -> np.ndarray:
  """Rows `[batch, seq]`, filled on the left to one of a few sizes."""
  more = rounded(x.shape[1]) - x.shape[1]
  return np.pad(x, ((0, 0), (more, 0)), constant_values=value)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(
  method: Method, given: Given, cache: Tree, table: Array, tokens, where
) -> tuple[Array, Tree]:
  """Reads `[1, seq]` for one row; its last hidden state `[1, 1, dim]`."""
  x, cache = hidden(
    method.model,
    given.params,
    tokens,
    At(positions=where),
    with_table(cache, table),
    method.compute,
  )
  return whole(x[:, -1:], method.compute), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first(
  method: Method, room: int, given: Given, read, table: Array, *rest
) -> State:
  """The first new token of all rows."""
  x, cache = read
  return first(method, room, given, (x, with_table(cache, table)), *rest)
