"""The programs of a run, traced from shapes: nothing of their size is made."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from jaxlm import recipe
from jaxlm.errors import UserError
from jaxlm.generate.step import prefill, step
from jaxlm.layers import param
from jaxlm.layers.cache import FULL
from jaxlm.models.decoder import Decoder, logits
from jaxlm.plan.traced import Reading, read

Tree = Any


@dataclass(frozen=True)
class Program:
  """One program of a run, traced for a mesh.

  Attributes:
    name: 'train', 'prefill', 'decode', or one of `plan/rl.py`.
    traced: what `jax.jit(...).trace` gave.
    names: `(kind, path)` of each argument.
    tokens: how many it works on.
    forwards: its model FLOPs in forward passes: 3 in training.
    vocab: of the model.
    model_flops: all of them, where that is not what follows from these.
    loops: how often a loop runs whose length is data.
  """

  name: str
  traced: Any
  names: tuple[tuple[str, str], ...]
  tokens: int
  forwards: int
  vocab: int
  model_flops: float = 0.0
  loops: int = 1

  def reading(self, narrow: bool = True) -> Reading:
    """What can be told before it is compiled; `narrow` as in `traced.read`."""
    learns = self.name in ("train", "update")
    kept = "saved activations" if learns else "cache"
    given = self.names, self.vocab, kept, narrow, self.loops
    return read(self.traced.jaxpr, *given)


def vocab(config: FrozenConfigDict) -> int:
  """Tokens of the model: its own key, or as many as the tokenizer may have."""
  return config.model.get("vocab") or config.data.vocab


def decoder(config: FrozenConfigDict) -> Decoder:
  """The model of a config; the text it is trained on is not read."""
  return recipe.model(config, vocab(config), recipe.origin(config))


def train(config: FrozenConfigDict, model: Decoder, mesh: Mesh) -> Program:
  """The step of `jaxlm.train`, the very one."""
  trained = recipe.objective(config).trained
  with jax.set_mesh(mesh):
    tree, rules = trained.params(model), recipe.rules(config)
    tx = recipe.optimizer(config, tree, recipe.schedule(config))
    base = None
    if recipe.origin(config) is not None:
      base = param.abstract(model.params(), mesh=mesh, rules=rules)

    def begin(base: Tree) -> Any:
      return recipe.fresh_state(config, model, tx, mesh, base)

    state = jax.eval_shape(begin, base)
    frozen = jax.eval_shape(lambda base: trained.frozen(model, base), base)
    state, frozen = jax.tree.map(lambda x: placed(x, mesh), (state, frozen))
    batch = train_batch(config, mesh)
    traced = recipe.step(config, model, tx).trace(state, batch, frozen)
  names = (*state_names(state), *(("batch", name) for name in batch))
  names = (*names, *named("frozen parameters", frozen))
  tokens = config.batch_size * config.seq_len
  return Program("train", traced, names, tokens, 3, model.vocab)


def train_batch(config: FrozenConfigDict, mesh: Mesh) -> dict[str, Any]:
  """Shapes of one step's batch, as the loader makes it.

  Raises:
    UserError: for an objective whose rows are not single sequences.
  """
  name = config.objective.get("name", "next_token")
  if name not in ("next_token", "sft"):
    raise UserError(
      f"the batches of config.objective.name={name} cannot be planned; plan "
      "next_token or sft, whose step is nearest"
    )
  rows = config.batch_size // config.accumulate
  shape = (1, config.accumulate, rows, config.seq_len)
  place = recipe.batch_place(recipe.rules(config), shape, mesh)
  leaf = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
  names = ["inputs", "targets"]
  if config.data.windows == "packed" or name == "sft":
    names += ["segments", "positions", "mask"]
  return dict.fromkeys(sorted(names), leaf)


def reading_prompts(
  config: FrozenConfigDict,
  model: Decoder,
  mesh: Mesh,
  rows: int,
  length: int,
  kind: Any = FULL,
) -> Program:
  """Prefill: reads `rows` prompts of `length` tokens into a new cache."""
  compute, params = _generating(config, model, mesh)
  with jax.set_mesh(mesh):
    tokens = _rows(config, mesh, (rows, length))
    lengths = _rows(config, mesh, (rows,))

    def run(params: Tree, tokens: jax.Array, lengths: jax.Array) -> Any:
      x, cache = prefill(model, params, tokens, lengths, length, compute, kind)
      return logits(model, params, x, compute), cache

    traced = jax.jit(run).trace(params, tokens, lengths)
  names = (*named("parameters", params), ("batch", "tokens"))
  names = (*names, ("batch", "lengths"))
  return Program("prefill", traced, names, rows * length, 1, model.vocab)


def writing_tokens(
  config: FrozenConfigDict,
  model: Decoder,
  mesh: Mesh,
  rows: int,
  length: int,
  kind: Any = FULL,
) -> Program:
  """Decode: one token more for `rows` texts with room for `length` tokens."""
  compute, params = _generating(config, model, mesh)
  with jax.set_mesh(mesh):
    tree = model.cache(rows, length, kind)
    cache = jax.tree.map(
      lambda p: _activation(p, compute, mesh),
      tree,
      is_leaf=lambda x: isinstance(x, param.Param),
    )
    tokens = _rows(config, mesh, (rows, 1))
    position = _rows(config, mesh, (rows,))

    def run(params: Tree, cache: Tree, tokens: jax.Array, at: jax.Array) -> Any:
      x, cache = step(model, params, tokens, at, cache, compute)
      y = logits(model, params, x, compute)
      return jnp.argmax(y, axis=-1), cache

    jitted = jax.jit(run, donate_argnums=1)
    traced = jitted.trace(params, cache, tokens, position)
  names = (*named("parameters", params), *named("cache", cache))
  names = (*names, ("batch", "tokens"), ("batch", "positions"))
  return Program("decode", traced, names, rows, 1, model.vocab)


def _generating(
  config: FrozenConfigDict, model: Decoder, mesh: Mesh
) -> tuple[Any, Tree]:
  """How generation runs, and the parameters it reads: of the compute dtype."""
  compute = dataclasses.replace(
    recipe.compute(config), remat="none", unroll=False, watch=False
  )
  rules = recipe.rules(config)
  params = param.abstract(model.params(), compute.jnp_dtype, mesh, rules)
  return compute, params


def placed(x: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
  """An abstract array of a mesh's type as one that lies on its devices."""
  spec = PartitionSpec() if x.sharding is None else x.sharding.spec
  place = NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _activation(
  p: param.Param, compute: Any, mesh: Mesh
) -> jax.ShapeDtypeStruct:
  spec = compute.rules.activation_spec(p.axes, p.shape, mesh)
  place = NamedSharding(mesh, spec)
  dtype = p.compute or compute.jnp_dtype
  return jax.ShapeDtypeStruct(p.shape, dtype, sharding=place)


def _rows(
  config: FrozenConfigDict, mesh: Mesh, shape: tuple[int, ...]
) -> jax.ShapeDtypeStruct:
  axes = ("batch", *(None,) * (len(shape) - 1))
  spec = recipe.rules(config).activation_spec(axes, shape, mesh)
  place = NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)


def named(kind: str, tree: Tree) -> tuple[tuple[str, str], ...]:
  """`(kind, path)` of each array of a tree."""
  return tuple((kind, path) for path in param.paths(tree))


def state_names(state: Any) -> tuple[tuple[str, str], ...]:
  """What each array of a training state is."""
  kinds = {"params": "parameters", "ema": "parameters", "step": "batch"}
  found = []
  for path, _ in jax.tree_util.tree_leaves_with_path(state):
    name = param.path_name(path)
    kind = kinds.get(name.split("/")[0], "optimizer state")
    found.append((kind, name))
  return tuple(found)
