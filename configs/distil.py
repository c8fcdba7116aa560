r"""Distils a teacher into a student on the student's own responses.

    python -m jaxlm.rl.distil --config=configs/distil.py \
        --config.model.path=STUDENT --config.distil.teacher=TEACHER

Both are what `jaxlm.load` reads, with the same tokenizer. On texts instead of
own responses: `jaxlm.train` with `--config.objective.name=distil` (docs/
preferences.md).

Source: arXiv:2306.13649, algorithm 1, all on policy. Expected: see
docs/preferences.md.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config() -> ConfigDict:
  """AdamW at 3e-4, 150 steps of 64 responses to two-digit sums."""
  config = default_config()
  config.model.path = "runs/student"
  config.steps = 150
  config.batch_size = 64
  config.seq_len = 12
  config.unroll = True
  config.log_every = 10
  config.eval_every = 50
  config.checkpoint_every = 50

  config.optimizer.name = "adamw"
  config.optimizer.lr = 3e-4
  config.optimizer.weight_decay = 0.0
  config.optimizer.warmup = 5
  config.optimizer.schedule = "constant"

  config.distil.task = "add"
  config.distil.levels = "2"
  config.distil.teacher = "runs/teacher"
  config.distil.prompts = 64
  config.distil.tokens = 4
  return config
