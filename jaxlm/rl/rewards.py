"""Rewards: from responses to numbers, by a scorer, a model or any function.

A reward is a callable, `(examples, texts) -> one number for each`. What it
returns is never trusted: `judged` says what is wrong with it, or counts it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import workdir
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generate.prompts import pad_right
from jaxlm.interop.load import load
from jaxlm.layers.compute import Compute
from jaxlm.models.reward import RewardModel
from jaxlm.parallel.rules import Rules
from jaxlm.rl import place
from jaxlm.tasks import Example, Task

Reward = Callable[[Sequence[Example], Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Verifier:
  """The scorer of a task: from 0 to 1, and true."""

  task: Task

  def __call__(
    self, examples: Sequence[Example], texts: Sequence[str]
  ) -> list[float]:
    """How right each response is."""
    pairs = zip(examples, texts, strict=True)
    return [self.task.score(example, text) for example, text in pairs]


@dataclass(frozen=True, eq=False)
class Learned:
  """A reward model: what it says of prompt, response and end together.

  Attributes:
    model, params: the reward model.
    tokenizer: the one it was trained with.
    rows: responses are read so many at a time, of a few lengths only.
    rules: along which axes a mesh cuts them.
  """

  model: RewardModel
  params: Any
  tokenizer: Tokenizer
  rows: int = 64
  rules: Rules | None = None
  read: Any = field(init=False, repr=False)

  def __post_init__(self):
    compute = Compute(rules=self.rules)
    read = functools.partial(self.model, compute=compute)
    object.__setattr__(self, "read", jax.jit(read))

  @classmethod
  def load(cls, path: str | Path, rules: Rules | None = None) -> "Learned":
    """The one in a workdir, on every device of the mesh in force.

    Raises:
      UserError: if there is none, or it is no reward model.
    """
    mesh = jax.sharding.get_mesh()
    model, params = load(path, mesh=None if mesh.empty else mesh)
    if not isinstance(model, RewardModel):
      raise UserError(
        f"{path} holds no reward model; train one with the objective "
        "reward, or say reward='verifier'"
      )
    return cls(model, params, workdir.load_tokenizer(path), rules=rules)

  def __call__(
    self, examples: Sequence[Example], texts: Sequence[str]
  ) -> list[float]:
    """The reward of each response."""
    end = [] if self.tokenizer.eot is None else [self.tokenizer.eot]
    ids = [
      [
        *self.tokenizer.encode(example.prompt),
        *self.tokenizer.encode(text),
        *end,
      ]
      for example, text in zip(examples, texts, strict=True)
    ]
    parts = range(0, len(ids), self.rows)
    found = [self._some(ids[i : i + self.rows]) for i in parts]
    return np.concatenate(found).tolist()

  def _some(self, ids: list[list[int]]) -> np.ndarray:
    """Rewards of at most `rows` texts; shapes are rounded up."""
    most, n = self.model.max_positions, len(ids)
    longest = max(map(len, ids))
    if longest > most:
      raise UserError(
        f"prompt and response have {longest} tokens, and the reward model "
        f"reads {most}; allow fewer new tokens"
      )
    tokens, lengths = pad_right(ids + [ids[-1]] * (self.rows - n))
    room = min(-(-longest // 16) * 16, most) - longest
    tokens = np.pad(tokens, ((0, 0), (0, room)))
    mask = np.arange(tokens.shape[1])[None] < lengths[:, None]
    given = place.rows((tokens, mask), self.rules)
    return np.asarray(self.read(self.params, *given))[:n]


# --- What comes of them -----------------------------------------------------


@dataclass(frozen=True)
class Judged:
  """Rewards that can be trusted.

  Attributes:
    rewards: float32 [rows]; finite.
    valid: which of them the function gave, bool [rows]. The others it called
      NaN or infinite; they must not be learned from.
  """

  rewards: np.ndarray
  valid: np.ndarray


def judged(
  reward: Reward, examples: Sequence[Example], texts: Sequence[str]
) -> Judged:
  """What a reward function says of responses, if it makes sense.

  A NaN is told by `valid` and does not end a run; the caller counts it.

  Raises:
    UserError: if the function raises, returns anything but one number for each
      response, or nothing finite.
  """
  name = getattr(reward, "__name__", type(reward).__name__)
  try:
    found = reward(examples, texts)
  except UserError:
    raise
  except Exception as error:
    raise UserError(
      f"the reward function {name} raised {type(error).__name__}: {error}; it "
      "must return a number for every text that a model may say"
    ) from error
  try:
    array = np.asarray(found, np.float32)
  except (TypeError, ValueError):
    array = np.zeros(0, np.float32)
  if array.shape != (len(texts),):
    raise UserError(
      f"the reward function {name} returned {_told(found)} for {len(texts)} "
      "responses; it must return one number for each, in their order"
    )
  valid = np.isfinite(array)
  if not valid.any():
    raise UserError(
      f"the reward function {name} returned no finite number for any of "
      f"{len(texts)} responses"
    )
  return Judged(np.where(valid, array, 0.0).astype(np.float32), valid)


def _told(found: Any) -> str:
  """What came instead, in a few words."""
  try:
    return f"{len(found)} values"
  except TypeError:
    return f"{found!r}"[:40]


def filled(judged: Judged, samples: int) -> np.ndarray:
  """Rewards in which what is not valid is the mean of its group's others.

  So it moves neither the mean of the group nor itself. Where a whole group is
  not valid, it is the mean of all.

  Returns:
    float32 `[rows]`.
  """
  r = np.where(judged.valid, judged.rewards, np.nan).reshape(-1, samples)
  n = judged.valid.reshape(-1, samples).sum(1, keepdims=True)
  total = np.nansum(r, axis=1, keepdims=True)
  mean = np.where(n, total / np.maximum(n, 1), np.nanmean(r))
  return np.where(np.isnan(r), mean, r).astype(np.float32).reshape(-1)


def without_end(
  rewards: np.ndarray, ended: np.ndarray, penalty: float
) -> np.ndarray:
  """Rewards less `penalty` for responses that did not come to their end.

  InstructGPT's code and TRL have it: a model that is never punished for it
  learns to go on until it is cut off.
  """
  return rewards - np.float32(penalty) * ~ended
