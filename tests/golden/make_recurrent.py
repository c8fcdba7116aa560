"""Writes recurrent.npz: recurrent layers of torch and transformers.

Run with torch 2.13 and transformers 5 installed (neither the library nor its
tests need them): `python tests/golden/make_recurrent.py`. torch's layers run in
float64; the block of RecurrentGemma casts its states to float32. Weights and
inputs are float16 at heart. `<layer>/grad/<name>` is the gradient of
sum(out * cotangent).
"""

import pathlib

import numpy as np
import torch
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma import modeling_recurrent_gemma

ARRAYS: dict[str, np.ndarray] = {}
B, T, D = 2, 13, 5


def keep(name: str, module: torch.nn.Module, run, x: torch.Tensor) -> None:
  """Writes weights, input, output, and the gradients by all of them."""
  x = x.clone().requires_grad_()
  out, last = run(module, x)
  cotangent = torch.randn(out.shape).half().to(out.dtype)
  (out * cotangent).sum().backward()
  arrays = {"x": x} | dict(module.named_parameters())
  for key, value in arrays.items():
    ARRAYS[f"{name}/{key}"] = value.detach().numpy().astype(np.float16)
    ARRAYS[f"{name}/grad/{key}"] = value.grad.numpy().astype(np.float32)
  ARRAYS[f"{name}/cotangent"] = cotangent.numpy().astype(np.float16)
  ARRAYS[f"{name}/out"] = out.detach().numpy().astype(np.float32)
  for key, value in last.items():
    ARRAYS[f"{name}/last/{key}"] = value[0].detach().numpy().astype(np.float32)


def randomise(module: torch.nn.Module, scale: float) -> None:
  """Random weights everywhere, that float16 holds exactly."""
  with torch.no_grad():
    for p in module.parameters():
      p.copy_((scale * torch.randn(p.shape)).half())


def cells() -> None:
  """One layer of each of torch's, tanh and relu."""
  makers = {
    "tanh": torch.nn.RNN(D, D, batch_first=True),
    "relu": torch.nn.RNN(D, D, batch_first=True, nonlinearity="relu"),
    "lstm": torch.nn.LSTM(D, D, batch_first=True),
    "gru": torch.nn.GRU(D, D, batch_first=True),
  }

  def run(module, x):
    out, last = module(x)
    last = last if isinstance(last, tuple) else (last,)
    return out, dict(zip("hc", last, strict=False))

  for name, module in makers.items():
    module = module.double()
    randomise(module, 0.4)
    keep(name, module, run, torch.randn(B, T, D).half().double())


def block() -> None:
  """The recurrent block of RecurrentGemma: 6 wide, 12 inside, three heads."""
  config = RecurrentGemmaConfig(
    hidden_size=6,
    lru_width=12,
    num_attention_heads=3,
    conv1d_width=4,
    hidden_activation="gelu_pytorch_tanh",
  )
  module = modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock(config, 0)
  randomise(module, 0.6)
  positions = torch.arange(T)[None].repeat(B, 1)

  def run(module, x):
    return module(x, positions, None, use_cache=False)[0], {}

  keep("rglru", module, run, torch.randn(B, T, 6).half().float())


if __name__ == "__main__":
  torch.manual_seed(0)
  cells()
  block()
  path = pathlib.Path(__file__).parent / "recurrent.npz"
  np.savez_compressed(path, **ARRAYS)
  print(path.name, path.stat().st_size, len(ARRAYS))
