"""Trains a reward model on pairs of responses, one better than the other.

    python -m jaxlm.train --config=configs/reward.py
    python -m jaxlm.train --config=configs/reward.py --config.start=runs/sft
    python -m jaxlm.rl.reward_check --workdir=runs/reward --task=reverse

The default makes pairs of words turned around and nearly so, and a small model
from nothing, which learns to tell them apart in minutes on two cores. START is
what `jaxlm.load` reads; its tokenizer and template come with it. For your own
pairs set `--config.data.path=FILE` (docs/preferences.md has the forms).
`--config.objective.kind=encoder` reads both ways;
`--config.objective.noise=0.2` turns a fifth of the labels, to see what it does.
A task that has not 40,000 prompts says so: set `--config.objective.examples`.

Source: Bradley-Terry as in arXiv:2203.02155, equation 1. Expected: see
docs/reward-models.md.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config(start: str = "") -> ConfigDict:
  """2 layers x 64 with Muon from nothing; AdamW at 3e-4 from `start`."""
  config = default_config()
  config.objective.name = "reward"
  config.data.path = "task:reverse"
  config.data.val_fraction = 0.2
  config.steps = 1500
  config.batch_size = 64
  config.seq_len = 32
  config.unroll = True
  config.steps_per_call = 10
  config.log_every = 100
  config.eval_every = 300
  config.checkpoint_every = 300
  config.optimizer.warmup = 20
  config.optimizer.end_lr = 0.0
  if start:
    config.model.path = start
    config.optimizer.lr = 3e-4
    config.optimizer.weight_decay = 0.0
    return config
  # Few pairs are learned by heart: a changed letter or two exchanged ones are
  # what a model from nothing needs many to see.
  config.objective.examples = 40_000
  config.data.val_fraction = 0.05
  config.steps = 2500
  config.model.family = "modern"
  config.model.dim = 64
  config.model.layers = 2
  config.model.heads = 4
  config.data.tokenizer = "chars"
  config.optimizer.name = "muon"
  config.optimizer.lr = 3e-3
  return config
