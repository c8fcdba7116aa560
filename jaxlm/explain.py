"""`--explain`: every derived value of a config, with the rule it came by."""

import math

import jax
from ml_collections import FrozenConfigDict

from jaxlm import keys, recipe
from jaxlm.layers import context, param
from jaxlm.layers.attend import choose
from jaxlm.models import pipeline
from jaxlm.models.decoder import Decoder
from jaxlm.objectives.objective import Corpus
from jaxlm.speed import short

Row = tuple[str, str, str]


def explain(config: FrozenConfigDict) -> str:
  """What would be trained: keys, model, data, work, memory, learning rates.

  The corpus is read (its tokenizer decides the vocabulary) and the model is
  declared, but no array of it is made and nothing is run.
  """
  origin = recipe.origin(config)
  objective = recipe.objective(config)
  corpus = objective.data.read(**recipe.data_arguments(config, origin))
  model = recipe.model(config, corpus.tokenizer.vocab_size, origin)
  sections = [
    ("keys", _keys(config)),
    ("data", _data(config, corpus)),
    ("model", _model(config, model)),
    ("work", _work(config, corpus, model)),
    ("devices", _devices(config, model)),
    ("memory", _memory(config, model, objective.trained.params(model))),
    ("learning rates", _rates(config, model)),
  ]
  parts = [f"{title}\n{_table(rows)}" for title, rows in sections]
  shapes = param.describe(objective.trained.params(model))
  return "\n\n".join([*parts, "parameters\n" + _indent(shapes)])


def _keys(config: FrozenConfigDict) -> list[Row]:
  """All keys; those that differ from the default say so."""
  rows = []
  for name, value in keys.flatten(config).items():
    key = keys.KEYS.get(name)
    meaning = key.meaning if key else keys.OPEN[name.partition(".")[0]]
    if key and value != key.default:
      meaning += f" (default {key.default!r})"
    rows.append((name, repr(value), meaning))
  return rows


def _data(config: FrozenConfigDict, corpus: Corpus) -> list[Row]:
  c = corpus.counts
  batch = config.batch_size * config.seq_len
  total = batch * config.steps
  return [
    ("vocabulary", f"{c['vocab']:,}", f"of tokenizer {config.data.tokenizer}"),
    ("training tokens", f"{c['train_tokens']:,}", "1 - data.val_fraction"),
    ("validation tokens", f"{c['val_tokens']:,}", "data.val_fraction"),
    ("bytes per token", f"{c['bytes_per_token']:.3f}", "bytes / tokens"),
    ("tokens per step", f"{batch:,}", "batch_size x seq_len"),
    ("tokens in all", f"{total:,}", "steps x tokens per step"),
    (
      "epochs",
      f"{total / c['train_tokens']:.2f}",
      "tokens in all / training tokens",
    ),
  ]


def _model(config: FrozenConfigDict, model: Decoder) -> list[Row]:
  tree = model.params()
  hidden = sum(p.size for p in param.paths(tree).values() if p.is_hidden)
  return [
    ("continued from", config.model.path, "model.path")
    if "path" in config.model
    else ("family", config.model.family, "model.family"),
    ("parameters", f"{model.n_params():,}", "sum over the table below"),
    (
      "active",
      f"{model.n_active():,}",
      "those that work on one token",
    ),
    ("hidden matrices", f"{hidden:,}", "without embeddings, head, norms"),
    ("depth", f"{model.depth}", "blocks"),
    ("width", f"{model.dim}", "model.dim"),
    ("longest sequence", f"{model.max_positions:,}", "seq_len unless set"),
    ("attention", *choose(recipe.compute(config))),
  ]


def _work(
  config: FrozenConfigDict, corpus: Corpus, model: Decoder
) -> list[Row]:
  forward = model.flops_per_token(config.seq_len)
  batch = config.batch_size * config.seq_len
  total = batch * config.steps
  events = config.eval_every and config.steps // config.eval_every
  return [
    (
      "FLOPs per token",
      f"{short(forward)} forward, {short(3 * forward)} trained",
      "2 per weight of a matmul, plus attention; backward costs twice forward",
    ),
    ("FLOPs per step", short(3 * forward * batch), "trained x tokens per step"),
    ("FLOPs in all", short(3 * forward * total), "x steps"),
    (
      "tokens per parameter",
      f"{total / model.n_params():.2f}",
      "20 is Chinchilla's optimum (arXiv:2203.15556)",
    ),
    ("steps", f"{config.steps:,}", "steps"),
    ("evaluations", f"{max(events, 1):,}", "steps / eval_every, and the end"),
  ]


