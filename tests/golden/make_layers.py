"""Writes layers.npz: single layers of torch and transformers, for the tests.

Run with torch 2.13 and transformers 5 installed (neither the library nor its
tests need them): `python tests/golden/make_layers.py`. Everything with a
gradient is made in float64, so that the judge adds no error of its own, and
written in float32; inputs are float16 at heart. A name ends in `/grad/<input>`
for the gradient of sum(output * cotangent) by that input.
"""

import math
import pathlib
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import (
  chunked_causal_mask_function,
  sliding_window_causal_mask_function,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.distilbert.modeling_distilbert import (
  create_sinusoidal_embeddings,
)
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

ARRAYS: dict[str, np.ndarray] = {}


def draw(*shape: int) -> torch.Tensor:
  """Random float64 values that float16 holds exactly."""
  return torch.randn(shape).half().double()


def keep(name: str, fn, **inputs: torch.Tensor) -> None:
  """Writes `fn(**inputs)`, and its gradients by every input."""
  inputs = {k: v.clone().requires_grad_() for k, v in inputs.items()}
  out = fn(**inputs)
  cotangent = draw(*out.shape)
  (out * cotangent).sum().backward()
  ARRAYS[f"{name}/out"] = out.detach().numpy().astype(np.float32)
  ARRAYS[f"{name}/cotangent"] = cotangent.numpy().astype(np.float16)
  for key, x in inputs.items():
    ARRAYS[f"{name}/{key}"] = x.detach().numpy().astype(np.float16)
    ARRAYS[f"{name}/grad/{key}"] = x.grad.numpy().astype(np.float32)


# --- Attention, [batch, seq, heads, head_dim] as ours -----------------------

B, T, N, K, H, V = 2, 11, 6, 2, 5, 3
WINDOW = 4


def heads_first(*arrays: torch.Tensor) -> list[torch.Tensor]:
  """[batch, heads, seq, head_dim], as torch wants it."""
  return [x.transpose(1, 2) for x in arrays]


def sdpa(q, k, v, **options) -> torch.Tensor:
  """torch.nn.functional.scaled_dot_product_attention."""
  q, k, v = heads_first(q, k, v)
  out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
  return out.transpose(1, 2)


def sliding() -> torch.Tensor:
  """True where the last WINDOW tokens are seen."""
  i, j = torch.arange(T)[:, None], torch.arange(T)[None]
  return (j <= i) & (j > i - WINDOW)


def eager(module, q, k, v, options, **extra) -> torch.Tensor:
  """A transformers model's own attention function under a causal mask."""
  q, k, v = heads_first(q, k, v)
  low = torch.full((T, T), -1e30, dtype=q.dtype).triu(1)[None, None]
  groups = SimpleNamespace(
    num_key_value_groups=q.shape[1] // k.shape[1], training=False, **extra
  )
  scaling = q.shape[-1] ** -0.5
  return module.eager_attention_forward(
    groups, q, k, v, low, scaling=scaling, **options
  )[0]


def attention() -> None:
  """Masks, grouped heads, a soft cap, learned sinks, ALiBi."""
  q, k, v = draw(B, T, N, H), draw(B, T, N, H), draw(B, T, N, V)
  gk, gv = draw(B, T, K, H), draw(B, T, K, V)
  keep("causal", lambda q, k, v: sdpa(q, k, v, is_causal=True), q=q, k=k, v=v)
  keep("full", sdpa, q=q, k=k, v=v)
  keep(
    "sliding", lambda q, k, v: sdpa(q, k, v, attn_mask=sliding()), q=q, k=k, v=v
  )
  keep("gqa", lambda q, k, v: sdpa(q, k, v, is_causal=True), q=q, k=gk, v=gv)
  keep(
    "scaled",
    lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.3),
    q=q,
    k=k,
    v=v,
  )
  # transformers casts its softmax to float32: 1e-7, not 1e-16.
  keep(
    "softcap",
    lambda q, k, v: eager(modeling_gemma2, q, k, v, {"softcap": 0.8}),
    q=q,
    k=gk,
    v=gv,
  )
  keep(
    "sinks",
    lambda q, k, v, sinks: eager(modeling_gpt_oss, q, k, v, {}, sinks=sinks),
    q=q,
    k=gk,
    v=gv,
    sinks=draw(N),
  )
  bias = build_alibi_tensor(torch.ones(B, T), N, torch.float64)
  bias = bias.reshape(B, N, 1, T) + torch.full((T, T), -torch.inf).triu(1)
  keep("alibi", lambda q, k, v: sdpa(q, k, v, attn_mask=bias), q=q, k=k, v=v)
  for n in (1, 2, 6, 8, 12, 20, 112):
    row = build_alibi_tensor(torch.ones(1, 2), n, torch.float64)
    ARRAYS[f"slopes/{n}"] = row[:, 0, 1].numpy()


