"""Hugging Face directories: in, out, spread over devices, and refused.

Checkpoints are those of the golden families (see test_families.py), written by
the safetensors library, which judges our reader and writer too.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from test_families import NAMES, golden

import jaxlm
from jaxlm.data.tokenizers import ByteBPE, Bytes
from jaxlm.errors import UserError
from jaxlm.interop import beside, place, tensors
from jaxlm.interop.fp8 import Blocks
from jaxlm.interop.load import load_all, load_model
from jaxlm.layers.param import paths
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import Rules, preset

TIED = "mistral_full"  # a golden model whose head is its embedding
TEXT = "The quick brown fox jumps over the lazy dog. " * 60


def write(path: Path, name: str, weights=None, config=None) -> Path:
  """A golden checkpoint as a directory of the hub."""
  g = golden(name)
  path.mkdir(parents=True, exist_ok=True)
  weights = g.weights if weights is None else weights
  weights = {k: np.ascontiguousarray(v) for k, v in weights.items()}
  safetensors.numpy.save_file(weights, path / "model.safetensors")
  text = json.dumps(g.config if config is None else config)
  (path / "config.json").write_text(text)
  return path


def assert_same(a, b) -> None:
  """Same structure, dtypes and bits."""

  def one(x, y):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)

  jax.tree.map(one, a, b)


# --- In and out -------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_is_saved_the_same(tmp_path: Path, name: str):
  """The model, the parameters and every tensor; in shards, the smallest."""
  g = golden(name)
  model, params = jaxlm.load(write(tmp_path / "a", name))
  assert model == g.model
  want = g.names.load(g.model, g.weights)
  assert_same(params, jax.tree.map(lambda x: x.astype(np.float32), want))
  if g.names.base and "text_config" in g.config:
    return  # a text model out of one that sees: it is written as what it is
  jaxlm.save(tmp_path / "b", model, params, format="hf", shard_size=1)
  index = json.loads((tmp_path / "b" / tensors.INDEX).read_text())
  assert len(set(index["weight_map"].values())) == len(index["weight_map"])
  found, back = jaxlm.load(tmp_path / "b")
  assert found == model
  assert_same(back, params)
  for key, file in index["weight_map"].items():
    (only,) = safetensors.numpy.load_file(tmp_path / "b" / file).items()
    assert only[0] == key


def test_bfloat16_is_read_and_written_to_the_bit(tmp_path: Path):
  """As stored, widened exactly, rounded once; norms too."""
  _, wide = jaxlm.load(write(tmp_path / "a", "qwen3"))
  model, half = jaxlm.load(tmp_path / "a", dtype="bfloat16")
  assert_same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide))
  jaxlm.save(tmp_path / "b", model, half, format="hf")
  assert_same(jaxlm.load(tmp_path / "b", dtype=None)[1], half)
  jaxlm.save(tmp_path / "c", model, wide, format="hf", dtype="bfloat16")
  assert_same(jaxlm.load(tmp_path / "c", dtype=None)[1], half)
  back = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  assert_same(jaxlm.load(tmp_path / "c")[1], back)


@pytest.mark.parametrize("presets", ["fsdp", "tp", "dp"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt2"])
def test_parameters_are_read_to_where_the_rules_say(
  tmp_path: Path, name: str, presets: str
):
  """Eight devices, each given its part; gathered again they are the same."""
  rules = preset(presets)
  mesh = make_mesh(rules, "")
  path = write(tmp_path / "a", name)
  _, whole = jaxlm.load(path)
  model, params = jaxlm.load(path, mesh=mesh, rules=rules)
  assert_same(params, whole)
  for p, x in zip(
    paths(model.params()).values(), jax.tree.leaves(params), strict=True
  ):
    assert x.sharding.spec == rules.stored_spec(p.axes, p.shape, mesh)
  jaxlm.save(tmp_path / "b", model, params, format="hf")
  assert_same(jaxlm.load(tmp_path / "b")[1], whole)


def test_experts_may_be_spread(tmp_path: Path):
  """Each expert is a tensor of its own, and goes to its device alone."""
  rules = Rules(stored=(("experts", "data"),), mesh=(("data", -1),))
  path = write(tmp_path / "a", "mixtral")
  model = load_model(path)
  experts = {
    p.shape[1] for n, p in paths(model.params()).items() if "/experts/" in n
  }
  mesh = jax.make_mesh((experts.pop(),), ("data",), devices=None)
  _, params = jaxlm.load(path, mesh=mesh, rules=rules)
  specs = {x.sharding.spec for x in jax.tree.leaves(params)}
  assert any("data" in spec for spec in specs)
  assert_same(params, jaxlm.load(path)[1])


def test_a_run_of_ours_may_be_spread_too(tmp_path: Path):
  """One function, whatever the path is."""
  model, params = jaxlm.load(write(tmp_path / "a", "llama"))
  jaxlm.save(tmp_path / "b", model, params)
  rules = preset("fsdp")
  mesh = make_mesh(rules, "")
  _, spread = jaxlm.load(tmp_path / "b", None, mesh, rules)
  assert spread["embed"]["tokens"].sharding.spec == PartitionSpec(None, "fsdp")
  assert_same(spread, params)


def test_the_buffers_of_an_accelerator(tmp_path: Path, monkeypatch):
  """The way that a CPU does not take gives the same arrays."""
  path = write(tmp_path / "a", "qwen3_moe")
  want = jaxlm.load(path, dtype="bfloat16")[1]
  monkeypatch.setattr(place, "_HostShard", place._DeviceShard)
  rules = preset("fsdp")
  mesh = make_mesh(rules, "")
  assert_same(jaxlm.load(path, "bfloat16", mesh, rules)[1], want)
  assert_same(jaxlm.load(path, dtype="bfloat16")[1], want)


def test_a_file_without_its_head_lacks_the_base_of_names(tmp_path: Path):
  """AutoModel saves 'layers.0...', AutoModelForCausalLM 'model.layers.0...'."""
  g = golden(TIED)
  assert g.model.tied
  bare = {k.removeprefix("model."): v for k, v in g.weights.items()}
  path = write(tmp_path / "a", TIED, bare)
  assert_same(jaxlm.load(path)[1], jaxlm.load(write(tmp_path, TIED))[1])


def test_a_tied_head_may_be_there_as_a_copy(tmp_path: Path):
  """Some files have it; one that differs is no copy."""
  g = golden(TIED)
  table = g.weights["model.embed_tokens.weight"]
  path = write(tmp_path / "a", TIED, g.weights | {"lm_head.weight": table})
  assert load_model(path) == g.model
  assert_same(jaxlm.load(path)[1], jaxlm.load(write(tmp_path, TIED))[1])
  write(path, TIED, g.weights | {"lm_head.weight": table + 1})
  with pytest.raises(UserError, match=r"lm_head\.weight' differs"):
    jaxlm.load(path)


def test_float8_blocks_are_multiplied_out():
  """Blocks at the edges are smaller than 128 x 128."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 130)).astype(jnp.float8_e4m3fn)
  scales = rng.uniform(1, 2, (2, 2)).astype(np.float32)
  kept = rng.normal(size=3).astype(np.float32)
  given = {"a.weight": x, "a.weight_scale_inv": scales, "b": kept}
  view = Blocks(given)
  assert sorted(view) == ["a.weight", "b"]
  want = (
    x.astype(np.float32)
    * scales[np.arange(200)[:, None] // 128, [[0] * 128 + [1] * 2]]
  )
  np.testing.assert_array_equal(view["a.weight"], want)
  np.testing.assert_array_equal(view["b"], kept)
  with pytest.raises(UserError, match=r"\(2, 3\).*must be \(2, 2\)"):
    Blocks(given | {"a.weight_scale_inv": np.ones((2, 3))})["a.weight"]


def test_memory_stays_near_what_is_kept(tmp_path: Path):
  """In a process of its own: 48 MB of arrays, and no second copy of them."""
  code = """
import resource, sys, jax, jaxlm
from jaxlm.layers.param import abstract
from jaxlm.models.families import llama
import numpy as np
model = llama.decoder(1024, 256, 15, 4, 4, 64, 768, max_positions=32)
if sys.argv[2] == "save":
  params = jax.tree.map(
    lambda s: np.ones(s.shape, np.float32), abstract(model.params())
  )
  jaxlm.save(sys.argv[1], model, params, format="hf")
else:
  small = llama.decoder(8, 4, 1, 1, 1, 4, 4, max_positions=4)
  jax.block_until_ready(jaxlm.load(sys.argv[1] + "-small"))
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  model, params = jaxlm.load(sys.argv[1])
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print((after - before) * 1024, model.n_params() * 4)
"""
  small = golden("llama")
  write(tmp_path / "a-small", "llama")
  assert small.model.n_params() < 1e5
  for what in ("save", "load"):
    run = subprocess.run(
      [sys.executable, "-c", code, str(tmp_path / "a"), what],
      stdout=subprocess.PIPE,
      text=True,
      check=True,
      env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
  used, kept = map(int, run.stdout.split())
  assert kept > 45e6
  assert used < 1.25 * kept


@hypothesis.given(st.data())
def test_copy_is_assignment(data):
  """Whatever the order of axes in memory, and of any dtype to any other."""
  shape = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
  order = data.draw(st.permutations(range(len(shape))))
  dtypes = st.sampled_from(["float32", "bfloat16", "float16"])
  a, b = jnp.dtype(data.draw(dtypes)), jnp.dtype(data.draw(dtypes))
  n = int(np.prod(shape))
  x = (np.arange(n) % 999).astype(a).reshape([shape[i] for i in order])
  x = x.transpose(np.argsort(order))
  to = np.empty(x.shape, b)
  place.copy(to, x)
  np.testing.assert_array_equal(to, x.astype(b))


# --- The file format --------------------------------------------------------


def test_the_library_and_we_read_what_the_other_wrote(tmp_path: Path):
  """Every dtype both know, scalars and empty arrays among them."""
  arrays = {
    f"x.{dtype}": np.arange(6).reshape(2, 3).astype(dtype)
    for dtype in ("float64", "float32", "float16", "int64", "uint8", "bool")
  }
  arrays |= {"scalar": np.float32(2.5), "none": np.zeros((0, 3), np.int8)}
  arrays = {k: np.asarray(v) for k, v in arrays.items()}
  safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
  found = tensors.Tensors(tensors.heads(tmp_path / "a.safetensors"))
  shapes = {k: (v.shape, v.dtype) for k, v in arrays.items()}
  tensors.write(tmp_path / "b.safetensors", shapes, arrays.__getitem__)
  theirs = safetensors.numpy.load_file(tmp_path / "b.safetensors")
  for name, want in arrays.items():
    for x in (found[name], theirs[name]):
      assert x.dtype == want.dtype
      np.testing.assert_array_equal(x, want)
  with safetensors.safe_open(tmp_path / "b.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_a_tensor_is_let_go_when_nobody_holds_it(tmp_path: Path):
  """Mapped, not read: and unmapped with the last reference."""
  path = write(tmp_path / "a", "llama") / "model.safetensors"

  def mapped() -> bool:
    return str(path) in Path("/proc/self/maps").read_text()

  if not Path("/proc/self/maps").exists():
    pytest.skip("needs /proc")
  found = tensors.Tensors(tensors.heads(path))
  assert not mapped()
  x = found["model.norm.weight"]
  assert mapped()
  del x
  assert not mapped()


# --- Tokenizers -------------------------------------------------------------


def with_tokenizer(path: Path, specials=("<|endoftext|>",)) -> Path:
  """The tiny Llama whose vocabulary is that of a tokenizer."""
  write(path, "llama")
  tokenizer = ByteBPE.train([TEXT], 300, specials)
  config = golden("llama").config | {"vocab_size": tokenizer.vocab_size}
  weights = dict(golden("llama").weights)
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    wide = np.resize(
      weights[name], (tokenizer.vocab_size, config["hidden_size"])
    )
    weights[name] = wide
  write(path, "llama", weights, config)
  tokenizer.save(path)
  return path


def test_what_is_published_beside_a_tokenizer_travels(tmp_path: Path):
  """Template, stop tokens and defaults, also through a run of ours."""
  path = with_tokenizer(tmp_path / "a", ["<s>", "<|endoftext|>", "<|im_end|>"])
  said = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}
  said |= {"add_bos_token": True, "chat_template": "{{ messages[0].content }}"}
  (path / "tokenizer_config.json").write_text(json.dumps(said))
  (path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
  for i, form in enumerate(("jaxlm", "hf", "jaxlm")):
    model, params, tokenizer = load_all(path)
    found = beside.said(tokenizer)
    assert found.ends == (1, 2)
    assert (found.bos, found.start) == (0, (0,))
    assert found.template.source == said["chat_template"]
    assert (found.template.bos, found.template.eos) == ("<s>", "<|im_end|>")
    path = tmp_path / f"b{i}"
    jaxlm.save(path, model, params, tokenizer, format=form)


def test_the_end_may_stand_in_the_config_alone(tmp_path: Path):
  """Files of some years have no generation_config.json."""
  path = with_tokenizer(tmp_path / "a", ["<s>", "</s>"])
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
  assert beside.said(jaxlm.load_tokenizer(path)).ends == (0, 1)


def test_a_tokenizer_json_that_begins_every_text(tmp_path: Path):
  """Llama 3 says so by a template in the file itself."""
  from tokenizers.processors import TemplateProcessing

  tokenizer = ByteBPE.train([TEXT], 300, ["<s>"])
  tokenizer._hf.post_processor = TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
  )
  tokenizer = ByteBPE(tokenizer._hf.to_str())
  assert tokenizer.start == (0,)
  assert 0 not in tokenizer.encode("fox")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
  """More tokens than the model has; special ones may be too many."""
  path = with_tokenizer(tmp_path / "a")
  size = jaxlm.load_tokenizer(path).vocab_size
  form = json.loads((path / "tokenizer.json").read_text())
  extra = form["added_tokens"][0] | {"id": size, "content": "<image>"}
  form["added_tokens"].append(extra)
  (path / "tokenizer.json").write_text(json.dumps(form))
  tokenizer = jaxlm.load_tokenizer(path)
  assert tokenizer.vocab_size == size
  assert "<image>" not in tokenizer.specials
  ids = tokenizer.encode("a <image>", allow_special=True)
  assert tokenizer.decode(ids) == "a <image>"
  form["added_tokens"][-1]["special"] = False
  (path / "tokenizer.json").write_text(json.dumps(form))
  with pytest.raises(
    UserError, match=rf"{size + 1} tokens and the model {size}"
  ):
    jaxlm.load_tokenizer(path)
  model, params = jaxlm.load(path)
  big = Bytes([f"<{i}>" for i in range(size)])
  big.specials = {}
  with pytest.raises(UserError, match="another model's tokenizer"):
    jaxlm.save(tmp_path / "b", model, params, big)
  assert not (tmp_path / "b").exists()


# --- Bad input --------------------------------------------------------------


def fails(words: str, path: Path, **more) -> None:
  with pytest.raises(UserError, match=words):
    jaxlm.load(path, **more)


def test_paths_that_are_no_model(tmp_path: Path):
  """What is there instead, and what to do."""
  fails("no directory", tmp_path / "none")
  fails("holds no run", tmp_path)
  (tmp_path / "a.txt").write_text("text")
  fails(r"not a GGUF file|pip install", tmp_path / "a.txt")
  path = write(tmp_path / "a", "llama")
  fails("give its directory", path / "model.safetensors")
  fails("which='best' has no meaning", path, which="best")
  fails("dtype='int4' is unknown", path, dtype="int4")
  (path / "config.json").unlink()
  fails(r"has no config\.json", path)
  (path / "config.json").write_text("{")
  fails("is not JSON", path)
  (path / "config.json").write_text("[]")
  fails("holds no|no JSON object|damaged", path)
  with pytest.raises(UserError, match=r"no tokenizer\.json"):
    jaxlm.load_tokenizer(write(tmp_path / "b", "llama"))


def test_a_pickle_is_refused_and_not_touched(tmp_path: Path):
  """Reading it would have run a program."""

  class Bomb:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "exploded"),)

  path = write(tmp_path / "a", "llama")
  (path / "model.safetensors").unlink()
  (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
  fails("pickle.*only safetensors and GGUF are read", path)
  fails("pickle", path / "pytorch_model.bin")
  (path / "config.json").unlink()
  fails("no config.json|pickle", path)
  assert not (tmp_path / "exploded").exists()


def test_an_unknown_family_lists_the_known(tmp_path: Path):
  """And says where to read how one is added."""
  config = golden("llama").config | {"model_type": "lama"}
  path = write(tmp_path / "a", "llama", config=config)
  fails(r"model_type 'lama'; known: .*llama.*add-a-family", path)
  config["model_type"] = "llama"
  config["quantization_config"] = {"quant_method": "gptq"}
  fails("quantised by 'gptq'.*known: fp8", write(path, "llama", None, config))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path):
  """Missing, left over, of another shape: with what was wanted."""
  weights, path = golden("llama").weights, tmp_path / "a"
  key = "model.layers.1.self_attn.k_proj.weight"
  less = {k: v for k, v in weights.items() if k != key}
  fails(rf"no tensor '{key}'.*\(20, 24\)", write(path, "llama", less))
  write(path, "llama", weights | {"model.layers.9.odd": weights[key]})
  fails(r"tensor 'model\.layers\.9\.odd', for which the model", path)
  write(path, "llama", weights | {key: weights[key][:10]})
  fails(rf"'{key}' has shape \(10, 24\).*needs \(20, 24\)", path)


