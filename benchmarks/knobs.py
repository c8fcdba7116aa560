"""What each sampling knob does: texts of one model, measured and drawn.

    python benchmarks/knobs.py --model=SmolLM2-135M-Instruct.Q4_1.gguf

Every knob is turned alone, all others neutral, over the same prompts and the
same random numbers. Writes `docs/sampling-*.png` and prints the tables of
docs/sampling.md. The model is compiled once: each token is one call of it and
one of the sampler.
"""

import argparse
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from jaxlm import host
from jaxlm.generate import decode, measures
from jaxlm.generate.filters import (
  Eta,
  Filter,
  MinP,
  NoRepeat,
  Repetition,
  Seen,
  Temperature,
  TopK,
  TopP,
  Typical,
)
from jaxlm.generate.prompts import pad_left
from jaxlm.generate.samplers import apply
from jaxlm.generate.step import prefill, step
from jaxlm.models.decoder import logits

PROMPTS = (
  "The old lighthouse keeper opened the door and",
  "To make a good vegetable soup, first",
  "The main cause of the First World War was",
  "My sister called me last night because",
  "In physics, energy is",
  "The city council met on Tuesday to discuss",
  "Once upon a time, in a village by the sea,",
  "A computer program is a list of",
  "The best way to learn a new language is",
  "Scientists have found a new species of",
  "When the train finally arrived,",
  "Dear Mr. Hopkins, I am writing to",
)

# Each with values from mild to strong, the neutral one among them.
KNOBS = {
  "temperature": (Temperature, (0.3, 0.6, 0.8, 1.0, 1.3)),
  "top-k": (TopK, (1, 5, 20, 100, 1000)),
  "top-p": (TopP, (0.3, 0.6, 0.8, 0.9, 0.98)),
  "min-p": (MinP, (0.01, 0.05, 0.1, 0.2, 0.5)),
  "typical": (Typical, (0.2, 0.5, 0.8, 0.9, 0.98)),
  "eta": (Eta, (3e-4, 2e-3, 1e-2, 5e-2, 0.2)),
  "repetition penalty": (Repetition, (1.0, 1.05, 1.1, 1.3, 1.8)),
  "no-repeat n-gram": (NoRepeat, (2, 3, 4, 6, 8)),
}
# Penalties show where texts repeat themselves: at a low temperature.
COLD = ("repetition penalty", "no-repeat n-gram")
BASE = Temperature(0.3)

MEASURES = ("distinct-1", "distinct-2", "repetition", "entropy", "perplexity")


@dataclass(frozen=True)
class Figures:
  """What was measured of the texts of one setting."""

  knob: str
  value: float
  numbers: dict[str, float]
  example: str


# --- Texts ------------------------------------------------------------------


@dataclass
class Reader:
  """A model and its tokenizer, reading the same prompts again and again."""

  model: Any
  params: Any
  tokenizer: Any
  n: int

  def __post_init__(self):
    ids = [self.tokenizer.encode(prompt) for prompt in PROMPTS]
    self.tokens, self.lengths = pad_left(ids)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def _begin(self, length: int, params, tokens, lengths):
    x, cache = prefill(self.model, params, tokens, lengths, length)
    return logits(self.model, params, x[:, -1:], decode.UNROLLED)[:, 0], cache

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
  def _next(self, params, token, position, cache):
    x, cache = step(self.model, params, token[:, None], position, cache)
    return logits(self.model, params, x, decode.UNROLLED)[:, 0], cache

  def __hash__(self):
    return id(self)

  def texts(self, filters: tuple[Filter, ...]) -> tuple[np.ndarray, ...]:
    """New tokens `[rows, n]`, their log-probabilities, entropies of choices."""
    rows, seq = self.tokens.shape
    scores, cache = self._begin(
      seq + self.n, self.params, self.tokens, self.lengths
    )
    here = np.arange(seq)[None] >= seq - np.asarray(self.lengths)[:, None]
    text = np.full((rows, seq + self.n), -1, np.int32)
    text[:, :seq] = np.where(here, self.tokens, -1)
    told = []
    for i in range(self.n):
      seen = Seen(jnp.asarray(text), jnp.int32(seq), jnp.int32(seq + i))
      token, *numbers = choose(filters, scores, jax.random.key(i), seen)
      text[:, seq + i] = token
      told.append(numbers)
      where = jnp.asarray(self.lengths, jnp.int32) + i
      scores, cache = self._next(self.params, token, where, cache)
    logprobs, entropies = np.asarray(jax.device_get(told)).transpose(1, 2, 0)
    return text[:, seq:], logprobs, entropies


@functools.partial(jax.jit, static_argnums=0)
def choose(filters: tuple[Filter, ...], scores, key, seen: Seen):
  """A token of each row, its log-probability, the entropy it was drawn with.

  The log-probability is the model's; the entropy that of what the filters
  have left.
  """
  left = apply(filters, scores, seen)
  token = jax.random.categorical(key, left, axis=-1).astype(jnp.int32)
  known = jax.nn.log_softmax(scores, axis=-1)
  chosen = jnp.take_along_axis(known, token[:, None], axis=-1)[:, 0]
  return token, chosen, measures.entropy(left)


