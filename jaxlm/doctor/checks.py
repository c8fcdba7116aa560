"""All checks by name, cheapest first."""

from collections.abc import Callable, Iterator

from jaxlm.doctor import structure, training
from jaxlm.doctor.subject import Finding, Subject

CHECKS: dict[str, Callable[[Subject], Finding]] = {
  "vocabulary": training.vocabulary,
  "labels": training.labels,
  "initial loss": training.initial_loss,
  "loss by hand": training.loss_by_hand,
  "batch size": training.batch_size,
  "causality": structure.causality,
  "rows apart": structure.rows_apart,
  "documents apart": structure.documents_apart,
  "order": structure.order,
  "attention": structure.by_definition,
  "residual": structure.residual,
  "norms": structure.norms,
  "cache parity": structure.cache_parity,
  "tied head": structure.tied_head,
  "layers differ": structure.layers_differ,
  "dead units": structure.dead_units,
  "train and eval": structure.evaluation,
  "precision": training.precision,
  "gradients": training.gradients,
  "gradient flow": training.gradient_flow,
  "weight decay": training.weight_decay,
  "accumulation": training.accumulation,
  "all move": training.all_move,
  "overfit": training.overfit,
}


def examine(
  subject: Subject, names: tuple[str, ...] = tuple(CHECKS)
) -> Iterator[tuple[str, Finding]]:
  """Runs checks one by one; one that raises has found something as well."""
  for name in names:
    try:
      yield name, CHECKS[name](subject)
    except Exception as error:  # whatever the examined code does
      text = f"{type(error).__name__}: {error}".splitlines()[0]
      yield name, Finding(False, "it raised", text)
