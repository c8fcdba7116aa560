"""Adapters: what they compute, beside PEFT's own; merging; files.

golden/peft.npz holds adapters that PEFT wrote for the tiny models of other
golden files, what they add to each weight, and logits (golden/make_peft.py).
"""

import dataclasses
import functools
import json
import pathlib
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MODELS, random_params, random_tokens

from jaxlm.errors import UserError
from jaxlm.interop import tensors
from jaxlm.interop.peft import load_adapters, modules, save_adapters
from jaxlm.layers.param import count, paths, shardings
from jaxlm.models import hub
from jaxlm.models.decoder import forward
from jaxlm.models.lora import LoRA
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = ("lora", "rslora", "dora", "rsdora", "fused", "patterns")


def close(a, b, tol: float = 1e-6) -> None:
  """Equal trees, to a tolerance."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b
  )


# --- PEFT -------------------------------------------------------------------


@functools.cache
def base(family: str):
  """The tiny model under an adapter: itself, its arrays, their tensors."""
  with np.load(GOLDEN / f"families_{family}.npz") as file:
    arrays = dict(file)
  weights = {
    k.removeprefix("weight/"): v.astype(np.float32)
    for k, v in arrays.items()
    if k.startswith("weight/")
  }
  found = hub.find(json.loads(str(arrays["config"])))
  model = found.read(json.loads(str(arrays["config"])))
  params = jax.tree.map(jnp.asarray, found.names.load(model, weights))
  return model, params, jnp.asarray(arrays["tokens"], jnp.int32)


@functools.cache
def theirs(case: str) -> dict[str, np.ndarray]:
  """What PEFT wrote and computed of one adapter."""
  with np.load(GOLDEN / "peft.npz") as file:
    own = {k: v for k, v in file.items() if k.startswith(f"{case}/")}
  return {k.removeprefix(f"{case}/"): v for k, v in own.items()}


def written(folder: pathlib.Path, case: str) -> pathlib.Path:
  """A folder as PEFT left it."""
  arrays = {
    k.removeprefix("tensor/"): v
    for k, v in theirs(case).items()
    if k.startswith("tensor/")
  }
  folder.mkdir()
  (folder / "adapter_config.json").write_text(str(theirs(case)["config"]))
  shapes = {k: (v.shape, v.dtype) for k, v in arrays.items()}
  tensors.write(folder / "adapter_model.safetensors", shapes, arrays.get)
  return folder


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft(case: str, tmp_path):
  """Read, they add what PEFT adds, to 1e-6, and say what its model says.

  Written and read again, they still do.
  """
  golden = theirs(case)
  model, params, tokens = base(str(golden["family"]))
  lora, adapters = load_adapters(written(tmp_path / "peft", case), model)
  assert lora.learns_lengths == (case in ("dora", "rsdora"))
  logits = jax.jit(lambda x: forward(model, lora.apply(params, x), tokens))(
    adapters
  )
  np.testing.assert_allclose(logits, golden["logits"], atol=2e-5, rtol=1e-5)

  save_adapters(tmp_path / "ours", model, lora, adapters)
  again, back = load_adapters(tmp_path / "ours", model)
  for one, arrays in ((lora, adapters), (again, back)):
    for name, delta in deltas(model, params, one, arrays).items():
      want = golden[f"delta/{name}"]
      np.testing.assert_allclose(delta, want, atol=1e-6, err_msg=name)


def deltas(model, params, lora: LoRA, adapters) -> dict[str, np.ndarray]:
  """What is added to the weight of each module, as their tensor.

  For DoRA this is what is added before columns are made as long as learned.
  """
  kind = {"dora": "lora", "rsdora": "rslora"}.get(lora.kind, lora.kind)
  zeros = jax.tree.map(jnp.zeros_like, params)
  leaves = paths(dataclasses.replace(lora, kind=kind).merge(zeros, adapters))
  return {
    m.name: m.entry.join(leaves)
    for m in modules(model)
    if any(f"{path}/a" in paths(adapters) for path in m.entry.ours)
  }


def test_what_peft_will_look_for(tmp_path):
  """Short names where these tell modules apart, and a rank per fused one."""
  model, params, _ = base("llama")
  lora = LoRA(2, 8, (r".*/(q|down)",))
  start = started(lora, params, model)
  save_adapters(tmp_path / "llama", model, lora, start, "some/where")
  said = json.loads((tmp_path / "llama/adapter_config.json").read_text())
  assert said["target_modules"] == ["down_proj", "q_proj"]
  assert said["base_model_name_or_path"] == "some/where"
  assert (said["r"], said["lora_alpha"], said["rank_pattern"]) == (2, 8.0, {})
  model, params, _ = base("gpt2")
  lora = LoRA(2, 8, (r".*/(q|v)",))  # k of the fused three is left out
  start = started(lora, params, model)
  save_adapters(tmp_path / "gpt2", model, lora, start)
  said = json.loads((tmp_path / "gpt2/adapter_config.json").read_text())
  assert said["target_modules"] == ["c_attn"]
  assert set(said["rank_pattern"].values()) == {4}
  assert set(said["alpha_pattern"].values()) == {16.0}
  assert said["fan_in_fan_out"]


# --- The function -----------------------------------------------------------

MODEL = MODELS["chunked"]  # two blocks of their own in one segment


def started(lora: LoRA, params, model=MODEL):
  """Adapters before training."""
  start = functools.partial(lora.start, tree=model.params())
  return jax.jit(lambda key, p: start(key, params=p))(jax.random.key(0), params)


def trained(lora: LoRA, params):
  """Adapters as if after training: all of them random."""
  leaves, shape = jax.tree.flatten(jax.device_get(started(lora, params)))
  draw = np.random.default_rng(0)
  noise = [0.1 * draw.normal(size=x.shape).astype(np.float32) for x in leaves]
  return shape.unflatten([x + n for x, n in zip(leaves, noise, strict=True)])


@pytest.mark.parametrize("kind", ["lora", "rsdora"])
def test_merging_and_back(kind: str):
  """Merged and applied are the same model; unmerged is the base, to 1e-6."""
  params = random_params(MODEL)
  lora = LoRA(3, 6, kind=kind)
  fresh = started(lora, params)
  close(lora.merge(params, fresh), params)  # nothing is said before training
  adapters = trained(lora, params)
  merged = lora.merge(params, adapters)
  changed = {
    path
    for path, x in paths(jax.device_get(merged)).items()
    if np.abs(x - np.asarray(paths(params)[path])).max() > 1e-3
  }
  assert changed == set(lora.chosen(MODEL.params()))
  tokens = random_tokens(2, 9)
  run = jax.jit(lambda p: forward(MODEL, p, tokens))
  both = jax.jit(lambda x: forward(MODEL, lora.apply(params, x), tokens))
  close(run(merged), both(adapters))
  lengths = lora.learns_lengths and jax.jit(lora.lengths)(params, adapters)
  close(lora.unmerge(merged, adapters, lengths or None), params)


def test_the_formula():
  """W + (alpha / rank) A B by hand, on heads; and its root, in rsLoRA."""
  params = random_params(MODEL)
  lora = LoRA(3, 6.0, (r"layers/0/0/mixer/q",))
  adapters = trained(lora, params)
  x = adapters["layers"]["0"]["0"]["mixer"]["q"]
  product = np.einsum("ldr,lrnh->ldnh", x["a"], x["b"])
  for kind, scale in (("lora", 2.0), ("rslora", 6 / 3**0.5)):
    value = LoRA(3, 6.0, lora.targets, kind)
    got = value.merge(params, adapters)["layers"]["0"]["0"]["mixer"]["q"]
    want = params["layers"]["0"]["0"]["mixer"]["q"] + scale * product
    close(got, want)


def test_columns_of_dora_have_their_learned_lengths():
  """That is what m is; and |W| is no way for gradients (section 4.3)."""
  params = random_params(MODEL)
  lora = LoRA(2, 4, (r"layers/0/1/mixer/o",), "dora")
  adapters = trained(lora, params)
  w = lora.merge(params, adapters)["layers"]["0"]["1"]["mixer"]["o"]
  m = adapters["layers"]["0"]["1"]["mixer"]["o"]["m"]
  close(jnp.sqrt(jnp.sum(w**2, axis=(1, 2))), m)

  def total(x):
    return jnp.sum(lora.apply(params, x)["layers"]["0"]["1"]["mixer"]["o"] ** 2)

  # Turning a column without lengthening it has no slope, were |W| followed.
  slope = jax.jit(jax.grad(total))(adapters)["layers"]["0"]["1"]["mixer"]["o"]
  assert float(jnp.abs(slope["b"]).max()) > 1e-3
  close(slope["m"], 2 * m, 1e-5)


def test_only_adapters_are_learned():
  """Their number, and that all of them feel a loss (A once B has moved)."""
  params, tokens = random_params(MODEL), random_tokens(2, 9)
  lora = LoRA(2, 4)
  adapters = trained(lora, params)
  declared = lora.declare(MODEL.params())
  assert {k: x.shape for k, x in paths(adapters).items()} == {
    k: p.shape for k, p in paths(declared).items()
  }
  assert 0 < count(declared) < 0.3 * MODEL.n_params()

  @jax.jit
  def slopes(x):
    def total(x):
      return jnp.square(forward(MODEL, lora.apply(params, x), tokens)).mean()

    return jax.grad(total)(x)

  for path, g in paths(slopes(adapters)).items():
    assert float(jnp.abs(g).max()) > 0, path


@flax.struct.dataclass
class Eighths:
  """A weight kept in int8, as a quantised base may be."""

  codes: jax.Array

  def __jax_array__(self) -> jax.Array:
    """The weight that is meant."""
    return self.codes.astype(jnp.float32) / 8


def test_the_base_may_be_quantised():
  """All that is asked of it is to become an array where it is used."""
  params = random_params(MODEL)
  lora = LoRA(2, 4, (r"layers/0/1/ffn/up",), "dora")
  codes = jnp.round(params["layers"]["0"]["1"]["ffn"]["up"] * 8)
  packed = Eighths(codes.astype(jnp.int8))

  def with_up(x):
    first = params["layers"]["0"]["1"]
    changed = first | {"ffn": first["ffn"] | {"up": x}}
    return params | {"layers": {"0": params["layers"]["0"] | {"1": changed}}}

  plain, small = with_up(jnp.asarray(packed)), with_up(packed)
  adapters = trained(lora, plain)
  close(lora.merge(small, adapters), lora.merge(plain, adapters))


def test_adapters_on_a_mesh():
  """The base spread over devices, adapters everywhere: the same weights."""
  rules = preset("fsdp_tp")
  mesh = make_mesh(rules, "fsdp:2,tensor:2", jax.devices()[:4])
  params = random_params(MODEL)
  lora = LoRA(2, 4, kind="dora")
  adapters = trained(lora, params)
  want = lora.merge(params, adapters)
  with jax.set_mesh(mesh):
    places = shardings(MODEL.params(), mesh, rules)
    own = shardings(lora.declare(MODEL.params()), mesh, rules)
    spread = jax.tree.map(jax.device_put, params, places)
    merged = lora.merge(spread, jax.tree.map(jax.device_put, adapters, own))
    stay = jax.tree.map(
      lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), merged, places
    )
    assert all(jax.tree.leaves(stay))
  close(jax.device_get(merged), want)


# --- Bad input --------------------------------------------------------------


def test_targets_must_be_there():
  """Each one, whole paths, and matrices; tables are not."""
  tree = MODEL.params()
  for target, said in (
    (r".*/quarks", "matches no matrix"),
    ("mixer/q", "whole"),
    (".*norm/scale", "matches no matrix"),
    ("embed/tokens", "matches no matrix"),
    ("(", "no regular expression"),
  ):
    with pytest.raises(UserError, match=said):
      LoRA(targets=(".*/q", target)).declare(tree)
  for wrong in ({"rank": 0}, {"kind": "qlora"}):
    with pytest.raises(UserError, match="lora"):
      LoRA(**wrong)
  with pytest.raises(UserError, match="columns were"):
    LoRA(kind="dora").unmerge({}, {})


def test_adapters_of_another_model(tmp_path):
  """By name, by size, and where files are not adapters at all."""
  folder = written(tmp_path / "peft", "lora")
  with pytest.raises(UserError, match="no such module"):
    load_adapters(folder, base("gpt2")[0])
  with pytest.raises(UserError, match="for another model"):
    load_adapters(folder, MODELS["llama"])
  params = random_params(MODEL)
  adapters = trained(LoRA(2, 4), params)
  with pytest.raises(UserError, match="for another model"):
    LoRA(2, 4).apply({"layers": {}}, adapters)
  with pytest.raises(UserError, match="no adapters"):
    load_adapters(tmp_path / "nothing", base("llama")[0])
  said = json.loads((folder / "adapter_config.json").read_text())
  for key, value in (("peft_type", "IA3"), ("bias", "all")):
    text = json.dumps(said | {key: value})
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(value)):
      load_adapters(folder, base("llama")[0])
