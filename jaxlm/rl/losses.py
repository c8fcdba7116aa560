"""Losses of reinforcement learning: arrays in, arrays out.

Each is of single tokens, `[rows, new]`; `aggregate` joins them, and says over
how many targets, so that parts of a batch can be joined exactly.
"""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


# --- The policy -------------------------------------------------------------


def log_ratio(
  logp: Array, logp_old: Array, mask: Array, level: str = "token"
) -> Array:
  """Log of how much likelier a token, or its whole response, has become.

    token:     w_t = log p_t - log q_t               (PPO, arXiv:1707.06347)
    sequence:  w = mean over t of the same           (GSPO, arXiv:2507.18071)

  Args:
    logp: under the policy, `[rows, new]`.
    logp_old: under the policy that sampled, `[rows, new]`.
    mask: which tokens are there, `[rows, new]`.
    level: 'token' or 'sequence' (equation 7 there: the length is divided out).

  Returns:
    `[rows, new]`; at level 'sequence' a row has one number.
  """
  chex.assert_rank([logp, logp_old, mask], 2)
  there = mask.astype(logp.dtype)
  w = (logp - logp_old) * there
  if level == "token":
    return w
  n = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1.0)
  return jnp.broadcast_to(jnp.sum(w, axis=1, keepdims=True) / n, w.shape)


def gap(logp: Array, logp_old: Array, mask: Array) -> Array:
  """Max |log p - log q| / max(1, |log q|): how far two programs differ.

  Before the first update of a rollout both are of one policy, so this is
  rounding and nothing else; and what is rounded are logits, whose errors grow
  with their size. For a token of probability above 1/e it is the difference
  itself.

  Args:
    logp: by the trainer, `[rows, new]`.
    logp_old: by the sampler, `[rows, new]`.
    mask: which tokens are there, `[rows, new]`.

  Returns:
    A scalar.
  """
  chex.assert_rank([logp, logp_old, mask], 2)
  size = jnp.maximum(jnp.abs(logp_old), 1.0)
  return jnp.max(jnp.where(mask, jnp.abs(logp - logp_old) / size, 0.0))


def policy_loss(
  log_w: Array, advantages: Array, low: float, high: float
) -> tuple[Array, Array]:
  """-min(w A, clip(w, 1 - low, 1 + high) A), and where the clip acts.

  PPO's clipped surrogate (arXiv:1707.06347, equation 7), with two bounds as
  in DAPO (arXiv:2503.14476, equation 10). It has no gradient where w has
  moved past a bound in the direction that A wants.

  Args:
    log_w: from `log_ratio`, `[rows, new]`.
    advantages: `[rows, new]`.
    low: how far w may fall below 1.
    high: how far it may rise above.

  Returns:
    The loss of each token, and 1.0 where it is clipped, `[rows, new]`.
  """
  chex.assert_rank([log_w, advantages], 2)
  w = jnp.exp(log_w)
  free, bound = w * advantages, jnp.clip(w, 1 - low, 1 + high) * advantages
  return -jnp.minimum(free, bound), (bound < free).astype(w.dtype)


def entropy(logits: Array) -> Array:
  """H = log Z - sum_v p_v l_v in nats, `[.., vocab]` to `[..]`.

  It is that of the distribution, not -log p of the token that came. Logits of
  -inf are tokens that cannot come.
  """
  chex.assert_rank(logits, {2, 3})
  log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  p = jnp.exp(logits - log_z)
  finite = jnp.where(p > 0, logits, 0.0)
  return log_z[..., 0] - jnp.sum(p * finite, axis=-1)


# --- The critic -------------------------------------------------------------


def value_loss(
  values: Array, values_old: Array, targets: Array, clip: float
) -> tuple[Array, Array]:
  """max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2.

  As in the reference code of PPO (arXiv:2005.12729, section 3): the critic
  may not go further than c at once either. c = 0 is the plain squared error.

  Args:
    values: now, `[rows, new]`.
    values_old: at the rollout, `[rows, new]`.
    targets: returns R, `[rows, new]`.
    clip: c.

  Returns:
    The loss of each token, and 1.0 where it is clipped, `[rows, new]`.
  """
  chex.assert_rank([values, values_old, targets], 2)
  free = (values - targets) ** 2
  if not clip:
    return 0.5 * free, jnp.zeros_like(free)
  near = jnp.clip(values, values_old - clip, values_old + clip)
  bound = (near - targets) ** 2
  return 0.5 * jnp.maximum(free, bound), (bound > free).astype(free.dtype)


# --- The leash --------------------------------------------------------------


def kl(logp: Array, logp_ref: Array, kind: str = "k3") -> Array:
  """Estimates of KL(policy | reference) from tokens the policy sampled.

  With d = log p - log p_ref (Schulman, "Approximating KL divergence", 2020,
  http://joschu.net/blog/kl-approx.html):

    k1 = d                  unbiased, may be negative
    k2 = d^2 / 2            biased, small variance; its gradient is that of KL
    k3 = e^-d - 1 + d       unbiased, never negative

  Args:
    logp: of the sampled tokens, `[rows, new]`.
    logp_ref: of the same under the reference, `[rows, new]`.
    kind: 'k1', 'k2' or 'k3'.
  """
  chex.assert_rank([logp, logp_ref], 2)
  d = logp - logp_ref
  if kind == "k1":
    return d
  return d**2 / 2 if kind == "k2" else jnp.expm1(-d) + d


@dataclass(frozen=True)
class Controller:
  """How the weight of the KL penalty goes after a target; 0 keeps it fixed.

    e = clip(kl / target - 1, -0.2, 0.2),   beta' = beta (1 + rate e)

  Ziegler et al., arXiv:1909.08593, section 2.2.

  Attributes:
    target: KL of a response in nats; 0 for none.
    rate: how fast beta follows.
  """

  target: float = 0.0
  rate: float = 0.1

  def __call__(self, beta: float, kl: float) -> float:
    """The weight after a rollout whose mean KL was `kl`."""
    if not self.target:
      return beta
    error = min(max(kl / self.target - 1.0, -0.2), 0.2)
    return beta * (1.0 + self.rate * error)


# --- Joining ----------------------------------------------------------------


def aggregate(
  x: Array, mask: Array, over: str = "token", longest: int = 0
) -> tuple[Array, Array]:
  """One number of a batch of token losses, and the weight it stands for.

    token      sum x / number of tokens        DAPO, arXiv:2503.14476, eq. 8
    sequence   mean of each row's mean         GRPO, arXiv:2402.03300, eq. 3
    constant   sum x / (rows * longest)        Dr. GRPO, arXiv:2503.20783

  Parts of a batch, joined by weight, give what the whole gives: the weight is
  the number of tokens, or of rows. Rows without any token count nowhere but in
  'constant'.

  Args:
    x: `[rows, new]`.
    mask: which tokens count, `[rows, new]`.
    over: what is a mean over.
    longest: the most tokens a response may have, for 'constant'.

  Returns:
    Mean and weight, scalars.
  """
  chex.assert_rank([x, mask], 2)
  there = mask.astype(x.dtype)
  n = jnp.sum(there, axis=1)
  total = jnp.sum(x * there, axis=1)
  if over == "token":
    total, weight = jnp.sum(total), jnp.sum(n)
  elif over == "sequence":
    total, weight = jnp.sum(total / jnp.maximum(n, 1.0)), jnp.sum(n > 0)
  else:
    total, weight = jnp.sum(total) / longest, jnp.asarray(len(x))
  weight = weight.astype(x.dtype)
  return total / jnp.maximum(weight, 1.0), weight
