"""Collecting: questions are asked, responses judged, batches cut."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxlm.layers.compute import Compute
from jaxlm.parallel.rules import Rules
from jaxlm.rl import losses, place, questions, rewards
from jaxlm.rl.begin import Base
from jaxlm.rl.options import Options
from jaxlm.rl.questions import Questions
from jaxlm.rl.rewards import Reward
from jaxlm.rl.rollout import Draw, Rollout, Scores, sample

Array = jax.Array
Tree = Any


@functools.partial(jax.jit, static_argnums=3)
def _keys(seed: Array, step: Array, again: Array, rows: int) -> Array:
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.random.split(jax.random.fold_in(key, again), rows)


def respond(
  base: Base,
  draw: Draw,
  params: Tree,
  asked: Questions,
  compute: Compute,
  *when: int,
) -> tuple[Rollout, list[str]]:
  """Responses of a policy to questions: tokens and texts.

  Args:
    base: the model and its tokenizer.
    draw: how.
    params: of the policy.
    asked: what it is asked.
    compute: how to run.
    when: seed, step and round, from which all randomness follows.
  """
  keys = _keys(*map(np.int32, when), len(asked) * draw.samples)
  given = place.rows((asked.tokens, asked.lengths, keys), compute.rules)
  rollout = sample(base.model, draw, params, *given, compute)
  return rollout, questions.texts(rollout, base.tokenizer, base.eos)


def cut(
  tree: Tree,
  order: np.ndarray,
  updates: int,
  accumulate: int,
  rules: Rules | None = None,
) -> Tree:
  """Rows in a new order, as a step takes them: `[updates, parts, rows, ...]`.

  Args:
    tree: leaves `[rows, ...]`.
    order: a permutation of the rows.
    updates: how many batches they make.
    accumulate: parts of each.
    rules: along which axes a mesh cuts a batch.
  """

  def one(x: Array) -> np.ndarray:
    x = np.asarray(x)[order]
    return x.reshape(updates, accumulate, -1, *x.shape[1:])

  return place.parts(jax.tree.map(one, tree), rules)


def order(rows: int, seed: int, step: int, epoch: int) -> np.ndarray:
  """The order in which an epoch takes the rows of a rollout."""
  return np.random.default_rng((seed, step, epoch)).permutation(rows)


# --- Judging ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Collected:
  """A rollout with its rewards, on the host.

  Attributes:
    rollout: leaves are NumPy's; `rewards` are what the policy is trained on.
    samples: rows of a group.
    invalid: rewards that were no number.
    ended: share of the responses that came to their end.
  """

  rollout: Rollout
  samples: int
  invalid: int
  ended: float

  @property
  def varied(self) -> np.ndarray:
    """Which groups have rewards that differ, bool [groups]."""
    r = self.rollout.rewards.reshape(-1, self.samples)
    return r.max(1) > r.min(1)

  def against(self, reference: Scores) -> "Collected":
    """With what the reference says of the responses."""
    logp = np.asarray(reference.logp)
    return replace(self, rollout=self.rollout.replace(logp_ref=logp))


def judge(
  reward: Reward,
  asked: Questions,
  rollout: Rollout,
  texts: list[str],
  options: Options,
  eos: int,
) -> Collected:
  """Rewards of a rollout.

  A response whose reward is no number is not learned from: its mask is empty,
  and its group's mean stays what the others make it.
  """
  samples = options.samples
  repeated = [e for e in asked.examples for _ in range(samples)]
  found = rewards.judged(reward, repeated, texts)
  ended = questions.ended(rollout, eos)
  earned = rewards.filled(found, samples)
  earned = rewards.without_end(earned, ended, options.missing_eos)
  rollout = jax.tree.map(np.asarray, rollout)
  mask = rollout.mask & found.valid[:, None]
  return Collected(
    rollout.replace(rewards=earned, mask=mask),
    samples,
    int((~found.valid).sum()),
    float(ended.mean()),
  )


def joined(parts: list[Collected], groups: int) -> Collected:
  """One rollout of `groups` groups, those first whose rewards differ.

  Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): what teaches nothing
  is replaced by what further draws brought. Where these were not enough, the
  rest is filled with groups of the first draw.
  """
  if len(parts) == 1:
    return parts[0]
  whole = jax.tree.map(
    lambda *x: np.concatenate(x), *(part.rollout for part in parts)
  )
  varied = np.concatenate([part.varied for part in parts])
  order = np.argsort(~varied, kind="stable")[:groups]
  samples = parts[0].samples
  rows = (order[:, None] * samples + np.arange(samples)).reshape(-1)
  chosen = jax.tree.map(lambda x: x[rows], whole)
  group = np.repeat(np.arange(groups, dtype=np.int32), samples)
  return Collected(
    chosen.replace(group=group),
    samples,
    sum(part.invalid for part in parts),
    float(np.mean([part.ended for part in parts])),
  )


def gap(collected: Collected, said: Scores) -> float:
  """The most that sampler and trainer differ about the log p of a token.

  As `jaxlm.rl.losses.gap` of each token.
  """
  r = collected.rollout
  return float(losses.gap(said.logp, r.logp_old, r.mask))


def numbers(collected: Collected) -> dict[str, float]:
  """Metrics of a rollout, before anything is learned from it."""
  r = collected.rollout
  found = {
    "reward": r.rewards.mean(),
    "reward_std": r.rewards.std(),
    "length": r.mask.sum(1).mean(),
    "ended": collected.ended,
    "invalid": collected.invalid,
  }
  if collected.samples > 1:
    found["dead_groups"] = 1.0 - collected.varied.mean()
  if r.logp_ref is not None:
    found["kl"] = ((r.logp_old - r.logp_ref) * r.mask).sum(1).mean()
  return {name: float(x) for name, x in found.items()}
