"""What a run minimises: over which batches, and in which parameters.

`OBJECTIVES` has, by the name that `config.objective.name` gives, the functions
that make an `Objective`; the other keys of `config.objective` are their
parameters. `next_token`, `seq2seq` and `tokens_ahead` are the losses of
language models: (model, params, batch, key) -> loss, metrics.
"""

from collections.abc import Callable

from jaxlm.objectives.likelihood import next_token, seq2seq, tokens_ahead
from jaxlm.objectives.objective import Objective, Whole
from jaxlm.objectives.pretrain import pretrain
from jaxlm.objectives.sft import sft

__all__ = [
  "OBJECTIVES",
  "Objective",
  "Whole",
  "next_token",
  "pretrain",
  "seq2seq",
  "sft",
  "tokens_ahead",
]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
  "next_token": pretrain,
  "sft": sft,
}
