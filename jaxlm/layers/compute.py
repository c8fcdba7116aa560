"""How a model is run, as one value: precision, remat, unrolling, placement.

A model value says what is computed; `Compute` says how. Any two give the same
numbers up to rounding, and tests hold them to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel.rules import Rules


def active_mesh() -> jax.sharding.AbstractMesh | None:
  """The mesh in force, or None where there is none or it has one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
  """JAX's name of the devices of the mesh in force, or the default ones."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


@dataclass(frozen=True)
class Split:
  """How devices work together on what no rule table says.

  Attributes:
    context: how keys reach the queries of a row that is split over devices:
      they travel ('ring'), or all come at once ('gather').
    microbatches: how many a batch is cut into to pass the stages that layers
      are divided into; 0 means as many as stages.
    rounds: how often each passes them: 1 is GPipe, more is interleaved.
  """

  context: str = "ring"
  microbatches: int = 0
  rounds: int = 1


@dataclass(frozen=True)
class Compute:
  """How to run a model.

  Attributes:
    dtype: of activations and of matmul operands ('float32', 'bfloat16',
      'float16'); sums are float32 always.
    residual: dtype of the sum over layers; float32 costs memory and keeps what
      many small additions would lose.
    remat: what the backward pass recomputes: 'none' keeps all activations,
      'dots' keeps the results of matmuls, 'full' keeps each block's input.
    unroll: True writes every layer out (faster for small models on a CPU),
      False scans over the layers (compile time does not grow with depth).
    attention: which implementation of `attend` ('auto', 'reference',
      'blocks', 'flash' for TPUs, 'triton' and 'cudnn' for GPUs).
    split: how devices share rows and layers that are split among them.
    rules: the sharding rule table, None on one device.
    watch: attention also reports the largest logit of each head, which costs
      another product of queries and keys (QK clip needs it).
  """

  dtype: str = "float32"
  residual: str = "float32"
  remat: str = "none"
  unroll: bool = False
  attention: str = "auto"
  split: Split = Split()
  rules: Rules | None = None
  watch: bool = False

  @property
  def jnp_dtype(self) -> jnp.dtype:
    """The compute dtype as an object."""
    return jnp.dtype(self.dtype)

  def spec(
    self, axes: Sequence[str | None], shape: Sequence[int]
  ) -> PartitionSpec | None:
    """Where an activation of these logical axes lies, or None (anywhere)."""
    mesh = active_mesh()
    if mesh is None or self.rules is None:
      return None
    return self.rules.activation_spec(axes, shape, mesh)


DEFAULT = Compute()
