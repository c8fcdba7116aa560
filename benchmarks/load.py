"""Loading and running the same weights in jaxlm and transformers, on a CPU.

    pip install torch transformers       # the judge; jaxlm never needs it
    python benchmarks/load.py [--seconds=60] [--model=DIR] [--compiled]

Without --model, random weights of the shape of SmolLM2-135M (538 MB, float32)
are written to a temporary directory, which both libraries read.

Load: each library loads in a fresh process, in turns; both then read every
weight once, since transformers maps the file and leaves reading it for later.
Printed are seconds to import, to load and to that point, and peak memory: all
of it, and without pages of files, which the system can take back.

Forward: both compute logits of the same tokens, 1 x 512 and 8 x 512, in
processes of their own that take turns. transformers runs eagerly with torch's
fused attention (sdpa); with --compiled also under torch.compile, which takes
minutes to compile, and its best counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SHAPES = {"1 x 512": (1, 512), "8 x 512": (8, 512)}
LIBRARIES = ("jaxlm", "transformers")


def make(path: str) -> None:
  """Writes random weights of SmolLM2-135M's shape."""
  import jax
  import numpy as np

  import jaxlm
  from jaxlm.layers.param import abstract
  from jaxlm.models.families import llama

  model = llama.decoder(
    vocab=49152,
    dim=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    theta=100000.0,
    max_positions=8192,
    tied=True,
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: 0.02 * rng.standard_normal(s.shape, np.float32),
    abstract(model.params()),
  )
  jaxlm.save(path, model, params, format="hf")


# --- Loading ----------------------------------------------------------------


def load_jaxlm(path: str) -> tuple[float, Callable[[], float]]:
  """The time its imports are done, and what loads and reads all weights."""
  import jax

  import jaxlm

  load, _ = jaxlm.load, jax.devices()

  def run() -> float:
    _, params = load(path)
    jax.block_until_ready(params)
    loaded = time.perf_counter()
    for x in jax.tree.leaves(params):
      x.sum().block_until_ready()
    return loaded

  return time.perf_counter(), run


def load_transformers(path: str) -> tuple[float, Callable[[], float]]:
  """The same of transformers."""
  import torch
  from transformers import AutoModelForCausalLM, LlamaForCausalLM

  del LlamaForCausalLM  # imported lazily otherwise

  def run() -> float:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    loaded = time.perf_counter()
    with torch.no_grad():
      for p in model.parameters():
        p.sum()
    return loaded

  return time.perf_counter(), run


def load_once(library: str, path: str) -> None:
  """Loads in this process and prints what it took."""
  started = time.perf_counter()
  sides = {"jaxlm": load_jaxlm, "transformers": load_transformers}
  imported, run = sides[library](path)
  begun = time.perf_counter()
  loaded = run()
  done = time.perf_counter()
  peak, kept = memory()
  print(
    json.dumps(
      {
        "import": imported - started,
        "load": loaded - begun,
        "ready": done - started,
        "read": done - begun,
        "peak": peak,
        "kept": kept,
      }
    )
  )


def memory() -> tuple[float, float]:
  """Peak of resident memory in MB; what is resident now but of no file."""
  said = {}
  for line in Path("/proc/self/status").read_text().splitlines():
    name, _, value = line.partition(":")
    said[name] = value.split()[0] if value.split() else ""
  return int(said["VmHWM"]) / 1024, int(said["RssAnon"]) / 1024


def race_loading(path: str, seconds: float) -> None:
  """Prints the table of loading."""
  found = {library: [] for library in LIBRARIES}
  stop = time.perf_counter() + seconds
  while time.perf_counter() < stop or len(found["jaxlm"]) < 3:
    for library in LIBRARIES:
      run = subprocess.run(
        [sys.executable, __file__, "--loader", library, path],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
      )
      found[library].append(json.loads(run.stdout.splitlines()[-1]))
  print(f"load: median of {len(found['jaxlm'])} processes each")
  columns = ("import", "load", "read", "ready", "peak", "kept")
  print(f"{'':14}" + "".join(f"{c:>10}" for c in columns))
  for library, runs in found.items():
    row = {c: statistics.median(r[c] for r in runs) for c in columns}
    cells = [
      f"{v:.0f} MB" if c in ("peak", "kept") else f"{v:.2f} s"
      for c, v in row.items()
    ]
    row = f"{library:14}" + "".join(f"{cell:>10}" for cell in cells)
    print(row, flush=True)


# --- Forward ----------------------------------------------------------------


