"""A run's directory, as those see it who use its model.

    config.json or model.json   the model: by the run's config, or as a value
    tokenizer.json (or .model)  the tokenizer
    checkpoints/                the parameters, one folder for each saved step

`jaxlm.train` writes such a directory with a config, `save` one with a value,
and a run that began with a loaded model has both; `load` reads all three.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from jaxlm import arrays, config, files, values
from jaxlm.checkpoint import Checkpoints
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizers import load as _load_tokenizer
from jaxlm.errors import UserError
from jaxlm.layers.param import abstract, path_name, paths
from jaxlm.models.build import build
from jaxlm.models.decoder import Decoder
from jaxlm.objectives import from_config
from jaxlm.objectives.objective import Trained, Whole
from jaxlm.parallel.rules import Rules

Tree = Any

BEST = "val_loss"  # the metric by which a checkpoint is the best
_DTYPES = ("float32", "bfloat16", "float16")


def load(
  path: str | Path,
  dtype: str | None = "float32",
  which: str | int = "latest",
  mesh: Mesh | None = None,
  rules: Rules | None = None,
  base: Callable[[Path], Tree] | None = None,
) -> tuple[Any, Tree]:
  """The model in a workdir, and its parameters.

  Where the run kept a mean of the weights (`config.ema`), that is what comes.
  A run of adapters gives its base with the adapters merged into it.

  Args:
    path: the workdir.
    dtype: of the parameters: 'float32', 'bfloat16' or 'float16'; None means as
      they were saved.
    which: 'latest', 'best' (the lowest validation loss), or a step.
    mesh: the devices they are spread over; None means the first device.
    rules: where on the mesh each lies; None means all of it on every device.
    base: loads the parameters at `config.model.path` alike, for a run that
      says nothing without them.

  Raises:
    UserError: if there is no such run or checkpoint, or it is damaged.
  """
  path = Path(path)
  model, trained, params = load_trained(path, dtype, which, mesh, rules)
  under = None
  if trained.partial:
    at = Path(str(config.read(path).model.path)).expanduser()
    if base is None:
      raise UserError(f"{path} holds adapters for {at}; load them with it")
    try:
      under = base(at)
    except UserError as error:
      raise UserError(
        f"{path} holds adapters for the model at {at}: {error}"
      ) from error
  return trained.model(model), trained.whole(params, under)


def load_trained(
  path: Path,
  dtype: str | None = "float32",
  which: str | int = "latest",
  mesh: Mesh | None = None,
  rules: Rules | None = None,
) -> tuple[Decoder, Trained, Tree]:
  """What a run trained, as it is in its checkpoint; as `load`.

  Returns:
    The model that the run is of, which arrays of it were trained, and these.
  """
  check_dtype(dtype)
  model, trained = trunk(path), _trained(path)
  checkpoints = Checkpoints(path / "checkpoints", best=BEST, read_only=True)
  name = "ema" if _keeps_mean(path) else "params"
  tree = trained.params(model)
  like = abstract(tree, dtype or "float32", mesh, rules or Rules())
  step = _step(checkpoints, which)
  if dtype is None:
    like = _as_saved(checkpoints, step, name, like)
  state = checkpoints.restore({name: like}, step, part=True).state
  return model, trained, state[name]


def check_dtype(dtype: str | None) -> None:
  """Raises UserError unless parameters can have this dtype; None is any."""
  if dtype is not None and dtype not in _DTYPES:
    raise UserError(f"dtype={dtype!r} is unknown; use {', '.join(_DTYPES)}")


def _as_saved(
  checkpoints: Checkpoints, step: int | None, name: str, like: Tree
) -> Tree:
  """`like` in the dtypes of a checkpoint, where it has the leaves."""
  saved = checkpoints.shapes(step)

  def one(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    _, dtype = saved.get(f"{name}/{path_name(path)}", (None, x.dtype))
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)

  return jax.tree_util.tree_map_with_path(one, like)


def load_model(path: str | Path) -> Any:
  """The model in a workdir, without its parameters.

  Raises:
    UserError: if there is none, or it cannot be read.
  """
  return _trained(Path(path)).model(trunk(path))


def trunk(path: str | Path) -> Any:
  """The model that a run is of: what a reward model, say, is built around.

  Raises:
    UserError: as `load_model`.
  """
  path = Path(path)
  if not path.is_dir():
    raise UserError(
      f"there is no directory {path}; check the path, or train a model with "
      f"python -m jaxlm.train --config=configs/tiny.py --workdir={path}"
    )
  file = path / "model.json"
  if not file.exists():
    return build(config.read(path), load_tokenizer(path).vocab_size)
  try:
    model = values.from_json(file.read_text(encoding="utf-8"))
  except (UserError, UnicodeDecodeError) as e:
    raise UserError(f"{file} cannot be read: {e}") from e
  if not hasattr(model, "params"):  # an encoder-decoder has them, too
    raise UserError(f"{file} describes no model but {model!r}")
  return model


def load_tokenizer(path: str | Path) -> Tokenizer:
  """The tokenizer of a workdir.

  Raises:
    UserError: if there is none.
  """
  return _load_tokenizer(path)


def save(
  path: str | Path,
  model: Decoder,
  params: Tree,
  tokenizer: Tokenizer | None = None,
  step: int = 0,
) -> None:
  """Writes a model, so that `load(path)` gives equal values and bits back.

  Args:
    path: the directory to write, new or of an earlier `save` of this model.
    model: what is saved.
    params: its arrays.
    tokenizer: saved beside it, where given.
    step: the name of this checkpoint.

  Raises:
    UserError: if the parameters are not those of the model, or the directory
      holds something else already, or cannot be written.
  """
  path = Path(path)
  check_params(model, params)
  text = values.to_json(model)
  if (path / "config.json").exists():
    raise UserError(
      f"{path} holds a training run; save to another directory, or the run "
      "could not go on"
    )
  if (path / "model.json").exists() and load_model(path) != model:
    raise UserError(f"{path} holds another model; save to another directory")
  with Checkpoints(path / "checkpoints", keep=None) as checkpoints:
    try:
      files.replace(path / "model.json", text)
    except OSError as e:
      raise UserError(f"cannot write to {path} ({files.reason(e)})") from e
    if tokenizer is not None:
      tokenizer.save(path)
    checkpoints.save(step, {"params": params})


def check_params(model: Decoder, params: Tree) -> None:
  """Raises UserError unless names and shapes are those of the model."""
  have = {name: x.shape for name, x in arrays.named(params).items()}
  want = {name: p.shape for name, p in paths(model.params()).items()}
  for name in [*want, *have]:
    if have.get(name) != want.get(name):
      raise UserError(
        f"these are not the parameters of this model: its {name} has shape "
        f"{want.get(name)}, theirs {have.get(name)}"
      )


def _trained(path: Path) -> Trained:
  """Which arrays the run in a workdir trains."""
  if not (path / "config.json").exists():
    return Whole()  # written by `save`
  return from_config(config.read(path)).trained


def _keeps_mean(path: Path) -> bool:
  """Whether the run in a workdir keeps a mean of its weights."""
  if not (path / "config.json").exists():
    return False  # written by `save`
  return config.read(path).ema > 0


def _step(checkpoints: Checkpoints, which: str | int) -> int | None:
  """The step that `which` means; None for the newest good one."""
  if which == "latest":
    return None
  if which == "best":
    step = checkpoints.best()
    if step is None:
      raise UserError(
        f"no checkpoint in {checkpoints.directory} has been evaluated, so "
        "none is the best; use which='latest'"
      )
    return step
  if not isinstance(which, int):
    raise UserError(f"which={which!r} is neither latest, best nor a step")
  return which


def claim(path: Path, wanted: FrozenConfigDict) -> None:
  """Makes a workdir this config's, or checks that it already is.

  Raises:
    UserError: if it is another's, or cannot be written.
  """
  if (path / "config.json").exists():
    config.check_continues(config.read(path), wanted, path)
  try:
    path.mkdir(parents=True, exist_ok=True)
    files.replace(path / "config.json", config.to_json(wanted))
  except OSError as error:
    raise UserError(
      f"cannot write to {path} ({error.strerror}); choose another --workdir"
    ) from error
