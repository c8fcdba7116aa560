"""Guards: failures that others met in silence, named as soon as they happen.

A guard is a function from what is known of a step to an alarm or None. An
alarm stops the run or is a warning, and says the value and what to do. The
programs ask all of them before a step's checkpoint is written, so that the one
before the failure is kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Limits:
  """Where guards act.

  Attributes:
    gap: the most that the sampler's and the trainer's log-probability of a
      token may differ, before the first update of a rollout (`losses.gap`). In
      16 bits both round, and 0.1 is meant.
    dead: the largest share of groups whose rewards are all the same.
    kl: the most nats a response may be from the reference.
    entropy: the least share of the first rollout's entropy.
    length: the least share of the first rollout's length.
    flat: the least standard deviation of a rollout's rewards.
  """

  gap: float = 1e-5
  dead: float = 0.9
  kl: float = 50.0
  entropy: float = 0.02
  length: float = 0.2
  flat: float = 1e-6


@dataclass(frozen=True)
class Alarm:
  """What went wrong.

  Attributes:
    name: of the guard.
    value: that it saw.
    said: what that means, and what to do.
    stop: whether to go on would only do harm.
  """

  name: str
  value: float
  said: str
  stop: bool = False


Guard = Callable[[Numbers, Numbers, Limits], Alarm | None]


# --- Guards of a step -------------------------------------------------------


def not_a_number(now: Numbers, first: Numbers, limits: Limits) -> Alarm | None:
  """A loss, gradient or log-probability that is no number."""
  del first, limits
  for name in ("gap", "loss", "grad_norm", "approx_kl"):
    if name in now and not math.isfinite(now[name]):
      said = "lower optimizer.lr or set optimizer.clip"
      if name == "gap":
        said = "a log-probability is no number: look at the checkpoint it began"
      return Alarm(name, now[name], said, stop=True)
  return None


def sampler_gap(now: Numbers, first: Numbers, limits: Limits) -> Alarm | None:
  """Sampler and trainer differ about how likely a token is.

  Then ratios are wrong from the first update on: other temperatures, filters,
  precisions or padding on the two sides. A wrong distribution, and not
  rounding, is what differs by a hundred times the limit.
  """
  del first
  gap = now.get("gap", 0.0)
  if not gap > limits.gap:
    return None
  said = (
    f"sampler and trainer differ by more than {limits.gap:g} in the log-"
    "probability of a token; run both in one precision"
  )
  return Alarm("gap", gap, said, stop=gap > 100 * limits.gap)


def kl_blowup(now: Numbers, first: Numbers, limits: Limits) -> Alarm | None:
  """The policy has left the reference, and language with it."""
  del first
  if not now.get("kl", 0.0) > limits.kl:
    return None
  said = (
    f"more than {limits.kl:g} nats a response from the reference; raise the "
    "weight of the KL penalty, or lower optimizer.lr"
  )
  return Alarm("kl", now["kl"], said, stop=True)


def entropy_collapse(
  now: Numbers, first: Numbers, limits: Limits
) -> Alarm | None:
  """The policy always says the same, and so learns nothing more."""
  least = limits.entropy * first.get("entropy", 0.0)
  if not now.get("entropy", math.inf) < least:
    return None
  said = (
    f"entropy was {first['entropy']:.3g} in the first rollout; the policy has "
    "stopped to explore: raise clip_high or the entropy bonus, lower "
    "optimizer.lr, or stop here if the reward is what you want"
  )
  return Alarm("entropy", now["entropy"], said)


def length_collapse(
  now: Numbers, first: Numbers, limits: Limits
) -> Alarm | None:
  """Responses have shrunk to almost nothing."""
  least = limits.length * first.get("length", 0.0)
  if not now.get("length", math.inf) < least:
    return None
  said = (
    f"responses had {first['length']:.3g} tokens in the first rollout; look at "
    "samples.txt for what the reward has come to like"
  )
  return Alarm("length", now["length"], said)


def dead_groups(now: Numbers, first: Numbers, limits: Limits) -> Alarm | None:
  """Nearly all groups are all right or all wrong: no advantage, no gradient."""
  del first
  if not now.get("dead_groups", 0.0) > limits.dead:
    return None
  said = (
    "share of groups whose responses all earn the same, and teach nothing; "
    "choose questions neither too easy nor too hard, raise samples, or rounds"
  )
  return Alarm("dead_groups", now["dead_groups"], said)


def flat_reward(now: Numbers, first: Numbers, limits: Limits) -> Alarm | None:
  """Every response of the rollout earns the same."""
  del first
  if not now.get("reward_std", math.inf) < limits.flat:
    return None
  said = (
    "rewards have no variance, so this step taught nothing; check the reward "
    "function, or choose other questions"
  )
  return Alarm("reward_std", now["reward_std"], said)


GUARDS: tuple[Guard, ...] = (
  not_a_number,
  sampler_gap,
  kl_blowup,
  entropy_collapse,
  length_collapse,
  dead_groups,
  flat_reward,
)


def alarms(
  now: Numbers, first: Numbers, limits: Limits = Limits()
) -> list[Alarm]:
  """What all guards have to say of a step.

  Args:
    now: metrics of the step; what is missing is not watched.
    first: those of the first step of the run.
    limits: where they act.
  """
  found = (guard(now, first, limits) for guard in GUARDS)
  return [alarm for alarm in found if alarm is not None]


def act(alarms: Sequence[Alarm], step: int, workdir: Path, mode: str) -> None:
  """Prints warnings and stops for what should stop.

  Args:
    alarms: of this step.
    step: its number.
    workdir: where the checkpoints before it are.
    mode: 'stop', or 'warn' for a run that goes on whatever happens.

  Raises:
    UserError: for the first alarm that stops.
  """
  for alarm in alarms:
    said = f"{alarm.name} is {alarm.value:.4g} at step {step}: {alarm.said}"
    if alarm.stop and mode == "stop":
      raise UserError(
        f"{said}. The checkpoints in {workdir} are from before; start again "
        "in another workdir"
      )
    print(f"warning: {said}", flush=True)


# --- Guards of the set-up ---------------------------------------------------


def check_groups(group: np.ndarray, samples: int) -> None:
  """Raises unless advantages are made of whole groups.

  A batch cut before its advantages were computed compares a response with a
  part of its group, and where one is alone, with itself: the advantage is 0
  and nothing says so.

  Args:
    group: the prompt of each row, int `[rows]`.
    samples: rows that a prompt should have.

  Raises:
    UserError: for a group of one, or one that is not whole.
  """
  if samples < 2:
    raise UserError(
      "a group of one has no advantage over itself; use samples=2 or more, or "
      "the advantage 'reinforce'"
    )
  counts = np.unique(group, return_counts=True)[1]
  if (counts != samples).any() or (np.sort(group) != group).any():
    raise UserError(
      f"groups of {sorted(set(counts.tolist()))} rows where each should have "
      f"{samples} neighbours: advantages need whole groups; cut a batch only "
      "after they were computed"
    )


def check_padding(
  scored: Callable[[np.ndarray], np.ndarray],
  tokens: np.ndarray,
  mask: np.ndarray,
  starts: np.ndarray,
  vocab: int,
) -> None:
  """Raises if what stands behind a response changes what is said of it.

  Args:
    scored: from tokens `[rows, seq]` to log-probabilities `[rows, new]`.
    tokens: prompts and responses, padded on the right.
    mask: which tokens of the responses are there, `[rows, new]`.
    starts: where they begin, `[rows]`.
    vocab: number of tokens.

  Raises:
    UserError: if it does.
  """
  ends = starts + mask.sum(1)
  behind = np.arange(tokens.shape[1])[None] >= ends[:, None]
  other = np.where(behind, (tokens + 1) % vocab, tokens).astype(tokens.dtype)
  a, b = np.asarray(scored(tokens)), np.asarray(scored(other))
  gap = float(np.abs(np.where(mask, a - b, 0.0)).max(initial=0.0))
  if gap > 1e-6:
    raise UserError(
      f"padding changes log-probabilities by {gap:.3g}: what stands behind a "
      "response is seen by it. Is the model causal?"
    )


def check_accumulation(
  whole: float, parts: Sequence[tuple[float, float]], limit: float = 1e-4
) -> None:
  """Raises unless microbatches, joined by weight, give the loss of the whole.

  Args:
    whole: loss of a batch at once.
    parts: (loss, weight) of each of its microbatches.
    limit: the largest difference, as a share of the loss (of 1 below it).

  Raises:
    UserError: if they do not.
  """
  weights = np.array([w for _, w in parts])
  joined = float(np.sum([x * w for x, w in parts]) / weights.sum())
  if abs(joined - whole) > limit * max(abs(whole), 1.0):
    raise UserError(
      f"accumulation changes the loss: {len(parts)} microbatches give "
      f"{joined:.6g}, the whole batch {whole:.6g}; use accumulate=1 and tell "
      "us, for this is a defect"
    )
