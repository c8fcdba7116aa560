"""A few steps of training, on one device or on many, of small models.

Between them they have every kind of layer that attends: dense, mixtures of
experts, latent attention, windows between full attention.
"""

import functools

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from tiny_models import DIM, VOCAB, block, random_params

from jaxlm.layers.attention import Attention
from jaxlm.layers.compute import Compute
from jaxlm.layers.latent import LatentAttention
from jaxlm.layers.mask import Sliding
from jaxlm.layers.mlp import GLU, silu
from jaxlm.layers.moe import MoE
from jaxlm.layers.norm import RMSNorm
from jaxlm.layers.param import shardings
from jaxlm.layers.position import Rope
from jaxlm.layers.router import TopK
from jaxlm.models.decoder import Block, Decoder
from jaxlm.objectives import next_token
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset
from jaxlm.state import create, make_step


def mixture(router: TopK) -> Block:
  """A block with four experts, two of them for each token."""
  ffn = MoE(GLU(DIM, 12, silu), 4, 2, router)
  mixer = Attention(DIM, 4, kv_heads=2, position=Rope(100.0))
  return Block(mixer, ffn, RMSNorm(DIM))


def latent() -> Block:
  """A block whose keys and values come from a latent."""
  mixer = LatentAttention(DIM, 4, 8, 8, 4, 4, 4, position=Rope(100.0))
  return Block(mixer, GLU(DIM, 24, silu), RMSNorm(DIM))


def decoder(*pattern: Block) -> Decoder:
  """Four times the pattern."""
  return Decoder(VOCAB, DIM, ((pattern, 4),), RMSNorm(DIM), 64, tied=True)


MODELS = {
  "dense": decoder(block()),
  "mixture": decoder(mixture(TopK())),
  "balanced": decoder(mixture(TopK(balance=0.01, z_loss=0.001))),
  "latent": decoder(latent()),
  "windows": decoder(block(Sliding(5)), block(position=None)),
}
STEPS, ROWS, LENGTH = 20, 8, 32


@functools.cache
def batches(packed: bool = False) -> dict[str, np.ndarray]:
  """The same few rows 20 times, under masks that differ."""
  rng = np.random.default_rng(0)
  tokens = np.tile(rng.integers(0, VOCAB, (ROWS, LENGTH + 1)), (STEPS, 1, 1, 1))
  tokens = tokens.astype(np.int32)
  mask = rng.random((STEPS, 1, ROWS, LENGTH)) < 0.8
  found = {
    "inputs": tokens[..., :-1],
    "targets": tokens[..., 1:],
    "mask": mask.astype(np.int32),
  }
  if packed:
    segments = np.sort(rng.integers(0, 3, mask.shape), axis=-1)
    first = np.maximum.accumulate(
      np.where(np.diff(segments, prepend=-1) != 0, np.arange(LENGTH), 0), -1
    )
    found["segments"] = segments.astype(np.int32)
    found["positions"] = (np.arange(LENGTH) - first).astype(np.int32)
  return found


@functools.cache
def alone(name: str, packed: bool = False):
  """`train` on one device."""
  return train(name, packed=packed)


def train(name: str, rule: str = "", sizes: str = "", packed=False, **options):
  """Twenty steps of SGD: parameters and metrics."""
  model, batch, tx = MODELS[name], batches(packed), optax.sgd(1.0, 0.9)
  chunk = options.pop("chunk", 0)
  rules = preset(rule) if rule else None
  compute = Compute(rules=rules, **options)

  def loss_fn(params, batch, key):
    return next_token(model, params, batch, key, compute, chunk=chunk)

  step = make_step(loss_fn, tx, steps=STEPS)
  params = jax.tree.map(lambda x: 0.3 * x, random_params(model))
  if not rule:
    state, metrics = step(create(params, tx), batch)
    return state.params, metrics
  mesh = make_mesh(rules, sizes)
  with jax.sharding.set_mesh(mesh):
    params = jax.device_put(params, shardings(model.params(), mesh, rules))
    axes = (None, None, "batch", "length")
    spec = rules.activation_spec(axes, batch["inputs"].shape, mesh)
    batch = jax.device_put(batch, NamedSharding(mesh, spec))
    state, metrics = step(create(params, tx), batch)
    return state.params, metrics


def agree(got: tuple, want: tuple) -> None:
  """Losses of all steps, and every parameter: so every gradient was equal."""
  (params, metrics), (one_params, one) = got, want
  assert one["loss"][-1] < one["loss"][0] - 0.3  # it has learned something
  np.testing.assert_allclose(metrics["loss"], one["loss"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], one["grad_norm"], rtol=1e-4)
  for a, b in zip(*map(jax.tree.leaves, (params, one_params)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
