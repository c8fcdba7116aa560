"""Writes optim.npz: 100 steps of torch's optimizers, for tests/test_optim.py.

Run with torch 2.13 installed: `python tests/golden/make_optim.py`. The
gradient of step t is `w - target + noise[t]`, so that a wrong step is felt by
all that follow. Weights are in torch's layout (out, in). Everything but Muon
runs in float64, where 100 steps leave no room for rounding.
"""

import pathlib

import numpy as np
import torch

STEPS, LR, DECAY = 100, 0.02, 0.1
SHAPES = {"tall": (12, 8), "wide": (8, 20), "square": (10, 10)}
KEPT = (0, 1, 9, 49, 99)  # steps whose weights are written


def start() -> dict[str, np.ndarray]:
  """Weights, targets and noise; float16 keeps the file small."""
  rng = np.random.default_rng(0)
  arrays = {}
  for name, shape in SHAPES.items():
    arrays[f"{name}/start"] = rng.normal(size=shape)
    arrays[f"{name}/target"] = rng.normal(size=shape)
    arrays[f"{name}/noise"] = 0.5 * rng.normal(size=(STEPS, *shape))
  return {k: v.astype(np.float16) for k, v in arrays.items()}


def trajectory(make, arrays: dict[str, np.ndarray], dtype: torch.dtype):
  """The weights of the kept steps under the optimizer `make(weights)`."""
  arrays = {k: torch.tensor(v).to(dtype) for k, v in arrays.items()}
  weights = {
    n: torch.nn.Parameter(arrays[f"{n}/start"].clone()) for n in SHAPES
  }
  optimizer = make(list(weights.values()))
  kept = {n: [] for n in SHAPES}
  for step in range(STEPS):
    for n, w in weights.items():
      noise = arrays[f"{n}/noise"][step]
      w.grad = w.detach() - arrays[f"{n}/target"] + noise
    optimizer.step()
    if step in KEPT:
      for n, w in weights.items():
        kept[n].append(w.detach().numpy().copy())
  return {n: np.stack(v) for n, v in kept.items()}


OPTIMIZERS = {
  "sgd": lambda p: torch.optim.SGD(p, LR, weight_decay=DECAY),
  "momentum": lambda p: torch.optim.SGD(
    p, LR, momentum=0.9, weight_decay=DECAY
  ),
  "nesterov": lambda p: torch.optim.SGD(
    p, LR, momentum=0.9, weight_decay=DECAY, nesterov=True
  ),
  "rmsprop": lambda p: torch.optim.RMSprop(
    p, LR, alpha=0.95, eps=1e-8, weight_decay=DECAY
  ),
  "adagrad": lambda p: torch.optim.Adagrad(
    p, LR, eps=1e-10, weight_decay=DECAY
  ),
  "adam": lambda p: torch.optim.Adam(
    p, LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY
  ),
  "adamw": lambda p: torch.optim.AdamW(
    p, LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY
  ),
  "muon_original": lambda p: torch.optim.Muon(
    p, LR, weight_decay=DECAY, nesterov=False, adjust_lr_fn="original"
  ),
  "muon_match_rms_adamw": lambda p: torch.optim.Muon(
    p, LR, weight_decay=DECAY, nesterov=False, adjust_lr_fn="match_rms_adamw"
  ),
}


def main() -> None:
  arrays = start()
  out = dict(arrays)
  for name, make in OPTIMIZERS.items():
    dtype = torch.float32 if name.startswith("muon") else torch.float64
    for n, kept in trajectory(make, arrays, dtype).items():
      out[f"{name}/{n}"] = kept
  np.savez_compressed(pathlib.Path(__file__).with_name("optim.npz"), **out)


if __name__ == "__main__":
  main()
