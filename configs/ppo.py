"""PPO on two-digit sums, from a model that answers some of them.

python -m jaxlm.rl.ppo --config=configs/ppo.py
"""

from jaxlm.config import default_config


def get_config():
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
  return config