def test_files_that_are_cut_short(tmp_path: Path):
  """At any byte: never a traceback, never a model."""
  path = write(tmp_path / "a", "llama")
  file = path / "model.safetensors"
  whole = file.read_bytes()
  for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
    file.write_bytes(whole[:size])
    fails("cut short", path)
  file.write_bytes(
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
  )
  fails("git-lfs pointer", path)
  for bad in (b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F3"}}'):
    file.write_bytes(len(bad).to_bytes(8, "little") + bad)
    fails("damaged or no safetensors file", path)


@hypothesis.given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_a_sentence(tmp_path_factory, content):
  """A head of garbage raises nothing else."""
  file = tmp_path_factory.mktemp("x") / "a.safetensors"
  for prefix in (b"", len(content).to_bytes(8, "little")):
    file.write_bytes(prefix + content)
    with contextlib.suppress(UserError):
      tensors.heads(file)


def test_shards_that_are_missing_or_strange(tmp_path: Path):
  """The index and its files must agree, and stay in their folder."""
  model, params = jaxlm.load(write(tmp_path / "a", "llama"))
  path = tmp_path / "b"
  jaxlm.save(path, model, params, format="hf", shard_size=5000)
  shards = sorted(path.glob("*.safetensors"))
  assert len(shards) > 2
  index = json.loads((path / tensors.INDEX).read_text())
  swapped = dict.fromkeys(index["weight_map"], shards[0].name)
  text = json.dumps({"weight_map": swapped})
  (path / tensors.INDEX).write_text(text)
  fails(f"is in {shards[0].name}, and it is not", path)
  away = dict.fromkeys(index["weight_map"], "../../x.safetensors")
  (path / tensors.INDEX).write_text(json.dumps({"weight_map": away}))
  fails("outside its folder", path)
  (path / tensors.INDEX).write_text("{}")
  fails("no index", path)
  (path / tensors.INDEX).write_text(json.dumps(index))
  shards[1].unlink()
  fails(f"lacks the shard {shards[1].name}", path)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch):
  """Neither a directory that loads nor one that does not."""
  model, params = jaxlm.load(write(tmp_path / "a", "llama"))
  real = tensors.write

  def full(path, *arguments):
    real(path, *arguments)
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(tensors, "write", full)
  with pytest.raises(UserError, match="No space left on device"):
    jaxlm.save(tmp_path / "b", model, params, format="hf")
  assert [p.name for p in tmp_path.iterdir()] == ["a"]
  monkeypatch.undo()
  with pytest.raises(UserError, match="exists already"):
    jaxlm.save(tmp_path / "a", model, params, format="hf")
  with pytest.raises(UserError, match="format='onnx' is unknown"):
    jaxlm.save(tmp_path / "b", model, params, format="onnx")
  broken = dict(params, embed={"tokens": params["embed"]["tokens"][1:]})
  with pytest.raises(UserError, match="not the parameters of this model"):
    jaxlm.save(tmp_path / "b", model, broken, format="hf")
  assert not (tmp_path / "b").exists()


def test_a_killed_save_leaves_nothing_that_loads(tmp_path: Path, monkeypatch):
  """The process dies before the last file: its folder has no name yet."""
  model, params = jaxlm.load(write(tmp_path / "a", "llama"))

  def die(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr("os.rename", die)
  monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
  with pytest.raises(KeyboardInterrupt):
    jaxlm.save(tmp_path / "b", model, params, format="hf")
  left = [p.name for p in tmp_path.iterdir() if p.name != "a"]
  assert len(left) == 1
  assert re.fullmatch(r"\.b\..*\.tmp", left[0])
