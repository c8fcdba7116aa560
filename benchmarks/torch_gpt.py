"""The PyTorch side of `train_vs_torch.py`: a GPT-2 as its users write it well.

Shape and training follow Karpathy's nanoGPT (https://github.com/karpathy/
nanoGPT, `model.py` and `train.py`): learned positions, LayerNorm and Linear
with bias, exact or tanh GELU, tied embedding, no dropout, AdamW with decay on
matrices alone, gradients clipped to a global norm of 1. It uses what PyTorch
offers for speed: `scaled_dot_product_attention`, fused AdamW, gradients set to
None, bfloat16 autocast, `torch.compile`.

This file imports without PyTorch; `available()` says whether the rest works.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

try:
  import torch
  from torch import nn
  from torch.nn import functional as F
except ImportError:  # PyTorch is the judge, never a dependency.
  torch = None


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one GPT and of its batch."""

  layers: int
  heads: int
  dim: int
  context: int
  batch: int
  vocab: int = 65
  gelu: str = "tanh"  # GPT-2's own; "none" is the exact error function


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What AdamW and the clipping are told; nanoGPT's values."""

  lr: float = 1e-3
  betas: tuple[float, float] = (0.9, 0.99)
  eps: float = 1e-8
  decay: float = 0.1
  clip: float = 1.0


SMALL = Shape(layers=4, heads=4, dim=128, context=64, batch=12)
LARGE = Shape(layers=6, heads=6, dim=384, context=256, batch=8)


def available() -> bool:
  """True where PyTorch is installed."""
  return torch is not None


if torch is not None:

  class Attention(nn.Module):
    """Causal self-attention, one projection for q, k and v."""

    def __init__(self, shape: Shape):
      super().__init__()
      self.heads = shape.heads
      self.qkv = nn.Linear(shape.dim, 3 * shape.dim)
      self.out = nn.Linear(shape.dim, shape.dim)

    def forward(self, x):
      """[B, T, D] -> [B, T, D]."""
      b, t, d = x.shape
      q, k, v = (
        part.view(b, t, self.heads, d // self.heads).transpose(1, 2)
        for part in self.qkv(x).split(d, dim=2)
      )
      y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
      return self.out(y.transpose(1, 2).reshape(b, t, d))

  class Block(nn.Module):
    """Pre-norm attention and GELU MLP with residuals."""

    def __init__(self, shape: Shape):
      super().__init__()
      self.norm1 = nn.LayerNorm(shape.dim)
      self.attention = Attention(shape)
      self.norm2 = nn.LayerNorm(shape.dim)
      self.up = nn.Linear(shape.dim, 4 * shape.dim)
      self.act = nn.GELU(approximate=shape.gelu)
      self.down = nn.Linear(4 * shape.dim, shape.dim)

    def forward(self, x):
      """[B, T, D] -> [B, T, D]."""
      x = x + self.attention(self.norm1(x))
      return x + self.down(self.act(self.up(self.norm2(x))))

  class GPT(nn.Module):
    """A decoder with learned positions and a tied output projection."""

    def __init__(self, shape: Shape):
      super().__init__()
      self.tokens = nn.Embedding(shape.vocab, shape.dim)
      self.positions = nn.Embedding(shape.context, shape.dim)
      self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
      self.norm = nn.LayerNorm(shape.dim)
      self.head = nn.Linear(shape.dim, shape.vocab, bias=False)
      self.head.weight = self.tokens.weight
      self.apply(self._init)
      for name, p in self.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
          nn.init.normal_(p, std=0.02 / (2 * shape.layers) ** 0.5)

    @staticmethod
    def _init(module):
      if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
      if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

    def forward(self, inputs, targets):
      """Tokens [B, T] and their successors [B, T] -> the mean loss."""
      x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
      for block in self.blocks:
        x = block(x)
      logits = self.head(self.norm(x))
      return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(model, recipe: Recipe):
  """Fused AdamW that decays matrices and leaves vectors alone."""
  weights = list(model.parameters())
  groups = [
    {"params": [p for p in weights if p.dim() >= 2]},
    {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
  ]
  return torch.optim.AdamW(
    groups,
    lr=recipe.lr,
    betas=recipe.betas,
    eps=recipe.eps,
    weight_decay=recipe.decay,
    fused=True,
  )


def make_step(
  shape: Shape,
  recipe: Recipe = Recipe(),
  bfloat16: bool = False,
  compiled: bool = False,
  threads: int | None = None,
) -> Callable[[object, object], object]:
  """Build one training step of a freshly initialised GPT.

  Args:
    shape: sizes of the model.
    recipe: optimizer and clipping.
    bfloat16: run forward under bfloat16 autocast; the weights stay float32.
    compiled: pass the model through `torch.compile`.
    threads: CPU threads; PyTorch's own choice when None.

  Returns:
    step(inputs, targets) -> loss; int64 tensors [batch, context]; the loss is
    a scalar tensor. The model and the optimizer hang on it as attributes.
  """
  if threads is not None:
    torch.set_num_threads(threads)
  torch.manual_seed(0)
  model = GPT(shape)
  optimizer = make_optimizer(model, recipe)
  run = torch.compile(model) if compiled else model

  def step(inputs, targets):
    precision = (
      torch.autocast("cpu", dtype=torch.bfloat16)
      if bfloat16
      else contextlib.nullcontext()
    )
    with precision:
      loss = run(inputs, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  step.model, step.optimizer = model, optimizer
  return step


def batches(shape: Shape, count: int, seed: int = 0):
  """`count` random batches: int64 (inputs, targets), each [batch, context]."""
  g = torch.Generator().manual_seed(seed)
  size = (count, shape.batch, shape.context + 1)
  tokens = torch.randint(shape.vocab, size, generator=g)
  return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
