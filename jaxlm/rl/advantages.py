"""Advantages: from rewards to how much better each token was than expected.

Arrays in, arrays out. Rows are responses, padded on the right; `mask` says
which tokens are there. Functions of groups take `[groups, samples]`, so that
an incomplete group is a wrong shape and not a wrong number.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array

EPSILON = 1e-4  # added to a group's standard deviation, as in TRL


# --- Rewards ----------------------------------------------------------------


def token_rewards(score: Array, kl: Array, mask: Array, beta: Array) -> Array:
  """What each token earns: r_t = -beta kl_t, and the score at the last one.

  InstructGPT (arXiv:2203.02155), equation 2, with the penalty paid where it
  arises.

  Args:
    score: of the whole response, float32 `[rows]`.
    kl: of each token to the reference, `[rows, new]`.
    mask: which tokens are there, `[rows, new]`.
    beta: weight of the penalty, a scalar.

  Returns:
    float32 `[rows, new]`, zero outside the mask.
  """
  chex.assert_rank([score, kl, mask], [1, 2, 2])
  there = mask.astype(kl.dtype)
  last = there - jnp.pad(there[:, 1:], ((0, 0), (0, 1)))
  return -beta * kl * there + score[:, None] * last


def clip(x: Array, most: float) -> Array:
  """Rewards `[rows]` within -most .. most; 0 leaves them as they are."""
  chex.assert_rank(x, 1)
  return jnp.clip(x, -most, most) if most else x


@struct.dataclass
class Running:
  """Count, mean and sum of squared deviations of all rewards so far."""

  count: Array
  mean: Array
  squares: Array

  @classmethod
  def create(cls) -> "Running":
    """Before the first one."""
    zero = jnp.zeros((), jnp.float32)
    return cls(zero, zero, zero)

  @property
  def std(self) -> Array:
    """Standard deviation; 1 where fewer than two are known."""
    var = self.squares / jnp.maximum(self.count - 1.0, 1.0)
    return jnp.where(self.count > 1.0, jnp.sqrt(var), 1.0)


@jax.jit
def seen(running: Running, x: Array) -> Running:
  """`running` with the rewards `x` [rows] added to it.

    M' = M + sum (x_i - mean x)^2 + d^2 n m / (n + m),  d = mean x - mean

  Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
  computing sample variances", 1979.
  """
  chex.assert_rank(x, 1)
  n, m = running.count, jnp.asarray(x.size, x.dtype)
  mean = jnp.mean(x)
  d = mean - running.mean
  squares = jnp.sum((x - mean) ** 2) + d**2 * n * m / (n + m)
  return Running(
    n + m, running.mean + d * m / (n + m), running.squares + squares
  )


def scaled(x: Array, running: Running) -> Array:
  """X / std: the mean stays, or the sign of a reward would change.

  The reward scaling of PPO as it is used (arXiv:2005.12729, section 3).
  """
  chex.assert_rank(x, 1)
  return x / jnp.maximum(running.std, 1e-8)


# --- With a critic ----------------------------------------------------------


def gae(
  rewards: Array, values: Array, mask: Array, gamma: float, lam: float
) -> tuple[Array, Array]:
  """Generalised advantage estimation (arXiv:1506.02438, equations 11, 16).

    d_t = r_t + gamma V_{t+1} - V_t,   A_t = d_t + gamma lam A_{t+1}

  Behind the last token of a response both V and A are 0. lam = 1 gives the
  return minus V, lam = 0 the temporal difference d.

  Args:
    rewards: of each token, `[rows, new]`.
    values: what the critic expects before it, `[rows, new]`.
    mask: which tokens are there, `[rows, new]`.
    gamma: discount of a step.
    lam: decay of the mixture.

  Returns:
    Advantages, and returns A + V: the targets of the critic. `[rows, new]`.
  """
  chex.assert_rank([rewards, values, mask], 2)
  there = mask.astype(rewards.dtype)
  r, v = rewards * there, values * there
  d = r + gamma * jnp.pad(v[:, 1:], ((0, 0), (0, 1))) - v

  def back(later: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
    a = (now[0] + gamma * lam * later) * now[1]
    return a, a

  _, a = jax.lax.scan(back, jnp.zeros_like(d[:, 0]), (d.T, there.T), None, True)
  return a.T, a.T + v


def returns(rewards: Array, mask: Array, gamma: float = 1.0) -> Array:
  """Rewards to go, R_t = r_t + gamma R_{t+1}, `[rows, new]`."""
  chex.assert_rank([rewards, mask], 2)
  return gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)[1]


def whiten(x: Array, mask: Array, shift: bool = True) -> Array:
  """(x - mean) / std over the tokens of a batch; the mean may stay.

  Args:
    x: `[rows, new]`.
    mask: which tokens count, `[rows, new]`.
    shift: False keeps the mean, as for rewards.

  Returns:
    `[rows, new]`, zero outside the mask. The variance is that of a sample (n
    - 1), as in TRL's `masked_whiten`.
  """
  chex.assert_rank([x, mask], 2)
  there = mask.astype(x.dtype)
  n = jnp.maximum(jnp.sum(there), 1.0)
  mean = jnp.sum(x * there) / n
  var = jnp.sum((x - mean) ** 2 * there) / jnp.maximum(n - 1.0, 1.0)
  y = (x - mean) * jax.lax.rsqrt(var + 1e-8)
  return (y if shift else y + mean) * there


# --- Without one ------------------------------------------------------------


def group_relative(rewards: Array, scale: str = "group") -> Array:
  """A_i = (r_i - mean r) / (std r + 1e-4) within each group.

  GRPO (arXiv:2402.03300, section 4.1.2). With scale 'none' there is no
  division, which favours questions nearly always or never answered: Dr. GRPO
  (arXiv:2503.20783, section 3.2). 'batch' divides by the deviation of all
  rewards (arXiv:2508.08221).

  Args:
    rewards: `[groups, samples]`.
    scale: 'group', 'batch' or 'none'.
  """
  chex.assert_rank(rewards, 2)
  a = rewards - jnp.mean(rewards, axis=1, keepdims=True)
  if scale == "none":
    return a
  std = jnp.std(rewards, axis=1, keepdims=True, ddof=1)
  if scale == "batch":
    std = jnp.std(rewards, ddof=1)
  return a / (std + EPSILON)


def leave_one_out(rewards: Array) -> Array:
  """A_i = r_i - mean of the others' rewards: RLOO (arXiv:2402.14740, eq. 8).

  Args:
    rewards: `[groups, samples]`, two samples or more.
  """
  chex.assert_rank(rewards, 2)
  n = rewards.shape[1]
  return n / (n - 1) * (rewards - jnp.mean(rewards, axis=1, keepdims=True))


def reinforce(rewards: Array, baseline: Array) -> Array:
  """A_i = r_i - b: REINFORCE with one baseline (Williams 1992, section 4).

  Args:
    rewards: `[groups, samples]`; groups may be of one.
    baseline: a scalar that does not depend on them, e.g. the running mean.
  """
  chex.assert_rank([rewards, baseline], [2, 0])
  return rewards - baseline
