"""What the TPU compilers make of the kernels, without a TPU.

    python benchmarks/kernels.py --target v5e:2x2 [--memory]

Compiles flash attention and JAX's stock splash attention, forward and
gradients, causal, 8 query heads on 2 key heads, head_dim 128, bfloat16, from
the same `[batch, seq, heads, head_dim]`, and prints for each kernel how many
instruction bundles the compiler schedules for one pair of 512 x 512 blocks. A
bundle takes a cycle unless something stalls, so this is the compiler's
estimate of the time where the matrix units are the limit; no TPU is run.
`--memory` prints the compiler's temporary memory from 1k to 64k tokens
instead. Needs `pip install jaxlm[tpu]`.
"""

import argparse
import itertools
import os
import pathlib
import re
import tempfile
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
SIZE, HEADS, GROUPS, WIDTH = 512, 8, 2, 128


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--target", default="v5e:2x2")
  parser.add_argument("--memory", action="store_true")
  parser.add_argument("--seq", type=int, default=4096)
  given = parser.parse_args()
  if given.memory:
    return memory(given.target)
  with tempfile.TemporaryDirectory() as folder:
    # Read when the TPU's library starts, which is later.
    os.environ["LIBTPU_INIT_ARGS"] = (
      f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    )
    for name in ("ours", "splash"):
      compiled(given.target, given.seq, name)
    for kernel, count in sorted(bundles(pathlib.Path(folder)).items()):
      print(f"{given.target:10} {kernel:32} {count:6} bundles", flush=True)


def memory(target: str) -> None:
  """Temporary memory by length, of both forms."""
  for name in ("ours", "splash"):
    for seq in (1024, 4096, 16384, 65536):
      start = time.perf_counter()
      program = compiled(target, seq, name)
      found = program.memory_analysis().temp_size_in_bytes / 2**20
      took = time.perf_counter() - start
      print(
        f"{target:10} {name:8} {seq:6} tokens {found:8.1f} MiB temporary "
        f"(compiled in {took:.0f} s)",
        flush=True,
      )


def compiled(target: str, seq: int, name: str):
  """Gradients of the sum of squares of causal attention, compiled."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import SingleDeviceSharding

  device = topologies.get_topology_desc(
    platform="tpu", topology_name=target
  ).devices[0]
  attend = ours if name == "ours" else splash(seq)

  def loss(q, k, v):
    return jnp.sum(attend(q, k, v).astype(jnp.float32) ** 2)

  q, k = (
    jax.ShapeDtypeStruct(
      (1, seq, n, WIDTH), jnp.bfloat16, sharding=SingleDeviceSharding(device)
    )
    for n in (HEADS, GROUPS)
  )
  return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile()


def ours(q, k, v):
  from jaxlm.layers.attend import attend
  from jaxlm.layers.compute import Compute
  from jaxlm.layers.mask import Causal

  return attend(q, k, v, Causal(), compute=Compute(attention="flash"))


def splash(seq: int):
  """The stock kernel, in blocks of the same size."""
  import jax
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as stock,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  edges = (
    "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv "
    "block_kv_dkv_compute block_q_dq block_kv_dq"
  )
  each = HEADS // GROUPS
  kernel = stock.make_splash_mqa_single_device(
    masks.MultiHeadMask([masks.CausalMask((seq, seq))] * each),
    block_sizes=stock.BlockSizes(**dict.fromkeys(edges.split(), SIZE)),
  )

  def attend(q, k, v):
    b, t, n, h = q.shape
    q = (q * h**-0.5).reshape(b, t, GROUPS, each, h).transpose(0, 2, 3, 1, 4)
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    y = jax.vmap(jax.vmap(kernel))(q, k, v)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)

  return attend


def bundles(folder: pathlib.Path) -> dict[str, int]:
  """The longest run without a branch in each kernel: the work on a pair of
  blocks, kernel name -> bundles.
  """
  found = {}
  for path in folder.glob("*final_bundles.txt"):
    name = re.search(r"-((?:flash|splash|loss)\w+)", path.name)
    if name is None or "schedule" in path.name:
      continue
    lines = re.findall(
      r"^\s*(?:0x)?([0-9a-f]+) .*?(sbr\.|$)", path.read_text(), re.MULTILINE
    )
    cuts = [int(at, 16) for at, branch in lines if branch]
    cuts = [0, *cuts, int(lines[-1][0], 16)]
    longest = max(b - a for a, b in itertools.pairwise(cuts))
    found[name[1]] = max(longest, found.get(name[1], 0))
  return found


if __name__ == "__main__":
  main()
