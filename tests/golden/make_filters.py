"""Writes filters.npz: what transformers' processors do, for test_filters.py.

Run with torch 2.13 and transformers 5 installed (neither the library nor its
tests need them): `python tests/golden/make_filters.py`. The logits are the ten
thousand rows of samplers.npz, all of them for each processor; the texts so far
are nine random tokens a row. `kept` are packed bits; the repetition penalty's
logits are written in full for the first 200 rows.
"""

import pathlib

import numpy as np
import torch
from transformers.generation import logits_process as hf

HERE = pathlib.Path(__file__).parent
WORDS = ((3,), (1, 4), (5, 2, 7))

MASKS = {
  "min_p 0.05": hf.MinPLogitsWarper(0.05),
  "min_p 0.4": hf.MinPLogitsWarper(0.4),
  "typical 0.2": hf.TypicalLogitsWarper(0.2),
  "typical 0.9": hf.TypicalLogitsWarper(0.9),
  "eta 0.02": hf.EtaLogitsWarper(0.02),
  "eta 0.3": hf.EtaLogitsWarper(0.3),
  "epsilon 0.1": hf.EpsilonLogitsWarper(0.1),
  "no_repeat 1": hf.NoRepeatNGramLogitsProcessor(1),
  "no_repeat 2": hf.NoRepeatNGramLogitsProcessor(2),
  "no_repeat 3": hf.NoRepeatNGramLogitsProcessor(3),
  "banned": hf.NoBadWordsLogitsProcessor([list(w) for w in WORDS]),
}
PENALTIES = (1.3, 0.8)


def main() -> None:
  logits = np.load(HERE / "samplers.npz")["logits"].astype(np.float32) / 256
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, logits.shape[1], (len(logits), 9))
  scores, ids = torch.tensor(logits), torch.tensor(tokens)
  arrays = {"tokens": tokens.astype(np.uint8)}
  for name, process in MASKS.items():
    kept = torch.isfinite(process(ids, scores.clone())).numpy()
    arrays[f"kept {name}"] = np.packbits(kept, axis=1)
    print(name, kept.mean())
  for penalty in PENALTIES:
    process = hf.RepetitionPenaltyLogitsProcessor(penalty)
    arrays[f"repetition {penalty}"] = process(ids[:200], scores[:200]).numpy()
  path = HERE / "filters.npz"
  np.savez_compressed(path, **arrays)
  print(path.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
