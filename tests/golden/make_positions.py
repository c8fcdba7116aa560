"""Writes positions.npz: rotary scalings and ALiBi of transformers.

Run with torch 2.13 and transformers 5 installed (neither the library nor its
tests need them): `python tests/golden/make_positions.py`. For each case of
`CASES`: `<case>/frequencies` and `<case>/magnitude` as its initializer gives
them, and `<case>/turned`, queries `x` [1, seq, heads, head_dim] turned by its
own rotary module at `positions`. `<case>` may end in the length of a row.
`slopes` [40, 40] holds those of ALiBi for 1 to 40 heads, padded with zeros.
"""

import math
import pathlib

import numpy as np
import torch
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
  yarn_apply_mscale,
)
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

ARRAYS: dict[str, np.ndarray] = {}
HEAD, HEADS, SEQ = 20, 2, 9
ORIGINAL = 32
YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 64,
}
SHORT = [1.0 + 0.05 * i for i in range(HEAD // 2)]
LONG = [1.0 + 1.5 * i for i in range(HEAD // 2)]
LONGROPE = {
  "rope_type": "longrope",
  "short_factor": SHORT,
  "long_factor": LONG,
  "original_max_position_embeddings": ORIGINAL,
}
DEEPSEEK = {"factor": 40.0, "original_max_position_embeddings": 4096}
# Name: (rope_parameters, head_dim, theta, lengths of rows).
CASES = {
  "default": ({"rope_type": "default"}, HEAD, 1e4, [30]),
  "linear": ({"rope_type": "linear", "factor": 3.0}, HEAD, 1e4, [30]),
  "dynamic": (
    {"rope_type": "dynamic", "factor": 2.5},
    HEAD,
    1e4,
    [20, ORIGINAL, ORIGINAL + 1, 100],
  ),
  "llama3": (
    {
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    },
    64,
    5e5,
    [300],
  ),
  "yarn": (YARN, HEAD, 1e4, [200]),
  "yarn_whole": (YARN | {"truncate": False}, HEAD, 1e4, [200]),
  "yarn_betas": (
    YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 0.9},
    HEAD,
    1e4,
    [200],
  ),
  "yarn_short": (  # so short that the ramp has no length
    YARN | {"original_max_position_embeddings": 6},
    HEAD,
    1e4,
    [20],
  ),
  "yarn_gpt_oss": (
    {
      "rope_type": "yarn",
      "factor": 32.0,
      "beta_fast": 32.0,
      "beta_slow": 1.0,
      "original_max_position_embeddings": 4096,
      "truncate": False,
    },
    64,
    150000.0,
    [300],
  ),
  "yarn_deepseek": (
    YARN | DEEPSEEK | {"mscale": 1.0, "mscale_all_dim": 1.0},
    64,
    1e4,
    [300],
  ),
  "yarn_mscale": (
    YARN | DEEPSEEK | {"mscale": 0.8, "mscale_all_dim": 0.3},
    64,
    1e4,
    [300],
  ),
  "longrope": (LONGROPE | {"factor": 8.0}, HEAD, 1e4, [ORIGINAL, 33]),
  "longrope_told": (
    LONGROPE | {"factor": 8.0, "attention_factor": 1.25},
    HEAD,
    1e4,
    [40],
  ),
}


def config_of(parameters: dict, head: int, theta: float) -> LlamaConfig:
  """A configuration whose trained context is ORIGINAL, or as it says."""
  return LlamaConfig(
    hidden_size=head * HEADS,
    num_attention_heads=HEADS,
    head_dim=head,
    max_position_embeddings=ORIGINAL,
    rope_parameters=parameters | {"rope_theta": theta},
  )


def places(length: int) -> torch.Tensor:
  """SEQ positions [1, SEQ] of a row of `length` tokens, its last included."""
  return torch.linspace(0, length - 1, SEQ).round().long()[None]


def scalings(x: torch.Tensor) -> None:
  """Every case: frequencies, magnitude, queries turned in halves."""
  for name, (parameters, head, theta, lengths) in CASES.items():
    for n in lengths:
      config = config_of(parameters, head, theta)
      rotary = modeling_llama.LlamaRotaryEmbedding(config)
      where, q = places(n), x[..., :head]
      cos, sin = rotary(q, where)
      kind = parameters["rope_type"]
      if kind == "default":
        freq, magnitude = rotary.inv_freq, 1.0
      else:
        init = ROPE_INIT_FUNCTIONS[kind]
        freq, magnitude = init(config, device="cpu", seq_len=n)
      assert torch.equal(freq, rotary.inv_freq)
      turned, _ = modeling_llama.apply_rotary_pos_emb(
        q, q, cos, sin, unsqueeze_dim=2
      )
      key = f"{name}/{n}" if len(lengths) > 1 else name
      ARRAYS[f"{key}/frequencies"] = freq.numpy()
      ARRAYS[f"{key}/magnitude"] = np.float64(magnitude)
      ARRAYS[f"{key}/positions"] = where.numpy().astype(np.int32)
      ARRAYS[f"{key}/turned"] = turned.numpy()


def ntk() -> None:
  """NTK by 6 is what the dynamic rule of factor 1 does at 6 times the row."""
  config = config_of({"rope_type": "dynamic", "factor": 1.0}, HEAD, 1e4)
  init = ROPE_INIT_FUNCTIONS["dynamic"]
  freq, _ = init(config, device="cpu", seq_len=6 * ORIGINAL)
  ARRAYS["ntk/frequencies"] = freq.numpy()


def partial(x: torch.Tensor) -> None:
  """A part of each head turns: halves as GPT-NeoX, neighbours as GPT-J."""
  where = places(100)
  for name, fraction in (("quarter", 0.25), ("half", 0.5)):
    head = 40 if name == "quarter" else HEAD
    config = GPTNeoXConfig(
      hidden_size=head * HEADS,
      num_attention_heads=HEADS,
      rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": fraction,
      },
    )
    rotary = modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)
    q = x[..., :head]
    cos, sin = rotary(q, where)
    turned, _ = modeling_gpt_neox.apply_rotary_pos_emb(
      q, q, cos, sin, unsqueeze_dim=2
    )
    ARRAYS[f"partial/{name}/halves"] = turned.numpy()
    dim = cos.shape[-1]
    angles = (sin[..., : dim // 2], cos[..., : dim // 2])
    turned = modeling_gptj.apply_rotary_pos_emb(q[..., :dim], *angles)
    turned = torch.cat([turned, q[..., dim:]], dim=-1)
    ARRAYS[f"partial/{name}/neighbours"] = turned.numpy()
  ARRAYS["partial/positions"] = where.numpy().astype(np.int32)


def alibi() -> None:
  """The slopes of 1 to 40 heads, in the rows of a square."""
  square = np.zeros((40, 40))
  for n in range(1, 41):
    row = build_alibi_tensor(torch.ones(1, 2), n, torch.float64)
    square[n - 1, :n] = row[:, 0, 1].numpy()
  ARRAYS["slopes"] = square


def softmax() -> None:
  """What DeepSeek-V3 makes of a softmax scale of one."""
  for name in ("yarn", "yarn_deepseek", "yarn_mscale"):
    parameters = CASES[name][0]
    ARRAYS[f"softmax/{name}"] = np.float64(yarn_apply_mscale(parameters, 1.0))


if __name__ == "__main__":
  torch.manual_seed(0)
  x = torch.randn(1, SEQ, HEADS, 64).half().float()
  ARRAYS["x"] = x.numpy().astype(np.float16)
  scalings(x)
  ntk()
  partial(x)
  alibi()
  softmax()
  assert math.isclose(ARRAYS["slopes"][7, 0], 0.5)
  path = pathlib.Path(__file__).parent / "positions.npz"
  np.savez_compressed(path, **ARRAYS)
  print(path.name, path.stat().st_size, len(ARRAYS))
