"""Learning rates as functions of the step.

All begin with a linear warm-up from zero over `warmup` steps (step 0 has rate
zero, as in optax and transformers), except `one_cycle`, which has its own. All
end at `final`, given as a fraction of `peak`; past `steps` they stay there.
What optax has comes from optax.

A schedule takes an integer step (traced or not) and returns a float32 scalar;
it is exact up to 2²⁴ steps.
"""

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxlm.errors import UserError

Array = jax.Array
Schedule = Callable[[Array | int], Array]


def constant(
  peak: float, steps: int, warmup: int = 0, final: float = 0.0
) -> Schedule:
  """Warm-up, then `peak` for ever; `steps` and `final` have no say."""
  del steps, final
  return _warm(optax.constant_schedule(peak), peak, warmup)


def linear(
  peak: float, steps: int, warmup: int = 0, final: float = 0.0
) -> Schedule:
  """Warm-up, then a straight line to `final * peak` at `steps`."""
  decay = optax.linear_schedule(peak, final * peak, steps - warmup)
  return _warm(decay, peak, warmup)


def cosine(
  peak: float, steps: int, warmup: int = 0, final: float = 0.0
) -> Schedule:
  """Warm-up, then half a cosine to `final * peak` at `steps`.

  With p the share of the steps after warm-up that is done, the rate is
  peak (final + (1 − final) (1 + cos πp) / 2); Loshchilov and Hutter, SGDR,
  arXiv:1608.03983.
  """
  decay = optax.cosine_decay_schedule(peak, steps - warmup, alpha=final)
  return _warm(decay, peak, warmup)


def wsd(
  peak: float,
  steps: int,
  warmup: int = 0,
  final: float = 0.0,
  decay: float = 0.2,
  shape: str = "linear",
) -> Schedule:
  """Warm-up, stable, decay: `peak` until the last share `decay` of the steps.

  A run can be prolonged from any point of its stable part (MiniCPM,
  arXiv:2404.06395). With p the share of the decay that is done, the rate falls
  from `peak` to `final * peak` as 1 − p ('linear'), (1 + cos πp) / 2
  ('cosine') or 1 − √p ('sqrt'; arXiv:2405.18392).
  """
  if shape not in DECAYS:
    raise UserError(
      f"unknown decay shape {shape!r}; known: {', '.join(DECAYS)}"
    )
  n = max(1, round(decay * steps))
  start = max(steps - n, warmup)
  fall = DECAYS[shape]

  def stable_then_decay(count: Array) -> Array:
    p = jnp.clip((count - (start - warmup)) / (steps - start), 0.0, 1.0)
    return peak * (final + (1 - final) * fall(p))

  return _warm(stable_then_decay, peak, warmup)


DECAYS: dict[str, Callable[[Array], Array]] = {
  "linear": lambda p: 1 - p,
  "cosine": lambda p: (1 + jnp.cos(jnp.pi * p)) / 2,
  "sqrt": lambda p: 1 - jnp.sqrt(p),
}


def inverse_sqrt(
  peak: float, steps: int, warmup: int = 0, final: float = 0.0
) -> Schedule:
  """Warm-up, then peak √(warmup / step): no end need be known.

  Vaswani et al., arXiv:1706.03762, section 5.3. Without warm-up the rate is
  peak √(10000 / (10000 + step)), as transformers has it. It never falls below
  `final * peak`.
  """
  del steps
  scale = warmup or 10_000

  def decay(count: Array) -> Array:
    rate = jnp.sqrt(scale / (count + scale))
    return peak * jnp.maximum(rate, final)

  return _warm(decay, peak, warmup)


def one_cycle(
  peak: float, steps: int, warmup: int = 0, final: float = 0.0
) -> Schedule:
  """Half a cosine up from `peak / 25`, and another down to `final * peak`.

  Smith and Topin, arXiv:1708.07120. Without `warmup` the way up takes 30 % of
  the steps; without `final` the end is `peak / 250000`.
  """
  up = (warmup or round(0.3 * steps)) / steps
  down = 1.0 / (25.0 * final) if final else 1e4
  return _scalar(optax.cosine_onecycle_schedule(steps, peak, up, 25.0, down))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
  "constant": constant,
  "linear": linear,
  "cosine": cosine,
  "wsd": wsd,
  "inverse_sqrt": inverse_sqrt,
  "one_cycle": one_cycle,
}


def make_schedule(
  name: str,
  peak: float,
  steps: int,
  warmup: int = 0,
  final: float = 0.0,
  decay: float = 0.2,
) -> Schedule:
  """The schedule called `name`, with its numbers checked.

  Args:
    name: a key of `SCHEDULES`.
    peak: highest learning rate.
    steps: length of the run.
    warmup: steps until `peak` is reached.
    final: last rate as a fraction of `peak`.
    decay: share of the steps in which 'wsd' decays.

  Raises:
    UserError: for an unknown name or impossible numbers.
  """
  if name not in SCHEDULES:
    near = difflib.get_close_matches(name, SCHEDULES, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
      f"unknown schedule {name!r}; {hint}known: {', '.join(SCHEDULES)}"
    )
  if not 0 <= warmup < steps:
    raise UserError(
      f"warm-up takes {warmup} of {steps} steps; it must be shorter than the"
      " run: lower the warm-up or raise the steps"
    )
  if not 0 < decay <= 1:
    raise UserError(f"the decay takes {decay} of the steps; use 0 < share <= 1")
  if peak < 0 or not 0 <= final <= 1:
    raise UserError(
      f"learning rate {peak} with final fraction {final}: the rate must not be"
      " negative, and the fraction must be between 0 and 1"
    )
  more = (decay,) if name == "wsd" else ()
  return SCHEDULES[name](peak, steps, warmup, final, *more)


def _warm(schedule: Schedule, peak: float, warmup: int) -> Schedule:
  """`warmup` steps in a line from 0 to `peak`, then `schedule` from its 0."""
  if warmup:
    up = optax.linear_schedule(0.0, peak, warmup)
    schedule = optax.join_schedules([up, schedule], [warmup])
  return _scalar(schedule)


def _scalar(schedule: Schedule) -> Schedule:
  """Makes a schedule take integers of any kind and return float32.

  optax mixes integers and floats freely; strict promotion forbids that.
  """

  def at(step: Array | int) -> Array:
    with jax.numpy_dtype_promotion("standard"):
      value = schedule(jnp.asarray(step, jnp.float32))
    return jnp.asarray(value, jnp.float32)

  return at
