"""Text in, text out: a tokenizer around the decoding loop."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.data.tokenizer import TextStream, Tokenizer
from jaxlm.errors import UserError
from jaxlm.generate import decode
from jaxlm.generate.prompts import row_keys
from jaxlm.generate.samplers import Sampler, make_sampler
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder

Tree = Any


def sample_text(
  model: Decoder,
  params: Tree,
  tokenizer: Tokenizer,
  prompt: str = "",
  tokens: int = 200,
  temperature: float = 0.8,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
) -> str:
  """A text by the model, prompt included; it may stop short at its own end.

  The arguments after the tokenizer are those of `config.sample`. A mesh of
  several devices is left alone: the parameters are brought together on one.

  Raises:
    UserError: if the tokenizer cannot express the prompt, or a number makes
      no sense.
  """
  one = jax.make_mesh((1,), ("one",), devices=jax.local_devices()[:1])
  with jax.set_mesh(one):
    writer = Writer(
      model,
      decode.ready(model, _together(params, one)),
      tokenizer,
      make_sampler(temperature, top_k, top_p),
      tokens,
      jax.random.key(seed),
    )
    return "".join(writer.pieces(prompt))


def _together(params: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """Parameters whole on the one device of `mesh`, wherever they lie."""
  if jax.process_count() > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.device_put(params, place)


@dataclass
class Writer:
  """A model, how it is sampled, and what has been measured of it so far.

  Attributes:
    model, params: what writes; parameters as `decode.ready` makes them.
    tokenizer: between text and tokens.
    sampler: how it chooses.
    n: how many tokens it adds to a text.
    key: its randomness; text number i has key `fold_in(key, i)`.
    compute: how it is run.
    ends: tokens that end a text; the tokenizer's end of text, if not given.
    start: tokens that every text begins with, unseen.
    made: how many tokens it has made.
    first: how many of those were the first of their text.
    first_seconds: how long the first ones took: they include reading the
      prompt, and compiling where sizes are new.
    seconds: how long the others took.
  """

  model: Decoder
  params: Any
  tokenizer: Tokenizer
  sampler: Sampler
  n: int
  key: jax.Array
  compute: Compute = decode.UNROLLED
  ends: Sequence[int] | None = None
  start: Sequence[int] = ()
  made: int = 0
  first: int = 0
  first_seconds: float = 0.0
  seconds: float = 0.0

  def __post_init__(self):
    if self.ends is None:
      eot = self.tokenizer.eot
      self.ends = () if eot is None else (eot,)

  def pieces(self, prompt: str, number: int = 0) -> Iterator[str]:
    """The prompt, then what follows, never in half characters."""
    following = self.following(self._ids(prompt), number)
    yield prompt
    yield from following

  def following(self, ids: np.ndarray, number: int = 0) -> Iterator[str]:
    """What follows tokens [seq], up to an end, never in half characters."""
    keys = jax.random.fold_in(self.key, number)[None]
    tokens, text = self._tokens(ids, keys), TextStream(self.tokenizer)

    def pieces() -> Iterator[str]:
      for (token,) in tokens:
        if token in self.ends:
          break
        yield text.push(self._shown([token]))
      yield text.flush()

    return pieces()

  def texts(self, prompt: str, n: int) -> list[str]:
    """`n` texts, which are made side by side."""
    keys = row_keys(self.key, n)
    found = [*self._tokens(self._ids(prompt), keys)]
    rows = np.stack(found, axis=1) if found else np.zeros((n, 0), int)
    texts = [TextStream(self.tokenizer) for _ in rows]
    return [
      prompt + text.push(self._shown(row)) + text.flush()
      for text, row in zip(texts, rows, strict=True)
    ]

  def figures(self) -> str:
    """What was measured, in a line."""
    if not self.made:
      return "no tokens"
    wait = self.first_seconds / self.first
    text = f"{self.made:,} tokens; the first after {wait:.2f} s"
    if self.made > self.first:
      speed = (self.made - self.first) / max(self.seconds, 1e-9)
      text += f", the others at {speed:,.0f} tokens/s"
    return text

  def _ids(self, prompt: str) -> np.ndarray:
    """Tokens of a prompt, with what stands before it, int32 [seq]."""
    ids = [*self.start, *self.tokenizer.encode(prompt)]
    return np.array(ids if ids else self._nothing(), np.int32)

  def _tokens(self, ids: np.ndarray, keys: jax.Array) -> Iterator[np.ndarray]:
    """New tokens [batch] of texts that begin alike, with the time they take."""
    found = decode.stream(
      self.model,
      self.params,
      np.broadcast_to(ids, (len(keys), len(ids))),
      self.n,
      self.sampler,
      keys,
      eot=tuple(self.ends) or None,
      slide=True,
      compute=self.compute,
    )
    return self._measured(found, len(keys))

  def _measured(
    self, tokens: Iterable[np.ndarray], batch: int
  ) -> Iterator[np.ndarray]:
    since = time.perf_counter()
    for i, token in enumerate(tokens):
      took = time.perf_counter() - since
      self.made += batch
      self.first += batch if i == 0 else 0
      if i == 0:
        self.first_seconds += took * batch
      else:
        self.seconds += took
      yield token
      since = time.perf_counter()

  def _nothing(self) -> Sequence[int]:
    """What stands before a text that begins with nothing."""
    if self.tokenizer.eot is not None:
      return [self.tokenizer.eot]
    try:
      return self.tokenizer.encode("\n")
    except UserError:  # characters, none of them a newline
      return [0]

  def _shown(self, tokens: Iterable[int]) -> list[int]:
    """Tokens that have a text, up to the end of the row's."""
    shown = itertools.takewhile(lambda t: t not in self.ends, tokens)
    return [int(t) for t in shown if t < self.tokenizer.vocab_size]
