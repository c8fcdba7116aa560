r"""Llama 4 Scout, 17B active of 109B: sixteen experts, one a token.

Source: the config.json published with meta-llama/Llama-4-Scout-17B-16E. Batch
and learning rate of the pretraining are not public: these are Llama 3 70B's.

    python -m jaxlm.plan --config=configs/llama4_scout.py --target=v5p:8x8x8

On the machine itself the same file trains, given `--config.data.path` and the
model's tokenizer.json as `--config.data.tokenizer`.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config() -> ConfigDict:
  """107.8 billion parameters without vision, 512 rows of 8,192 tokens."""
  config = default_config()
  config.steps = 100_000
  config.batch_size = 512
  config.seq_len = 8192
  config.precision = "bfloat16"
  config.remat = "full"
  config.loss_chunk = 512
  config.parallel.preset = "fsdp"
  config.data.tokenizer = "tokenizer.json"

  config.model.family = "llama4"
  config.model.vocab = 202048

  config.optimizer.name = "adamw"
  config.optimizer.lr = 1.5e-4
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip = 1.0
  config.optimizer.warmup = 8000
  return config
