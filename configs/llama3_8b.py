r"""Llama 3 8B, from nothing.

Source: The Llama 3 Herd of Models, arXiv:2407.21783: sizes and learning rate
from table 3; warm-up, cosine to a hundredth and 8,192 tokens of context from
section 3.4.1, where they are those of 405B, as are 4 million tokens a batch.

    python -m jaxlm.plan --config=configs/llama3_8b.py --target=v5e:16x16

On the machine itself the same file trains, given `--config.data.path` and the
model's tokenizer.json as `--config.data.tokenizer`.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config() -> ConfigDict:
  """8.0 billion parameters, 512 rows of 8,192 tokens, 15 trillion in all."""
  config = default_config()
  config.steps = 3_600_000
  config.batch_size = 512
  config.seq_len = 8192
  config.accumulate = 2
  config.precision = "bfloat16"
  config.remat = "full"
  config.loss_chunk = 512
  config.parallel.preset = "fsdp"
  config.data.tokenizer = "tokenizer.json"

  config.model.family = "llama"
  config.model.vocab = 128256
  config.model.dim = 4096
  config.model.layers = 32
  config.model.heads = 32
  config.model.kv_heads = 8
  config.model.mlp_dim = 14336
  config.model.theta = 500000.0

  config.optimizer.name = "adamw"
  config.optimizer.lr = 3e-4
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip = 1.0
  config.optimizer.warmup = 8000
  config.optimizer.end_lr = 0.01
  return config
