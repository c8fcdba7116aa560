r"""gpt-oss-120b, 5B active of 117B: 128 experts, four a token.

Source: gpt-oss-120b & gpt-oss-20b Model Card, arXiv:2508.10925, table 1, and
the config.json published with the weights. Batch and learning rate are not
public: these are Llama 3 70B's.

    python -m jaxlm.plan --config=configs/gpt_oss_120b.py --target=v5p:8x8x8

On the machine itself the same file trains, given `--config.data.path` and the
model's tokenizer.json as `--config.data.tokenizer`.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config() -> ConfigDict:
  """116.8 billion parameters, 512 rows of 8,192 tokens."""
  config = default_config()
  config.steps = 100_000
  config.batch_size = 512
  config.seq_len = 8192
  config.precision = "bfloat16"
  config.remat = "full"
  config.loss_chunk = 512
  config.parallel.preset = "fsdp"
  config.data.tokenizer = "tokenizer.json"

  config.model.family = "gpt_oss"
  config.model.vocab = 201088
  config.model.layers = 36
  config.model.experts = 128

  config.optimizer.name = "adamw"
  config.optimizer.lr = 1.5e-4
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip = 1.0
  config.optimizer.warmup = 8000
  return config
