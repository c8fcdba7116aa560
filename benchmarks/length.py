"""What is left of a model's perplexity on rows four times as long?

    python benchmarks/length.py                       # Python's own docs
    python benchmarks/length.py --path=input.txt

Two small decoders, equal but for their positions, train on rows of 128
characters: one with ALiBi, one with RoPE. Then the whole validation split is
read in rows of 128 and of 512. ALiBi should be no worse on the longer rows.
RoPE meets angles it has never seen; reading it with a scaling helps at once,
and YaRN with a short tune on long rows should bring it below where it was.
Prints perplexities, means and spreads over seeds, and the verdict.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import data, host
from jaxlm.evaluate import evaluate
from jaxlm.layers import param
from jaxlm.layers.compute import Compute
from jaxlm.layers.position import NTK, Alibi, Linear, Rope, Yarn
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import modern
from jaxlm.objectives import next_token
from jaxlm.optim import Muon, Optimizer, make, make_schedule
from jaxlm.state import create, make_step

SHORT, LONG, TOKENS, CALL = 128, 512, 2048, 5
COMPUTE = Compute(unroll=True)
OPTIMIZER = Optimizer("muon", weight_decay=0.1, b2=0.99, muon=Muon())
READ = {  # who is trained, and how its long rows are read
  "ALiBi": {"as trained": Alibi()},
  "RoPE": {
    "as trained": Rope(),
    "linear": Rope(scaling=Linear(LONG / SHORT)),
    "NTK": Rope(scaling=NTK(LONG / SHORT)),
    "YaRN": Rope(scaling=Yarn(LONG / SHORT, SHORT)),
  },
}
TUNED = {"ALiBi": (), "RoPE": ("as trained", "YaRN")}
KEPT = 1.03  # times the perplexity on short rows


def placed(model: Decoder, position: Alibi | Rope) -> Decoder:
  """The same decoder with other positions in all of its layers."""

  def swap(block: Any) -> Any:
    return replace(block, mixer=replace(block.mixer, position=position))

  layers = tuple((tuple(map(swap, row)), n) for row, n in model.layers)
  return replace(model, layers=layers)


def fit(
  model: Decoder,
  params: Any,
  tokens: Any,
  seq: int,
  steps: int,
  peak: float,
  seed: int,
) -> Any:
  """Parameters after `steps` steps of TOKENS tokens in rows of `seq`."""
  lr = make_schedule("cosine", peak, steps, max(1, steps // 10), 0.1)
  tx = make(model.params(), lr, OPTIMIZER)
  step = make_step(partial(next_token, model, compute=COMPUTE), tx, steps=CALL)
  state = create(jax.tree.map(jnp.copy, params), tx)  # steps donate it
  feed = data.batches(tokens, seq, TOKENS // seq, seed)
  for i in range(0, steps, CALL):
    batch = jax.tree.map(
      lambda *x: np.stack(x)[:, None], *(feed[i + k] for k in range(CALL))
    )
    state, _ = step(state, batch)
  return state.params


def perplexity(model: Decoder, params: Any, tokens: Any, seq: int) -> float:
  """Of the whole of `tokens` in consecutive rows of `seq`."""

  @jax.jit
  def judge(params: Any, batch: Any) -> dict[str, jax.Array]:
    return next_token(model, params, batch, compute=COMPUTE)[1]

  rows = data.windows(tokens, seq, 4 * TOKENS // seq)
  return evaluate(judge, params, rows)["perplexity"]


def trial(
  model: Decoder, corpus: Any, seed: int, args: Any
) -> dict[tuple, tuple[float, float]]:
  """By (positions, reading, length of rows): perplexity, and as a ratio.

  The ratio is to what the same positions reached on short rows before they
  were tuned. A tune on short rows shows what is owed to the steps alone.
  """
  start, found = param.init(model.params(), jax.random.key(seed)), {}
  train = args.steps, args.lr, 2 * seed  # another order of rows in a tune
  tune = args.tune, args.lr / 4, 2 * seed + 1
  for kind, readings in READ.items():
    short = placed(model, readings["as trained"])
    params = fit(short, start, corpus.train, SHORT, *train)
    base = perplexity(short, params, corpus.val, SHORT)

    def note(name, seq, model, params, kind=kind, base=base):
      value = perplexity(model, params, corpus.val, seq)
      found[kind, name, seq] = value, value / base
      print(f"seed {seed} {kind} {name} {seq}: {value:.3f}", flush=True)

    note("as trained", SHORT, short, params)
    for name, position in readings.items():
      note(name, LONG, placed(model, position), params)
    for name in TUNED[kind]:
      long = placed(model, readings[name])
      tuned = fit(long, params, corpus.train, LONG, *tune)
      note(f"{name}, tuned", LONG, long, tuned)
    if TUNED[kind]:
      tuned = fit(short, params, corpus.train, SHORT, *tune)
      note("as trained, tuned", SHORT, short, tuned)
  return found


def report(trials: list[dict]) -> None:
  """Means and spreads over seeds, and the verdict."""
  means = {}
  for case in trials[0]:
    values, ratios = zip(*(t[case] for t in trials), strict=True)
    means[case] = statistics.mean(ratios)
    spread = statistics.stdev(ratios) if len(trials) > 1 else 0.0
    kind, name, seq = case
    print(
      f"{kind:6} {name:18} rows of {seq}: {statistics.mean(values):6.3f}  "
      f"ratio {means[case]:.3f} ± {spread:.3f}"
    )
  for case in (("ALiBi", "as trained", LONG), ("RoPE", "YaRN, tuned", LONG)):
    kept = "kept" if means[case] <= KEPT else "NOT kept"
    print(f"{', '.join(case[:2])}: {kept} at {LONG} (ratio at most {KEPT})")


def main() -> None:
  """Trains, judges, prints the table and the verdict."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--path", help="a text file; default: Python's docs")
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--tune", type=int, default=80)
  parser.add_argument("--lr", type=float, default=8e-3)
  parser.add_argument("--seeds", type=int, default=1)
  args = parser.parse_args()
  host.prepare()

  corpus = data.prepare(args.path, tokenizer="chars")
  model = modern.decoder(
    corpus.tokenizer.vocab_size, dim=128, layers=4, heads=4, max_positions=LONG
  )
  print(f"{model.n_params():,} parameters; {corpus.describe()}")
  start = time.perf_counter()
  report([trial(model, corpus, seed, args) for seed in range(args.seeds)])
  print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
  main()
