"""Training that goes on from a loaded model, as its user meets it."""

import os
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import data, explain, metrics, program
from jaxlm.data.tokenizers import ByteBPE
from jaxlm.errors import UserError
from jaxlm.interop.load import load_model
from jaxlm.layers.param import init
from jaxlm.models.families import llama
from jaxlm.train import train

ROOT = Path(__file__).parent.parent
TEXT = "The quick brown fox jumps over the lazy dog. " * 60
SHORT = (
  "steps=8",
  "batch_size=8",
  "seq_len=16",
  "log_every=1",
  "eval_every=0",
  "checkpoint_every=4",
  "optimizer.lr=1e-2",
  "optimizer.warmup=1",
  "sample.tokens=4",
  "log.tensorboard=false",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("text") / "fox.txt"
  path.write_text(TEXT)
  return path


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
  """A tiny checkpoint of random numbers, as the hub would have it."""
  tokenizer = ByteBPE.train([TEXT], 300)
  model = llama.decoder(
    tokenizer.vocab_size + 3, 16, 2, 4, 2, 8, 32, max_positions=32
  )
  path = tmp_path_factory.mktemp("hub") / "llama"
  params = init(model.params(), jax.random.key(0))
  jaxlm.save(path, model, params, tokenizer, format="hf")
  return path


def run(text: Path, path: Path, workdir: Path, *keys: str):
  """Trains in this process, by the config of the repository."""
  flags = [f"--config={ROOT / 'configs' / 'finetune.py'}"]
  flags += [f"--workdir={workdir}"]
  changed = (f"model.path={path}", f"data.path={text}", *SHORT, *keys)
  flags += [f"--config.{key}" for key in changed]
  asked = program.load(flags, program.parser("A test."))
  return train(asked.config, asked.workdir)


def assert_same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole(text, published, tmp_path_factory):
  """An undisturbed run: its last state, its directory."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return run(text, published, workdir), workdir


def test_it_begins_with_what_was_loaded_and_learns(whole, text, published):
  """The first loss is that of the loaded model on the first batch."""
  _, workdir = whole
  losses = [r["loss"] for r in metrics.read(workdir) if "loss" in r]
  assert losses[-1] < losses[0] - 0.5
  model, params = jaxlm.load(published)
  tokenizer = jaxlm.load_tokenizer(published)
  corpus = data.prepare(text, tokenizer)
  batch = data.batches(corpus.train, 16, 8, 0)[0]
  logits = jaxlm.forward(model, params, batch["inputs"])
  chosen = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1
  )
  np.testing.assert_allclose(losses[0], -chosen.mean(), rtol=1e-5)


def test_the_run_needs_its_origin_no_more(text, published, tmp_path):
  """Loading, generating and going on: all of it from the workdir."""
  origin = tmp_path / "origin"
  shutil.copytree(published, origin)
  state = run(text, origin, tmp_path / "run", "steps=4")
  shutil.rmtree(origin)
  model, params = jaxlm.load(tmp_path / "run")
  assert model == load_model(published)
  assert_same(params, state.params)
  tokens = jaxlm.load_tokenizer(tmp_path / "run").encode("The fox")[None]
  assert jaxlm.generate(model, params, tokens, 4).shape[1] > tokens.shape[1]
  asked = program.load(
    [f"--workdir={tmp_path / 'run'}", "--config.steps=6"],
    program.parser("A test."),
  )
  assert int(train(asked.config, asked.workdir).step) == 6


def test_an_interrupted_run_continues_to_the_same_bits(
  whole, text, published, tmp_path, monkeypatch
):
  """SIGTERM between two checkpoints, and a kill before the first."""
  import jaxlm.train as program_under_test

  def crash(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(program_under_test.recipe, "step", crash)
    with pytest.raises(KeyboardInterrupt):
      run(text, published, tmp_path / "run")
  real, seen = program_under_test._next_event, []

  def interrupting(config, step):
    if step == 5 and not seen:
      seen.append(step)
      os.kill(os.getpid(), signal.SIGTERM)
    return real(config, step)

  monkeypatch.setattr(program_under_test, "_next_event", interrupting)
  with pytest.raises(SystemExit):
    run(text, published, tmp_path / "run")
  state = run(text, published, tmp_path / "run")
  assert_same(state, whole[0])


def test_on_eight_devices_it_learns_the_same(whole, text, published, tmp_path):
  """Parameters are read straight to where FSDP keeps them."""
  state = run(text, published, tmp_path / "run", "parallel.preset=fsdp")
  assert not state.params["embed"]["tokens"].sharding.is_fully_replicated
  for a, b in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(whole[0].params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)


def test_explain_says_where_it_comes_from(text, published):
  """And runs nothing."""
  flags = [f"--config={ROOT / 'configs' / 'finetune.py'}"]
  flags += [f"--config.model.path={published}", f"--config.data.path={text}"]
  asked = program.load(
    [*flags, "--config.seq_len=16"], program.parser("A test.")
  )
  told = explain.explain(asked.config)
  found = re.search(r"continued from +(\S+)", told)
  assert found[1] == str(published)
  assert re.search(r"attention +blocks +plain XLA, on cpu", told)


@pytest.mark.parametrize(
  ("keys", "words"),
  [
    (("seq_len=64",), "seq_len=64 is more than"),
    (("model.dim=8",), "model.dim cannot be set beside config.model.path"),
    (("data.tokenizer=chars",), "has a tokenizer of its own"),
    (("model.path=nowhere",), "no directory nowhere"),
  ],
)
def test_what_does_not_fit_is_told(text, published, tmp_path, keys, words):
  """Before anything is computed."""
  with pytest.raises(UserError, match=words):
    run(text, published, tmp_path / "run", *keys)


def test_a_tokenizer_of_another_model_is_refused(text, published, tmp_path):
  """More tokens than the model has: it cannot be the model's."""
  path = tmp_path / "mixed"
  shutil.copytree(published, path)
  readme = (ROOT / "README.md").read_text("utf-8")
  ByteBPE.train([readme], 400).save(path)
  with pytest.raises(UserError, match="another model's tokenizer"):
    run(text, path, tmp_path / "run")
