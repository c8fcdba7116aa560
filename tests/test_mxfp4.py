"""MXFP4: the numbers bit for bit, and a model's experts read from them."""

import pathlib

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.interop import mxfp4
from jaxlm.models.families import gpt_oss

with np.load(pathlib.Path(__file__).parent / "golden/mxfp4.npz") as file:
  GOLDEN = dict(file)


def test_bits_are_those_of_transformers():
  """Every byte under every scale, subnormal and infinite results included."""
  assert set(GOLDEN["blocks"].flat) == set(range(256))
  assert set(GOLDEN["scales"].flat) == set(range(255))
  got = mxfp4.dequantise(GOLDEN["blocks"], GOLDEN["scales"])
  np.testing.assert_array_equal(got.view(np.uint16), GOLDEN["bits"])


def test_by_hand():
  """Two numbers of a byte, low half first; the last scale is no number."""
  blocks = np.zeros((1, 2, 16), np.uint8)
  blocks[0, 0, :2] = 0x21, 0xF7  # 0.5 and 1, 6 and -6
  got = mxfp4.dequantise(blocks, np.array([[128, 255]], np.uint8))
  assert got.shape == (64, 1)
  assert got[:5, 0].tolist() == [1.0, 2.0, 12.0, -12.0, 0.0]
  assert np.isnan(got[32:]).all()


def packed(model) -> dict[str, np.ndarray]:
  """A checkpoint of a model, its experts' matrices in random blocks."""
  rng, tensors = np.random.default_rng(0), {}
  for entry in gpt_oss.HF[0].names.entries(model):
    name, shape = entry.theirs, entry.shape
    if name.endswith(("gate_up_proj", "down_proj")):
      shape = (shape[0], shape[2], shape[1] // 32)
      bytes_ = rng.integers(0, 256, (*shape, 16))
      tensors[name + "_blocks"] = bytes_.astype(np.uint8)
      tensors[name + "_scales"] = rng.integers(120, 130, shape).astype(np.uint8)
    else:
      tensors[name] = rng.normal(size=shape).astype(np.float32)
  return tensors


def tiny():
  """Matrices of whole blocks; each kind of layer twice."""
  return gpt_oss.decoder(
    vocab=11,
    dim=64,
    layers=4,
    heads=2,
    kv_heads=1,
    mlp_dim=32,
    experts=3,
    top_k=2,
  )


def test_a_model_reads_its_experts():
  """Gate and up columns take turns, and everything else passes through."""
  model, names = tiny(), gpt_oss.HF[0].names
  raw = packed(model)
  tensors = mxfp4.view(raw, {})
  assert set(tensors) == {e.theirs for e in names.entries(model)}
  assert len(tensors) == len(list(tensors))
  assert names.extra(model, list(tensors)) == []
  key = "model.layers.1.mlp.experts.gate_up_proj"
  assert key in tensors
  assert key + "_blocks" not in tensors
  assert key + "_scales" not in tensors
  both = mxfp4.dequantise(raw[key + "_blocks"], raw[key + "_scales"])
  experts = names.load(model, tensors)["layers"]["0"]["1"]["ffn"]["experts"]
  np.testing.assert_array_equal(experts["gate"][0], both[..., ::2])
  np.testing.assert_array_equal(experts["up"][0], both[..., 1::2])
  bias = raw[key + "_bias"]
  np.testing.assert_array_equal(experts["up_bias"][0], bias[:, 1::2])


def test_rejects_what_does_not_fit():
  """Scales that are missing or of other blocks: the tensor is named."""
  raw = packed(tiny())
  key = "model.layers.0.mlp.experts.down_proj"
  less = {k: v for k, v in raw.items() if k != key + "_scales"}
  with pytest.raises(UserError, match=r"down_proj_blocks' has no .*_scales"):
    mxfp4.view(less, {})[key]
  cut = raw | {key + "_scales": raw[key + "_scales"][:, 1:]}
  with pytest.raises(UserError, match=r"down_proj': MXFP4 blocks of shape"):
    mxfp4.view(cut, {})[key]
