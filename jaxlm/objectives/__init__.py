"""What a run minimises: over which batches, and in which parameters.

`OBJECTIVES` has, by the name that `config.objective.name` gives, the functions
that make an `Objective`; the other keys of `config.objective` are their
parameters. `next_token`, `seq2seq` and `tokens_ahead` are the losses of
language models: (model, params, batch, key) -> loss, metrics.
"""

import inspect
from collections.abc import Callable

from ml_collections import FrozenConfigDict

from jaxlm import config as configs
from jaxlm import keys
from jaxlm.errors import UserError
from jaxlm.models.lora import LoRA
from jaxlm.objectives.adapters import adapted
from jaxlm.objectives.distil import Teacher, distil
from jaxlm.objectives.likelihood import next_token, seq2seq, tokens_ahead
from jaxlm.objectives.objective import Objective, Whole
from jaxlm.objectives.preference import dpo, ipo, kto, orpo, simpo
from jaxlm.objectives.pretrain import pretrain
from jaxlm.objectives.reward import reward
from jaxlm.objectives.sft import sft

__all__ = [
  "OBJECTIVES",
  "Objective",
  "Whole",
  "adapted",
  "from_config",
  "next_token",
  "pretrain",
  "seq2seq",
  "sft",
  "tokens_ahead",
]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
  "next_token": pretrain,
  "sft": sft,
  "reward": reward,
  "dpo": dpo,
  "ipo": ipo,
  "kto": kto,
  "orpo": orpo,
  "simpo": simpo,
  "distil": distil,
}


def from_config(
  config: FrozenConfigDict, find: Callable[[str], Teacher] | None = None
) -> Objective:
  """What a config says is to be minimised, over what, in what.

  The keys of `config.objective` are the parameters of the function of that
  name; `chunk` comes from `config.loss_chunk`, and `seq_len` from there. Where
  `config.lora` has a key, adapters are trained instead of the model.

  Args:
    config: every key.
    find: gives the teacher at a path; None where no loss will be asked for.

  Raises:
    UserError: for an unknown objective, or keys that it or `LoRA` do not take.
  """
  name = config.objective.get("name", "next_token")
  if name not in OBJECTIVES:
    known = f"; known: {', '.join(OBJECTIVES)}"
    hint = keys.nearest(str(name), OBJECTIVES) or known
    raise UserError(f"no objective {name!r}{hint}")
  make = OBJECTIVES[name]
  takes = inspect.signature(make).parameters
  implied = {"chunk": config.loss_chunk, "seq_len": config.seq_len}
  implied["find"] = find
  given = {k: v for k, v in implied.items() if k in takes}
  made = configs.call(
    make, config.objective, "objective", ("name",), name, **given
  )
  if all(value is None for value in config.lora.values()):
    return made
  return adapted(made, configs.call(LoRA, config.lora, "lora", ()))
