r"""nanoGPT's CPU setting on characters: 4 layers, 4 heads, 128 wide.

Source: github.com/karpathy/nanoGPT, README, "I only have a macbook": context
64, batch 12, 2000 steps, dropout 0. Its text is tiny Shakespeare, split 90/10.

    python -m jaxlm.train --config=configs/shakespeare_char.py \
        --config.data.path=tinyshakespeare.txt
    python -m jaxlm.train --config=configs/shakespeare_char.py \
        --config.data.path=tinyshakespeare.txt --config.style=modern

Any text file will do; without a path it trains on Python's documentation.
Expected on tiny Shakespeare, loss over the whole validation split: 1.78 in
GPT-2 style, 1.59 in modern style, in about a minute each on 2 CPU cores.
"""

from ml_collections import ConfigDict

from jaxlm.config import default_config
from jaxlm.errors import UserError


def get_config(style: str = "gpt2") -> ConfigDict:
  """The setting in the style 'gpt2' (AdamW) or 'modern' (Muon and AdamW)."""
  config = default_config()
  config.steps = 2000
  config.batch_size = 12
  config.seq_len = 64
  config.steps_per_call = 8
  config.unroll = True
  config.log_every = 40
  config.eval_every = 1000
  config.checkpoint_every = 1000

  config.model.dim = 128
  config.model.layers = 4
  config.model.heads = 4

  config.data.tokenizer = "chars"
  config.sample.tokens = 400

  if style == "gpt2":
    config.model.family = "gpt2"
    config.optimizer.name = "adamw"
    config.optimizer.lr = 3e-3  # nanoGPT's 1e-3 ends at 1.907 in 2000 steps
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup = 100
  elif style == "modern":
    config.model.family = "modern"
    config.optimizer.name = "muon"
    config.optimizer.lr = 3e-3
    config.optimizer.muon_lr = 0.02
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup = 100
    config.optimizer.end_lr = 0.0
  else:
    raise UserError(f"style is {style!r}; it can be 'gpt2' or 'modern'")
  return config
