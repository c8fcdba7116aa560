"""Writes families_*.npz: tiny models of transformers, for test_families.py.

Needs torch 2.13 and transformers 5 beside jaxlm's own requirements; neither the
library nor its tests do.

    python tests/golden/make_families.py NAME CONFIG.json   a new file
    python tests/golden/make_families.py NAME ...           made again
    python tests/golden/make_families.py                    all of them

CONFIG.json is a tiny config.json with its `model_type`; each file keeps its
own. Sizes are awkward on purpose: heads that are not dim / heads wide, an odd
vocabulary, rows longer than windows, chunks and original contexts. Every
weight is random, norms, biases, sinks and router corrections too, so that one
left out or swapped is felt.

Each file holds `weight/<name>` as on disk (float16, exactly what the model
computed with), `config`, `tokens`, `logits`, `loss`; where names on disk are
those of the model also `grad/<name>`; and `counts`: for each published size of
the family the number of parameters, total and active, of a transformers model
without memory (the meta device) built from the config.json that jaxlm writes.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from jaxlm.models import hub

HERE = pathlib.Path(__file__).parent
SEQ = 26


def build(config: dict) -> torch.nn.Module:
  """A model of transformers, with attention and experts written out."""
  made = AutoConfig.for_model(**config)
  return AutoModelForCausalLM.from_config(
    made,
    attn_implementation="eager",
    experts_implementation="eager",
    dtype=torch.float32,
  )


def learned(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
  """Its parameters; corrections of routers are buffers. No masks."""
  buffers = [(k, b) for k, b in model.named_buffers() if "bias" in k]
  every = [*model.named_parameters(), *buffers]
  return [(name, p) for name, p in every if p.dtype is torch.float32]


def perturb(model: torch.nn.Module) -> None:
  """Random weights, float16 at heart; scales around one, all others zero."""
  for _, p in learned(model):
    start = float((p == 1.0).all())  # a scale, unless it is stored as 1 + p
    noise = torch.randn(p.shape) * 0.25
    p.data = (noise + start).half().float()


def on_disk(model: torch.nn.Module) -> tuple[dict, dict]:
  """Tensors and config as `save_pretrained` writes them."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    path = pathlib.Path(folder)
    config = json.loads((path / "config.json").read_text())
    return load_file(path / "model.safetensors"), config


def write(name: str, config: dict) -> None:
  """Logits, the loss of the next token, its gradients, and counts."""
  torch.manual_seed(0)
  model = build(config).eval()
  perturb(model)
  weights, config = on_disk(model)
  for noise in ("transformers_version", "dtype", "_name_or_path"):
    config.pop(noise, None)
  vocab = model.config.vocab_size
  tokens = torch.randint(0, vocab, (2, SEQ))
  logits = model(tokens, use_cache=False).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].reshape(-1, vocab), tokens[:, 1:].reshape(-1)
  )
  loss.backward()
  arrays = {"tokens": tokens, "logits": logits, "loss": loss}
  grads = {k: p.grad for k, p in model.named_parameters()}
  if grads.keys() == weights.keys():
    arrays |= {f"grad/{k}": g for k, g in grads.items()}
  arrays = {k: v.detach().numpy() for k, v in arrays.items()}
  arrays |= {
    f"weight/{k}": v.astype(np.float16) if v.dtype == np.float32 else v
    for k, v in weights.items()
  }
  arrays["config"] = np.array(json.dumps(config))
  arrays["counts"] = np.array(json.dumps(counts(config["model_type"])))
  path = HERE / f"families_{name}.npz"
  np.savez_compressed(path, **arrays)
  print(f"{path.name} {path.stat().st_size:,} bytes, loss {loss.item():.3f}")


def counts(kind: str) -> dict[str, dict[str, int]]:
  """Total and active parameters of every published size of a model_type."""
  out = {}
  for family in hub.modules():
    for name, model in getattr(family, "PUBLISHED", {}).items():
      hubs = [h for h in getattr(family, "HF", ()) if h.type == kind]
      if not hubs or hub.recognise(model, family.HF) != hubs[0]:
        continue
      with torch.device("meta"):
        theirs = build(hubs[0].config(model))
      out[name] = count(theirs)
      print(name, out[name])
  return out


def count(model: torch.nn.Module) -> dict[str, int]:
  """All parameters, and those at work on one token: top k of the experts."""
  config = model.config
  experts = (
    getattr(config, "num_local_experts", None)
    or getattr(config, "n_routed_experts", None)
    or getattr(config, "num_experts", None)
  )
  total = idle = 0
  for name, p in learned(model):
    total += p.numel()
    if ".experts." in name:
      idle += p.numel() * (experts - config.num_experts_per_tok) // experts
  return {"total": total, "active": total - idle}


def stored(name: str) -> dict:
  """The config that a golden file was made from."""
  with np.load(HERE / f"families_{name}.npz") as file:
    return json.loads(str(file["config"]))


if __name__ == "__main__":
  arguments = sys.argv[1:]
  if len(arguments) == 2 and arguments[1].endswith(".json"):
    write(arguments[0], json.loads(pathlib.Path(arguments[1]).read_text()))
  else:
    files = sorted(HERE.glob("families_*.npz"))
    every = [f.stem.removeprefix("families_") for f in files]
    for each in arguments or every:
      write(each, stored(each))
