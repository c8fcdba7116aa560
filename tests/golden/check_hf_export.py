"""Checks that transformers loads what jaxlm writes, and computes the same.

Needs torch and transformers 5 beside jaxlm's own requirements.

    python tests/golden/check_hf_export.py [NAME ...]

For each golden family (all, if none is named): its tiny model goes through
`jaxlm.load` and `jaxlm.save(format="hf")`, in several shards, and the logits
of `AutoModelForCausalLM.from_pretrained` are compared with jaxlm's, in float32
to 1e-4. Printed are the largest difference and the size of the logits. A
tokenizer trained here goes through `AutoTokenizer` and must give equal ids.
"""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import jaxlm
from jaxlm.data.tokenizers import ByteBPE
from jaxlm.layers.param import init
from jaxlm.models.families import llama

HERE = pathlib.Path(__file__).parent
BOUND = 1e-4


def check(name: str, folder: pathlib.Path) -> float:
  """The largest difference of logits, of one family."""
  with np.load(HERE / f"families_{name}.npz") as file:
    arrays = dict(file)
  folder.mkdir()
  weights = {
    k.removeprefix("weight/"): np.ascontiguousarray(v, np.float32)
    for k, v in arrays.items()
    if k.startswith("weight/")
  }
  save_file(weights, folder / "model.safetensors")
  (folder / "config.json").write_text(str(arrays["config"]))
  model, params = jaxlm.load(folder)
  out = folder / "out"
  jaxlm.save(out, model, params, format="hf", shard_size=30_000)
  tokens = arrays["tokens"]
  ours = jax.jit(jaxlm.forward, static_argnums=0)(model, params, tokens)
  theirs, problems = AutoModelForCausalLM.from_pretrained(
    out,
    attn_implementation="eager",
    experts_implementation="eager",  # torch's other one wants even sizes
    output_loading_info=True,
  )
  problems = {k: v for k, v in problems.items() if v}
  with torch.no_grad():
    logits = theirs(torch.as_tensor(tokens), use_cache=False).logits.numpy()
  worst = float(np.abs(ours - logits).max())
  print(
    f"{name:24} {worst:.1e} of {np.abs(logits).max():.1f}, "
    f"{theirs.dtype}, {len(list(out.glob('*.safetensors')))} files "
    f"{problems or ''}",
    flush=True,
  )
  return worst


def check_tokenizer(folder: pathlib.Path) -> bool:
  """Whether transformers gives the ids that we do."""
  text = json.dumps(sorted(p.name for p in HERE.iterdir()))
  tokenizer = ByteBPE.train([text * 20], 400)
  model = llama.decoder(tokenizer.vocab_size, 16, 1, 2, 1, 8, 32)
  params = init(model.params(), jax.random.key(0))
  jaxlm.save(folder, model, params, tokenizer, format="hf")
  theirs = AutoTokenizer.from_pretrained(folder)
  same = theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
  same = same and theirs.eos_token_id == tokenizer.eot
  generated = AutoModelForCausalLM.from_pretrained(folder).generation_config
  same = same and generated.eos_token_id == tokenizer.eot
  print(f"tokenizer: {'equal' if same else 'DIFFERENT'} ids and end")
  return same


def main(names: list[str]) -> None:
  """Checks, and exits with 1 if anything differs."""
  files = sorted(HERE.glob("families_*.npz"))
  every = [f.stem.removeprefix("families_") for f in files]
  failed = []
  with tempfile.TemporaryDirectory() as temporary:
    for name in names or every:
      try:
        if check(name, pathlib.Path(temporary) / name) > BOUND:
          failed.append(name)
      except Exception as error:
        print(f"{name:24} {type(error).__name__}: {str(error)[:300]}")
        failed.append(name)
    if not check_tokenizer(pathlib.Path(temporary) / "tokenizer"):
      failed.append("tokenizer")
  if failed:
    raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
  main(sys.argv[1:])
