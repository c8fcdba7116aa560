"""Text in, text out: a tokenizer around the decoding loop."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxlm.data.tokenizer import TextStream, Tokenizer
from jaxlm.errors import UserError
from jaxlm.generate import decode
from jaxlm.generate.figures import Figures, Stopwatch
from jaxlm.generate.methods import Asked, Draw, Method
from jaxlm.generate.new import New
from jaxlm.generate.prompts import pad_left, row_keys
from jaxlm.generate.samplers import make_sampler
from jaxlm.layers.cache import n_bytes, number
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
      Draw(make_sampler(temperature, top_k, top_p)),
      tokens,
      jax.random.key(seed),
      long="slide",
    )
    return "".join(writer.pieces(prompt))


def _together(params: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """Parameters whole on the one device of `mesh`, wherever they lie here."""
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.device_put(params, place)


# --- From tokens to text ----------------------------------------------------


class StopStrings:
  """Ends a text where a string appears, however tokens cut that string up.

  What may be the beginning of one is held back until it is known. The string
  that is complete first ends the text, wherever the text was cut into pieces.

  >>> stop = StopStrings(["END"])
  >>> [stop.push(piece) for piece in ("an E", "N", "a EN", "D!")]
  ['an ', '', 'ENa ', '']
  >>> stop.stopped
  True

  Attributes:
    stopped: whether one has been found; it is not shown, nor what follows it.
  """

  def __init__(self, stops: Sequence[str]):
    """Ends at any of `stops`; UserError if one is empty."""
    if "" in stops:
      raise UserError("a stop string is empty; leave it out")
    self._stops = tuple(stops)
    self._held = ""
    self.stopped = False

  def push(self, text: str) -> str:
    """What may be shown, now that `text` has come."""
    if self.stopped:
      return ""
    text = self._held + text
    found = [(text.find(stop), stop) for stop in self._stops]
    ends = [(at + len(stop), at) for at, stop in found if at >= 0]
    if ends:
      self.stopped, self._held = True, ""
      return text[: min(ends)[1]]
    held = max((_overlap(text, stop) for stop in self._stops), default=0)
    self._held = text[len(text) - held :]
    return text[: len(text) - held]

  def flush(self) -> str:
    """What was held back, when no more comes."""
    held, self._held = self._held, ""
    return held


def _overlap(text: str, stop: str) -> int:
  """How many of the last characters of `text` begin `stop`."""
  most = min(len(stop) - 1, len(text))
  return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


class Transcript:
  """A text while its tokens come: what may be shown, and why it ended.

  Attributes:
    tokens: those that belong to it, its end included.
    text: what has been shown.
    finish: 'stop' where the model or a stop string ended it, 'length' after
      `n` tokens, None before.
    scores: its row of `New`, if log-probabilities were asked for.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    n: int,
    ends: Sequence[int] = (),
    stops: Sequence[str] = (),
  ):
    """A text of at most `n` tokens, with the tokens and strings that end it."""
    self._stream, self._stops = TextStream(tokenizer), StopStrings(stops)
    self._vocab, self._n, self._ends = tokenizer.vocab_size, n, ends
    self.tokens: list[int] = []
    self.text = ""
    self.finish = None if n else "length"
    self.scores: New | None = None

  def push(self, tokens: Iterable[int]) -> str:
    """What may be shown of these tokens; those behind the end do not count."""
    return "".join(map(self._one, map(int, tokens)))

  def _one(self, token: int) -> str:
    if self.finish is not None:
      return ""
    self.tokens.append(token)
    piece = ""
    if token in self._ends:
      self.finish = "stop"
    elif token < self._vocab:  # embeddings may be padded beyond
      piece = self._stops.push(self._stream.push([token]))
    if not self._stops.stopped and self.finish is None:
      self.finish = "length" if len(self.tokens) == self._n else None
    if self.finish is not None:  # nothing more comes
      piece += self._stops.push(self._stream.flush()) + self._stops.flush()
    if self._stops.stopped:
      self.finish = "stop"
    self.text += piece
    return piece


# --- The writer -------------------------------------------------------------


