"""A run's directory: what is saved is what is loaded, bit for bit."""

import inspect
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlm
from jaxlm import config as configs
from jaxlm import state, values
from jaxlm.checkpoint import Checkpoints
from jaxlm.data.tokenizers import Chars
from jaxlm.errors import UserError
from jaxlm.layers.param import init
from jaxlm.models import hub
from jaxlm.models.build import build, family
from jaxlm.models.families import gpt2, modern

DECODERS = [
  module.__name__.rpartition(".")[2]
  for module in hub.modules()
  if hasattr(module, "decoder")
]
TOKENIZER = Chars("abcdefg \n")
SIZES = {"model.dim": 16, "model.layers": 2, "model.heads": 2}


def small(seed: int = 0):
  model = modern.decoder(vocab=9, dim=16, layers=2, heads=2, max_positions=32)
  return model, init(model.params(), jax.random.key(seed))


def equal(a, b) -> bool:
  """Same structure, dtypes and bits."""
  same = jax.tree.map(
    lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b
  )
  return all(jax.tree.leaves(same))


def a_run(path: Path, **more):
  """A workdir as training leaves it: two checkpoints, the first the better."""
  config = configs.freeze({"seq_len": 32, **SIZES, **more})
  model = build(config, TOKENIZER.vocab_size)
  path.mkdir()
  (path / "config.json").write_text(configs.to_json(config))
  TOKENIZER.save(path)
  saved = {}
  with Checkpoints(path / "checkpoints", best="val_loss") as checkpoints:
    for step, loss in ((10, 2.0), (20, 2.5)):
      params = init(model.params(), jax.random.key(step))
      now = state.create(params, optax.adam(1e-3), ema=config.ema > 0)
      if now.ema is not None:
        now = now.replace(ema=jax.tree.map(lambda x: x / 2, params))
      checkpoints.save(step, now)
      checkpoints.note(step, val_loss=loss)
      saved[step] = params
  return model, saved


# --- Saved values -----------------------------------------------------------


def test_save_and_load_are_inverse(tmp_path: Path):
  """Model, parameters and tokenizer come back equal."""
  model, params = small()
  jaxlm.save(tmp_path / "a", model, params, TOKENIZER)
  loaded, arrays = jaxlm.load(tmp_path / "a")
  assert loaded == model
  assert equal(params, arrays)
  text = "abc\nfed"
  tokens = jaxlm.load_tokenizer(tmp_path / "a").encode(text)
  np.testing.assert_array_equal(tokens, TOKENIZER.encode(text))


def test_half_precision_is_kept_and_widened_exactly(tmp_path: Path):
  """bfloat16 on disk; as float32 the same numbers."""
  model, params = small()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  jaxlm.save(tmp_path / "a", model, half)
  assert equal(jaxlm.load(tmp_path / "a", dtype="bfloat16")[1], half)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  assert equal(jaxlm.load(tmp_path / "a")[1], wide)


def test_a_model_can_be_saved_again_at_another_step(tmp_path: Path):
  """The newest is loaded, an older one by its number."""
  model, first = small(1)
  _, second = small(2)
  jaxlm.save(tmp_path, model, first, step=1)
  jaxlm.save(tmp_path, model, second, step=2)
  assert equal(jaxlm.load(tmp_path)[1], second)
  assert equal(jaxlm.load(tmp_path, which=1)[1], first)


@pytest.mark.parametrize("name", [*hub.published(), "modern"])
def test_every_published_model_is_a_value_in_json(name: str):
  """Written down whole and read back equal, functions included."""
  model = hub.published().get(name, modern.decoder(dropout=0.1))
  assert values.from_json(values.to_json(model)) == model


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("{", "not JSON"),
    ('{"dim": 3}', "describes no value"),
    ('{"is": "os:system"}', "outside jaxlm.layers"),
    ('{"is": "layers.param:jax"}', "neither a dataclass"),
    ('{"is": "layers.norm:NoNorm"}', "this version of jaxlm has no"),
    ('{"is": "layers.norm:RMSNorm", "dmi": 3}', "describes no value"),
    ("[1, 2]", "describes no model"),
  ],
)
def test_a_file_that_describes_no_model_is_refused(tmp_path, text, words):
  """And nothing of it is run."""
  (tmp_path / "model.json").write_text(text)
  with pytest.raises(UserError, match=words):
    jaxlm.load(tmp_path)


def test_what_is_not_data_cannot_be_written_down():
  """A function from elsewhere would not be found again."""
  with pytest.raises(UserError, match="cannot be written down"):
    values.to_json((math.sqrt,))
  with pytest.raises(UserError, match="cannot be written down"):
    values.to_json(lambda x: x)


# --- Runs -------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_a_run_is_loaded_by_its_config(tmp_path: Path, name: str):
  """Vocabulary from the tokenizer, positions from seq_len."""
  takes = inspect.signature(family(name)).parameters
  small = {
    "kv_heads": 1,
    "mlp_dim": 32,
    "head_dim": 8,
    "experts": 8,
    "top_k": 2,
  }
  more = {f"model.{k}": v for k, v in small.items() if k in takes}
  model, saved = a_run(tmp_path / "run", **{"model.family": name}, **more)
  loaded, params = jaxlm.load(tmp_path / "run")
  assert loaded == model
  assert (loaded.vocab, loaded.max_positions) == (9, 32)
  assert equal(params, saved[20])


