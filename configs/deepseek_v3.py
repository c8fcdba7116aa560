r"""DeepSeek-V3, 37B active of 671B: 256 experts, latent attention.

Source: DeepSeek-V3 Technical Report, arXiv:2412.19437: sizes, 15,360 rows of
4,096 tokens a batch, and AdamW from section 4.2. Its second head, which
predicts one token further, is not here, nor is FP8.

    python -m jaxlm.plan --config=configs/deepseek_v3.py --target=h100:1024

Experts are split over 64 devices, as in the report (section 3.2.2); all else
that is stored is spread over as many groups of 64 as there are.

On the machine itself the same file trains, given `--config.data.path` and the
model's tokenizer.json as `--config.data.tokenizer`.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config() -> ConfigDict:
  """671.0 billion parameters, 15,360 rows of 4,096 tokens."""
  config = default_config()
  config.steps = 235_000
  config.batch_size = 15360
  config.seq_len = 4096
  config.precision = "bfloat16"
  config.remat = "full"
  config.loss_chunk = 512
  config.parallel.preset = "fsdp_ep"
  config.parallel.mesh = "fsdp:-1,expert:64"
  config.data.tokenizer = "tokenizer.json"
  config.accumulate = 15

  config.model.family = "deepseek"
  config.model.vocab = 129280

  config.optimizer.name = "adamw"
  config.optimizer.lr = 2.2e-4
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip = 1.0
  config.optimizer.warmup = 2000
  return config
