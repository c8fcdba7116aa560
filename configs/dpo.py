r"""Teaches a model preferences: DPO, IPO, KTO, ORPO or SimPO.

    python -m jaxlm.train --config=configs/dpo.py --config.start=runs/sft \
        --config.data.path=FILE
    python -m jaxlm.train --config=configs/dpo.py --config.start=runs/sft \
        --config.objective.name=kto --config.data.path=task:reverse

START is what `jaxlm.load` reads, usually a run of configs/sft.py; it is the
reference, too. FILE has `prompt`, `chosen` and `rejected` in its records
(docs/preferences.md); `python -m jaxlm.rl.best_of` writes one of the model's
own responses. `--config.lora.rank=8` trains adapters instead of the model.

Source: beta = 0.1 and one pass at a small rate as in arXiv:2305.18290, appendix
B (5e-7 for billions of parameters; small models bear more). Watch `accuracy`
and `margin`, and `chosen`: if it falls far, lower the rate or take ORPO.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config(start: str = "START") -> ConfigDict:
  """AdamW at 1e-4, 200 steps of 32 pairs, no decay."""
  config = default_config()
  config.objective.name = "dpo"
  config.model.path = start
  config.data.path = "task:reverse"
  config.data.val_fraction = 0.1
  config.steps = 200
  config.batch_size = 32
  config.seq_len = 64
  config.unroll = True
  config.log_every = 20
  config.eval_every = 50
  config.checkpoint_every = 100

  config.optimizer.name = "adamw"
  config.optimizer.lr = 1e-4
  config.optimizer.b2 = 0.999
  config.optimizer.weight_decay = 0.0
  config.optimizer.warmup = 10
  config.optimizer.end_lr = 0.0
  return config
