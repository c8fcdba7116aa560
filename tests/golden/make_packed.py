"""Writes packed.npz: ternary weights by transformers, for test_packed.py.

Needs torch 2.13 and transformers 5; neither the library nor its tests do.

    python tests/golden/make_packed.py

It holds the arithmetic of BitLinear on random arrays, packed weights, and the
logits of one tiny BitNet in the three forms its config can name. The model is
small on purpose: where an activation lies between two integers, the last bit of
a sum decides which it becomes.
"""

import json
import os
import pathlib

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import bitnet

HERE = pathlib.Path(__file__).parent
CONFIG = {
  "model_type": "bitnet",
  "vocab_size": 29,
  "hidden_size": 24,
  "intermediate_size": 20,
  "num_hidden_layers": 1,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "max_position_embeddings": 16,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "tie_word_embeddings": False,
}
FORMS = {
  "auto": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
  "plain": {"linear_class": "bitlinear", "quantization_mode": "offline"},
  "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
}


def arithmetic() -> dict[str, torch.Tensor]:
  """Both roundings, and packing of rows that are no multiple of four."""
  w, x = torch.randn(7, 12), 3 * torch.randn(2, 5, 12)
  values = torch.randint(-1, 2, (10, 6), dtype=torch.int8)
  return {
    "w": w,
    "w_rounded": bitnet.WeightQuant.apply(w),
    "x": x,
    "x_rounded": bitnet.ActQuant.apply(x),
    "values": values.clone(),
    "packed": bitnet.pack_weights(values.clone()),
  }


def form(said: dict, floats: dict, tokens: torch.Tensor) -> dict:
  """Tensors and logits of a model with the same weights in one form."""
  model = AutoModelForCausalLM.from_config(
    AutoConfig.for_model(**CONFIG), attn_implementation="eager"
  )
  quantized = type("Config", (), {"use_rms_norm": False, "rms_norm_eps": 1e-6})
  for key, value in said.items():
    setattr(quantized, key, value)
  bitnet.replace_with_bitnet_linear(model, ["lm_head"], quantized)
  tensors = {}
  for name, w in floats.items():
    tensors[name] = w
    if "_proj" in name and said["quantization_mode"] == "offline":
      scale = 1.0 / w.abs().mean()
      values = (w * scale).round().clamp(-1, 1)
      multiplies = said["linear_class"] == "autobitlinear"
      tensors[name] = bitnet.pack_weights(values.to(torch.int8))
      tensors[name + "_scale"] = (1 / scale if multiplies else scale)[None]
  state = dict(tensors)
  if said["linear_class"] == "autobitlinear":  # as BitNetDeserialize does
    for name, w in state.items():
      if w.dtype is torch.uint8:
        state[name] = bitnet.unpack_weights(w, torch.float32)
  model.to_empty(device="cpu")
  model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
  model.load_state_dict(state)
  logits = model.eval()(tokens, use_cache=False).logits
  return {f"weight/{k}": v for k, v in tensors.items()} | {"logits": logits}


def main() -> None:
  """Everything into one file."""
  torch.manual_seed(0)
  arrays = arithmetic()
  model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
  floats = {
    k: float((p == 1).all()) + 0.25 * torch.randn(p.shape)
    for k, p in model.named_parameters()
  }
  arrays["tokens"] = torch.randint(0, CONFIG["vocab_size"], (1, 8))
  for name, said in FORMS.items():
    found = form(said, floats, arrays["tokens"])
    arrays |= {f"{name}/{k}": v for k, v in found.items()}
  arrays = {k: v.detach().numpy() for k, v in arrays.items()}
  arrays["config"] = np.array(json.dumps(CONFIG))
  arrays["forms"] = np.array(json.dumps(FORMS))
  path = HERE / "packed.npz"
  np.savez_compressed(path, **arrays)
  print(f"{path.name} {path.stat().st_size:,} bytes")


if __name__ == "__main__":
  main()
