"""Advantages and losses of jaxlm.rl beside TRL's own code, in float64.

    pip install trl            # 1.16: GRPO; it has no PPO any more
    pip install trl==1.8.0     # the last that has PPO
    python tests/golden/check_trl_rl.py

TRL's functions are called where they are functions. GRPO's loss is a method,
called with a stand-in for the trainer; PPO's advantages are lines of a long
method, which are cut out of TRL's source and run as they are. Printed is the
largest difference of each; docs/rl-trl.txt is what came of it.
"""

import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402
from trl.trainer import grpo_trainer  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
  entropy_from_logits,
  selective_log_softmax,
)

from jaxlm.losses import cross_entropy  # noqa: E402
from jaxlm.rl import advantages, losses  # noqa: E402

RNG = np.random.default_rng(0)
ROWS, NEW, GROUP = 12, 7, 4
LENGTHS = RNG.integers(1, NEW + 1, ROWS)
MASK = np.arange(NEW)[None] < LENGTHS[:, None]
WORST = 0.0


def normal(*shape: int) -> np.ndarray:
  return RNG.normal(size=shape)


def tell(name: str, ours, theirs) -> None:
  """Prints how far two results are apart."""
  global WORST
  gap = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
  WORST = max(WORST, gap)
  print(f"  {name:58} {gap:.1e}")


# --- GRPO -------------------------------------------------------------------


class Accelerator:
  """One process."""

  num_processes = 1
  sync_gradients = True

  def gather(self, x):
    return x

  gather_for_metrics = gather

  def reduce(self, x, reduction):
    return x


def trainer(logps, entropies, kind: str, level: str, beta: float):
  """What `GRPOTrainer._compute_loss` looks at of its trainer."""
  args = SimpleNamespace(
    delta=None,
    use_bias_correction_kl=False,
    steps_per_generation=1,
    gradient_accumulation_steps=1,
  )
  found = SimpleNamespace(
    args=args,
    loss_type=kind,
    importance_sampling_level=level,
    beta=beta,
    epsilon_low=0.2,
    epsilon_high=0.28,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    use_vllm=False,
    vllm_importance_sampling_correction=False,
    aux_loss_enabled=False,
    max_completion_length=NEW,
    current_gradient_accumulation_steps=1,
    accelerator=Accelerator(),
    model=SimpleNamespace(training=True),
    use_adaptive_entropy=False,
    _entropy_bonus_enabled=False,
    entropy_coef=0.0,
    _metrics={"train": defaultdict(list)},
  )
  found._get_per_token_logps_and_entropies = lambda *a, **k: (
    logps,
    entropies,
    None,
  )
  return found


def grpo() -> None:
  """Every loss type that both have."""
  old, ref = normal(ROWS, NEW) - 2, normal(ROWS, NEW) - 2
  new = old + 0.3 * normal(ROWS, NEW)
  a = normal(ROWS)
  over = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}
  for kind, name in over.items():
    for level in ("token", "sequence"):
      for beta in (0.0, 0.1):
        logps = torch.tensor(new, requires_grad=True)
        inputs = {
          "prompt_ids": torch.zeros(ROWS, 2, dtype=torch.long),
          "prompt_mask": torch.ones(ROWS, 2),
          "completion_ids": torch.zeros(ROWS, NEW, dtype=torch.long),
          "completion_mask": torch.tensor(MASK.astype(float)),
          "advantages": torch.tensor(a),
          "old_per_token_logps": torch.tensor(old),
          "ref_per_token_logps": torch.tensor(ref),
          "num_items_in_batch": torch.tensor(float(MASK.sum())),
        }
        of = trainer(logps, torch.ones(ROWS, NEW), kind, level, beta)
        theirs = grpo_trainer.GRPOTrainer._compute_loss(of, None, inputs)
        theirs.backward()

        def ours(p, name=name, level=level, beta=beta):
          log_w = losses.log_ratio(p, jnp.asarray(old), MASK, level)
          each_a = jnp.broadcast_to(jnp.asarray(a)[:, None], p.shape)
          each, _ = losses.policy_loss(log_w, each_a, 0.2, 0.28)
          each = each + beta * losses.kl(p, jnp.asarray(ref), "k3")
          return losses.aggregate(each, MASK, name, NEW)[0]

        said = f"GRPO {kind}, {level} ratio, beta {beta}"
        tell(said, ours(jnp.asarray(new)), theirs.detach())
        slope = jax.grad(ours)(jnp.asarray(new))
        tell(f"{said}, gradient", slope, logps.grad)


def small() -> None:
  """Log-probabilities and entropy."""
  logits, ids = 3 * normal(ROWS, NEW, 11), RNG.integers(0, 11, (ROWS, NEW))
  theirs = selective_log_softmax(torch.tensor(logits), torch.tensor(ids))
  ours = -cross_entropy(jnp.asarray(logits), jnp.asarray(ids))[0]
  tell("selective_log_softmax", ours, theirs)
  theirs = entropy_from_logits(torch.tensor(logits))
  tell("entropy_from_logits", losses.entropy(jnp.asarray(logits)), theirs)


