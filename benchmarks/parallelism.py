"""What each device holds, and what travels, under every preset: no timing.

    python benchmarks/parallelism.py
    python benchmarks/parallelism.py fsdp fsdp_tp_ep --batch=16 --accumulate=2

One step of a small mixture of experts on eight devices of this machine's CPU:
bytes are counted in the arrays of its state, temporaries and collectives are
those of the program that XLA compiles. A collective in a loop over layers
counts once.
"""

import argparse
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from jaxlm import recipe
from jaxlm.config import default_config
from jaxlm.parallel.rules import PARTS

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
KINDS += ("collective-permute",)
JOINED = ("fsdp_tp", "fsdp_sp", "fsdp_ep", "fsdp_tp_ep", "zero1_sp_ep")
JOINED += ("fsdp_cp", "fsdp_pp", "fsdp_cp_pp")
MESHES = {"pp": "data:2,pipe:4"}  # four layers are four stages


def settings(preset: str, batch: int, accumulate: int) -> FrozenConfigDict:
  """A decoder of 4 layers, width 256, 8 experts of which 2 see a token."""
  config = default_config()
  with config.unlocked():
    config.parallel.preset = preset
    config.parallel.mesh = MESHES.get(preset, "")
    config.batch_size, config.accumulate, config.seq_len = (
      batch,
      accumulate,
      128,
    )
    config.ema, config.optimizer.name = 0.99, "adamw"
    config.model.family = "modern"
    config.model.update(dim=256, layers=4, heads=8, experts=8, mlp_dim=256)
  return FrozenConfigDict(config)


def held(tree: jax.Array) -> float:
  """Megabytes on one device."""
  device = jax.devices()[0]
  shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
  return sum(s.data.nbytes for s in shards if s.device == device) / 1e6


def measure(config: FrozenConfigDict) -> list[str]:
  """One row of the table."""
  model = recipe.model(config, 2048)
  tx = recipe.optimizer(config, model.params(), recipe.schedule(config))
  mesh = recipe.mesh(config)
  with jax.sharding.set_mesh(mesh):
    state = recipe.fresh_state(config, model, tx, mesh)
    rows = config.batch_size // config.accumulate
    shape = (1, config.accumulate, rows, config.seq_len)
    place = recipe.batch_place(recipe.rules(config), shape, mesh)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    batch = {"inputs": tokens, "targets": tokens}
    program = recipe.step(config, model, tx).lower(state, batch).compile()
  text = program.as_text()
  counts = [len(re.findall(rf" {k}(-start)?\(", text)) for k in KINDS]
  temporary = program.memory_analysis().temp_size_in_bytes / 1e6
  sizes = " ".join(f"{k}:{v}" for k, v in mesh.shape.items() if v > 1)
  numbers = (held(state.params), held(state.opt_state), held(state.ema))
  bytes_ = [f"{x:.1f}" for x in (*numbers, temporary)]
  return [config.parallel.preset, sizes, *bytes_, *map(str, counts)]


def main() -> None:
  """Prints the table."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument("presets", nargs="*", default=[*PARTS, *JOINED])
  flags.add_argument("--batch", type=int, default=8)
  flags.add_argument("--accumulate", type=int, default=1)
  asked = flags.parse_args()
  head = ["preset", "mesh", "parameters", "optimizer", "average", "temporary"]
  print("| " + " | ".join([*head, *KINDS]) + " |")
  print("|" + " --- |" * (len(head) + len(KINDS)))
  for name in asked.presets:
    row = measure(settings(name, asked.batch, asked.accumulate))
    print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
  main()
