"""Writes mxfp4.npz: random blocks, as transformers dequantises them.

Run with torch 2.13 and transformers 5 installed (neither the library nor its
tests need them): `python tests/golden/make_mxfp4.py`. Every byte and every
scale but that of NaN occurs; `bits` are those of the bfloat16 result.
"""

import pathlib

import numpy as np
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

rng = np.random.default_rng(0)
blocks = rng.integers(0, 256, (3, 10, 9, 16)).astype(np.uint8)
blocks[0, 0] = np.arange(9 * 16).reshape(9, 16)
blocks[0, 1] = 255 - blocks[0, 0]
scales = np.resize(rng.permutation(255), (3, 10, 9)).astype(np.uint8)
out = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
np.savez_compressed(
  pathlib.Path(__file__).parent / "mxfp4.npz",
  blocks=blocks,
  scales=scales,
  bits=out.view(torch.int16).numpy().view(np.uint16),
)