def _devices(config: FrozenConfigDict, model: Decoder) -> list[Row]:
  """How a step is divided among devices."""
  mesh, compute = recipe.mesh(config), recipe.compute(config)
  sizes = [f"{name}:{n}" for name, n in mesh.shape.items() if n > 1]
  grid = ",".join(sizes) or "one device"
  rows = [("mesh", grid, f"preset {config.parallel.preset}, parallel.mesh")]
  with jax.sharding.set_mesh(mesh):
    each = context.share(config.seq_len, compute)
    if each < config.seq_len:
      how = f"keys by parallel.context={compute.split.context}"
      rows.append(("tokens of a row", f"{each:,}", f"on each device; {how}"))
    batch = config.batch_size // config.accumulate
    for i, (_, n) in enumerate(model.layers):
      if pipeline.stages(compute) > 1:
        plan = pipeline.schedule(n, batch, compute)
        rows.append((f"layers of segment {i}", str(plan), plan.explain()))
  return rows


def _memory(
  config: FrozenConfigDict, model: Decoder, tree: param.Tree
) -> list[Row]:
  """Bytes that are certain, where `tree` is trained; activations are not."""
  mesh, rules = recipe.mesh(config), recipe.rules(config)
  param.check_mesh(tree, mesh, rules)
  like = param.abstract(tree, mesh=mesh, rules=rules)
  tx = recipe.optimizer(config, tree, recipe.schedule(config))
  with jax.sharding.set_mesh(mesh):
    state = jax.eval_shape(tx.init, like)
  moments = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  n = param.count(tree)
  rows = config.batch_size // config.accumulate * config.seq_len
  where = f"on each of {mesh.size} devices, preset {config.parallel.preset}"
  return [
    ("parameters", f"{short(4 * n)}B", "4 bytes each, float32"),
    ("  per device", f"{short(_held(like))}B", where),
    ("optimizer", f"{short(moments)}B", f"state of {config.optimizer.name}"),
    ("  per device", f"{short(_held(state))}B", where),
    ("gradients", f"{short(4 * n)}B", "4 bytes each, float32"),
    (
      "logits",
      f"{short(4 * rows * model.vocab)}B",
      "4 x rows x vocabulary; loss_chunk makes it less",
    ),
    (
      "key-value cache",
      f"{short(_cache_bytes(model))}B",
      "one sequence of the longest length, while sampling",
    ),
  ]


def _held(arrays: param.Tree) -> int:
  """Bytes of arrays on each device."""

  def held(x: jax.ShapeDtypeStruct) -> int:
    part = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return x.dtype.itemsize * math.prod(part)

  return sum(map(held, jax.tree.leaves(arrays)))


def _cache_bytes(model: Decoder) -> int:
  return 4 * param.count(model.cache(1, model.max_positions))


def _rates(config: FrozenConfigDict, model: Decoder) -> list[Row]:
  """The learning rate of each group at the first, middle and last step."""
  schedule = recipe.schedule(config)
  at = [0, config.optimizer.warmup, config.steps // 2, config.steps - 1]
  at = [min(max(step, 0), max(config.steps - 1, 0)) for step in at]
  groups = {"all": 1.0}
  if config.optimizer.name == "muon":
    ratio = config.optimizer.muon_lr / config.optimizer.lr
    groups = {"hidden matrices (Muon)": ratio, "the rest (AdamW)": 1.0}
  rows = [("at step", "  ".join(f"{step:>9,}" for step in at), "")]
  for name, factor in groups.items():
    values = [f"{float(schedule(step)) * factor:9.3g}" for step in at]
    rule = f"{config.optimizer.schedule}, warmup {config.optimizer.warmup}"
    rows.append((name, "  ".join(values), rule))
  return rows


def _table(rows: list[Row]) -> str:
  left = max(len(r[0]) for r in rows)
  middle = max(len(r[1]) for r in rows)
  return "\n".join(
    f"  {a:{left}}  {b:{middle}}  {c}".rstrip() for a, b, c in rows
  )


def _indent(text: str) -> str:
  return "\n".join("  " + line for line in text.splitlines())
