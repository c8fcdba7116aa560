"""The whole chain on the default tiny model, on two CPU cores.

    python -m jaxlm.chain

Pretraining on Python's documentation, fine-tuning on sums, a reward model, PPO
against that reward model and GRPO against the scorer; then both, and what they
began with, are asked the same held-out sums.

Source: the stages are the configs of this folder; InstructGPT's order
(arXiv:2203.02155, figure 2).
"""

from jaxlm.chain import Chain, Stage


def get_chain(quick: bool = False) -> Chain:
  """Five stages; with `quick` a few steps of each."""
  few = {"steps": 4, "eval_every": 0, "optimizer.warmup": 1} if quick else {}
  sft = {"start": "{pretrain}", "data.path": "task:add?levels=1-2"}
  rl = {"model.path": "{sft}", "seq_len": 24}
  small = {"questions": 64, "held_out": 16} if quick else {}
  return Chain(
    stages=(
      Stage("pretrain", "train", "configs/tiny.py", few),
      Stage(
        "sft",
        "train",
        "configs/sft.py",
        sft | {"steps": 300} | few,
        judged=True,
      ),
      Stage(
        "reward",
        "train",
        "configs/reward.py",
        sft | {"start": "{sft}", "steps": 300} | few,
      ),
      Stage(
        "ppo",
        "rl.ppo",
        "configs/ppo.py",
        rl
        | {"ppo.reward": "{reward}", "ppo.levels": "1-2", "steps": 60}
        | few
        | {f"ppo.{k}": v for k, v in small.items()},
        judged=True,
      ),
      Stage(
        "grpo",
        "rl.grpo",
        "configs/grpo.py",
        rl
        | {"grpo.levels": "1-2", "steps": 60}
        | few
        | {f"grpo.{k}": v for k, v in small.items()},
        judged=True,
      ),
    ),
    questions=f"--task=add --levels=1-2 --n={20 if quick else 300}",
  )
