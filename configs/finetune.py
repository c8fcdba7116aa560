r"""Trains a published model further, on any text.

    python -m jaxlm.train --config=configs/finetune.py \
        --config.model.path=DIR --config.data.path=FILE

DIR is what `jaxlm.load` reads: a Hugging Face directory with safetensors, a
GGUF file, or a run of ours. Its tokenizer comes with it. After the first
start the run keeps both, and DIR is needed no more. On several devices add
`--config.parallel.preset=fsdp`.

Source: the learning rate, schedule and batch are those of common full
fine-tuning (2e-5, 3 % warmup, cosine; Stanford Alpaca's README). What to expect
depends on the model: the loss starts where the model stands on the text, and
falls within tens of steps.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config


def get_config() -> ConfigDict:
  """AdamW at 2e-5, 300 steps of 8 x 256 tokens, no decay."""
  config = default_config()
  config.model.path = "DIR"
  config.steps = 300
  config.batch_size = 8
  config.seq_len = 256
  config.unroll = True
  config.log_every = 10
  config.eval_every = 100
  config.checkpoint_every = 100

  config.optimizer.name = "adamw"
  config.optimizer.lr = 2e-5
  config.optimizer.b2 = 0.999
  config.optimizer.weight_decay = 0.0
  config.optimizer.warmup = 10
  config.optimizer.end_lr = 0.0

  config.sample.tokens = 100
  return config
