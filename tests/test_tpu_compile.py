"""The TPU's own compiler takes the kernels, without a TPU.

In a process of its own, because the one that runs the tests may not start a
TPU's library. Needs the extra `tpu`; docs/kernels.md has the larger table.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed (pip install jaxlm[tpu])",
)
ROOT = pathlib.Path(__file__).parent.parent

# Forward and gradients of each; `name: (target, mask, shape, fields)`.
SCRIPT = """
import json
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxlm.layers.attend import At, attend
from jaxlm.layers.compute import Compute
from jaxlm.layers.kernels.fused_loss import fused_cross_entropy
from jaxlm.layers.kernels.grouped import grouped_dot
from jaxlm.layers.kernels.paged import paged_attention
from jaxlm.layers.mask import Causal, Chunked, PrefixLM, Sliding
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset

def on(target):
  device = topologies.get_topology_desc(
    platform="tpu", topology_name=target).devices[0]
  where = SingleDeviceSharding(device)
  return lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(
    shape, jnp.dtype(dtype), sharding=where)

def attention(target, mask, t, head_dim, dtype="bfloat16", fields=(), **more):
  array = on(target)
  q = array(1, t, 4, head_dim, dtype=dtype)
  k = array(1, t, 2, head_dim, dtype=dtype)
  at = At(**{name: array(1, t, dtype="int32") for name in fields})
  def loss(q, k, v, at):
    y = attend(q, k, v, mask, at, compute=Compute(attention="flash"), **more)
    return jnp.sum(y.astype(jnp.float32) ** 2)
  return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, at).compile()

def entropy(target):
  array = on(target)
  def loss(x, w, targets):
    return jnp.mean(fused_cross_entropy(x, w, targets, softcap=30.0)[0])
  return jax.jit(jax.grad(loss, (0, 1))).lower(
    array(1, 1024, 256), array(256, 5000), array(1, 1024, dtype="int32")
  ).compile()

def pages(target):
  array = on(target)
  def step(q, k, v, table, at):
    return paged_attention(q, k, v, table, at, Sliding(300, 4), scale=0.1,
      softcap=30.0)
  pool = array(64, 16, 2, 128)
  return jax.jit(step).lower(array(4, 8, 128), pool, pool,
    array(4, 32, dtype="int32"), array(4, dtype="int32")).compile()

def experts(target):
  array = on(target)
  def loss(x, w, sizes):
    return jnp.sum(grouped_dot(x, w, sizes) ** 2)
  return jax.jit(jax.grad(loss, (0, 1))).lower(array(1000, 256),
    array(8, 256, 640), array(8, dtype="int32")).compile()

def ring(target, t):
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=target).devices
  rules = preset("cp")
  mesh = make_mesh(rules, devices=list(devices))
  spec = PartitionSpec(None, "context", None, None)
  x = jax.ShapeDtypeStruct(
    (1, t, 4, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
  def loss(q, k, v):
    y = attend(q, k, v, Causal(), compute=Compute(rules=rules))
    return jnp.sum(y.astype(jnp.float32) ** 2)
  with jax.sharding.set_mesh(mesh):
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()

def bytes_of(program):
  return program.memory_analysis().temp_size_in_bytes

found = {}
for target in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
  found[target] = bytes_of(attention(target, Causal(), 1000, 128))
  found[target + " pages"] = bytes_of(pages(target))
  found[target + " experts"] = bytes_of(experts(target))
found["float32"] = bytes_of(
  attention("v5e:2x2", Chunked(300), 1024, 80, "float32"))
found["data"] = bytes_of(attention("v5e:2x2", Sliding(300, 4), 1024, 64,
  fields=("positions", "segments"), softcap=30.0))
found["blocks"] = bytes_of(
  attention("v5e:2x2", PrefixLM(), 512, 256, fields=("blocks",)))
found["loss"] = bytes_of(entropy("v5e:2x2"))
for t in (16384, 65536):
  found[str(t)] = bytes_of(attention("v5p:2x2x1", Sliding(4096), t, 128))
program = ring("v5e:2x2", 16384)
found["ring"] = bytes_of(program)
found["travels"] = program.as_text().count("collective-permute-start(")
print(json.dumps(found))
"""


@functools.cache
def compiled() -> dict[str, int]:
  """Bytes of temporary memory of what was compiled, by name."""
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other tests may plan for TPUs
    "PYTHONPATH": str(ROOT),
  }
  run = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    env=env,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_compiler_takes_every_kernel():
  """Three generations; both dtypes; odd widths and lengths; data; the loss;
  and no copy of a pool, nor of a gradient for all experts.
  """
  found = compiled()
  assert {"data", "blocks", "loss"} <= found.keys()
  for target in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    assert target in found
    assert found[target + " pages"] < 64 * 16 * 2 * 128 * 2  # bytes of a pool
    assert found[target + " experts"] < 8 * 256 * 640 * 4


@pytest.mark.slow
def test_a_ring_of_kernels_is_compiled():
  """Four devices share a row: parts travel, and no scores are kept.

  Keys, values, positions and their sums, in bfloat16 and in float32, are a few
  arrays as large as a device's queries; scores would be 256 of them.
  """
  queries = 16384 // 4 * 4 * 128 * 2
  assert 0 < compiled()["ring"] < 24 * queries
  assert compiled()["travels"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [16384, 65536])
def test_memory_grows_with_the_length(tokens):
  """At most four arrays as large as the queries, at any length: at the longer
  one, a byte per pair of tokens would be sixteen times that.
  """
  queries = tokens * 4 * 128 * 2  # heads, head_dim, bytes
  assert 0 < compiled()[str(tokens)] < 4 * queries < tokens**2 / 3


@pytest.mark.slow
def test_a_plan_for_chips_that_are_not_here(tmp_path):
  """The whole program on a tiny model: compiled, fitting, with the compiler's
  own estimate of the time, and messages along the axis that FSDP uses.
  """
  command = [sys.executable, "-m", "jaxlm.plan", "--target=v5e:2x2"]
  command += [f"--config={ROOT}/configs/tiny.py", f"--workdir={tmp_path}"]
  command += ["--programs=train", "--config.parallel.preset=fsdp"]
  command += ["--config.model.layers=2", "--config.unroll=false"]
  command += ["--config.optimizer.name=adamw"]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  run = subprocess.run(
    command, env=env, capture_output=True, text=True, timeout=600
  )
  assert run.returncode == 0, run.stderr[-3000:]
  found = json.loads((tmp_path / "plan-v5e-2x2.json").read_text("utf-8"))
  train = found["programs"]["train"]
  assert train["memory"]["fits"]
  assert train["seconds"]["compiler"] > 0
  assert found["attention"][0] == "flash"
  kinds = {row["kind"] for row in train["collectives"]}
  assert kinds & {"all-gather", "all-reduce"}
  assert all(row["axes"] == ["fsdp"] for row in train["collectives"])
