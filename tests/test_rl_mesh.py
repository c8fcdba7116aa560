"""PPO and GRPO on eight devices: what they say and learn on one."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import FAMILIES, random_params, save_adder

from jaxlm import config, keys, metrics, program
from jaxlm.errors import UserError
from jaxlm.layers import param
from jaxlm.layers.compute import Compute
from jaxlm.models.heads import ScalarHead
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset
from jaxlm.rl import begin, grpo, place, ppo
from jaxlm.rl.rollout import Actor, Draw, sample, scored

ROOT = Path(__file__).parent.parent
KEYS = (
  *("steps=3", "batch_size=16", "seq_len=12", "checkpoint_every=2"),
  *("eval_every=3", "log_every=1", "unroll=false", "log.tensorboard=false"),
  # Adam would magnify what rounding leaves of the gradients that are zero, as
  # those of the biases of keys are.
  *("optimizer.warmup=1", "optimizer.eps=1e-4"),
)
# Rollouts of the shapes of an evaluation, whose programs then serve both.
SHAPE = ("prompts=8", "samples=4", "tokens=4", "questions=50", "held_out=8")
OWN = {
  grpo: ("grpo.kl=0.1", "accumulate=2"),
  ppo: ("ppo.critic=separate", "ppo.epochs=1", "ema=0.9"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
  """A model that knows nothing, with a tokenizer for sums."""
  return save_adder(tmp_path_factory.mktemp("base") / "model", 32, 1, 8)


def run(which, base: Path, workdir: Path, *keys: str, devices: int = 8):
  """Trains; the last state, and every text that was judged."""
  name, said = which.__name__.rpartition(".")[2], []

  def digits(examples, texts):
    said.extend(texts)
    return [text.count("7") + 0.1 * len(text) for text in texts]

  def mesh(config, made=place.mesh):
    return made(config, jax.devices()[:devices])

  given = [*KEYS, *OWN[which], f"model.path={base}", *keys]
  given += [f"{name}.{key}" for key in SHAPE]
  flags = [f"--config={ROOT}/configs/{name}.py", f"--workdir={workdir}"]
  asked = program.load(flags + [f"--config.{key}" for key in given])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(begin, "reward_of", lambda options, compute: digits)
    patch.setattr(place, "mesh", mesh)
    return which.train(asked.config, asked.workdir), said


def close(a, b, path: str = "") -> None:
  """Arrays of two runs, to 1e-5."""
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=path)


def told(workdir: Path, kind: str) -> list[dict[str, float]]:
  """What the log says of each step, without the clock."""
  lines = [x for x in metrics.read(workdir) if kind in x]
  return [{k: v for k, v in x.items() if k != "samples_per_sec"} for x in lines]


@pytest.mark.parametrize(
  ("which", "rules"),
  [(grpo, "fsdp_tp"), (ppo, "fsdp")],
  ids=["grpo", "ppo"],
)
def test_a_run_on_a_mesh_is_the_run_on_one_device(which, rules, base, tmp_path):
  """Every text, loss and weight; and each device has its share of the state."""
  one, texts = run(which, base, tmp_path / "one", devices=1)
  keys = (f"parallel.preset={rules}",)
  state, said = run(which, base, tmp_path / "mesh", *keys)
  assert said == texts
  assert len(set(said)) > 10
  close(state.params, one.params)
  for kind in ("reward", "val_score"):
    pairs = zip(
      *(told(tmp_path / x, kind) for x in ("one", "mesh")), strict=True
    )
    for a, b in pairs:
      assert a.keys() == b.keys()
      for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
  q = state.params["layers"]["0"]["0"]["mixer"]["q"]
  assert q.addressable_shards[0].data.size == q.size // 8
  sizes = [x.addressable_shards[0].data.size for x in jax.tree.leaves(state)]
  whole = sum(x.size for x in jax.tree.leaves(state))
  assert sum(sizes) < 0.25 * whole


def test_rollouts_on_a_mesh():
  """The same tokens from the same keys, and to rounding the same scores; also
  where prompts do not divide, and weights are gathered for every token.
  """
  model = FAMILIES["llama"]
  head = ScalarHead(model.dim)
  actor = Actor(model, head)
  params = random_params(model) | {"value": random_params(head)}
  rng = np.random.default_rng(0)
  prompts = rng.integers(1, model.vocab, (6, 5)).astype(np.int32)
  lengths = np.int32([5, 1, 3, 2, 5, 4])
  seeds = jax.random.split(jax.random.key(1), 24)
  draw = Draw(7, 4, eos=3, temperature=1.3, top_k=7, gathered=False)
  one = sample(model, draw, params, prompts, lengths, seeds)
  want = scored(actor, params, one, draw)
  rules = preset("tp")
  mesh, compute = make_mesh(rules, "data:4,tensor:2"), Compute(rules=rules)
  with jax.set_mesh(mesh):
    places = param.shardings(actor.params(), mesh, rules)
    params = jax.device_put(params, places)
    given = place.rows((prompts, lengths, seeds), rules)
    many = sample(model, draw, params, *given, compute)
    found = scored(actor, params, many, draw, compute)
  assert many.tokens.addressable_shards[0].data.shape[0] < 24
  np.testing.assert_array_equal(many.tokens, one.tokens)
  np.testing.assert_array_equal(many.kept, one.kept)
  close((many.logp_old, found), (one.logp_old, want))


@pytest.mark.parametrize(
  ("name", "words"),
  [("fsdp_cp", "divides the positions.*leave out cp"), ("pp", "leave out pp")],
)
def test_what_cannot_be_cut_is_told(name, words):
  """Rows and layers stay whole while responses are written."""
  flat = keys.defaults() | {"batch_size": 16, "parallel.preset": name}
  with pytest.raises(UserError, match=words):
    place.mesh(config.freeze(flat))
