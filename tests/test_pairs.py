"""Pairs as batches, the objectives on them, and runs of jaxlm.train."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MODELS, random_params

import jaxlm
from jaxlm import convert, recipe
from jaxlm import preference_losses as losses
from jaxlm.config import default_config, freeze
from jaxlm.data.tokenizer import EOT
from jaxlm.data.tokenizers import Chars
from jaxlm.errors import UserError
from jaxlm.keys import flatten
from jaxlm.layers.compute import DEFAULT
from jaxlm.layers.param import paths
from jaxlm.losses import cross_entropy
from jaxlm.models.decoder import forward
from jaxlm.models.families import llama
from jaxlm.models.reward import RewardModel
from jaxlm.objectives import OBJECTIVES, from_config, preference
from jaxlm.objectives.pairs import Pairs, Sides, render
from jaxlm.train import train

ROWS = [
  {"prompt": "ab=", "chosen": "ba", "rejected": "ab"},
  {"prompt": "abc=", "chosen": "cba", "rejected": "c"},
  {"prompt": "aa=", "chosen": "aa", "rejected": "a"},
  {"prompt": "b=", "chosen": "b", "rejected": "b"},
  {"prompt": "b=", "chosen": "b", "rejected": " "},
  {"prompt": "b=", "chosen": "", "rejected": "b"},
  {"prompt": "abcabcabcabcabc=", "chosen": "a", "rejected": "b"},
  {"prompt": "abcabcab=", "chosen": "abcabcab", "rejected": "b"},
]
SEQ = 12


@pytest.fixture(scope="module")
def tokenizer():
  """Letters, and an end."""
  return Chars("abcdefghijklmnopqrstuvwxyz= ", (EOT,))


def corpus(tokenizer, folder, rows=ROWS, **options):
  """What is read of some rows."""
  path = folder / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return Pairs(SEQ, "bare", **options).read(path, tokenizer, 0, 0.0)


def test_what_cannot_be_compared_is_counted(tokenizer, tmp_path, capsys):
  """Equal sides, empty ones, prompts that fill a row: left out, and told."""
  found = corpus(tokenizer, tmp_path)
  assert len(found.train) == 3
  told = found.describe()
  for reason in (
    "1 with equal sides",
    "1 with an empty rejected side",
    "1 with an empty response",
    f"1 with a prompt that fills seq_len={SEQ}",
    f"1 with more than seq_len={SEQ} tokens",
  ):
    assert reason in told
  with pytest.raises(UserError, match="no pair is left"):
    corpus(tokenizer, tmp_path, ROWS[6:])
  with pytest.raises(UserError, match="no pair to learn from"):
    corpus(tokenizer, tmp_path, ROWS[3:6])
  for row, said in (
    ({"prompt": "a", "chosen": "b"}, "line 1.*no 'rejected'"),
    ({"prompt": "a", "chosen": "b", "rejected": 1}, "not a text"),
    ({"rejected": "1"}, "no prompt"),
  ):
    with pytest.raises(UserError, match=said):
      corpus(tokenizer, tmp_path, [row])
  with pytest.raises(UserError, match="noise"):
    Pairs(SEQ, noise=2.0)


def test_sides_of_a_batch(tokenizer, tmp_path):
  """Prompt once on each side, the response and its end masked, the rest zero.

  A third side has the next pair's answer, and a row beyond the last is empty.
  """
  found = corpus(tokenizer, tmp_path)
  batch = render(found.train, np.array([1, 2, 3]), SEQ, sides=3)
  text = [
    [tokenizer.decode(t[m]) for t, m in zip(row, mask, strict=True)]
    for row, mask in zip(batch["tokens"], batch["text"], strict=True)
  ]
  end = "<|endoftext|>"
  assert text[0] == [f"abc=cba{end}", f"abc=c{end}", f"abc=aa{end}"]
  assert text[1][2] == f"aa=ba{end}"
  said = batch["tokens"][0, 0][batch["mask"][0, 0]]
  assert tokenizer.decode(said) == f"cba{end}"
  assert not batch["text"][2].any()
  assert not batch["tokens"][2].any()


def test_conversations_are_pairs_too(tokenizer, tmp_path):
  """Messages on both sides, a prompt of messages, and one text as the worse."""
  user = {"role": "user", "content": "ab"}
  good, bad = ({"role": "assistant", "content": c} for c in ("ba", "b"))
  rows = [
    {"chosen": [user, good], "rejected": [user, bad]},
    {"prompt": [user], "chosen": [good], "rejected": [bad]},
    {"messages": [user, good], "rejected": "b"},
    {"prompt": "ab", "chosen": "ba", "rejected": "b"},
  ]
  found = corpus(tokenizer, tmp_path, rows)
  for pair in found.train:
    np.testing.assert_array_equal(pair.prompt, found.train[0].prompt)
    for one, other in zip(
      pair.responses, found.train[0].responses, strict=True
    ):
      np.testing.assert_array_equal(one, other)
  other = {"role": "user", "content": "c"}
  with pytest.raises(UserError, match="same question"):
    corpus(tokenizer, tmp_path, [rows[0] | {"rejected": [other, bad]}])


def test_noise_turns_labels(tokenizer):
  """The share that is asked for, the same pairs every time, the rest as is."""
  clean, noisy = (
    Pairs(24, "bare", 400, noise).read("task:reverse", tokenizer, 0, 0.5)
    for noise in (0.0, 0.3)
  )
  for split in ("train", "val"):
    turned = [
      np.array_equal(a.responses[0], b.responses[1])
      for a, b in zip(getattr(clean, split), getattr(noisy, split), strict=True)
    ]
    assert 0.2 < np.mean(turned) < 0.4
  again = Pairs(24, "bare", 400, 0.3).read("task:reverse", tokenizer, 0, 0.5)
  for one, other in zip(noisy.train, again.train, strict=True):
    np.testing.assert_array_equal(one.responses[0], other.responses[0])


# --- Losses -----------------------------------------------------------------

MODEL = MODELS["llama"]


def pairs(n: int = 3) -> dict[str, jax.Array]:
  """A batch of random pairs of three sides, and a row of padding."""
  draw = np.random.default_rng(0)

  def ids() -> np.ndarray:
    return draw.integers(1, MODEL.vocab, draw.integers(2, 6)).astype(np.int32)

  made = [Sides(ids(), (ids(), ids())) for _ in range(n)]
  batch = render(made, np.arange(n + 1), SEQ, sides=3)
  return {k: jnp.asarray(x) for k, x in batch.items()}


def by_hand(params, batch) -> tuple[np.ndarray, np.ndarray]:
  """Sums of log-likelihoods and numbers of tokens, [pairs, sides], in loops."""
  run = jax.jit(lambda p, t: forward(MODEL, p, t))
  rows, sides, _ = batch["tokens"].shape
  sums, counts = np.zeros((rows, sides)), np.zeros((rows, sides))
  for side in range(sides):
    tokens = batch["tokens"][:, side]
    logp = -cross_entropy(run(params, tokens[:, :-1]), tokens[:, 1:])[0]
    mask = np.asarray(batch["mask"][:, side, 1:])
    sums[:, side] = (np.asarray(logp, np.float64) * mask).sum(1)
    counts[:, side] = mask.sum(1)
  return sums[:-1], counts[:-1]


def test_objectives_are_their_formulas():
  """Each loss, from likelihoods that were summed in loops; padding counts not.

  And the gradient is that of the policy alone.
  """
  policy, ref = random_params(MODEL), random_params(MODEL, seed=1)
  batch = pairs()
  (logp, n), (before, _) = by_hand(policy, batch), by_hand(ref, batch)
  ratio, mean = jnp.asarray(logp - before), jnp.asarray(logp / n)
  per_token, good = ratio / n, jnp.ones(3, bool)
  z = losses.kl_baseline(ratio[:, 2])
  kto = [
    losses.kto(ratio[:, i], good == (i == 0), z, 0.2, (1.0, 2.0))
    for i in (0, 1)
  ]
  want = {
    preference.DPO(0.2, 0.1): losses.dpo(ratio[:, 0], ratio[:, 1], 0.2, 0.1),
    preference.DPO(0.2, 0.0, 2.0): losses.dpo(ratio[:, 0], ratio[:, 1], 0.2)
    - 2.0 * mean[:, 0],
    preference.IPO(0.2): losses.ipo(per_token[:, 0], per_token[:, 1], 0.2),
    preference.KTO(0.2, 1.0, 2.0): (kto[0] + kto[1]) / 2,
    preference.ORPO(0.2): losses.orpo(mean[:, 0], mean[:, 1], 0.2) - mean[:, 0],
    preference.SimPO(2.0, 0.5): losses.simpo(mean[:, 0], mean[:, 1], 2.0, 0.5),
  }

  @jax.jit
  def run(policy, ref):
    return [
      preference.Preference(form)(MODEL, policy, batch, None, DEFAULT, ref)
      for form in want
    ]

  for form, (loss, metrics) in zip(want, run(policy, ref), strict=True):
    np.testing.assert_allclose(
      loss, np.mean(want[form]), rtol=1e-5, err_msg=type(form).__name__
    )
    assert float(metrics["weight"]) == 3
  chosen = metrics["chosen"]
  np.testing.assert_allclose(chosen, np.mean(logp[:, 0] / n[:, 0]), rtol=1e-5)


# --- Runs -------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
  """A saved model that has learned nothing, as one would load it."""
  model = llama.decoder(
    vocab=tokenizer.vocab_size,
    dim=16,
    layers=2,
    heads=2,
    kv_heads=2,
    max_positions=32,
  )
  folder = tmp_path_factory.mktemp("base") / "model"
  jaxlm.save(folder, model, random_params(model), tokenizer)
  return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Runs of this file take the first device alone, which compiles faster."""
  mesh = functools.partial(recipe.mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(recipe, "mesh", mesh)


def settings(base, **more):
  """Two steps on a task, from the base."""
  config = default_config()
  config.data.path = "task:reverse?levels=1"
  config.data.val_fraction = 0.1
  config.model.path = str(base)
  config.steps, config.batch_size, config.seq_len = 2, 8, 24
  config.log_every, config.sample.tokens = 1, 4
  config.optimizer.warmup = 0
  config.log.tensorboard = False
  return freeze(flatten(config) | {"objective.examples": 40} | more)


def test_a_reward_run_gives_a_reward_model(base, tmp_path):
  """Trained and loaded; it does not try to talk."""
  config = settings(base, **{"objective.name": "reward"})
  state = train(config, tmp_path)
  model, params = jaxlm.load(tmp_path)
  assert isinstance(model, RewardModel)
  jax.tree.map(np.testing.assert_array_equal, params, state.params)
  assert not (tmp_path / "samples.txt").exists()
  state = train(
    settings(base, **{"objective.name": "reward", "steps": 3}), tmp_path
  )
  assert int(state.step) == 3


@pytest.mark.parametrize("name", ["kto", "reward"])
def test_adapters_alone_are_trained(base, name: str, tmp_path):
  """The checkpoint has no base, and `load` gives base and adapters merged.

  For a reward model its new head is trained whole.
  """
  more = {"objective.name": name, "lora.rank": 2, "lora.kind": "dora"}
  more["lora.targets"] = (r".*/mixer/(q|v)",)
  state = train(settings(base, **more), tmp_path)
  want = {"adapters", "head"} if name == "reward" else {"adapters"}
  assert set(state.params) == want
  _, params = jaxlm.load(tmp_path)
  _, before = jaxlm.load(base)
  trunk = params["trunk"] if name == "reward" else params
  changed = {
    path
    for path, x in paths(trunk).items()
    if not np.array_equal(x, paths(before)[path])
  }
  assert changed == {"layers/0/0/mixer/q", "layers/0/0/mixer/v"}
  if name == "kto":
    convert.main([f"--from={tmp_path}", f"--to={tmp_path}/a", "--format=peft"])
    _, again = jaxlm.load(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (tmp_path / "samples.txt").exists()
    state = train(settings(base, **more | {"steps": 3}), tmp_path)
    assert int(state.step) == 3


def test_what_a_run_needs(base):
  """Preferences and adapters need a model; wrong names are said."""
  key = jax.random.key(0)
  for more, said in (
    ({"objective.name": "dpo", "model.path": None}, "start"),
    ({"objective.name": "orpo", "lora.rank": 2}, "to adapt"),
    ({"objective.name": "dpo", "lora.rnk": 2}, "lora.rank"),
    ({"objective.name": "reward", "objective.kind": "dog"}, "encoder"),
    ({"objective.name": "reward", "objective.loss": "dog"}, "hinge"),
  ):
    with pytest.raises(UserError, match=said):
      from_config(settings(base, **more)).trained.start(MODEL, key, None)


def test_every_preference_has_a_name():
  """And says what its parameters are."""
  assert {"dpo", "ipo", "kto", "orpo", "simpo", "reward"} <= set(OBJECTIVES)
  made = OBJECTIVES["kto"](seq_len=8, beta=0.5)
  assert made.data.sides == 3
  assert dataclasses.replace(made.loss.form, beta=0.1) == preference.KTO()
