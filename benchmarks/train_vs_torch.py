"""Training speed of jaxlm and PyTorch, side by side on this machine.

    pip install torch            # the judge; jaxlm itself never needs it
    python benchmarks/train_vs_torch.py [--seconds=40] [--sizes=small,large]

The same GPT-2 (sizes, batch, AdamW, clipping, precision) trains in both. Each
library runs in a process of its own, with its own memory allocator and all
cores, and the two take turns, one chunk of steps at a time, so that a change
in the machine's speed meets both. PyTorch runs eagerly and compiled, and its
best counts. Printed are the median and the shortest milliseconds a step,
tokens/s, the share of the matmul peak that jaxlm measures in the same run, and
the ratio of medians. jaxlm's seconds to the first step (imports, compilation)
and peak memory are printed too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch_gpt

SIZES = {"small": torch_gpt.SMALL, "large": torch_gpt.LARGE}
STEPS = {"small": 8, "large": 1}  # in a chunk; jaxlm takes them in one call
PRECISIONS = ("float32", "bfloat16")


# --- The two sides, each in its own process ---------------------------------


def jaxlm_sides(size: str) -> dict[str, Callable[[], float]]:
  """Chunks of jaxlm's own training step, by precision."""
  from jaxlm import host

  host.prepare()
  import jax
  import numpy as np

  from jaxlm.layers import param
  from jaxlm.layers.compute import Compute
  from jaxlm.models.families import gpt2
  from jaxlm.objectives import next_token
  from jaxlm.optim import Optimizer, make
  from jaxlm.state import create, make_step

  shape, recipe, n = SIZES[size], torch_gpt.Recipe(), STEPS[size]
  model = gpt2.decoder(
    shape.vocab, shape.dim, shape.layers, shape.heads, shape.context
  )
  tx = make(
    model.params(),
    recipe.lr,
    Optimizer(
      b1=recipe.betas[0],
      b2=recipe.betas[1],
      eps=recipe.eps,
      weight_decay=recipe.decay,
      clip_norm=recipe.clip,
    ),
  )
  rows = (n, 1, shape.batch, shape.context + 1)
  tokens = np.random.default_rng(0).integers(shape.vocab, size=rows)
  tokens = tokens.astype(np.int32)
  batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}

  def side(precision: str) -> Callable[[], float]:
    compute = Compute(dtype=precision, unroll=True)

    def loss_fn(params, part, key):
      return next_token(model, params, part, key, compute)

    step = make_step(loss_fn, tx, steps=n)
    state = jax.jit(
      lambda: create(param.init(model.params(), jax.random.key(0)), tx)
    )()

    def chunk() -> float:
      nonlocal state
      state, metrics = step(state, batch)
      return float(metrics["loss"][-1])

    return chunk

  return {f"jaxlm {p}": side(p) for p in PRECISIONS}


def torch_sides(size: str) -> dict[str, Callable[[], float]]:
  """Chunks of PyTorch's step, by precision, eager and compiled."""
  shape = SIZES[size]
  batches = torch_gpt.batches(shape, STEPS[size])

  def side(bfloat16: bool, compiled: bool) -> Callable[[], float]:
    step = torch_gpt.make_step(shape, bfloat16=bfloat16, compiled=compiled)

    def chunk() -> float:
      for inputs, targets in batches:
        loss = step(inputs, targets)
      return float(loss)

    return chunk

  return {
    f"torch {p}{' compiled' if c else ''}": side(p == "bfloat16", c)
    for p in PRECISIONS
    for c in (False, True)
  }


def work(library: str, size: str) -> None:
  """Runs chunks by name as the parent asks for them on stdin."""
  started = time.perf_counter()
  make = {"jaxlm": jaxlm_sides, "torch": torch_sides}[library]
  first = {}
  ready = {}
  for name, chunk in make(size).items():
    chunk()  # compiles
    first[name] = time.perf_counter() - started
    started = time.perf_counter()
    chunk()
    ready[name] = chunk
  more = {}
  if library == "jaxlm":
    from jaxlm import speed

    peaks = {p: speed.matmul_peak(p) for p in PRECISIONS}
    more = {"peak": peaks, "memory": speed.memory()["host"]}
  print(json.dumps({"first": first} | more), flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    ready[line.strip()]()
    print(time.perf_counter() - start, flush=True)


# --- The race ---------------------------------------------------------------


class Side:
  """A process that runs chunks of one library."""

  def __init__(self, library: str, size: str):
    command = [sys.executable, __file__, "--worker", library, size]
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"the {library} side failed to start; see above")
    self.about = json.loads(line)
    self.names = list(self.about["first"])

  def seconds(self, name: str) -> float:
    """Runs one chunk."""
    self.process.stdin.write(name + "\n")
    self.process.stdin.flush()
    return float(self.process.stdout.readline())

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def race(size: str, seconds: float) -> None:
  """Prints one size's table."""
  shape, n = SIZES[size], STEPS[size]
  sides = [Side("jaxlm", size), Side("torch", size)]
  times = {name: [] for side in sides for name in side.names}
  stop = time.perf_counter() + seconds
  while time.perf_counter() < stop:
    for side in sides:
      for name in side.names:
        times[name].append(side.seconds(name) / n)
  about = sides[0].about
  for side in sides:
    side.close()
  tokens = shape.batch * shape.context
  flops = tokens * flops_per_token(shape)
  print(
    f"\n{size}: {shape.layers} layers x {shape.dim}, context {shape.context}, "
    f"batch {shape.batch}"
  )
  print(f"{'':24}{'median':>9}{'best':>9}{'tokens/s':>11}{'of peak':>9}")
  for name, values in times.items():
    median, best = statistics.median(values), min(values)
    share = flops / median / about["peak"][name.split()[1]]
    print(
      f"{name:24}{median * 1e3:7.1f}ms{best * 1e3:7.1f}ms"
      f"{tokens / median:11,.0f}{share:9.0%}"
    )
  best = {n: statistics.median(v) for n, v in times.items()}
  for precision in (*PRECISIONS, "best precision"):
    picked = {
      library: min(
        v
        for k, v in best.items()
        if k.startswith(library)
        and (precision in k or precision == "best precision")
      )
      for library in ("jaxlm", "torch")
    }
    ratio = picked["torch"] / picked["jaxlm"]
    print(f"jaxlm is {ratio:.2f} x torch at {precision}")
  peaks = ", ".join(
    f"{p} {about['peak'][p] / 1e9:.0f} GFLOP/s" for p in PRECISIONS
  )
  print(
    f"matmul peak {peaks}; jaxlm peak memory {about['memory'] / 1e6:.0f} MB"
  )
  first = ", ".join(f"{k} {v:.1f} s" for k, v in about["first"].items())
  print(f"imports and compilation to the first chunk: {first}")


def flops_per_token(shape: torch_gpt.Shape) -> float:
  """Of training: three times the forward pass's matmuls, causal half."""
  matmuls = 24 * shape.layers * shape.dim**2 + 2 * shape.dim * shape.vocab
  mixing = 4 * shape.layers * shape.dim * (shape.context + 1) / 2
  return 3 * (matmuls + mixing)


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument("--seconds", type=float, default=40)
  flags.add_argument("--sizes", default="small,large")
  flags.add_argument("--worker", nargs=2)
  asked = flags.parse_args()
  if not torch_gpt.available():
    raise SystemExit("error: this benchmark needs PyTorch: pip install torch")
  if asked.worker:
    return work(*asked.worker)
  for size in asked.sizes.split(","):
    race(size, asked.seconds)


if __name__ == "__main__":
  main()
