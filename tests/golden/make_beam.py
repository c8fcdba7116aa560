"""Writes beam.npz: what transformers' beam search finds, for test_beam.py.

Run with torch 2.13 and transformers 5 installed (neither the library nor its
tests need them): `python tests/golden/make_beam.py`. The model is the tiny
GPT-2 of families_gpt2.npz, its logits made three times as large; each case is
a set of arguments, the prompts are four.
"""

import json
import pathlib

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

HERE = pathlib.Path(__file__).parent
NEW = 9
CASES = [
  {"num_beams": k, "length_penalty": p, "early_stopping": e}
  for k in (1, 2, 3, 5)
  for p in (1.0, 0.0, -0.7, 2.0)
  for e in (False, True, "never")
]
ENDS = [(), (7,), (7, 20, 31), tuple(range(0, 61, 5))]


def main() -> None:
  with np.load(HERE / "families_gpt2.npz") as file:
    weights = {
      k.removeprefix("weight/"): torch.tensor(v.astype(np.float32))
      for k, v in file.items()
      if k.startswith("weight/")
    }
    config = json.loads(str(file["config"]))
  model = GPT2LMHeadModel(GPT2Config(**config)).eval()
  weights["transformer.ln_f.weight"] *= 3
  weights["transformer.ln_f.bias"] *= 3
  model.load_state_dict(weights, strict=False)
  torch.manual_seed(0)
  prompts = torch.randint(0, 61, (4, 5))
  arrays = {"prompts": prompts.numpy().astype(np.int32)}
  for i, case in enumerate(CASES):
    for j, ends in enumerate(ENDS):
      out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW,
        do_sample=False,
        num_return_sequences=case["num_beams"],
        eos_token_id=list(ends) or None,
        pad_token_id=60,
        return_dict_in_generate=True,
        output_scores=True,
        **case,
      )
      tokens = np.full((len(out.sequences), NEW), 60, np.uint8)
      new = out.sequences[:, 5:].numpy()
      tokens[:, : new.shape[1]] = new
      arrays[f"{i} {j} tokens"] = tokens
      if case["num_beams"] > 1:
        arrays[f"{i} {j} scores"] = out.sequences_scores.numpy()
  np.savez_compressed(HERE / "beam.npz", **arrays)
  print((HERE / "beam.npz").stat().st_size, "bytes")


if __name__ == "__main__":
  main()
