"""The program that converts, and the round trips it makes."""

import json

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.convert import main
from jaxlm.data.tokenizers import ByteBPE, Chars
from jaxlm.errors import UserError
from jaxlm.layers.param import init
from jaxlm.models import hub
from jaxlm.models.families import llama, modern

TEXT = "The quick brown fox jumps over the lazy dog. " * 60


def tiny(vocab: int, seed: int = 0):
  model = llama.decoder(vocab, 16, 2, 4, 2, 8, 32, max_positions=32)
  return model, init(model.params(), jax.random.key(seed))


def assert_same(a, b) -> None:
  """Same structure, dtypes and bits."""

  def one(x, y):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)

  jax.tree.map(one, a, b)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
  """A model as `jaxlm.save` writes it: directory, model, parameters."""
  tokenizer = ByteBPE.train([TEXT], 300)
  tokenizer.beside = {"chat_template.jinja": b"{{ messages }}"}
  model, params = tiny(tokenizer.vocab_size)
  path = tmp_path_factory.mktemp("ours") / "a"
  jaxlm.save(path, model, params, tokenizer)
  return path, model, params


def test_there_and_back(ours, tmp_path, capsys):
  """Ours, the hub's, ours again: model, bits, tokenizer and template."""
  path, model, params = ours
  main([f"--from={path}", f"--to={tmp_path / 'hub'}"])
  assert capsys.readouterr().out.startswith(f"{tmp_path / 'hub'}: hf, 1")
  main([f"--from={tmp_path / 'hub'}", f"--to={tmp_path / 'back'}"])
  assert (tmp_path / "back" / "model.json").exists()
  for place in ("hub", "back"):
    found, loaded = jaxlm.load(tmp_path / place)
    assert found == model
    assert_same(loaded, params)
    tokenizer = jaxlm.load_tokenizer(tmp_path / place)
    want = jaxlm.load_tokenizer(path)
    assert tokenizer.fingerprint() == want.fingerprint()
    template = tokenizer.beside["chat_template.jinja"]
    assert template == want.beside["chat_template.jinja"]


def test_dtype_is_kept_or_changed(ours, tmp_path):
  """bfloat16 on request; after that it stays so without being asked for."""
  path, _, params = ours
  half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
  args = ["--format=hf", "--dtype=bfloat16"]
  main([f"--from={path}", f"--to={tmp_path / 'a'}", *args])
  config = json.loads((tmp_path / "a" / "config.json").read_text())
  assert config["dtype"] == "bfloat16"
  main([f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}"])
  assert_same(jaxlm.load(tmp_path / "b", dtype=None)[1], half)


def test_a_model_without_a_tokenizer(tmp_path, capsys):
  """Goes through, and it is said."""
  model, params = tiny(31)
  jaxlm.save(tmp_path / "a", model, params, format="hf")
  main([f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}"])
  assert ", no tokenizer, " in capsys.readouterr().out
  assert_same(jaxlm.load(tmp_path / "b")[1], params)


def test_gguf_and_back(ours, tmp_path):
  """float32 as GGUF is exact too: queries and keys regrouped, and back."""
  pytest.importorskip("gguf")
  path, model, params = ours
  main([f"--from={path}", f"--to={tmp_path / 'a.gguf'}", "--dtype=float32"])
  main([f"--from={tmp_path / 'a.gguf'}", f"--to={tmp_path / 'b'}"])
  found, loaded = jaxlm.load(tmp_path / "b")
  assert found == model
  assert_same(loaded, params)
  tokenizer = jaxlm.load_tokenizer(tmp_path / "b")
  assert tokenizer.beside["chat_template.jinja"] == b"{{ messages }}"
  ids = jaxlm.load_tokenizer(path).encode(TEXT)
  np.testing.assert_array_equal(tokenizer.encode(TEXT), ids)


def test_errors(ours, tmp_path):
  """One sentence each, and nothing left behind."""
  path, _, _ = ours

  def fails(words: str, *flags: str) -> None:
    with pytest.raises(UserError, match=words):
      main(list(flags))

  to = f"--to={tmp_path / 'x'}"
  fails("required: --from", to)
  fails("no directory nowhere", "--from=nowhere", to)
  fails("exists already", f"--from={path}", f"--to={path}")
  fails("dtype='int3' is unknown", f"--from={path}", to, "--dtype=int3")
  fails("invalid choice", f"--from={path}", to, "--format=onnx")
  model = modern.decoder(vocab=9, dim=16, layers=1, heads=2, max_positions=8)
  params = init(model.params(), jax.random.key(0))
  jaxlm.save(tmp_path / "modern", model, params, Chars("abcdefg \n"))
  fails(
    "no family on the Hugging Face hub", f"--from={tmp_path / 'modern'}", to
  )
  assert [p.name for p in tmp_path.iterdir()] == ["modern"]


def test_an_encoder_decoder_converts_too(tmp_path):
  """It is no `Decoder`, and is written down and read back all the same."""
  config = {"model_type": "t5", "vocab_size": 33, "d_model": 16, "d_kv": 8}
  config |= {"d_ff": 32, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
  config |= {"decoder_start_token_id": 0}
  model = hub.find(config).read(config)
  params = init(model.params(), jax.random.key(0))
  jaxlm.save(tmp_path / "a", model, params, format="hf")
  main([f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}"])
  found, loaded = jaxlm.load(tmp_path / "b")
  assert found == model
  assert_same(loaded, params)
