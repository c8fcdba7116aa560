"""A trace of real steps, and memory that really runs out."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm.config import freeze
from jaxlm.errors import UserError
from jaxlm.layers.param import init
from jaxlm.models.families import llama
from jaxlm.optim import Optimizer, make
from jaxlm.plan import failure
from jaxlm.profiling import Profile, phases
from jaxlm.state import create, make_step


def test_a_trace_holds_the_names_of_the_phases(tmp_path, capsys):
  """Files for TensorBoard and Perfetto; every phase of a step by its name."""
  model = llama.decoder(64, 16, 1, 2, 1, mlp_dim=32, max_positions=16)
  tx = make(model.params(), lambda step: 1e-3, Optimizer(name="sgd"))
  state = create(init(model.params(), jax.random.key(0)), tx)
  config = freeze({"seq_len": 16})
  step = make_step(failure.programs.recipe.loss(config, model), tx)
  row = jnp.zeros((1, 1, 1, 16), jnp.int32)
  with Profile(tmp_path, calls=1) as profile:
    for _ in range(3):
      with profile.call(before=state):
        state, _ = step(state, {"inputs": row, "targets": row})
  assert str(tmp_path) in capsys.readouterr().out
  assert len(list(tmp_path.rglob("perfetto_trace.json.gz"))) == 1
  (plane,) = tmp_path.rglob("*.xplane.pb")
  text = plane.read_bytes()
  for name in ("embed", "mixer", "ffn", "head", "loss", "optimizer"):
    assert f"{name}".encode() in text, name
  assert b"optimizer/" in text
  shares = phases(tmp_path)
  assert sum(shares.values()) == pytest.approx(1.0)
  assert shares["mixer"] > 0
  assert shares["ffn"] > 0


def test_no_trace_unless_asked(tmp_path):
  """Nothing is written, however long the loop."""
  with Profile(tmp_path / "none", calls=0) as profile:
    for _ in range(4):
      with profile.call():
        pass
  assert not (tmp_path / "none").exists()


def test_memory_that_runs_out_is_explained():
  """The device's own sentence, then ours; a real allocation that fails."""
  with (
    pytest.raises(UserError, match=r"(?s)RESOURCE_EXHAUSTED.*half the batch"),
    failure.explained(lambda: "take half the batch"),
  ):
    jnp.zeros(1 << 44, jnp.float32).block_until_ready()


def test_other_errors_pass():
  """Only memory is explained."""
  with pytest.raises(KeyError), failure.explained(lambda: ""):
    raise KeyError("x")
  assert failure.ran_out(MemoryError())
  assert not failure.ran_out(ValueError("shapes differ"))


def test_the_devices_here_have_a_limit():
  """The host's memory, shared by its CPU devices."""
  site = failure.here()
  assert len(site.devices) == 8
  assert 0 < site.limit * 8 < 1e14
