"""Ternary weights: the arithmetic, the files, and whole models of them.

`golden/packed.npz` was made by golden/make_packed.py, with transformers.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxlm
from jaxlm.errors import UserError
from jaxlm.interop import packed
from jaxlm.interop.tensors import open_folder
from jaxlm.layers.norm import RMSNorm, Rounded
from jaxlm.layers.rounding import integers, ternary, ternary_weights
from jaxlm.models import hub
from jaxlm.models.decoder import forward
from jaxlm.models.families import bitnet

FOLDER = pathlib.Path(__file__).parent
with np.load(FOLDER / "golden/packed.npz") as file:
  GOLDEN = dict(file)
CONFIG = json.loads(str(GOLDEN["config"]))
FORMS = json.loads(str(GOLDEN["forms"]))


def tensors(form: str) -> dict[str, np.ndarray]:
  """A checkpoint in one of the three forms."""
  head = f"{form}/weight/"
  return {
    k.removeprefix(head): v for k, v in GOLDEN.items() if k.startswith(head)
  }


def config(form: str) -> dict:
  """Its config.json."""
  said = {"quant_method": "bitnet"} | FORMS[form]
  return CONFIG | {"quantization_config": said}


def test_roundings_equal_transformers():
  """Weights of three values, activations of 255, as BitLinear has them."""
  w, x = jnp.asarray(GOLDEN["w"]), jnp.asarray(GOLDEN["x"])
  np.testing.assert_allclose(ternary(w), GOLDEN["w_rounded"], rtol=1e-6)
  np.testing.assert_allclose(integers(x), GOLDEN["x_rounded"], rtol=1e-6)
  assert len(np.unique(ternary(w))) == 3


def test_each_stacked_matrix_has_its_own_scale():
  """A stack of two is two matrices, and gradients pass straight through."""
  w = jnp.stack([GOLDEN["w"], 5.0 * GOLDEN["w"]])
  both = jnp.stack([ternary(w[0]), ternary(w[1])])
  np.testing.assert_array_equal(ternary(w, 1), both)
  assert not np.allclose(ternary(w), both)
  grad = jax.grad(lambda w: jnp.sum(ternary(w, 1) * w[::-1]))(w)
  np.testing.assert_allclose(grad, w[::-1] + ternary(w, 1)[::-1], rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_norms_have_few_values(bits: int):
  """A row of a rounded norm is integers below 2^(bits-1) times one scale."""
  norm = RMSNorm(12, scale=False)
  y = Rounded(norm, bits)({}, jnp.asarray(GOLDEN["x"]))
  most = 2 ** (bits - 1) - 1
  steps = y / jnp.abs(y).max(-1, keepdims=True) * most
  np.testing.assert_allclose(steps, jnp.round(steps), atol=1e-4)
  plain = norm({}, jnp.asarray(GOLDEN["x"]))
  assert np.abs(y - plain).max() <= np.abs(plain).max() / most / 2 + 1e-6


def test_packing_equals_transformers():
  """Bit for bit, with rows that are no multiple of four."""
  np.testing.assert_array_equal(packed.pack(GOLDEN["values"]), GOLDEN["packed"])
  np.testing.assert_array_equal(
    packed.unpack(GOLDEN["packed"], 10), GOLDEN["values"]
  )


@given(rows=st.integers(1, 13), seed=st.integers(0, 99))
def test_packing_round_trips(rows: int, seed: int):
  """Unpacking undoes packing, whatever the number of rows."""
  values = np.random.default_rng(seed).integers(-1, 2, (rows, 3))
  values = values.astype(np.int8)
  np.testing.assert_array_equal(
    packed.unpack(packed.pack(values), rows), values
  )


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_quantised_models_equal_transformers(form: str):
  """Packed weights times or over their scale, or float ones rounded on use."""
  family = hub.find(config(form))
  model = family.read(config(form))
  arrays = packed.view(tensors(form), config(form))
  assert family.names.extra(model, list(arrays)) == []
  params = family.names.load(model, arrays)
  tokens = jnp.asarray(GOLDEN["tokens"], jnp.int32)
  logits = jax.jit(forward, static_argnums=0)(model, params, tokens)
  want = GOLDEN[f"{form}/logits"]
  assert np.abs(want).max() > 1.0
  np.testing.assert_allclose(logits, want, rtol=0, atol=5e-5)


def test_training_sees_rounded_weights():
  """`ternary_weights` of masters is what the online file is read as."""
  model = bitnet.read(config("online"))
  names = hub.find(CONFIG).names
  arrays = packed.view(tensors("online"), config("online"))
  params = names.load(model, tensors("online"))
  rounded = jax.jit(lambda p: ternary_weights(model.params(), p))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    rounded,
    names.load(model, arrays),
  )
  np.testing.assert_array_equal(rounded["head"], params["head"])


def shapes(arrays) -> dict[str, tuple]:
  """What a writer asks for before the arrays."""
  return {name: (x.shape, x.dtype) for name, x in arrays.items()}


def test_packing_a_model_gives_its_file_again():
  """Bit for bit: packed weights and their scales."""
  before = tensors("auto")
  plain = packed.view(before, config("auto"))
  after = packed.Packed(plain, shapes(plain))
  assert after.keys() == before.keys() == after.shapes.keys()
  for name, x in before.items():
    np.testing.assert_array_equal(after[name], x, err_msg=name)
    assert after.shapes[name] == (x.shape, x.dtype)


def test_what_is_not_ternary_is_not_packed():
  """Float weights, and rows that do not fill their bytes."""
  masters = tensors("online")
  name = "model.layers.0.self_attn.q_proj.weight"
  with pytest.raises(UserError, match=rf"{name}.*ternary_weights"):
    packed.Packed(masters, shapes(masters))[name]
  odd = {"x.weight": np.ones((6, 4), np.float32)}
  with pytest.raises(UserError, match="6 rows"):
    packed.Packed(odd, shapes(odd))


def test_bad_packed_files_are_named():
  """A scale that is missing, and bits that stand for nothing."""
  arrays = tensors("auto")
  name = "model.layers.0.self_attn.q_proj.weight"
  del arrays[name + "_scale"]
  with pytest.raises(UserError, match=rf"{name}.*has no"):
    packed.view(arrays, config("auto"))[name]
  with pytest.raises(UserError, match="damaged"):
    packed.unpack(np.full((1, 2), 255, np.uint8))


def test_a_model_of_other_bits_has_no_config():
  """The hub's BitNet rounds to 8 bits; 4 would be read back as 8."""
  sizes = {"vocab": 9, "dim": 8, "layers": 1, "heads": 2, "kv_heads": 1}
  for bits in (None, 8):
    model = bitnet.decoder(**sizes, mlp_dim=4, activation_bits=bits)
    assert bitnet.read(bitnet.write(model)) == model
  with pytest.raises(UserError, match="activations of 8 bits"):
    bitnet.write(bitnet.decoder(**sizes, mlp_dim=4, activation_bits=4))


def test_a_saved_model_is_packed_and_loads_equal(tmp_path):
  """Through files: the published form, back to the same bits."""
  model = bitnet.read(config("auto"))
  names = hub.find(CONFIG).names
  params = names.load(model, packed.view(tensors("auto"), config("auto")))
  jaxlm.save(tmp_path / "out", model, params, format="hf")
  stored = open_folder(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
  assert (stored.shape, stored.dtype) == ((5, 24), np.uint8)
  again, back = jaxlm.load(tmp_path / "out")
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, back, params)