def masks() -> None:
  """Who sees whom, as transformers' masks have it."""
  i, j = torch.arange(T)[:, None], torch.arange(T)[None]
  see = {
    "sliding": sliding_window_causal_mask_function(WINDOW),
    "chunked": chunked_causal_mask_function(WINDOW, torch.zeros(1, dtype=int)),
  }
  for name, fn in see.items():
    ARRAYS[f"mask/{name}"] = fn(0, 0, i, j).numpy()


# --- Norms, activations, positions ------------------------------------------


def norms() -> None:
  """LayerNorm with and without its parameters, RMSNorm, Gemma's RMSNorm."""
  x = (3.0 * draw(4, 7) + 1.0).half().double()
  scale, bias = draw(7), draw(7)
  keep(
    "layernorm",
    lambda x, scale, bias: F.layer_norm(x, (7,), scale, bias, 1e-5),
    x=x,
    scale=scale,
    bias=bias,
  )
  keep("layernorm_plain", lambda x: F.layer_norm(x, (7,), eps=1e-2), x=x)
  keep(
    "rmsnorm",
    lambda x, scale: F.rms_norm(x, (7,), scale, 1e-6),
    x=x,
    scale=scale,
  )

  def gemma(x, scale):
    norm = modeling_gemma2.Gemma2RMSNorm(7, eps=1e-6)
    del norm.weight
    norm.weight = scale
    return norm(x)

  keep("rmsnorm_gemma", gemma, x=x, scale=scale)


def activations() -> None:
  """Values and slopes, through the tails where a form would differ."""
  x = torch.cat([torch.linspace(-6, 6, 49), torch.tensor([-30.0, 30.0])])
  x = x.half().double()
  table = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": ACT2FN["relu2"],
  }
  for name, fn in table.items():
    keep(f"act_{name}", lambda x, fn=fn: fn(x), x=x)


def positions() -> None:
  """Rotations of both layouts, scaled frequencies, sinusoids."""
  x, places = draw(B, T, 3, 8), torch.randint(0, 500, (B, T))
  angles = places[..., None] * 10000.0 ** -(torch.arange(0, 8, 2).double() / 8)
  ARRAYS["rope/positions"] = places.numpy().astype(np.int32)

  def halves(x):
    both = torch.cat([angles, angles], dim=-1)
    q, _ = modeling_llama.apply_rotary_pos_emb(
      x, x, both.cos(), both.sin(), unsqueeze_dim=2
    )
    return q

  def neighbours(x):
    return modeling_gptj.apply_rotary_pos_emb(x, angles.sin(), angles.cos())

  keep("rope_halves", halves, x=x)
  keep("rope_interleaved", neighbours, x=x)
  # Half of the features turn, as in GPT-NeoX: the same function on a part.
  keep(
    "rope_partial",
    lambda x: torch.cat([halves(x[..., :8]), x[..., 8:]], dim=-1),
    x=draw(B, T, 3, 16),
  )
  for name, options in {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    },
  }.items():
    config = LlamaConfig(
      head_dim=128,
      rope_parameters={"rope_type": name, "rope_theta": 5e5, **options},
    )
    if name == "default":
      rotary = modeling_llama.LlamaRotaryEmbedding(config)
      freq = rotary.inv_freq
    else:
      freq, factor = ROPE_INIT_FUNCTIONS[name](config, device="cpu")
      assert math.isclose(factor, 1.0)
    ARRAYS[f"frequencies/{name}"] = freq.numpy()
  table = torch.empty(T, 10)
  create_sinusoidal_embeddings(T, 10, table)
  ARRAYS["sinusoidal"] = table.numpy()


if __name__ == "__main__":
  torch.manual_seed(0)
  for make in (attention, masks, norms, activations, positions):
    make()
  path = pathlib.Path(__file__).parent / "layers.npz"
  np.savez_compressed(path, **ARRAYS)
  print(path.name, path.stat().st_size, len(ARRAYS))
