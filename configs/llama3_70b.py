r"""Llama 3 70B, from nothing.

Source: The Llama 3 Herd of Models, arXiv:2407.21783: sizes and learning rate
from table 3; warm-up, cosine to a hundredth and 8,192 tokens of context from
section 3.4.1, where they are those of 405B, as are 4 million tokens a batch.

    python -m jaxlm.plan --config=configs/llama3_70b.py --target=v5p:8x8x8

On the machine itself the same file trains, given `--config.data.path` and the
model's tokenizer.json as `--config.data.tokenizer`.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config() -> ConfigDict:
  """70.6 billion parameters, 512 rows of 8,192 tokens, 15 trillion in all."""
  config = default_config()
  config.steps = 3_600_000
  config.batch_size = 512
  config.seq_len = 8192
  config.precision = "bfloat16"
  config.remat = "full"
  config.loss_chunk = 512
  config.parallel.preset = "fsdp"
  config.data.tokenizer = "tokenizer.json"

  config.model.family = "llama"
  config.model.vocab = 128256
  config.model.dim = 8192
  config.model.layers = 80
  config.model.heads = 64
  config.model.kv_heads = 8
  config.model.mlp_dim = 28672
  config.model.theta = 500000.0

  config.optimizer.name = "adamw"
  config.optimizer.lr = 1.5e-4
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip = 1.0
  config.optimizer.warmup = 8000
  config.optimizer.end_lr = 0.01
  return config
