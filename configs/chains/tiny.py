"""The whole chain on the default tiny model, on two CPU cores.

    python -m jaxlm.chain

Pretraining on Python's documentation, a short fine-tuning on answers in upper
case, a reward model, PPO against that reward model and GRPO against the scorer;
then both, and what they began with, are asked the same held-out questions.

Source: the stages are the configs of this folder; InstructGPT's order
(arXiv:2203.02155, figure 2).
"""

from jaxlm.chain import Chain, Stage

TASK = "upper"


def get_chain(quick: bool = False) -> Chain:
  """Five stages; with `quick` a few steps of each."""
  few = {"steps": 4, "eval_every": 0, "optimizer.warmup": 1} if quick else {}
  talk = {"data.path": f"task:{TASK}"}

  def reinforced(name: str, **keys) -> dict:
    """Keys of PPO or GRPO: a small step, short answers, few questions."""
    asked = {"questions": 64, "held_out": 16} if quick else {"questions": 4000}
    keys = {"task": TASK, "tokens": 12, "levels": "none", **asked, **keys}
    mine = {f"{name}.{key}": value for key, value in keys.items()}
    return {"model.path": "{sft}", "seq_len": 48, **mine}

  return Chain(
    stages=(
      Stage("pretrain", "train", "configs/tiny.py", few),
      Stage(
        "sft",
        "train",
        "configs/sft.py",
        talk | {"start": "{pretrain}", "steps": 120} | few,
        judged=True,
      ),
      Stage(
        "reward",
        "train",
        "configs/reward.py",
        talk | {"start": "{sft}", "seq_len": 48, "steps": 300} | few,
      ),
      Stage(
        "ppo",
        "rl.ppo",
        "configs/ppo.py",
        # A learned reward is only right near what it was trained on: small
        # steps, a short leash, and a price on never ending.
        reinforced(
          "ppo",
          reward="{reward}",
          prompts=128,
          missing_eos=3.0,
          scale_rewards=True,
          kl=0.2,
        )
        | {"steps": 60, "optimizer.lr": 2e-5}
        | few,
        judged=True,
      ),
      Stage(
        "grpo",
        "rl.grpo",
        "configs/grpo.py",
        reinforced("grpo", prompts=16)
        | {"steps": 80, "optimizer.lr": 1e-4}
        | few,
        judged=True,
      ),
    ),
    questions=f"--task={TASK} --n={20 if quick else 300}",
  )
