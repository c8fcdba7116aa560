"""Distillation: a student learns what a teacher would say next, everywhere.

    config.objective.name = "distil"
    config.objective.teacher = "runs/large"

The texts are those of `sft` (responses are learned, prompts read), or plain
ones with `config.objective.texts = "plain"`. Both models must read the same
tokens. `python -m jaxlm.rl.distil` does the same on what the student itself
says (arXiv:2306.13649).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxlm import losses
from jaxlm.data.orders import Random
from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.compute import Compute
from jaxlm.models.decoder import Decoder, hidden, logits
from jaxlm.objectives.objective import Objective, Whole
from jaxlm.objectives.pretrain import Text
from jaxlm.objectives.sft import Conversations

Array = jax.Array
Tree = Any
KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")


@dataclass(frozen=True)
class Divergence:
  """How far a student is from its teacher.

  Attributes:
    kind: a function of `jaxlm.losses`: one of `KINDS`.
    beta: of `jensen_shannon`.
    temperature: divides both logits; its square multiplies the divergence, so
      that gradients keep their size (arXiv:1503.02531, section 2).
  """

  kind: str = "forward_kl"
  beta: float = 0.5
  temperature: float = 1.0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f"divergence={self.kind!r}; it can be {', '.join(KINDS)}")
    if not 0 < self.beta < 1:
      raise UserError(f"beta={self.beta}; use a number between 0 and 1")
    if self.temperature <= 0:
      raise UserError(f"temperature={self.temperature}; use a number above 0")

  def __call__(self, teacher: Array, student: Array) -> Array:
    """From logits `[..., vocab]` to nats `[...]`."""
    t = self.temperature
    teacher, student = jax.lax.stop_gradient(teacher) / t, student / t
    if self.kind == "jensen_shannon":
      return t**2 * losses.jensen_shannon(teacher, student, self.beta)
    return t**2 * getattr(losses, self.kind)(teacher, student)


@dataclass(frozen=True, eq=False)
class Teacher:
  """A model to learn from.

  Attributes:
    model: it.
    read: gives its parameters, where they are to lie.
  """

  model: Decoder
  read: Callable[[], Tree]


def distil(
  seq_len: int,
  find: Callable[[str], Teacher] | None = None,
  teacher: str = "",
  divergence: str = "forward_kl",
  beta: float = 0.5,
  temperature: float = 1.0,
  mix: float = 0.0,
  texts: str = "responses",
  template: str = "",
  examples: int = 5000,
) -> Objective:
  """What a teacher would say next, by all its probabilities.

  Args:
    seq_len: tokens in a row; `config.seq_len`.
    find: the teacher at a path; None where it will not be asked.
    teacher: its path, as `jaxlm.load` takes it.
    divergence: 'forward_kl', 'reverse_kl' or 'jensen_shannon'.
    beta: of the last one.
    temperature: divides both logits.
    mix: the share of the loss that is the text's own likelihood.
    texts: 'responses' (as `sft`) or 'plain'.
    template: as for `sft`.
    examples: as for `sft`.
  """
  if not teacher:
    raise UserError("distil needs config.objective.teacher, a model's path")
  if texts not in ("responses", "plain"):
    raise UserError(f"texts={texts!r}; it can be responses or plain")
  if not 0.0 <= mix <= 1.0:
    raise UserError(f"config.objective.mix={mix} is no share: 0 to 1")
  kind = Divergence(divergence, beta, temperature)
  talks = Conversations(template, Random(), True, examples, seq_len)
  found = None if find is None else find(teacher)
  data = talks if texts == "responses" else Text()
  return Objective(data, Distil(found, kind, mix), Taught(found))


@dataclass(frozen=True)
class Distil:
  """The loss of a batch, as those of `next_token`; `frozen` is the teacher's.

  Attributes:
    teacher: what is learned from.
    divergence: how far the student is from it.
    mix: the share of the text's own likelihood.
  """

  teacher: Teacher | None
  divergence: Divergence
  mix: float = 0.0

  def __call__(
    self,
    model: Decoder,
    params: Tree,
    batch: dict[str, Array],
    key: Array | None,
    compute: Compute,
    frozen: Tree = None,
  ) -> tuple[Array, dict[str, Array]]:
    """The mean over targets.

    Returns:
      The loss, `weight`, and `divergence` and `nll`, which it is mixed of.
    """
    at = At(batch.get("positions"), batch.get("segments"))
    student, teacher = (
      logits(
        m, p, hidden(m, p, batch["inputs"], where, None, compute)[0], compute
      )
      for m, p, where in (
        (model, params, at.replace(key=key)),
        (self.teacher.model, frozen, at),
      )
    )
    mask = batch.get("mask")
    away, weight = losses.weighted_mean(self.divergence(teacher, student), mask)
    nll = losses.cross_entropy(student, batch["targets"])[0]
    nll, _ = losses.weighted_mean(nll, mask)
    loss = (1 - self.mix) * away + self.mix * nll
    told = {"loss": loss, "weight": weight, "divergence": away, "nll": nll}
    return loss, told


@dataclass(frozen=True)
class Taught(Whole):
  """All parameters are trained, beside a teacher's."""

  teacher: Teacher | None = None

  def frozen(self, model: Decoder, base: Tree | None) -> Tree:
    """The teacher's.

    Raises:
      UserError: if it speaks of other tokens.
    """
    check(self.teacher.model, model)
    return self.teacher.read()


def check(teacher: Any, student: Decoder) -> None:
  """Raises UserError unless a student can learn from a teacher."""
  if not isinstance(teacher, Decoder):
    raise UserError("the teacher is no decoder; it has no next token to tell")
  if teacher.vocab != student.vocab:
    raise UserError(
      f"the teacher has {teacher.vocab} tokens and the student "
      f"{student.vocab}; both must read the same tokenizer's"
    )
