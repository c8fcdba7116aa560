"""Losses of preferences: what a better answer should be worth, arrays only.

Reward models learn scores (`bradley_terry` and its kin); policies learn from
the log-probabilities of whole responses, under themselves and under a frozen
reference (`dpo`, `ipo`, `kto`) or without one (`orpo`, `simpo`). All return a
loss for each pair or example; whoever calls takes the mean.

    s(x) = 1 / (1 + exp(-x))       w, l: the chosen and the rejected response
"""

import chex
import jax
import jax.numpy as jnp

Array = jax.Array

# --- Scores -----------------------------------------------------------------


def bradley_terry(
  chosen: Array,
  rejected: Array,
  margin: Array | float = 0.0,
  smoothing: float = 0.0,
) -> Array:
  """-(1 - e) log s(r_w - r_l - m) - e log s(r_l - r_w + m).

  With m = 0 and e = 0 this is the likelihood of Bradley and Terry (1952) that
  reward models are trained on (arXiv:1706.03741, equation 1; arXiv:2203.02155,
  equation 1). With m > 0 it is the margin of Llama 2 (arXiv:2307.09288,
  equation 2); e is the share of labels believed to be wrong.

  Args:
    chosen: scores r_w `[pairs]`.
    rejected: scores r_l `[pairs]`.
    margin: m, one number or `[pairs]`: by how much better the chosen one is.
    smoothing: e, at least 0 and below 1/2.

  Returns:
    `[pairs]`, in nats.
  """
  chex.assert_rank([chosen, rejected], 1)
  h = chosen - rejected - margin
  return -(1 - smoothing) * jax.nn.log_sigmoid(
    h
  ) - smoothing * jax.nn.log_sigmoid(-h)


def hinge(chosen: Array, rejected: Array, margin: Array | float = 1.0) -> Array:
  """max(0, m - (r_w - r_l)), the ranking loss of support vector machines.

  Joachims (2002), "Optimizing search engines using clickthrough data".

  Args:
    chosen: scores r_w `[pairs]`.
    rejected: scores r_l `[pairs]`.
    margin: m, one number or `[pairs]`; what is that far apart costs nothing.

  Returns:
    `[pairs]`.
  """
  chex.assert_rank([chosen, rejected], 1)
  return jax.nn.relu(margin - (chosen - rejected))


def plackett_luce(scores: Array, mask: Array | None = None) -> Array:
  """-sum_i log(exp r_i / sum_(j >= i) exp r_j): of a whole ranking.

  The best is drawn first, then the best of the rest, and so on (Plackett 1975,
  Luce 1959; for rewards arXiv:2305.18290, appendix A.3). With two answers it is
  Bradley-Terry.

  Args:
    scores: r `[lists, answers]`, the best first.
    mask: which answers there are, bool of the same shape; those that are not
      come last.

  Returns:
    `[lists]`, in nats.
  """
  chex.assert_rank(scores, 2)
  mask = jnp.ones(scores.shape, bool) if mask is None else mask.astype(bool)
  low = jnp.where(mask, scores, -jnp.inf)
  rest = jax.lax.cumlogsumexp(low, axis=1, reverse=True)
  return jnp.sum(jnp.where(mask, rest - scores, 0.0), axis=1)


# --- Policies with a reference ----------------------------------------------


def dpo(
  chosen: Array, rejected: Array, beta: float = 0.1, smoothing: float = 0.0
) -> Array:
  """Bradley-Terry of the rewards b log(pi / ref) that a policy implies.

    h = b ((log pi_w - log ref_w) - (log pi_l - log ref_l))
    loss = -(1 - e) log s(h) - e log s(-h)

  Rafailov et al., arXiv:2305.18290, equation 7; e > 0 is their conservative
  form for labels of which a share e is wrong (Mitchell 2023).

  Args:
    chosen: log(pi / ref) of the chosen responses, `[pairs]`.
    rejected: that of the rejected ones, `[pairs]`.
    beta: b, how dearly the policy pays for leaving the reference.
    smoothing: e.

  Returns:
    `[pairs]`, in nats.
  """
  chex.assert_rank([chosen, rejected], 1)
  return bradley_terry(beta * chosen, beta * rejected, 0.0, smoothing)


