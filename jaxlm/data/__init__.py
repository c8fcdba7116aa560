"""Text to batches: sources -> tokenise -> pack -> batch.

    data = prepare("corpus.txt", tokenizer="bpe", vocab=4096)
    train = batches(data.train, seq_len=64, batch_size=12, seed=0)
    train[step]["inputs"]                     # [12, 64], for any step
    for batch in windows(data.val, 64, 12):   # all of the split, once
      ...

See docs/data.md. Heavy libraries are imported when something needs them.
"""

from jaxlm.data.dataset import Dataset, prepare
from jaxlm.data.loader import Batches, Tokens, Windows, batches, windows
from jaxlm.data.tokenizer import EOT, TextStream, Tokenizer, bytes_per_token
from jaxlm.data.tokenizers import ByteBPE, Bytes, Chars, SentencePiece, load

__all__ = [
  "EOT",
  "Batches",
  "ByteBPE",
  "Bytes",
  "Chars",
  "Dataset",
  "SentencePiece",
  "TextStream",
  "Tokenizer",
  "Tokens",
  "Windows",
  "batches",
  "bytes_per_token",
  "load",
  "prepare",
  "windows",
]
