"""Writes moe.npz: sparse layers of transformers, for the tests.

Run with torch 2.13 and transformers 5 installed (neither the library nor its
tests need them): `python tests/golden/make_moe.py`. One layer per published
model, with random weights; arrays are named as this library's parameters are,
stored (in, out). Everything is computed in float64 and written in float32;
inputs and weights are float16 at heart.
"""

import pathlib

import numpy as np
import torch
import transformers as tf
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama4 import modeling_llama4
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe

DIM, HIDDEN, EXPERTS, TOP_K, BATCH, SEQ = 8, 6, 8, 3, 2, 11
ARRAYS: dict[str, np.ndarray] = {}


def write(name: str, x: torch.Tensor, dtype=np.float16) -> None:
  """Keeps an array."""
  ARRAYS[name] = x.detach().numpy().astype(dtype)


def randomise(layer: torch.nn.Module) -> torch.nn.Module:
  """Every weight and buffer drawn anew; zeros would hide mistakes."""
  layer = layer.double().eval()
  for x in [*layer.parameters(), *layer.buffers()]:
    x.data = (0.7 * torch.randn(x.shape)).half().double()
  return layer


def halves(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
  """Gate and up of a fused array, one after the other."""
  return x.chunk(2, dim=axis)


def experts(name: str, layer, stored_in_out: bool = False) -> None:
  """The fused arrays of experts as gate, up and down."""
  gate_up, down = layer.gate_up_proj, layer.down_proj
  if not stored_in_out:
    gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
  gate, up = halves(gate_up, 2)
  for part, x in (("gate", gate), ("up", up), ("down", down)):
    write(f"{name}/p/experts/{part}", x)


def shared(name: str, layer) -> None:
  """An expert for all tokens."""
  for part in ("gate", "up", "down"):
    write(f"{name}/p/shared/{part}", getattr(layer, f"{part}_proj").weight.T)


def answer(name: str, layer) -> None:
  """Input, output, and the gradient of sum(output * cotangent)."""
  x = torch.randn(BATCH, SEQ, DIM).half().double().requires_grad_()
  out = layer(x)
  out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
  cotangent = torch.randn(x.shape).half().double()
  (out * cotangent).sum().backward()
  write(f"{name}/x", x)
  write(f"{name}/cotangent", cotangent)
  write(f"{name}/out", out, np.float32)
  write(f"{name}/grad", x.grad, np.float32)


def keep(name: str, layer, gate=None, stored_in_out: bool = False) -> None:
  """A whole layer whose router is `gate`."""
  gate = layer.gate if gate is None else gate
  write(f"{name}/p/router/w", gate.weight.T)
  experts(name, layer.experts, stored_in_out)
  answer(name, layer)


torch.manual_seed(0)
common = {
  "hidden_size": DIM,
  "num_experts_per_tok": TOP_K,
  "num_attention_heads": 1,
  "num_key_value_heads": 1,
}

config = tf.MixtralConfig(
  **common, intermediate_size=HIDDEN, num_local_experts=EXPERTS
)
keep("mixtral", randomise(modeling_mixtral.MixtralSparseMoeBlock(config)))

for norm in (True, False):
  config = tf.Qwen3MoeConfig(
    **common,
    moe_intermediate_size=HIDDEN,
    num_experts=EXPERTS,
    norm_topk_prob=norm,
  )
  layer = randomise(modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config))
  keep(f"qwen3_{norm}", layer)

config = tf.Qwen2MoeConfig(
  **common,
  moe_intermediate_size=HIDDEN,
  num_experts=EXPERTS,
  shared_expert_intermediate_size=10,
)
layer = randomise(modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config))
keep("qwen2", layer)
shared("qwen2", layer.shared_expert)
write("qwen2/p/shared_gate", layer.shared_expert_gate.weight.T)

for method in ("greedy", "group_limited_greedy"):
  config = tf.DeepseekV2Config(
    **common,
    moe_intermediate_size=HIDDEN,
    n_routed_experts=EXPERTS,
    n_shared_experts=2,
    topk_method=method,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
  )
  layer = randomise(modeling_deepseek_v2.DeepseekV2Moe(config))
  keep(f"deepseek2_{method}", layer)
  shared(f"deepseek2_{method}", layer.shared_experts)

config = tf.DeepseekV3Config(
  **common,
  moe_intermediate_size=HIDDEN,
  n_routed_experts=EXPERTS,
  n_shared_experts=1,
  n_group=4,
  topk_group=2,
  routed_scaling_factor=2.5,
  norm_topk_prob=True,
)
layer = randomise(modeling_deepseek_v3.DeepseekV3MoE(config))
keep("deepseek3", layer)
shared("deepseek3", layer.shared_experts)
write("deepseek3/p/router/correction", layer.gate.e_score_correction_bias)

config = tf.GptOssConfig(
  **common, intermediate_size=HIDDEN, num_local_experts=EXPERTS
)
config.swiglu_limit = 0.9  # low enough for small numbers to meet it
layer = randomise(modeling_gpt_oss.GptOssMLP(config))
write("gpt_oss/p/router/w", layer.router.weight.T)
write("gpt_oss/p/router/bias", layer.router.bias)
for part, at in (("gate", 0), ("up", 1)):
  fused = layer.experts.gate_up_proj[..., at::2]
  write(f"gpt_oss/p/experts/{part}", fused)
  fused = layer.experts.gate_up_proj_bias[..., at::2]
  write(f"gpt_oss/p/experts/{part}_bias", fused)
write("gpt_oss/p/experts/down", layer.experts.down_proj)
write("gpt_oss/p/experts/down_bias", layer.experts.down_proj_bias)
answer("gpt_oss", layer)

config = tf.Llama4TextConfig(
  **common | {"num_experts_per_tok": 1},
  intermediate_size=HIDDEN,
  num_local_experts=EXPERTS,
)
layer = randomise(modeling_llama4.Llama4TextMoe(config))
keep("llama4", layer, layer.router, stored_in_out=True)
shared("llama4", layer.shared_expert)

logits = torch.randn(40, EXPERTS).half().double()
write("switch/logits", logits)
for k in (1, 2, 4):
  loss = modeling_mixtral.load_balancing_loss_func((logits,), EXPERTS, k)
  write(f"switch/top{k}", loss, np.float32)

np.savez_compressed(pathlib.Path(__file__).parent / "moe.npz", **ARRAYS)
print(sum(x.nbytes for x in ARRAYS.values()), "bytes")
