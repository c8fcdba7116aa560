"""How far the estimates of `jaxlm.plan` are from the compilers' own figures.

    python benchmarks/plan.py                      # CPU devices
    python benchmarks/plan.py --target=h100:16     # the GPU's compiler
    python benchmarks/plan.py --target=v5e:4x4     # the TPU's

Each case is traced, read, compiled, and read again: bytes on one device, bytes
that travel, and how both estimates differ. The last lines sum up.
"""

import argparse
import itertools
import statistics
import sys

from jaxlm import keys
from jaxlm.config import freeze
from jaxlm.errors import UserError
from jaxlm.plan import make
from jaxlm.speed import short

DENSE = {
  "model.family": "llama",
  "model.vocab": 8192,
  "model.dim": 512,
  "model.layers": 8,
  "model.heads": 8,
  "model.kv_heads": 4,
  "model.mlp_dim": 1536,
  "seq_len": 512,
  "batch_size": 32,
  "precision": "bfloat16",
}
EXPERTS = {
  "model.family": "mixtral",
  "model.vocab": 8192,
  "model.dim": 256,
  "model.layers": 4,
  "model.heads": 4,
  "model.kv_heads": 2,
  "model.mlp_dim": 512,
  "model.experts": 8,
  "seq_len": 256,
  "batch_size": 32,
  "precision": "bfloat16",
}


def cases():
  """`(name, keys, program)`."""
  presets = ("dp", "zero1", "fsdp", "fsdp_tp", "fsdp_sp")
  for preset, remat in itertools.product(presets, ("none", "dots", "full")):
    config = DENSE | {"parallel.preset": preset, "remat": remat}
    yield f"dense {preset} {remat}", config, "train"
  fsdp = DENSE | {"parallel.preset": "fsdp"}
  yield (
    "dense fsdp full chunk",
    fsdp | {"remat": "full", "loss_chunk": 64},
    "train",
  )
  yield (
    "dense fsdp full parts",
    fsdp | {"remat": "full", "accumulate": 2},
    "train",
  )
  yield "dense fsdp float32", fsdp | {"precision": "float32"}, "train"
  yield "dense fsdp muon", fsdp | {"optimizer.name": "muon"}, "train"
  yield "dense fsdp", fsdp, "prefill"
  yield "dense fsdp", fsdp, "decode"
  yield "dense fsdp_tp", DENSE | {"parallel.preset": "fsdp_tp"}, "decode"
  for preset in ("fsdp", "fsdp_tp"):
    config = EXPERTS | {"parallel.preset": preset, "remat": "full"}
    yield f"experts {preset} full", config, "train"
  yield "experts fsdp", EXPERTS | {"parallel.preset": "fsdp"}, "decode"


def measure(where, name: str, flat: dict, program: str) -> dict | None:
  """Estimates and figures of one case; None where it cannot be."""
  config = freeze(keys.defaults() | flat)
  model = make.programs.decoder(config)
  try:
    mesh = where.mesh(config)
    found = make.outcome(config, model, where, mesh, program)
  except UserError as error:
    print(f"{name}: {error}", file=sys.stderr)
    return None

  def sent(messages):
    return sum(m.bytes * m.times for m in messages)

  return {
    "case": f"{name} {program}",
    "memory": (found.reading.peak, found.total),
    "sent": (sent(found.reading.messages), sent(found.messages)),
  }


def row(found: dict) -> str:
  """One line of the table."""
  cells = [found["case"]]
  for name in ("memory", "sent"):
    told, true = found[name]
    off = f"{told / true - 1:+.0%}" if true else "-"
    cells += [f"{short(told)}B", f"{short(true)}B", off]
  return "| " + " | ".join(cells) + " |"


def summary(rows: list[dict], name: str) -> str:
  """Median and extremes of the relative error."""
  errors = [a / b - 1 for r in rows for a, b in [r[name]] if b]
  size = statistics.median(abs(e) for e in errors)
  low, high = min(errors), max(errors)
  return (
    f"{name}: {len(errors)} cases, median error {size:.0%}, "
    f"from {low:+.0%} to {high:+.0%}"
  )


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument("--target", default="cpu:8")
  flags.add_argument("--only", default="", help="cases whose name has this")
  asked = flags.parse_args()
  where = make.site(asked.target)
  print(f"| {asked.target} | memory: estimate | compiler | off |", end="")
  print(" sent: estimate | compiler | off |\n|---|---|---|---|---|---|---|")
  rows = []
  for name, flat, program in cases():
    if asked.only in f"{name} {program}":
      found = measure(where, name, flat, program)
      if found:
        rows.append(found)
        print(row(found), flush=True)
  print()
  for name in ("memory", "sent"):
    print(summary(rows, name))


if __name__ == "__main__":
  main()
