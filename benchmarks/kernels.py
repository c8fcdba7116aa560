"""What the compilers make of the kernels, without a TPU or a GPU.

    python benchmarks/kernels.py --target v5e:2x2 [--kernel attention]
    python benchmarks/kernels.py --target h100:1 --memory

Compiles each kernel and its stock counterparts for the target and prints the
compiler's own figures: FLOPs, bytes and seconds from XLA's cost analysis
(kernels are counted as they say themselves; those that say nothing count as
nothing), temporary memory, and of each kernel how many instruction bundles a
TPU's compiler schedules in its longest run without a branch (a bundle takes a
cycle unless something stalls), or the registers a GPU's assembler gives a
thread and what spills out of them. `--memory` prints the temporary memory of
attention from 1k to 64k tokens instead.

    attention  gradients; causal, 8 query heads on 2 key heads of 128
    masks      gradients of every mask, extra, width and kind of data
    paged      8 rows on 1,024 pages of 16 tokens; 32 heads on 8, of 128
    grouped    gradients; 4,096 rows, 64 experts of 2,048 x 1,408
    loss       gradients; 8,192 tokens of 4,096, 128,256 words

All in bfloat16. Needs `pip install jaxlm[tpu]`, or `jaxlm[cuda12]`.
"""

import argparse
import functools
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxlm.layers.at import At
from jaxlm.layers.attend import attend
from jaxlm.layers.compute import Compute
from jaxlm.layers.kernels.fused_loss import fused_cross_entropy
from jaxlm.layers.kernels.grouped import grouped_dot
from jaxlm.layers.kernels.paged import paged_attention
from jaxlm.layers.mask import Causal, Chunked, Full, PrefixLM, Sliding
from jaxlm.layers.position import Alibi
from jaxlm.losses import chunked_cross_entropy
from jaxlm.plan import target as targets

SIZE, HEADS, GROUPS, WIDTH = 512, 8, 2, 128
LENGTHS = (1024, 4096, 16384, 65536)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--target", default="v5e:2x2")
  parser.add_argument("--kernel", choices=KERNELS, action="append")
  parser.add_argument("--memory", action="store_true")
  given = parser.parse_args()
  target = targets.parse(given.target)
  gpu = target.chip == "h100"
  with tempfile.TemporaryDirectory() as folder:
    # Read when the compiler starts, which is later.
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    name, dump = (
      ("XLA_FLAGS", f"--xla_dump_to={folder}")
      if gpu
      else ("LIBTPU_INIT_ARGS", dump)
    )
    os.environ[name] = "" if given.memory else dump
    targets.prepare(target)
    array = arrays(targets.devices(target)[0])
    if given.memory:
      return memory(array, given.target, gpu)
    for kernel in given.kernel or KERNELS:
      for form, program in KERNELS[kernel](array, gpu):
        show(given.target, f"{kernel}, {form}", program, pathlib.Path(folder))


def arrays(device):
  """Shapes on a device, whose dtype is bfloat16 unless said otherwise."""
  return lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(
    shape, jnp.dtype(dtype), sharding=SingleDeviceSharding(device)
  )


def gradients(form, *args):
  """Lowers the gradients of the sum of squares of `form(*floats, *others)`."""
  floats = tuple(
    i
    for i, x in enumerate(args)
    if not isinstance(x, dict) and jnp.issubdtype(x.dtype, jnp.floating)
  )

  def loss(*args):
    return jnp.sum(form(*args).astype(jnp.float32) ** 2)

  return jax.jit(jax.grad(loss, floats)).lower(*args)


# --- What is compiled -------------------------------------------------------


def attention(array, gpu: bool, seq: int = 4096):
  """Flash attention beside JAX's own."""
  args = [array(1, seq, n, WIDTH) for n in (HEADS, GROUPS, GROUPS)]
  if gpu:
    forms = {"ours": ours("triton"), "cuDNN": cudnn, "stock Triton": triton}
  else:
    forms = {"ours": ours("flash"), "splash": splash(seq)}
  return ((name, gradients(form, *args)) for name, form in forms.items())


def ours(name: str):
  def form(q, k, v):
    return attend(q, k, v, Causal(), compute=Compute(attention=name))

  return form