def test_the_best_and_any_step_can_be_asked_for(tmp_path: Path):
  """By validation loss, or by number."""
  _, saved = a_run(tmp_path / "run")
  assert equal(jaxlm.load(tmp_path / "run", which="best")[1], saved[10])
  assert equal(jaxlm.load(tmp_path / "run", which=10)[1], saved[10])


def test_averaged_weights_come_where_the_run_kept_them(tmp_path: Path):
  """`config.ema` says so; they are what is evaluated, too."""
  _, saved = a_run(tmp_path / "run", ema=0.9)
  half = jax.tree.map(lambda x: x / 2, saved[20])
  assert equal(jaxlm.load(tmp_path / "run")[1], half)


def test_forward_and_generate_have_their_promised_shapes(tmp_path: Path):
  """The names that are meant to stay."""
  a_run(tmp_path / "run")
  model, params = jaxlm.load(tmp_path / "run")
  tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]])
  logits = jaxlm.forward(model, params, tokens)
  assert logits.shape == (2, 3, 9)
  assert logits.dtype == jnp.float32
  new = jaxlm.generate(model, params, tokens, 5, sampler=jaxlm.Greedy())
  assert new.shape == (2, 8)
  assert (new[:, :3] == tokens).all()
  assert (new[:, 3] == jnp.argmax(logits[:, -1], axis=-1)).all()


# --- Errors -----------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path: Path):
  """The directory, the run, the checkpoint, the step, the evaluation."""
  model, params = small()

  def fails(words: str, *args, **more) -> None:
    with pytest.raises(UserError, match=words):
      jaxlm.load(*args, **more)

  fails("no directory", tmp_path / "none")
  fails("holds no run", tmp_path)
  jaxlm.save(tmp_path / "a", model, params, step=3)
  fails("no checkpoint at step 4", tmp_path / "a", which=4)
  fails("none is the best", tmp_path / "a", which="best")
  fails("neither latest, best nor a step", tmp_path / "a", which="newest")
  fails("dtype='int4' is unknown", tmp_path / "a", dtype="int4")
  a_run(tmp_path / "run")
  for step in ("10", "20"):
    manifest = tmp_path / "run" / "checkpoints" / step / "manifest.json"
    manifest.unlink()
  fails("damaged", tmp_path / "run")
  with pytest.raises(UserError, match=r"no tokenizer\.json"):
    jaxlm.load_tokenizer(tmp_path / "a")


def test_save_spares_what_is_there(tmp_path: Path):
  """A training run, another model, a saved step: none is overwritten."""
  model, params = small()
  a_run(tmp_path / "run")
  before = (tmp_path / "run" / "config.json").read_text()
  with pytest.raises(UserError, match="holds a training run"):
    jaxlm.save(tmp_path / "run", model, params)
  assert (tmp_path / "run" / "config.json").read_text() == before
  jaxlm.save(tmp_path / "a", model, params)
  with pytest.raises(UserError, match="already in"):
    jaxlm.save(tmp_path / "a", model, params)
  other = gpt2.decoder(vocab=9, dim=16, layers=1, heads=2, max_positions=8)
  others = init(other.params(), jax.random.key(0))
  with pytest.raises(UserError, match="holds another model"):
    jaxlm.save(tmp_path / "a", other, others, step=1)
  with pytest.raises(UserError, match="not the parameters of this model"):
    jaxlm.save(tmp_path / "b", model, others)
  assert not (tmp_path / "b").exists()
  assert json.loads((tmp_path / "a" / "model.json").read_text())["vocab"] == 9


@pytest.mark.parametrize(
  ("keys", "words"),
  [
    ({"model.family": "lama"}, "did you mean llama"),
    ({"model.family": "zzz"}, "known: .*gpt2, .*llama"),
    ({"model.ffn": "glu"}, "gpt2 takes no config.model.ffn"),
    ({"model.vocab": 4}, "less than the tokenizer's 9"),
    ({"model.heads": 3}, "does not divide into config.model.heads=3"),
    ({"model.family": "modern", "model.kv_heads": 3}, "kv_heads=3 groups"),
    ({"model.family": "modern", "model.dim": 6}, "turn in pairs"),
    ({"model.max_positions": 8}, "is more than config.model.max_positions=8"),
    ({"model.bias": 3}, "takes true or false"),
  ],
)
def test_sizes_that_do_not_fit_are_named_by_their_keys(keys: dict, words: str):
  """Before anything is computed."""
  config = configs.freeze({"seq_len": 32, **SIZES, **keys})
  with pytest.raises(UserError, match=words):
    build(config, TOKENIZER.vocab_size)


def test_a_padded_vocabulary_is_the_config_s_to_choose():
  """A multiple of 64, say, is kinder to a matmul."""
  config = configs.freeze({"model.vocab": 64, **SIZES})
  assert build(config, TOKENIZER.vocab_size).vocab == 64
