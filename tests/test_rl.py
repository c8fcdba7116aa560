"""Rollouts and the two programs: what they promise of a run."""

import json
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import FAMILIES, random_params, save_adder

import jaxlm
from jaxlm import metrics, program, recipe, workdir
from jaxlm.checkpoint import Checkpoints
from jaxlm.data.tokenizers import Chars
from jaxlm.errors import UserError
from jaxlm.generate.prompts import pad_left
from jaxlm.models.families import gpt2
from jaxlm.models.heads import ScalarHead
from jaxlm.models.reward import RewardModel
from jaxlm.rl import begin, grpo, place, ppo
from jaxlm.rl.rewards import Learned
from jaxlm.rl.rollout import Actor, Draw, sample, scored
from jaxlm.tasks import examples, make

ROOT = Path(__file__).parent.parent
MODEL = FAMILIES["llama"]
PARAMS = random_params(MODEL)
PROMPTS = [[1, 2, 3, 4, 5], [7], [8, 9, 10]]
EOS = 3


# --- Rollouts ---------------------------------------------------------------


def drawn(draw: Draw):
  tokens, lengths = pad_left(PROMPTS)
  keys = jax.random.split(jax.random.key(1), len(PROMPTS) * draw.samples)
  return sample(MODEL, draw, PARAMS, tokens, lengths, keys), keys


@pytest.fixture(scope="module")
def rolled():
  draw = Draw(9, samples=4, eos=EOS, temperature=1.3, top_k=7)
  return draw, *drawn(draw)


