"""Writes t5.npz and transformer.npz: encoder-decoders, for test_encdec.py.

Needs torch 2.13 and transformers 5; neither the library nor its tests do:
`python tests/golden/make_t5.py`. Sizes are awkward on purpose, distances pass
the last bucket, rows are padded on the right. Weights are float16 at heart,
torch's transformers run in float64. `--counts` prints the number of parameters
at every published size, on the meta device.
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

HERE = pathlib.Path(__file__).parent
B, S, T, VOCAB = 2, 29, 17, 61
LENGTHS = (29, 21)
TINY = {
  "vocab_size": VOCAB,
  "d_model": 12,
  "d_kv": 5,
  "d_ff": 16,
  "num_heads": 3,
  "num_layers": 3,
  "num_decoder_layers": 2,
  "relative_attention_num_buckets": 10,
  "relative_attention_max_distance": 15,
  "decoder_start_token_id": 0,
}
VERSIONS = {
  "v1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
  "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
SIZES = {
  "t5-small": (512, 6, 8, 64, 2048),
  "t5-base": (768, 12, 12, 64, 3072),
  "t5-large": (1024, 24, 16, 64, 4096),
  "t5-3b": (1024, 24, 32, 128, 16384),
  "t5-11b": (1024, 24, 128, 128, 65536),
  "t5-v1.1-small": (512, 8, 6, 64, 1024),
  "t5-v1.1-base": (768, 12, 12, 64, 2048),
  "t5-v1.1-large": (1024, 24, 16, 64, 2816),
  "t5-v1.1-xl": (2048, 24, 32, 64, 5120),
  "t5-v1.1-xxl": (4096, 24, 64, 64, 10240),
}


def build(version: str, **sizes) -> T5ForConditionalGeneration:
  """A model of transformers; 1.1 with the head of its own that its files have.

  transformers 5 ties the two in every config and unties them where a file has
  both; what the key decides is whether the head's input is scaled.
  """
  config = T5Config(**VERSIONS[version], **sizes)
  config.tie_word_embeddings = version == "v1.0"
  config._attn_implementation = "eager"
  model = T5ForConditionalGeneration(config)
  model.set_input_embeddings(model.shared)  # both stacks read one table
  return model


def perturb(model: torch.nn.Module, scale: float) -> None:
  """Random weights everywhere, scales around one."""
  with torch.no_grad():
    for name, p in model.named_parameters():
      center = float("norm" in name and name.endswith("weight"))
      p.copy_((center + scale * torch.randn(p.shape)).half())


def t5() -> dict[str, np.ndarray]:
  """Logits, the loss and all its gradients, a greedy continuation."""
  arrays = {}
  inputs = torch.randint(2, VOCAB, (B, S))
  targets = torch.randint(2, VOCAB, (B, T))
  mask = torch.arange(S)[None] < torch.tensor(LENGTHS)[:, None]
  arrays |= {"inputs": inputs, "targets": targets, "mask": mask}
  for version in VERSIONS:
    model = build(version, **TINY).eval().double()
    perturb(model, 0.35)
    out = model(input_ids=inputs, attention_mask=mask.long(), labels=targets)
    out.loss.backward()
    new = model.generate(
      inputs,
      attention_mask=mask.long(),
      max_new_tokens=9,
      min_new_tokens=9,
      do_sample=False,
      use_cache=False,
    )
    arrays |= {
      f"{version}/logits": out.logits,
      f"{version}/loss": out.loss,
      f"{version}/greedy": new[:, 1:],
    }
    for name, p in model.named_parameters():
      arrays[f"{version}/weight/{name}"] = p.detach().half()
      arrays[f"{version}/grad/{name}"] = p.grad
  return arrays


def transformer() -> dict[str, np.ndarray]:
  """torch.nn.Transformer, the norms after or before, and its gradients."""
  arrays = {}
  for first in (False, True):
    model = torch.nn.Transformer(
      d_model=12,
      nhead=3,
      num_encoder_layers=2,
      num_decoder_layers=2,
      dim_feedforward=20,
      dropout=0.0,
      batch_first=True,
      norm_first=first,
    ).double()
    perturb(model, 0.35)
    name = "pre" if first else "post"
    x = {
      k: torch.randn(B, n, 12).half().double()
      for k, n in (("src", 9), ("tgt", 7))
    }
    hidden = torch.arange(9)[None] >= torch.tensor([[9], [6]])
    for value in x.values():
      value.requires_grad_()
    out = model(
      **x,
      tgt_mask=model.generate_square_subsequent_mask(7, dtype=torch.float64),
      src_key_padding_mask=hidden,
      memory_key_padding_mask=hidden,
    )
    cotangent = torch.randn(out.shape).half().double()
    (out * cotangent).sum().backward()
    arrays |= {f"{name}/out": out, f"{name}/cotangent": cotangent}
    for key, p in [*x.items(), *model.named_parameters()]:
      arrays[f"{name}/weight/{key}"] = p.detach().half()
      arrays[f"{name}/grad/{key}"] = p.grad
  return arrays


def save(name: str, arrays: dict) -> None:
  """Float64 becomes float32."""
  arrays = {k: v.detach().numpy() for k, v in arrays.items()}
  arrays = {
    k: v.astype(np.float32) if v.dtype == np.float64 else v
    for k, v in arrays.items()
  }
  np.savez_compressed(HERE / name, **arrays)
  print(name, (HERE / name).stat().st_size, len(arrays))


def counts() -> None:
  """Parameters at every published size."""
  for name, (dim, layers, heads, width, feed) in SIZES.items():
    with torch.device("meta"):
      model = build(
        "v1.1" if "v1.1" in name else "v1.0",
        d_model=dim,
        num_layers=layers,
        num_heads=heads,
        d_kv=width,
        d_ff=feed,
        vocab_size=32128,
      )
    print(f'  "{name}": {model.num_parameters():_},')


if __name__ == "__main__":
  torch.manual_seed(0)
  if "--counts" in sys.argv:
    counts()
  else:
    save("t5.npz", t5())
    save("transformer.npz", transformer())
