"""Writes samplers.npz: what transformers' warpers keep, for test_samplers.py.

Run with torch 2.13 and transformers 5 installed (neither the library nor its
tests need them): `python tests/golden/make_samplers.py`. Ten thousand rows of
logits, an eighth for each chain of warpers. `logits` are int16, to be divided
by 256; `kept` are packed bits. No two logits of a row are equal: torch's sort
leaves open which of equal tokens come first, and so which of them top-p keeps.
"""

import pathlib

import numpy as np
import torch
from transformers import (
  TemperatureLogitsWarper,
  TopKLogitsWarper,
  TopPLogitsWarper,
)

ROWS, VOCAB = 10_000, 12

# Temperature, top-k, top-p of each chain; test_samplers.py has the same.
CHAINS = [
  *((1.0, None, 0.1), (1.0, None, 0.5), (1.0, None, 0.9), (1.0, None, 0.99)),
  *((1.0, 3, None), (0.7, 8, 0.8), (1.5, None, 0.95), (0.3, 5, 0.6)),
]


def warpers(temperature: float, k: int | None, p: float | None) -> list:
  chain = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
  chain += [] if k is None else [TopKLogitsWarper(k)]
  return chain + ([] if p is None else [TopPLogitsWarper(p)])


def main() -> None:
  rng = np.random.default_rng(0)
  width = rng.choice([60, 250, 1000], (ROWS, 1))
  steps = 1 + rng.exponential(size=(ROWS, VOCAB)) * width * 3 / VOCAB
  logits = rng.permuted(np.cumsum(steps.astype(int), axis=1), axis=1)
  logits -= logits.mean(axis=1, keepdims=True).astype(int)
  kept = []
  for chain, rows in zip(CHAINS, np.split(logits, len(CHAINS)), strict=True):
    scores = torch.tensor(rows.astype(np.float32) / 256)
    for warper in warpers(*chain):
      scores = warper(None, scores)
    kept.append(torch.isfinite(scores).numpy())
  path = pathlib.Path(__file__).with_name("samplers.npz")
  np.savez_compressed(
    path,
    logits=logits.astype(np.int16),
    kept=np.packbits(np.concatenate(kept), axis=1),
  )
  print(path.stat().st_size, "bytes", [k.sum(1).mean() for k in kept])


if __name__ == "__main__":
  main()