def test_a_rollout_is_what_generate_says(rolled):
  """Token for token, from the same keys; some rows end, some do not."""
  draw, r, keys = rolled
  tokens, lengths = pad_left(PROMPTS)
  want = jaxlm.generate(
    *(MODEL, PARAMS, tokens, draw.new, draw.sampler, keys),
    lengths=lengths,
    eot=EOS,
    samples=draw.samples,
  )
  said = np.asarray(want)[:, tokens.shape[1] :]
  ends = np.where((said == EOS).any(1), (said == EOS).argmax(1) + 1, draw.new)
  assert len(set(ends)) > 2
  np.testing.assert_array_equal(np.asarray(r.mask).sum(1), ends)
  np.testing.assert_array_equal(r.group, np.repeat([0, 1, 2], 4))
  for i, (end, start) in enumerate(
    zip(ends, np.asarray(r.starts), strict=True)
  ):
    row = np.asarray(r.tokens)[i]
    assert row[:start].tolist() == PROMPTS[i // 4]
    np.testing.assert_array_equal(row[start : start + end], said[i, :end])
    assert (row[start + end :] == 0).all()


def test_sampler_and_trainer_agree(rolled):
  """To 1e-5 in float32, under temperature and top-k; and they would not if
  the trainer forgot either.
  """
  draw, r, _ = rolled
  said = scored(Actor(MODEL), PARAMS, r, draw, jaxlm.Compute())
  gap = np.abs(np.asarray(said.logp - r.logp_old))[np.asarray(r.mask)]
  assert gap.max() < 1e-5
  assert (np.asarray(r.kept).sum(-1)[np.asarray(r.mask)] == draw.top_k).all()
  for wrong in (
    (r.replace(kept=None), draw),
    (r, Draw(9, samples=4, eos=EOS, temperature=1.0, top_k=7)),
  ):
    said = scored(Actor(MODEL), PARAMS, *wrong, jaxlm.Compute())
    gap = np.abs(np.asarray(said.logp - r.logp_old))[np.asarray(r.mask)]
    assert gap.max() > 1e-2


def test_values_are_those_before_each_token(rolled):
  """A critic of a head, and one of its own: both read what stood before."""
  draw, r, _ = rolled
  head = ScalarHead(MODEL.dim)
  rng = np.random.default_rng(0)
  params = PARAMS | {
    "value": {"w": np.float32(rng.normal(size=MODEL.dim)), "b": np.float32(1)},
    "critic": PARAMS,
  }
  shared, own = (
    scored(Actor(MODEL, head, c), params, r, draw, jaxlm.Compute()).values
    for c in (None, MODEL)
  )
  np.testing.assert_allclose(shared, own, atol=1e-5)
  i, t = 1, 2
  start = int(r.starts[i]) + t
  changed = r.replace(tokens=r.tokens.at[i, start].set(11))
  other = scored(Actor(MODEL, head), params, changed, draw, jaxlm.Compute())
  moved = np.abs(np.asarray(other.values - shared))[i] > 1e-4
  assert not moved[: t + 1].any()
  assert moved[t + 1 :].all()


def test_the_page_says_what_is_so(capsys):
  """The examples of docs/rl.md run, and print what stands beside them."""
  page, known = (ROOT / "docs" / "rl.md").read_text("utf-8"), {}
  blocks = re.findall(r"```python\n(.*?)```", page, re.S)
  for block in blocks:
    exec(block, known)
  want = re.findall(r"^print\(.*\) +# (.*)$", "".join(blocks), re.M)
  assert capsys.readouterr().out.splitlines() == want
  assert len(want) == 6


def test_a_reward_model_is_a_reward(tmp_path):
  """From a workdir; what stands in the same batch does not matter."""
  tokenizer = Chars("0123456789+=", ["<|endoftext|>"])
  trunk = gpt2.decoder(tokenizer.vocab_size, 16, 1, 2, 32)
  model = RewardModel.on(trunk)
  workdir.save(tmp_path / "rm", model, random_params(model), tokenizer)
  reward = Learned.load(tmp_path / "rm")
  asked = examples(make("add", levels=2), "test", 5)
  texts = ["1", "", "12345", "7", "99"]
  whole = reward(asked, texts)
  assert len(set(whole)) == 5
  for example, text, said in zip(asked, texts, whole, strict=True):
    np.testing.assert_allclose(reward([example], [text]), [said], rtol=1e-5)
  with pytest.raises(UserError, match="the reward model reads 32"):
    reward(asked[:1], ["1" * 40])


# --- Programs ---------------------------------------------------------------

KEYS = {
  "both": (
    *("steps=4", "batch_size=8", "seq_len=12", "checkpoint_every=1"),
    *("eval_every=2", "log_every=1", "unroll=false", "log.tensorboard=false"),
    "optimizer.warmup=1",
  ),
  "section": ("prompts=4", "tokens=4", "questions=50", "held_out=8"),
  "grpo": ("grpo.samples=4", "grpo.kl=0.1", "grpo.rounds=2", "accumulate=2"),
  "ppo": (
    *("ppo.samples=2", "ppo.epochs=2", "ppo.scale_rewards=true"),
    *("ppo.kl_target=5.0", "ppo.missing_eos=0.5", "ppo.stop_kl=10.0"),
  ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
  """A model that knows nothing, with a tokenizer for sums."""
  return save_adder(tmp_path_factory.mktemp("base") / "model", 16, 1, 2)


def run(which, base: Path, workdir: Path, *keys: str):
  """Trains in this process."""
  name = which.__name__.rpartition(".")[2]
  given = [*KEYS["both"], *KEYS[name], f"model.path={base}"]
  given += [*(f"{name}.{key}" for key in KEYS["section"]), *keys]
  flags = [f"--config={ROOT}/configs/{name}.py", f"--workdir={workdir}"]
  asked = program.load(flags + [f"--config.{key}" for key in given])
  return which.train(asked.config, asked.workdir)


def records(workdir: Path) -> list[dict]:
  """The log without what depends on the clock."""
  lines = metrics.read(workdir)
  return [
    {k: v for k, v in line.items() if k != "samples_per_sec"} for line in lines
  ]


@pytest.fixture(autouse=True, scope="module")
def simple():
  """A reward that varies though the model knows nothing, and one device."""

  def digits(examples, texts):
    return [text.count("7") + 0.1 * len(text) for text in texts]

  def alone(config):
    return recipe.mesh(config, jax.devices()[:1])

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(begin, "reward_of", lambda options, compute: digits)
    patch.setattr(place, "mesh", alone)
    yield


@pytest.fixture(scope="module", params=[grpo, ppo], ids=["grpo", "ppo"])
def whole(request, base, tmp_path_factory):
  """An undisturbed run of each program."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return request.param, run(request.param, base, workdir), workdir


def test_a_run_leaves_what_it_promises(whole):
  """Files, metrics of every step, before and after, a policy that loads."""
  which, state, workdir = whole
  for name in ("config.json", "rl.png", "samples.txt", "tokenizer.json"):
    assert (workdir / name).stat().st_size > 0
  text = (workdir / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  steps = [line for line in lines if "reward" in line]
  assert [line["step"] for line in steps] == [1, 2, 3, 4]
  told = {"reward_std", "kl", "entropy", "gap", "length", "clipped", "lr"}
  told |= {"beta", "explained", "epochs"} if which is ppo else {"dead_groups"}
  assert all(told <= line.keys() for line in steps)
  assert max(line["gap"] for line in steps) < 1e-5
  assert [x["step"] for x in lines if "val_score" in x] == [0, 2, 4]
  before = next(line for line in lines if "val_kl" in line)
  assert abs(before["val_kl"]) < 1e-4  # the policy begins as the reference
  assert steps[-1]["kl"] > 0.0
  params = jaxlm.load(workdir)[1]
  np.testing.assert_array_equal(
    params["embed"]["tokens"], state.params["embed"]["tokens"]
  )
  reference = jaxlm.load(workdir / "reference")[1]
  assert (params["embed"]["tokens"] != reference["embed"]["tokens"]).any()
  if which is ppo:
    assert np.abs(state.params["value"]["w"]).max() > 0
    assert steps[0]["beta"] != steps[-1]["beta"]


def test_an_interrupted_run_continues_to_the_same_bits(
  whole, base, tmp_path, monkeypatch
):
  """SIGTERM within a step: that step is saved, and nothing is different,
  neither weights nor controller nor running statistics.
  """
  which, state, workdir = whole
  real, seen = recipe.due, []

  def interrupting(step, every, steps):
    if step == 3 and not seen:
      seen.append(step)
      os.kill(os.getpid(), signal.SIGTERM)
    return real(step, every, steps)

  monkeypatch.setattr(recipe, "due", interrupting)
  with pytest.raises(SystemExit) as stop:
    run(which, base, tmp_path / "run")
  assert stop.value.code == 128 + signal.SIGTERM
  again = run(which, base, tmp_path / "run")
  for x, y in zip(*map(jax.tree.leaves, (state, again)), strict=True):
    np.testing.assert_array_equal(x, y)
  assert records(tmp_path / "run") == records(workdir)


def test_a_guard_stops_and_keeps_what_was_before(base, tmp_path):
  """KL beyond the limit: named with its step; the checkpoint is older."""
  keys = ("optimizer.lr=0.1", "ppo.most_kl=1.0", "steps=12", "eval_every=0")
  with pytest.raises(UserError, match=r"kl is .* at step .*: more than 1 nat"):
    run(ppo, base, tmp_path / "run", *keys)
  kept = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
  assert kept.latest() is not None


@pytest.mark.parametrize(
  ("keys", "said"),
  [
    (("model.path=nowhere",), "there is no directory nowhere"),
    (("grpo.tokens=12",), "leaves no room for a prompt"),
    (("grpo.tokens=8",), "no prompt fits"),
    (("grpo.clip=0.1",), "grpo takes no config.grpo.clip; did you mean"),
    (("batch_size=6",), "does not divide into batches"),
  ],
)
def test_wrong_input_is_one_sentence(base, tmp_path, keys, said):
  """Before anything is trained."""
  with pytest.raises(UserError, match=said):
    run(grpo, base, tmp_path / "run", *keys)