def groups() -> None:
  """Advantages of groups: the lines of `_generate_and_score_completions`."""
  r = normal(ROWS // GROUP, GROUP)
  t = torch.tensor(r)
  mean = torch.nanmean(t, dim=1, keepdim=True)
  for scale, std in (("group", t.std(1, keepdim=True)), ("batch", t.std())):
    theirs = (t - mean) / (std + 1e-4)
    ours = advantages.group_relative(jnp.asarray(r), scale)
    tell(f"scale_rewards={scale}", ours, theirs)


# --- PPO --------------------------------------------------------------------


def ppo() -> None:
  """Advantages, returns and both losses, by the lines of TRL's own loop."""
  from trl.experimental.ppo import ppo_trainer as theirs

  x = normal(ROWS, NEW)
  t, m = torch.tensor(x), torch.tensor(MASK)
  for shift in (True, False):
    white = theirs.masked_whiten(t, m, shift_mean=shift) * m
    ours = advantages.whiten(jnp.asarray(x), MASK, shift)
    tell(f"masked_whiten, shift_mean={shift}", ours, white)

  # All responses have the full length here: TRL puts the score one place
  # behind the end of a shorter one, on padding, and we on its last token.
  source = textwrap.dedent(inspect.getsource(theirs.PPOTrainer.train))
  whole = np.ones((ROWS, NEW), bool)
  logp, ref, v = normal(ROWS, NEW), normal(ROWS, NEW), normal(ROWS, NEW)
  score = normal(ROWS)
  for kind in ("k1", "k3"):
    args = SimpleNamespace(
      kl_estimator=kind,
      kl_coef=0.05,
      whiten_rewards=False,
      gamma=0.97,
      lam=0.9,
    )
    known = {
      "torch": torch,
      "args": args,
      "masked_whiten": theirs.masked_whiten,
      "logprobs": torch.tensor(logp),
      "ref_logprobs": torch.tensor(ref),
      "values": torch.tensor(v),
      "scores": torch.tensor(score),
      "responses": torch.zeros(ROWS, NEW),
      "sequence_lengths": torch.full((ROWS,), NEW - 1),
      "sequence_lengths_p1": torch.full((ROWS,), NEW),
      "padding_mask": torch.zeros(ROWS, NEW, dtype=torch.bool),
      "padding_mask_p1": torch.zeros(ROWS, NEW, dtype=torch.bool),
    }
    exec(between(source, "logr = ref", "empty_cache()"), known)
    kl = losses.kl(jnp.asarray(logp), jnp.asarray(ref), kind)
    earned = advantages.token_rewards(jnp.asarray(score), kl, whole, 0.05)
    a, target = advantages.gae(earned, jnp.asarray(v), whole, 0.97, 0.9)
    tell(f"PPO rewards with {kind}", earned, known["rewards"])
    tell(f"PPO returns with {kind}", target, known["returns"])
    white = advantages.whiten(a, whole)
    tell(f"PPO advantages with {kind}", white, known["advantages"])

  old, new = normal(ROWS, NEW), normal(ROWS, NEW)
  vold, vnew, a = v, v + 0.3 * normal(ROWS, NEW), normal(ROWS, NEW)
  known = {
    "torch": torch,
    "args": SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1),
    "masked_mean": theirs.masked_mean,
    "vpred": torch.tensor(vnew),
    "mb_values": torch.tensor(vold),
    "mb_return": torch.tensor(x),
    "mb_logprobs": torch.tensor(old),
    "new_logprobs": torch.tensor(new),
    "mb_advantage": torch.tensor(a),
    "padding_mask": ~m,
    "padding_mask_p1": ~m,
    "micro_batch_inds": slice(None),
  }
  exec(between(source, "vpredclipped = ", "accelerator.backward"), known)
  log_w = losses.log_ratio(jnp.asarray(new), jnp.asarray(old), MASK)
  each, _ = losses.policy_loss(log_w, jnp.asarray(a), 0.2, 0.2)
  tell("PPO pg_loss", losses.aggregate(each, MASK)[0], known["pg_loss"])
  error, _ = losses.value_loss(
    jnp.asarray(vnew), jnp.asarray(vold), jnp.asarray(x), 0.2
  )
  tell("PPO vf_loss", losses.aggregate(error, MASK)[0], known["vf_loss"])


def between(source: str, first: str, last: str) -> str:
  """The lines from the one that begins with `first` up to that of `last`."""
  lines = source.splitlines()
  at = next(i for i, x in enumerate(lines) if x.strip().startswith(first))
  to = next(i for i, x in enumerate(lines) if i > at and last in x)
  return textwrap.dedent("\n".join(lines[at:to]))


if __name__ == "__main__":
  print(f"TRL {trl.__version__}, largest absolute difference:")
  small()
  groups()
  grpo()
  try:
    ppo()
  except ModuleNotFoundError:
    print("  this TRL has no PPO")
  assert WORST < 1e-7, WORST
