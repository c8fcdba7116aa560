"""From a config to a model: the one place where a family is found by name."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from jaxlm import config as configs
from jaxlm import keys
from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.layers.attention import Attention
from jaxlm.layers.position import Rope
from jaxlm.models import families
from jaxlm.models.decoder import Decoder


def family_names() -> list[str]:
  """Names that `config.model.family` may have: the files of `families`."""
  return sorted(m.name for m in pkgutil.iter_modules(families.__path__))


def family(name: str) -> Callable[..., Decoder]:
  """The function `decoder` of a family.

  Raises:
    UserError: if there is no such family, or it has no decoders.
  """
  known = family_names()
  if name not in known:
    hint = keys.nearest(name, known) or f"; known: {', '.join(known)}"
    raise UserError(f"no model family {name!r}{hint}")
  module = importlib.import_module(f"{families.__name__}.{name}")
  if not hasattr(module, "decoder"):
    raise UserError(
      f"model family {name!r} has no decoders to be trained on plain text; "
      "docs/encoder-decoder.md shows how its models are used"
    )
  return module.decoder


def build(config: Config, vocab: int) -> Decoder:
  """The model that `config.model` describes.

  The family's function gets the keys of the section that are set. Where the
  config leaves them open, `vocab` comes from the data and `max_positions` from
  `config.seq_len`.

  Args:
    config: a whole config; `model` and `seq_len` are read.
    vocab: number of tokens of the data's tokenizer.

  Raises:
    UserError: for an unknown family, a key that the family does not take, or
      sizes that do not fit together.
  """
  section = config.model
  function = family(section.family)
  takes = inspect.signature(function).parameters
  implied = {"vocab": vocab, "max_positions": config.seq_len}
  given = {
    name: value
    for name, value in implied.items()
    if name in takes and section.get(name) is None
  }
  # A key that is None counts as not set, also one that is given here.
  skip = ("family", *given)
  model = configs.call(
    function, section, skip=skip, label=section.family, **given
  )
  check(model, vocab, config.seq_len)
  return model


def check(model: Decoder, vocab: int, seq_len: int) -> None:
  """Rejects sizes that could not be meant, in the words of the config.

  Args:
    model: what is to be trained.
    vocab: number of tokens of the data's tokenizer.
    seq_len: tokens it is to read at once.

  Raises:
    UserError: if they do not fit together.
  """
  if model.vocab < vocab:
    raise UserError(
      f"config.model.vocab={model.vocab} is less than the tokenizer's {vocab} "
      "tokens; leave it out to follow the tokenizer"
    )
  if model.max_positions < seq_len:
    raise UserError(
      f"config.seq_len={seq_len} is more than config.model.max_positions="
      f"{model.max_positions}; raise the one or lower the other"
    )
  for rate in {model.dropout, *(block.dropout for block in model.blocks)}:
    if not 0.0 <= rate < 1.0:
      raise UserError(
        f"config.model.dropout={rate} is not a share: at least 0, below 1"
      )
  mixers = {block.mixer for block in model.blocks}
  for mixer in (m for m in mixers if isinstance(m, Attention)):
    if mixer.head_dim is None and mixer.dim % mixer.heads:
      raise UserError(
        f"config.model.dim={mixer.dim} does not divide into "
        f"config.model.heads={mixer.heads} heads; change one of them"
      )
    if isinstance(mixer.position, Rope) and mixer.width % 2:
      raise UserError(
        f"heads of {mixer.width} features cannot turn in pairs (rotary "
        "positions); choose config.model.dim / config.model.heads to be even"
      )