def tokens_of(shape: tuple[int, int]):
  """The same tokens on both sides."""
  import numpy as np

  return np.random.default_rng(0).integers(1000, size=shape)


def jaxlm_sides(path: str) -> dict[str, Callable[[], None]]:
  """Forward passes of jaxlm by shape."""
  from jaxlm import host

  host.prepare()
  import jax
  import jax.numpy as jnp

  import jaxlm

  model, params = jaxlm.load(path)
  compute = jaxlm.Compute(unroll=True)

  @jax.jit
  def run(params, tokens):
    return jaxlm.forward(model, params, tokens, compute=compute)

  def side(shape: tuple[int, int]) -> Callable[[], None]:
    tokens = jnp.asarray(tokens_of(shape), jnp.int32)
    return lambda: run(params, tokens).block_until_ready()

  return {f"jaxlm {name}": side(shape) for name, shape in SHAPES.items()}


def transformers_sides(
  path: str, compiled: bool
) -> dict[str, Callable[[], None]]:
  """Forward passes of transformers, eager and, if asked, compiled."""
  import torch
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, attn_implementation="sdpa"
  ).eval()
  forms = {"": model}
  if compiled:
    forms[" compiled"] = torch.compile(model)

  def side(form, shape: tuple[int, int]) -> Callable[[], None]:
    tokens = torch.as_tensor(tokens_of(shape))

    def run() -> None:
      with torch.inference_mode():
        form(tokens, use_cache=False)

    return run

  return {
    f"transformers{kind} {name}": side(form, shape)
    for kind, form in forms.items()
    for name, shape in SHAPES.items()
  }


def work(library: str, path: str, compiled: bool) -> None:
  """Runs passes by name as the parent asks for them on stdin."""
  if library == "jaxlm":
    ready = jaxlm_sides(path)
  else:
    ready = transformers_sides(path, compiled)
  for run in ready.values():
    run()  # compiles
    run()
  print(json.dumps(list(ready)), flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    ready[line.strip()]()
    print(time.perf_counter() - start, flush=True)


class Side:
  """A process that runs passes of one library."""

  def __init__(self, library: str, path: str, compiled: bool):
    command = [sys.executable, __file__, "--worker", library, path]
    command += ["--compiled"] * compiled
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"the {library} side failed to start; see above")
    self.names = json.loads(line)

  def seconds(self, name: str) -> float:
    """Runs one pass."""
    self.process.stdin.write(name + "\n")
    self.process.stdin.flush()
    return float(self.process.stdout.readline())

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def race_forward(path: str, seconds: float, compiled: bool) -> None:
  """Prints the table of forward passes, and the ratios."""
  sides = [Side(library, path, compiled) for library in LIBRARIES]
  times = {name: [] for side in sides for name in side.names}
  stop = time.perf_counter() + seconds
  while time.perf_counter() < stop or len(times["jaxlm 8 x 512"]) < 3:
    for side in sides:
      for name in side.names:
        times[name].append(side.seconds(name))
  for side in sides:
    side.close()
  print(f"\nforward: {len(times['jaxlm 1 x 512'])} passes each, in turns")
  print(f"{'':32}{'median':>9}{'best':>9}{'tokens/s':>11}")
  medians = {name: statistics.median(v) for name, v in times.items()}
  for name, values in times.items():
    rows, length = SHAPES[name[-7:]]
    print(
      f"{name:32}{medians[name]:8.3f}s{min(values):8.3f}s"
      f"{rows * length / medians[name]:11,.0f}"
    )
  for shape in SHAPES:
    theirs = min(
      v
      for k, v in medians.items()
      if k.startswith("transformers") and k.endswith(shape)
    )
    ratio = theirs / medians[f"jaxlm {shape}"]
    print(f"jaxlm is {ratio:.2f} x transformers at {shape}")


def main() -> None:
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--seconds", type=float, default=60)
  flags.add_argument("--model", help="a Hugging Face directory")
  flags.add_argument("--compiled", action="store_true")
  flags.add_argument("--loader", nargs=2, help=argparse.SUPPRESS)
  flags.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
  asked = flags.parse_args()
  if asked.loader:
    return load_once(*asked.loader)
  if asked.worker:
    return work(*asked.worker, asked.compiled)
  with tempfile.TemporaryDirectory() as folder:
    path = asked.model or os.path.join(folder, "model")
    if asked.model is None:
      make(path)
    race_loading(path, asked.seconds)
    race_forward(path, asked.seconds, asked.compiled)
  return None


if __name__ == "__main__":
  main()
