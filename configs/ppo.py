r"""PPO on two-digit sums, from a model that answers some of them.

    python -m jaxlm.rl.ppo --config=configs/ppo.py --config.model.path=DIR

Switch: a published model of this directory, whose step is planned:

    python -m jaxlm.plan --config=configs/ppo.py --config.model=llama3_8b \
        --target=h100:32
"""

from pathlib import Path

from jaxlm.config import default_config, from_file


def get_config(model: str = ""):
  """Keys by their names; docs/rl.md has what comes of them."""
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

  config.ppo.task = "add"
  config.ppo.levels = "2"
  config.ppo.questions = 6000
  config.ppo.prompts = 512
  config.ppo.tokens = 4
  config.ppo.epochs = 2
  config.ppo.value_weight = 0.5
  if model:
    published(config, model)
  return config


def published(config, name: str) -> None:
  """512 prompts and responses, sizes and all else as configs/grpo.py has it."""
  path = Path(__file__).with_name("grpo.py")
  for key, value in from_file(path, {"model": name})[0].items():
    section, _, last = key.rpartition(".")
    if section != "grpo":
      (config[section] if section else config)[last] = value
  config.ppo.tokens = 1024
  config.ppo.critic = "separate"