def ipo(chosen: Array, rejected: Array, beta: float = 0.1) -> Array:
  """(log(pi_w / ref_w) - log(pi_l / ref_l) - 1 / (2 b))^2.

  A step of fixed size instead of an endless one, so that clean labels do not
  pull the policy to certainty (Azar et al., arXiv:2310.12036, equation 17).

  Args:
    chosen: log(pi / ref) of the chosen responses, `[pairs]`; means over
      tokens, if lengths differ (that is what the authors measured).
    rejected: that of the rejected ones, `[pairs]`.
    beta: b, tau in the paper.

  Returns:
    `[pairs]`.
  """
  chex.assert_rank([chosen, rejected], 1)
  return (chosen - rejected - 1 / (2 * beta)) ** 2


def kto(
  ratio: Array,
  desirable: Array,
  baseline: Array,
  beta: float = 0.1,
  weights: tuple[float, float] = (1.0, 1.0),
) -> Array:
  """Kahneman-Tversky: good above the baseline, bad below; no pairs needed.

    loss = v_d (1 - s(b (log(pi / ref) - z)))    where desirable
           v_u (1 - s(b (z - log(pi / ref))))    where not

  Ethayarajh et al., arXiv:2402.01306, equation 8. The baseline z has no
  gradient.

  Args:
    ratio: log(pi / ref) of each response, `[examples]`.
    desirable: bool `[examples]`.
    baseline: z, from `kl_baseline`; a scalar.
    beta: b.
    weights: v_d and v_u, which even out unequal numbers of the two.

  Returns:
    `[examples]`, between 0 and the weights.
  """
  chex.assert_rank([ratio, desirable, baseline], [1, 1, 0])
  sign = jnp.where(desirable, 1.0, -1.0).astype(ratio.dtype)
  scale = jnp.where(desirable, *weights).astype(ratio.dtype)
  z = jax.lax.stop_gradient(baseline)
  return scale * jax.nn.sigmoid(-beta * sign * (ratio - z))


def kl_baseline(ratio: Array, mask: Array | None = None) -> Array:
  """The point of KTO from which gains and losses count, no gradient.

    z = max(0, mean log(pi / ref)) over prompts with somebody else's answer

  Answers that do not belong to their prompts stand for samples of the policy:
  a biased estimate of KL(pi | ref), and a cheap one (arXiv:2402.01306, section
  4.1).

  Args:
    ratio: log(pi / ref) of each such answer, `[examples]`.
    mask: which count, of the same shape; None: all.

  Returns:
    A scalar.
  """
  chex.assert_rank(ratio, 1)
  mask = jnp.ones_like(ratio) if mask is None else mask.astype(ratio.dtype)
  mean = jnp.sum(ratio * mask) / jnp.maximum(jnp.sum(mask), 1.0)
  return jax.lax.stop_gradient(jax.nn.relu(mean))


# --- Policies without one ---------------------------------------------------


def orpo(chosen: Array, rejected: Array, beta: float = 0.1) -> Array:
  """-b log s(log odds_w - log odds_l), odds = p / (1 - p).

  What is added to the likelihood of the chosen response (Hong et al.,
  arXiv:2403.07691, equations 6 and 7; b is their lambda).

  Args:
    chosen: log p of the chosen responses, means over tokens, `[pairs]`, below
      zero.
    rejected: that of the rejected ones, `[pairs]`.
    beta: b.

  Returns:
    `[pairs]`, in nats.
  """
  chex.assert_rank([chosen, rejected], 1)
  return -beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logp: Array) -> Array:
  """log(p / (1 - p)) from log p < 0, exact at both ends."""
  return logp - jax.nn.log1mexp(-logp)


def simpo(
  chosen: Array, rejected: Array, beta: float = 2.0, gamma: float = 1.0
) -> Array:
  """-log s(b (log p_w - log p_l) - g): no reference, and length is divided out.

  Meng et al., arXiv:2405.14734, equation 6. Others write g = b times a ratio.

  Args:
    chosen: log p of the chosen responses, means over tokens, `[pairs]`.
    rejected: that of the rejected ones, `[pairs]`.
    beta: b.
    gamma: g, the margin that a pair should reach.

  Returns:
    `[pairs]`, in nats.
  """
  chex.assert_rank([chosen, rejected], 1)
  return bradley_terry(beta * chosen, beta * rejected, gamma)
