r"""GRPO on two-digit sums, from a model that gets some of them right.

    python -m jaxlm.rl.grpo --config=configs/grpo.py --config.model.path=DIR

From a model of 0.1 million parameters with pass@1 of 39 to 43 % on held-out
sums: 84 to 91 % over five seeds, in about a minute (docs/rl.md,
`python benchmarks/rl_curves.py`).

Switches: `--config.method=grpo|dr_grpo|dapo|gspo|rloo|reinforce`, and a
published model of this directory, whose step is planned (docs/plan.md):

    python -m jaxlm.plan --config=configs/grpo.py --config.model=llama3_8b \
        --target=h100:16
"""

from pathlib import Path

from jaxlm.config import default_config, from_file

METHODS = {
  "grpo": {"over": "sequence"},
  "dr_grpo": {"over": "constant", "scale": "none"},
  "dapo": {"clip_high": 0.28, "rounds": 3},
  "gspo": {
    "ratio": "sequence",
    "over": "sequence",
    "clip_low": 3e-4,
    "clip_high": 4e-4,
  },
  "rloo": {"advantage": "loo"},
  "reinforce": {"advantage": "reinforce"},
}


def get_config(method: str = "dapo", model: str = ""):
  """The keys of one of `METHODS`; of a published `model`, at its size."""
  config = default_config()
  config.model.path = "runs/sft"
  config.steps = 150
  config.seq_len = 12
  config.batch_size = 128
  config.unroll = True
  config.log_every = 5
  config.eval_every = 50
  config.checkpoint_every = 50

  config.optimizer.lr = 3e-4
  config.optimizer.warmup = 5
  config.optimizer.schedule = "constant"
  config.optimizer.weight_decay = 0.0

  config.grpo.task = "add"
  config.grpo.levels = "2"
  config.grpo.questions = 6000
  config.grpo.prompts = 64
  config.grpo.samples = 8
  config.grpo.tokens = 4
  for name, value in METHODS[method].items():
    config.grpo[name] = value
  if model:
    published(config, model)
  return config


def published(config, name: str) -> None:
  """512 responses of up to 1,024 tokens to 64 prompts of up to 1,024."""
  path = Path(__file__).with_name(f"{name}.py")
  sizes = {
    k.removeprefix("model."): v
    for k, v in from_file(path, {})[0].items()
    if k.startswith("model.")
  }
  config.model.update(sizes)
  config.model.path = None
  config.seq_len, config.grpo.tokens = 2048, 1024
  config.batch_size, config.accumulate = 512, 8
  config.precision, config.remat, config.unroll = "bfloat16", "full", False
  config.parallel.preset = "fsdp"
  config.optimizer.lr = 1e-6
