"""Writes peft.npz: adapters as PEFT keeps and uses them, for test_lora.py.

Needs torch 2.13, transformers 5 and peft 0.21; neither the library nor its
tests do: `python tests/golden/make_peft.py`. The base models are those of
families_llama.npz and families_gpt2.npz; the adapters are random, lengths of
DoRA included. Of each there are the two files that PEFT wrote, what it adds to
every weight, and the logits of the model with it.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
LLAMA = ["q_proj", "v_proj", "o_proj", "down_proj"]
CASES = {
  "lora": ("llama", LLAMA, {}),
  "rslora": ("llama", "all-linear", {"use_rslora": True}),
  "dora": ("llama", LLAMA, {"use_dora": True}),
  "rsdora": ("gpt2", ["c_attn"], {"use_dora": True, "use_rslora": True}),
  "fused": ("gpt2", ["c_attn", "c_fc"], {}),
  "patterns": (
    "llama",
    ["q_proj", "up_proj"],
    {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {r"0\..*q_proj": 2}},
  ),
}


def base(family: str) -> tuple[torch.nn.Module, torch.Tensor]:
  """The tiny model of a golden file, and its tokens."""
  with np.load(HERE / f"families_{family}.npz") as file:
    arrays = dict(file)
  config = json.loads(str(arrays["config"]))
  config = AutoConfig.for_model(**config)
  config._attn_implementation = "eager"
  model = AutoModelForCausalLM.from_config(config).eval()
  weights = {
    name.removeprefix("weight/"): torch.tensor(x, dtype=torch.float32)
    for name, x in arrays.items()
    if name.startswith("weight/")
  }
  missing, extra = model.load_state_dict(weights, strict=False)
  assert not extra, extra
  assert set(missing) <= {"lm_head.weight"}, missing
  model.tie_weights()
  return model, torch.tensor(arrays["tokens"])


def case(name: str) -> dict[str, np.ndarray]:
  """One adapter."""
  family, targets, options = CASES[name]
  model, tokens = base(family)
  config = LoraConfig(
    r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", **options
  )
  model = get_peft_model(model, config).eval()
  with torch.no_grad():
    for path, p in model.named_parameters():
      if "lora_" in path:
        center = p if "magnitude" in path else 0.0
        p.copy_(center + 0.2 * torch.randn(p.shape))
    logits = model(tokens).logits
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    files = pathlib.Path(folder)
    said = json.loads((files / "adapter_config.json").read_text())
    tensors = load_file(files / "adapter_model.safetensors")
  arrays = {f"tensor/{k}": v for k, v in tensors.items()}
  for path, module in model.base_model.model.named_modules():
    if hasattr(module, "get_delta_weight"):
      delta = module.get_delta_weight("default").detach()
      arrays[f"delta/{path}"] = delta.numpy()
  arrays["config"] = np.array(json.dumps(said, sort_keys=True))
  arrays |= {"family": np.array(family), "logits": logits.detach().numpy()}
  return arrays


def main() -> None:
  """Writes the file."""
  torch.manual_seed(0)
  arrays = {f"{n}/{k}": v for n in CASES for k, v in case(n).items()}
  np.savez_compressed(HERE / "peft.npz", **arrays)
  print(f"{len(arrays)} arrays of {', '.join(CASES)}")


if __name__ == "__main__":
  main()
