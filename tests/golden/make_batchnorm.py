"""Writes batchnorm.npz: torch.nn.BatchNorm1d in training and in evaluation.

Needs torch 2.13: `python tests/golden/make_batchnorm.py`. Made in float64:
three training batches one after another, then an evaluation; the gradients are
those of sum(output * cotangent) of the last training batch.
"""

import pathlib

import numpy as np
import torch

DIM, ROWS, BATCHES = 5, 7, 3

torch.manual_seed(0)
norm = torch.nn.BatchNorm1d(DIM).double()
norm.weight.data, norm.bias.data = (
  torch.randn(DIM).half().double(),
  torch.randn(DIM).half().double(),
)
x = (torch.randn(BATCHES + 1, ROWS, DIM) * 2 + 1).half().double()
x.requires_grad_()
cotangent = torch.randn(ROWS, DIM).half().double()
out = [norm(x[i]) for i in range(BATCHES)]
(out[-1] * cotangent).sum().backward()
running = {"mean": norm.running_mean.clone(), "var": norm.running_var.clone()}
norm.eval()
out.append(norm(x[BATCHES]))
arrays = {
  "x": x,
  "scale": norm.weight,
  "bias": norm.bias,
  "cotangent": cotangent,
  "out": torch.stack(out),
  "grad/x": x.grad[BATCHES - 1],
  "grad/scale": norm.weight.grad,
  "grad/bias": norm.bias.grad,
  **running,
}
np.savez_compressed(
  pathlib.Path(__file__).parent / "batchnorm.npz",
  **{k: v.detach().numpy().astype(np.float32) for k, v in arrays.items()},
)
