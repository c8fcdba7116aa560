"""What a run of PPO or GRPO may be told: the keys of their config sections.

`config.ppo.clip = 0.1` is the field `clip` of `PPO`. Combinations that make no
sense are refused here, before anything is loaded.
"""

from dataclasses import dataclass
from typing import Any

from jaxlm import tasks
from jaxlm.errors import UserError
from jaxlm.rl.guards import Limits
from jaxlm.rl.rollout import Draw


@dataclass(frozen=True)
class Options:
  """What both have in common. A rollout is `prompts` x `samples` responses;
  `config.batch_size` of them make an update, and all are used `epochs` times.

  Attributes:
    task: what is asked, a name of `jaxlm.tasks`.
    levels: how hard, as '2' or '1-3'; None means the task's own.
    worked: whether arithmetic shows its steps.
    questions: different prompts to train on.
    held_out: prompts of the test split that every evaluation asks.
    reward: 'verifier' (the task's scorer), or the workdir of a reward model.
    missing_eos: taken off the reward of a response without an end.
    prompts: asked in each step.
    samples: responses to each.
    tokens: the most new tokens of a response.
    temperature, top_k, top_p: how they are drawn, in training.
    gathered: where devices share the weights: whether each gathers them once
      for a whole rollout, or layer by layer for every token.
    epochs: how often each response is learned from.
    kl: weight of the penalty for leaving the reference; 0 for none.
    kl_kind: its estimator, 'k1', 'k2' or 'k3'.
    entropy: weight of the bonus for it.
    guards: 'stop', or 'warn' to go on whatever they say.
    gap: the largest difference between sampler and trainer (`guards.Limits`);
      None means 1e-5, or 0.1 in 16 bits.
    most_kl: where a run is stopped, in nats a response.
  """

  task: str = "add"
  levels: str | int | None = None
  worked: bool = False
  questions: int = 2000
  held_out: int = 128
  reward: str = "verifier"
  missing_eos: float = 0.0
  prompts: int = 8
  samples: int = 8
  tokens: int = 16
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  gathered: bool = True
  epochs: int = 1
  kl: float = 0.0
  kl_kind: str = "k3"
  entropy: float = 0.0
  guards: str = "stop"
  gap: float | None = None
  most_kl: float = 50.0

  def __post_init__(self):
    one_of(self, "kl_kind", "k1", "k2", "k3")
    one_of(self, "guards", "stop", "warn")
    for name in ("questions", "held_out", "prompts", "epochs"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)}; use 1 or more")
    for name in ("kl", "missing_eos"):
      if getattr(self, name) < 0:
        raise UserError(f"{name}={getattr(self, name)} must not be negative")

  @property
  def rows(self) -> int:
    """Responses of a rollout."""
    return self.prompts * self.samples

  def updates(self, batch_size: int) -> int:
    """Updates in one epoch of a rollout.

    Raises:
      UserError: if batches do not divide it.
    """
    if self.rows % batch_size:
      raise UserError(
        f"a rollout of {self.prompts} prompts x {self.samples} samples does "
        f"not divide into batches of batch_size={batch_size}; the whole of it "
        f"is {self.rows}"
      )
    return self.rows // batch_size

  def draw(self, eos: int | None) -> Draw:
    """How responses are drawn in training."""
    drawn = (self.temperature, self.top_k, self.top_p, self.gathered)
    return Draw(self.tokens, self.samples, eos, *drawn)

  def made(self) -> tasks.Task:
    """The task."""
    given: dict[str, Any] = {"worked": True} if self.worked else {}
    if self.levels is not None:
      given["levels"] = self.levels
    return tasks.make(self.task, **given)

  def limits(self, precision: str) -> Limits:
    """Where guards act."""
    usual = Limits().gap if precision == "float32" else 0.1
    gap = usual if self.gap is None else self.gap
    return Limits(gap=gap, kl=self.most_kl)


@dataclass(frozen=True)
class GRPO(Options):
  """GRPO and its kin; see `jaxlm.rl.grpo`.

  Attributes:
    advantage: 'group' (GRPO), 'loo' (RLOO), or 'reinforce' with the mean of
      all rewards so far for a baseline.
    scale: what advantages of a group are divided by: the deviation of its
      rewards ('group'), of all ('batch'), or nothing ('none', Dr. GRPO).
    over: what the loss is a mean over: 'token' (DAPO), 'sequence' (GRPO) or
      'constant' (Dr. GRPO).
    ratio: importance ratios of each 'token' or of the 'sequence' (GSPO).
    clip_low, clip_high: how far a ratio may fall and rise.
    rounds: draw up to so many rollouts for a step, to replace groups in which
      all rewards are the same (DAPO's dynamic sampling); 1 for none of it.
  """

  advantage: str = "group"
  scale: str = "group"
  over: str = "token"
  ratio: str = "token"
  clip_low: float = 0.2
  clip_high: float = 0.2
  rounds: int = 1

  def __post_init__(self):
    super().__post_init__()
    one_of(self, "advantage", "group", "loo", "reinforce")
    one_of(self, "scale", "group", "batch", "none")
    one_of(self, "over", "token", "sequence", "constant")
    one_of(self, "ratio", "token", "sequence")
    if self.samples < 2 and self.advantage != "reinforce":
      raise UserError(
        "a group of one has no advantage over itself; use samples=2 or more, "
        "or advantage='reinforce'"
      )


@dataclass(frozen=True)
class PPO(Options):
  """PPO; see `jaxlm.rl.ppo`. Published defaults of TRL, but for the KL.

  Attributes:
    critic: 'shared' (a head on the policy's hidden states) or 'separate' (a
      model of its own, which starts as a copy of the policy).
    kl_target: nats a response that the weight of the KL goes after; 0: fixed.
    gamma: discount of a step.
    lam: of generalised advantage estimation.
    clip: how far a ratio may move.
    clip_value: how far the critic may move; 0: any.
    value_weight: of the critic's loss.
    whiten: whether advantages are whitened.
    whiten_rewards: whether token rewards are, their mean kept.
    scale_rewards: divide scores by the deviation of all so far.
    clip_rewards: bound of the scores after that; 0: none.
    stop_kl: ends a rollout's epochs once the policy is so far (k3, nats a
      token) from what sampled it; 0: never.
  """

  samples: int = 1
  prompts: int = 64
  epochs: int = 4
  kl: float = 0.05
  kl_kind: str = "k1"
  critic: str = "shared"
  kl_target: float = 0.0
  gamma: float = 1.0
  lam: float = 0.95
  clip: float = 0.2
  clip_value: float = 0.2
  value_weight: float = 0.1
  whiten: bool = True
  whiten_rewards: bool = False
  scale_rewards: bool = False
  clip_rewards: float = 10.0
  stop_kl: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    one_of(self, "critic", "shared", "separate")
    for name in ("gamma", "lam"):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(f"{name}={getattr(self, name)}; use a number up to 1")


def one_of(options: Any, name: str, *known: str) -> None:
  """Raises UserError unless a field has one of the known values."""
  if getattr(options, name) not in known:
    raise UserError(
      f"{name}={getattr(options, name)!r}; known: {', '.join(known)}"
    )