def cudnn(q, k, v):
  """NVIDIA's library, through JAX."""
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation="cudnn"
  )


def triton(q, k, v):
  """JAX's Pallas kernel for GPUs, which knows no groups of heads."""
  from jax.experimental.pallas.ops.gpu import attention as stock

  k, v = (jnp.repeat(x, HEADS // GROUPS, axis=2) for x in (k, v))
  return stock.mha(q, k, v, None, sm_scale=WIDTH**-0.5, causal=True)


def splash(seq: int):
  """JAX's Pallas kernel for TPUs, in blocks of the same size."""
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

  def form(q, k, v):
    b, t, n, h = q.shape
    q = (q * h**-0.5).reshape(b, t, GROUPS, each, h).transpose(0, 2, 3, 1, 4)
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    y = jax.vmap(jax.vmap(kernel))(q, k, v)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)

  return form


def masks(array, gpu: bool):
  """All that attention can be asked for, in lengths that divide no block."""
  name = "triton" if gpu else "flash"
  fields = "positions", "segments", "blocks"
  for mask, width, dtype, given in (
    (Causal(), 128, "bfloat16", ()),
    (Full(), 64, "float16" if gpu else "bfloat16", ()),
    (Sliding(300), 80, "bfloat16", ()),
    (Sliding(300, 4), 96, "bfloat16", ("sinks", "alibi", "softcap")),
    (Chunked(256), 128, "float32", ("segments",)),
    (Causal(), 192, "bfloat16", ("positions", "segments")),
    (PrefixLM(), 256, "bfloat16", ("blocks",)),
    (Causal(), 256, "float32", ()),
  ):
    args = [array(1, 1000, n, width, dtype=dtype) for n in (8, 2, 2)]
    data = {x: array(1, 1000, dtype="int32") for x in given if x in fields}
    extras = {"sinks": array(8, dtype="float32")} if "sinks" in given else {}

    def form(q, k, v, data, extras, mask=mask, given=given):
      return attend(
        q,
        k,
        v,
        mask,
        At(**data),
        **extras,
        alibi=Alibi() if "alibi" in given else None,
        softcap=30.0 if "softcap" in given else None,
        compute=Compute(attention=name),
      )

    label = " ".join((str(mask), str(width), dtype, *given))
    yield label, gradients(form, *args, data, extras)


def paged(array, gpu: bool):
  """One step of decoding from pages, where they lie."""
  rows, pages, block, n, g = 8, 1024, 16, 32, 8
  q, table = array(rows, n, WIDTH), array(rows, 64, dtype="int32")
  at = array(rows, dtype="int32")

  def here(q, k, v, table, at):
    scale = WIDTH**-0.5
    return paged_attention(q, k, v, table, at, Causal(), scale=scale, gpu=gpu)

  def theirs(q, k, v, table, at):
    if gpu:
      from jax.experimental.pallas.ops.gpu.paged_attention import (
        paged_attention as stock,
      )

      return stock(q, k, v, table, at + 1)
    from jax.experimental.pallas.ops.tpu.paged_attention import (
      paged_attention as stock,
    )

    return stock(q, k, v, at + 1, table, pages_per_compute_block=8)

  pool = array(pages, block, g, WIDTH)
  yield "ours", jax.jit(here).lower(q, pool, pool, table, at)
  pool = array(g, pages, block, WIDTH)
  yield "stock", jax.jit(theirs).lower(q, pool, pool, table, at)


def grouped(array, gpu: bool):
  """The products of a mixture of experts."""
  forms = {
    "ours": grouped_dot,
    "ragged_dot": functools.partial(
      jax.lax.ragged_dot, preferred_element_type=jnp.float32
    ),
  }
  if not gpu:
    from jax.experimental.pallas.ops.tpu.megablox import ops

    forms["megablox"] = functools.partial(
      ops.gmm, preferred_element_type=jnp.float32, tiling=(128, SIZE, SIZE)
    )
  args = array(4096, 2048), array(64, 2048, 1408), array(64, dtype="int32")
  return ((name, gradients(form, *args)) for name, form in forms.items())


def loss(array, gpu: bool):
  """Cross entropy of a large vocabulary."""
  forms = {"chunks of 512": lambda *args: chunked_cross_entropy(*args, 512)[0]}
  if not gpu:
    forms = {"ours": lambda *args: fused_cross_entropy(*args)[0]} | forms
  args = array(1, 8192, 4096), array(4096, 128256)
  args = *args, array(1, 8192, dtype="int32")
  return ((name, gradients(form, *args)) for name, form in forms.items())


KERNELS = {
  "attention": attention,
  "masks": masks,
  "paged": paged,
  "grouped": grouped,
  "loss": loss,
}


# --- What the compilers say -------------------------------------------------


def memory(array, target: str, gpu: bool) -> None:
  """Temporary memory of attention's gradients by length."""
  for seq in LENGTHS:
    for form, program in attention(array, gpu, seq):
      start = time.perf_counter()
      found = program.compile().memory_analysis().temp_size_in_bytes / 2**20
      print(
        f"{target:10} {form:13} {seq:6} tokens {found:8.1f} MiB temporary "
        f"(compiled in {time.perf_counter() - start:.0f} s)",
        flush=True,
      )


def show(target: str, name: str, program, folder: pathlib.Path) -> None:
  """Compiles a program and prints all that is known of it."""
  for old in folder.iterdir():
    old.unlink()
  compiled = program.compile()
  cost = compiled.cost_analysis() or {}
  temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
  parts = [f"{temporary:9.1f} MiB temporary"]
  if cost:
    parts.append(f"{cost['flops'] / 1e9:9.1f} GFLOP")
    parts.append(f"{cost['bytes accessed'] / 2**20:8.1f} MiB moved")
    seconds = cost.get("optimal_seconds", -1)
    parts += [f"{1e6 * seconds:.0f} us"] * (seconds > 0)
  print(f"{target:8} {name:26} {'  '.join(parts)}", flush=True)
  for kernel, said in sorted((bundles(folder) | registers(folder)).items()):
    print(f"{'':8}   {kernel:40} {said}", flush=True)


def bundles(folder: pathlib.Path) -> dict[str, str]:
  """The longest run without a branch in each kernel of a TPU: the work on a
  pair of blocks.
  """
  found = {}
  for path in folder.glob("*final_bundles.txt"):
    name = re.search(
      r"-((?:flash|splash|loss|paged|grouped|ragged|kernel)\w*)", path.name
    )
    if name is None or "schedule" in path.name:
      continue
    lines = re.findall(
      r"^\s*(?:0x)?([0-9a-f]+) .*?(sbr\.|$)", path.read_text(), re.MULTILINE
    )
    cuts = [int(at, 16) for at, branch in lines if branch]
    cuts = [0, *cuts, int(lines[-1][0], 16)]
    longest = max(b - a for a, b in itertools.pairwise(cuts))
    found[name[1]] = max(longest, found.get(name[1], 0))
  return {name: f"{n:6} bundles" for name, n in found.items()}


def registers(folder: pathlib.Path) -> dict[str, str]:
  """What the assembler says of each kernel of a GPU."""
  found = {}
  for path in folder.glob("*.ptx"):
    text = path.read_text()
    products = text.count("wgmma.mma_async") + text.count("mma.sync")
    if not products:
      continue
    out = subprocess.run(
      [assembler(), "-v", "-arch=sm_90a", path, "-o", os.devnull],
      capture_output=True,
      text=True,
      check=True,
    ).stderr
    name = re.search(r"Function properties for (\w+)", out)[1]
    spilled = re.search(r"(\d+) bytes spill stores", out)[1]
    used = re.search(r"Used (\d+) registers", out)[1]
    found[name] = (
      f"{used} registers, {spilled} bytes spilled, {products} instructions for "
      f"tensor cores"
    )
  return found


def assembler() -> pathlib.Path:
  """The `ptxas` that comes with jaxlm[cuda12]."""
  (folder,) = importlib.util.find_spec(
    "nvidia.cuda_nvcc"
  ).submodule_search_locations
  return pathlib.Path(folder) / "bin" / "ptxas"


if __name__ == "__main__":
  main()
