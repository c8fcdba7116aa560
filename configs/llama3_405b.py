r"""Llama 3 405B, from nothing.

Source: The Llama 3 Herd of Models, arXiv:2407.21783: sizes and learning rate
from table 3; warm-up, steps, the cosine to a hundredth, 8,192 tokens of context
and, for most of the run, 16 million tokens a batch from section 3.4.1.

    python -m jaxlm.plan --config=configs/llama3_405b.py --target=v5p:8x16x16

On the machine itself the same file trains, given `--config.data.path` and the
model's tokenizer.json as `--config.data.tokenizer`.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config() -> ConfigDict:
  """405.9 billion parameters, 2,048 rows of 8,192 tokens."""
  config = default_config()
  config.steps = 1_200_000
  config.batch_size = 2048
  config.seq_len = 8192
  config.precision = "bfloat16"
  config.remat = "full"
  config.loss_chunk = 512
  config.parallel.preset = "fsdp"
  config.data.tokenizer = "tokenizer.json"

  config.model.family = "llama"
  config.model.vocab = 128256
  config.model.dim = 16384
  config.model.layers = 126
  config.model.heads = 128
  config.model.kv_heads = 8
  config.model.mlp_dim = 53248
  config.model.theta = 500000.0

  config.optimizer.name = "adamw"
  config.optimizer.lr = 8e-5
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip = 1.0
  config.optimizer.warmup = 8000
  config.optimizer.end_lr = 0.01
  return config
