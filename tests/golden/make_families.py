"""Writes families_*.npz: tiny models of transformers, for test_families.py.

Run with torch 2.13 and transformers 5 installed (neither the library nor its
tests need them): `python tests/golden/make_families.py`. Sizes are awkward on
purpose: heads that are not dim / heads wide, an odd vocabulary, kv heads fewer
than heads. Every weight is random, norms and biases too, so that one left out
or swapped is felt. With `--counts` it prints the parameter counts of the
published sizes instead, from models without memory (the meta device).

Each file holds `weight/<name>` (float16, exactly what the model computed
with), `grad/<name>`, `tokens`, `logits`, `loss`; all made in float32.
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import (
  GPT2Config,
  GPT2LMHeadModel,
  LlamaConfig,
  LlamaForCausalLM,
  Qwen3Config,
  Qwen3ForCausalLM,
)

ROPE = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 100.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
LLAMA = {
  "vocab_size": 67,
  "hidden_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 10,
  "intermediate_size": 28,
  "max_position_embeddings": 64,
}


def tiny() -> dict[str, torch.nn.Module]:
  """One small model for each family and form."""
  gpt2 = GPT2Config(
    vocab_size=61, n_positions=19, n_embd=24, n_layer=2, n_head=3
  )
  gpt2.resid_pdrop = gpt2.embd_pdrop = gpt2.attn_pdrop = 0.0
  llama = LlamaConfig(**LLAMA, rms_norm_eps=1e-5, rope_parameters=ROPE)
  scaled = LlamaConfig(**LLAMA, rms_norm_eps=1e-5, rope_parameters=LLAMA3)
  qwen3 = Qwen3Config(**LLAMA, rms_norm_eps=1e-6, rope_parameters=ROPE)
  qwen3.tie_word_embeddings = True
  return {
    "gpt2": GPT2LMHeadModel(gpt2),
    "llama": LlamaForCausalLM(llama),
    "llama3": LlamaForCausalLM(scaled),
    "qwen3": Qwen3ForCausalLM(qwen3),
  }


def perturb(model: torch.nn.Module) -> None:
  """Random weights, float16 at heart; scales around one, all others zero."""
  for name, p in model.named_parameters():
    scale = "norm" in name or "ln_" in name
    scale = scale and name.endswith("weight")
    noise = torch.randn(p.shape) * 0.25
    p.data = (noise + float(scale)).half().float()


def write(name: str, model: torch.nn.Module) -> None:
  """Logits, the loss of the next token, and its gradients."""
  perturb(model)
  model.eval()
  vocab = model.config.vocab_size
  tokens = torch.randint(0, vocab, (2, 18))
  logits = model(tokens).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].reshape(-1, vocab), tokens[:, 1:].reshape(-1)
  )
  loss.backward()
  arrays = {"tokens": tokens, "logits": logits, "loss": loss}
  for key, p in model.named_parameters():
    arrays[f"weight/{key}"] = p.half()
    arrays[f"grad/{key}"] = p.grad
  arrays = {k: v.detach().numpy() for k, v in arrays.items()}
  path = pathlib.Path(__file__).parent / f"families_{name}.npz"
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, float(loss))


# --- Parameter counts at published sizes ------------------------------------


def gpt2_at(dim: int, layers: int, heads: int) -> torch.nn.Module:
  """GPT-2 of openai/gpt-2's `hparams.json`."""
  return GPT2LMHeadModel(GPT2Config(n_embd=dim, n_layer=layers, n_head=heads))


def llama_at(
  vocab: int,
  dim: int,
  layers: int,
  heads: int,
  kv_heads: int,
  hidden: int,
  tied: bool = False,
) -> torch.nn.Module:
  """Llama of the published `config.json` files."""
  return LlamaForCausalLM(
    LlamaConfig(
      vocab_size=vocab,
      hidden_size=dim,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      num_key_value_heads=kv_heads,
      intermediate_size=hidden,
      tie_word_embeddings=tied,
    )
  )


def qwen3_at(
  dim: int, layers: int, heads: int, hidden: int, tied: bool
) -> torch.nn.Module:
  """Qwen 3 of the published `config.json` files."""
  return Qwen3ForCausalLM(
    Qwen3Config(
      vocab_size=151936,
      hidden_size=dim,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      num_key_value_heads=8,
      head_dim=128,
      intermediate_size=hidden,
      tie_word_embeddings=tied,
    )
  )


def counts() -> None:
  """Prints the exact number of parameters of every published size."""
  sizes = {
    "gpt2": (gpt2_at, 768, 12, 12),
    "gpt2-medium": (gpt2_at, 1024, 24, 16),
    "gpt2-large": (gpt2_at, 1280, 36, 20),
    "gpt2-xl": (gpt2_at, 1600, 48, 25),
    "llama2-7b": (llama_at, 32000, 4096, 32, 32, 32, 11008),
    "llama3-8b": (llama_at, 128256, 4096, 32, 32, 8, 14336),
    "llama3-70b": (llama_at, 128256, 8192, 80, 64, 8, 28672),
    "llama3.1-405b": (llama_at, 128256, 16384, 126, 128, 8, 53248),
    "llama3.2-1b": (llama_at, 128256, 2048, 16, 32, 8, 8192, True),
    "qwen3-0.6b": (qwen3_at, 1024, 28, 16, 3072, True),
    "qwen3-1.7b": (qwen3_at, 2048, 28, 16, 6144, True),
    "qwen3-4b": (qwen3_at, 2560, 36, 32, 9728, True),
    "qwen3-8b": (qwen3_at, 4096, 36, 32, 12288, False),
    "qwen3-14b": (qwen3_at, 5120, 40, 40, 17408, False),
    "qwen3-32b": (qwen3_at, 5120, 64, 64, 25600, False),
  }
  for name, (make, *size) in sizes.items():
    with torch.device("meta"):
      model = make(*size)
    print(f'  "{name}": {sum(p.numel() for p in model.parameters()):_},')


if __name__ == "__main__":
  if "--counts" in sys.argv:
    counts()
  else:
    torch.manual_seed(0)
    for name, model in tiny().items():
      write(name, model)