@dataclass
class Writer:
  """A model, how it continues texts, and what has been measured of it so far.

  Attributes:
    model, params: what writes; parameters as `decode.ready` makes them.
    tokenizer: between text and tokens.
    method: how it goes on.
    n: how many tokens it adds to a text.
    key: its randomness; text number i has key `fold_in(key, i)`.
    compute: how it is run.
    ends: tokens that end a text; the tokenizer's end of text, if not given.
    start: tokens that every text begins with, unseen.
    stops: strings that end a text.
    long: what is done with a prompt longer than the context: 'truncate' leaves
      its beginning out, 'slide' reads the last half of a context; else it is
      an error.
    figures: what was measured.
  """

  model: Decoder
  params: Any
  tokenizer: Tokenizer
  method: Method
  n: int
  key: jax.Array
  compute: Compute = decode.UNROLLED
  ends: Sequence[int] | None = None
  start: Sequence[int] = ()
  stops: Sequence[str] = ()
  long: str | None = None
  figures: Figures = field(default_factory=Figures)

  def __post_init__(self):
    if self.ends is None:
      eot = self.tokenizer.eot
      self.ends = () if eot is None else (eot,)
    if self.n < 0:
      raise UserError(f"max_new_tokens={self.n} is negative; use 0 or more")
    StopStrings(self.stops)  # says if one makes no sense

  def pieces(self, prompt: str, number: int = 0) -> Iterator[str]:
    """The prompt, then what follows, never in half characters."""
    following = self.following(self.ids(prompt), number)
    yield prompt
    yield from following

  def following(self, ids: np.ndarray, number: int = 0) -> Iterator[str]:
    """What follows tokens [seq], up to an end, never in half characters."""
    keys = jax.random.fold_in(self.key, number)[None]
    blocks = self.run([self.fitted(ids, self.n)], keys, [self.transcript()])
    return (piece for (piece,) in blocks)

  def texts(self, prompt: str, n: int) -> list[str]:
    """`n` texts, which are made side by side."""
    told = [self.transcript() for _ in range(n)]
    ids = self.fitted(self.ids(prompt), self.n)
    for _ in self.run([ids], row_keys(self.key, n), told):
      pass
    return [prompt + text.text for text in told]

  def ids(self, prompt: str) -> np.ndarray:
    """Tokens of a prompt, with what stands before it, int32 [seq]."""
    ids = [*self.start, *self.tokenizer.encode(prompt)]
    return np.array(ids if ids else self._nothing(), np.int32)

  def transcript(self, n: int | None = None) -> Transcript:
    """An empty text of at most `n` tokens, by default the writer's."""
    n = self.n if n is None else n
    return Transcript(self.tokenizer, n, self.ends, self.stops)

  def fitted(self, ids: np.ndarray, n: int) -> np.ndarray:
    """A prompt that `n` tokens can be added to, perhaps shortened.

    Raises:
      UserError: if it is too long and nothing says what to do about it.
    """
    most, streams = self.model.max_positions, self.method.streams
    over = len(ids) - most if streams else len(ids) + n - 1 - most
    if over <= 0 or n == 0 or (self.long == "slide" and streams):
      return ids
    if self.method.cache.endless:
      return ids
    if self.long == "truncate":
      kept = max(most + 1 - n, most // 2)
      rest = max(kept - len(self.start), 1)
      ids = np.concatenate([ids[: len(self.start)], ids[len(ids) - rest :]])
      if streams or len(ids) + n - 1 <= most:
        return ids
    if streams:
      raise UserError(
        f"the prompt has {len(ids):,} tokens, {over:,} more than the context "
        f"of {most:,}; --truncate leaves its beginning out, --slide reads its "
        f"end and lets the window slide, --cache='ring({most // 2}, sinks=4)' "
        "reads all of it and remembers so much"
      )
    raise UserError(
      f"{len(ids):,} tokens of prompt and {n:,} new ones are {over:,} more "
      f"than the context of {most:,}, which this method cannot leave; ask for "
      "fewer with --max_new_tokens, or shorten the prompt with --truncate"
    )

  def run(
    self,
    prompts: Sequence[np.ndarray],
    keys: jax.Array,
    told: Sequence[Transcript],
    n: int | None = None,
    top: int | None = None,
    pace: float = 0.02,
  ) -> Iterator[list[str]]:
    """Continues prompts side by side, until every transcript has its end.

    Args:
      prompts: tokens [seq] each.
      keys: one for each text, [prompts * samples].
      told: what is filled in, one for each text; where there are fewer, the
        other rows are padding.
      n: tokens to add, by default the writer's.
      top: as `Asked.top`; then each transcript also gets `logprobs`.
      pace: seconds between two blocks.

    Returns:
      Blocks: what each text may show of it.

    Raises:
      UserError: as `decode.generate`.
    """
    watch = Stopwatch()
    tokens, lengths = pad_left(prompts)
    n, samples = self.n if n is None else n, len(keys) // len(prompts)
    self.figures.texts += len(told)
    if n == 0:
      return iter([[""] * len(told)])
    asked = Asked(
      *(self.model, self.params, tokens, lengths, n, keys, samples),
      ends=tuple(self.ends),
      compute=self.compute,
      top=top,
      pace=pace,
      notes=self.figures.notes,
    )
    self._remember(asked)
    read = int(lengths[: len(told) // samples].sum())
    return self._told(self.method(asked), told, read, watch)

  def _told(
    self,
    blocks: Iterable[New],
    told: Sequence[Transcript],
    read: int,
    watch: Stopwatch,
  ) -> Iterator[list[str]]:
    """Fills transcripts in, and measures."""
    for new in blocks:
      laps, whole = watch.lap(), new.tokens.shape[1] > 1
      before = sum(len(text.tokens) for text in told)
      pieces = [
        text.push(row) for text, row in zip(told, new.tokens, strict=False)
      ]
      made = sum(len(text.tokens) for text in told) - before
      self.figures.note(made, read, laps, whole)
      if new.logprobs is not None:
        for i, text in enumerate(told):
          text.scores = jax.tree.map(lambda x, i=i: x[i], new)
      yield pieces
      if all(text.finish is not None for text in told):
        return
      read = 0
      watch.start()

  def _remember(self, asked: Asked) -> None:
    """Notes the size of the cache, as the model declares it."""
    most = self.model.max_positions
    rows = len(asked.lengths) * self.method.rows(asked.samples)
    length = min(decode.rounded(int(asked.lengths.max()) + asked.n - 1), most)
    cache = self.model.cache(rows, length, self.method.cache)
    size = n_bytes(cache, number(self.compute))
    self.figures.cache_bytes = max(self.figures.cache_bytes, size)

  def _nothing(self) -> Sequence[int]:
    """What stands before a text that begins with nothing."""
    if self.tokenizer.eot is not None:
      return [self.tokenizer.eot]
    try:
      return self.tokenizer.encode("\n")
    except UserError:  # characters, none of them a newline
      return [0]
