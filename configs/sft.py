r"""Learns to answer: fine-tuning on prompts and responses.

    python -m jaxlm.train --config=configs/sft.py
    python -m jaxlm.train --config=configs/sft.py --config.start=runs/tiny \
        --config.data.path=task:upper
    python -m jaxlm.train --config=configs/sft.py --config.start=DIR \
        --config.data.path=talks.jsonl --config.objective.template=chatml
    python -m jaxlm.evaluate --workdir=runs/sft --task=reverse

Without a `start` a small model with characters for tokens is made; DIR is what
`jaxlm.load` reads: a run of ours, a Hugging Face directory, a GGUF file.

Source: the task is made by `jaxlm.tasks`; the rate from a start is ten times
that of common full fine-tuning (2e-5), which is right for models as small as
ours. Expected of the first line on 2 CPU cores: 100 % of held-out prompts
answered to the letter after 400 steps, of the second 98 % after 200.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config(start: str = "") -> ConfigDict:
  """400 steps of 32 rows of 64 tokens, on the responses alone."""
  config = default_config()
  config.objective.name = "sft"
  config.data.path = "task:reverse"
  config.steps = 400
  config.batch_size = 32
  config.seq_len = 64
  config.unroll = True
  config.log_every = 20
  config.eval_every = 100
  config.checkpoint_every = 200
  config.optimizer.warmup = 20
  config.optimizer.end_lr = 0.0
  config.sample.tokens = 0
  if start:
    config.model.path = start
    config.optimizer.lr = 3e-4
    config.optimizer.weight_decay = 0.0
    return config
  config.model.family = "modern"
  config.model.dim = 128
  config.model.layers = 4
  config.model.heads = 4
  config.data.tokenizer = "chars"
  config.optimizer.name = "muon"
  config.optimizer.lr = 3e-3
  config.optimizer.muon_lr = 0.02
  return config
