"""Checks that PEFT loads the adapters that jaxlm writes, and computes the same.

Needs torch 2.13, transformers 5 and peft 0.21 beside jaxlm's own requirements:
`python tests/golden/check_peft_export.py`.

The bases are the tiny models of families_llama.npz and families_gpt2.npz (whose
queries, keys and values are fused), written by `jaxlm.save(format="hf")`;
adapters of every kind are random. Printed are the largest difference of the
logits of `PeftModel.from_pretrained` and ours, which must be below 1e-4, and
how far the adapters move them.
"""

import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import jaxlm
from jaxlm.interop.peft import save_adapters
from jaxlm.models import hub
from jaxlm.models.decoder import forward
from jaxlm.models.lora import KINDS, LoRA

HERE = pathlib.Path(__file__).parent
TARGETS = {"llama": (".*/mixer/(q|o)", ".*/ffn/.*"), "gpt2": (".*/mixer/.*",)}


def check(family: str, kind: str, folder: pathlib.Path) -> None:
  """One base and one kind of adapter."""
  with np.load(HERE / f"families_{family}.npz") as file:
    arrays = dict(file)
  said = json.loads(str(arrays["config"]))
  weights = {
    k.removeprefix("weight/"): v.astype(np.float32)
    for k, v in arrays.items()
    if k.startswith("weight/")
  }
  found = hub.find(said)
  model = found.read(said)
  params = jax.tree.map(jnp.asarray, found.names.load(model, weights))
  lora = LoRA(3, 7, TARGETS[family], kind)
  adapters = lora.start(jax.random.key(0), model.params(), params)
  draw = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: x + 0.2 * draw.normal(size=x.shape).astype(np.float32), adapters
  )
  jaxlm.save(folder / "base", model, params, format="hf")
  save_adapters(folder / "adapters", model, lora, adapters)
  base = AutoModelForCausalLM.from_pretrained(
    folder / "base", attn_implementation="eager", dtype=torch.float32
  )
  theirs = PeftModel.from_pretrained(base, folder / "adapters").eval()
  tokens = jnp.asarray(arrays["tokens"], jnp.int32)
  with torch.no_grad():
    want = theirs(torch.tensor(arrays["tokens"])).logits.numpy()
  ours = forward(model, lora.apply(params, adapters), tokens)
  away = float(np.abs(want - ours).max())
  moved = float(np.abs(want - forward(model, params, tokens)).max())
  print(f"{family:6} {kind:8} {away:.1e} of {moved:.2f}")
  if away > 1e-4:
    sys.exit("too far")


if __name__ == "__main__":
  for family in TARGETS:
    for kind in KINDS:
      with tempfile.TemporaryDirectory() as folder:
        check(family, kind, pathlib.Path(folder))