def until_end(text: np.ndarray, ends: tuple[int, ...]) -> int:
  """How many tokens stand before the first end."""
  stops = np.flatnonzero(np.isin(text, ends))
  return int(stops[0]) if len(stops) else len(text)


def measure(reader: Reader, knob: str, value: float) -> Figures:
  """Texts of one setting of one knob, in numbers."""
  kind, _ = KNOBS[knob]
  filters = (kind(value),) if knob not in COLD else (kind(value), BASE)
  tokens, logprobs, entropies = reader.texts(filters)
  eot = reader.tokenizer.eot
  sizes = [until_end(row, () if eot is None else (eot,)) for row in tokens]
  texts = [row[:n].tolist() for row, n in zip(tokens, sizes, strict=True)]
  every = np.arange(tokens.shape[1])[None] < np.array(sizes)[:, None]
  numbers = {
    "distinct-1": measures.distinct(texts, 1),
    "distinct-2": measures.distinct(texts, 2),
    "repetition": measures.repetition(texts, 4),
    "entropy": float(entropies[every].mean()),
    "perplexity": measures.perplexity(logprobs[every].tolist()),
  }
  return Figures(knob, value, numbers, reader.tokenizer.decode(texts[0]))


# --- Tables and plots -------------------------------------------------------


def table(found: list[Figures]) -> str:
  """Settings of one knob, in markdown."""
  lines = [
    f"| {found[0].knob} | " + " | ".join(MEASURES) + " |",
    "|---" * (len(MEASURES) + 1) + "|",
  ]
  for one in found:
    cells = [f"{one.value:g}"]
    cells += [f"{one.numbers[name]:.2f}" for name in MEASURES[:-1]]
    cells.append(f"{one.numbers['perplexity']:.1f}")
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def draw_knobs(found: dict[str, list[Figures]], path: Path) -> None:
  """A panel per knob: varied and repetitive on the left axis, perplexity."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(2, 4, figsize=(15, 6.6), layout="constrained")
  for ax, (knob, settings) in zip(axes.flat, found.items(), strict=True):
    x = range(len(settings))
    for name, color in (("distinct-2", "C0"), ("repetition", "C3")):
      y = [one.numbers[name] for one in settings]
      ax.plot(x, y, "o-", color=color, label=name)
    ax.set(ylim=(-0.03, 1.03), title=knob, xticks=list(x))
    ax.set_xticklabels([f"{one.value:g}" for one in settings])
    other = ax.twinx()
    y = [one.numbers["perplexity"] for one in settings]
    other.plot(x, y, "s--", color="C2", label="perplexity (right)")
    other.set(yscale="log", ylim=(1, 3000))
    other.minorticks_off()
    ax.grid(alpha=0.3)
  lines = [*ax.lines, *other.lines]
  names = [line.get_label() for line in lines]
  figure.legend(lines, names, loc="outside lower center", ncols=3)
  figure.savefig(path, dpi=90)


def draw_trade(found: dict[str, list[Figures]], path: Path) -> None:
  """Likely against varied: each knob is a line through its settings."""
  import matplotlib.pyplot as plt

  figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
  marks = "osD^v<>p"
  for mark, (knob, settings) in zip(marks, found.items(), strict=True):
    x = [one.numbers["perplexity"] for one in settings]
    y = [one.numbers["repetition"] for one in settings]
    ax.plot(x, y, mark + "-", label=knob, alpha=0.8)
  ax.set(xscale="log", xlabel="perplexity under the model (log)")
  ax.set_ylabel("repeated 4-grams")
  ax.grid(alpha=0.3)
  ax.legend()
  figure.savefig(path, dpi=90)


# --- The program ------------------------------------------------------------


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument("--model", required=True, help="a file or directory")
  flags.add_argument("--tokens", type=int, default=96, help="of each text")
  flags.add_argument("--docs", default="docs", help="where the plots go")
  flags = flags.parse_args()
  host.prepare()
  model, params = jaxlm.load(flags.model)
  params = decode.ready(model, params)
  reader = Reader(
    model, params, jaxlm.load_tokenizer(flags.model), flags.tokens
  )
  found: dict[str, list[Figures]] = {}
  for knob, (_, values) in KNOBS.items():
    found[knob] = [measure(reader, knob, value) for value in values]
    print(table(found[knob]), end="\n\n", flush=True)
  for settings in found.values():
    for one in (settings[0], settings[-1]):
      print(json.dumps([one.knob, one.value, one.example]))
  draw_knobs(found, Path(flags.docs) / "sampling-knobs.png")
  draw_trade(found, Path(flags.docs) / "sampling-trade.png")


if __name__ == "__main__":
  main()
