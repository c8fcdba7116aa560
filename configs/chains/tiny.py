"""The whole chain on the default tiny model, on two CPU cores.

    python -m jaxlm.chain

Pretraining on Python's documentation, a short fine-tuning on answers in upper
case, a reward model, PPO against that reward model and GRPO against the scorer;
then both, and what they began with, are asked the same held-out questions. The
reward model learns from what the fine-tuned one says, right beside wrong: it
will be asked about such answers, and one that has only seen others is fooled.

Source: the stages are the configs of this folder; InstructGPT's order
(arXiv:2203.02155, figure 2).
"""

from jaxlm.chain import Chain, Stage

TASK = "upper"
TOKENS = 16  # of an answer; the longest right one has 12, and its end
HEAD = (("value/.*", 10.0), (".*", 1.0))  # factors of PPO's rate


def get_chain(quick: bool = False) -> Chain:
  """Six stages; with `quick` a few steps of each."""
  few = {"steps": 4, "eval_every": 0, "optimizer.warmup": 1} if quick else {}

  def reinforced(name: str, **keys) -> dict:
    """Keys of PPO or GRPO: a small step, short answers, few questions."""
    asked = {"questions": 64, "held_out": 16} if quick else {"questions": 4000}
    keys = {"task": TASK, "tokens": TOKENS, "levels": "none", **asked, **keys}
    mine = {f"{name}.{key}": value for key, value in keys.items()}
    return {"model.path": "{sft}", "seq_len": 48, **mine}

  return Chain(
    stages=(
      Stage("pretrain", "train", "configs/tiny.py", few),
      Stage(
        "sft",
        "train",
        "configs/sft.py",
        {"start": "{pretrain}", "data.path": f"task:{TASK}", "steps": 120}
        | few,
        judged=True,
      ),
      Stage(
        "pairs",
        "rl.best_of",
        keys={
          "workdir": "{sft}",
          "task": TASK,
          "prompts": 32 if quick else 2000,
          "samples": 8,
          "tokens": TOKENS,
          "pairs": 4,
          "gold": True,
          "out": "{pairs}/pairs.jsonl",
        },
      ),
      Stage(
        "reward",
        "train",
        "configs/reward.py",
        {
          "start": "{sft}",
          "data.path": "{pairs}/pairs.jsonl",
          "seq_len": 32,
          "batch_size": 32,
          "steps": 300,
          # Right answers to all prompts score alike.
          "objective.centre": 0.01,
        }
        | few,
      ),
      Stage(
        "ppo",
        "rl.ppo",
        "configs/ppo.py",
        # Drawn at 0.7, one answer in four is right, not one in eleven; at 1
        # the likeliest answers became worse (docs/chain.md).
        reinforced(
          "ppo",
          reward="{reward}",
          temperature=0.7,
          prompts=128,
          missing_eos=1.0,
          scale_rewards=True,
          value_weight=0.1,
        )
        | {"steps": 60, "optimizer.lr": 5e-5, "optimizer.lr_table": HEAD}
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
