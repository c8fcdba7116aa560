"""What is recorded can be read back, after a kill and a resume too."""

import json
import math
import resource
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import metrics
from jaxlm.errors import UserError


def lines(workdir) -> list[dict]:
  """The strict reading: every line is JSON, and JSON has no NaN."""

  def refuse(word):
    raise ValueError(word)

  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(x, parse_constant=refuse) for x in text.splitlines()]


# --- JSONL -------------------------------------------------------------------


def test_lines(tmp_path):
  """Numbers of any kind are exact and short; what is not finite is null."""
  with metrics.Log(tmp_path, tensorboard=False) as log:
    log.scalars(1, {"loss": jnp.float32(0.1), "tokens": 2**40, "lr": 1e-3})
    log.scalars(2, {"loss": math.nan, "grad_norm": np.float32("inf")})
    log.scalars(3, {"loss": jnp.bfloat16(1.5), "n": jnp.int32(3)})
  assert lines(tmp_path) == [
    {"step": 1, "loss": 0.1, "tokens": 2**40, "lr": 1e-3},
    {"step": 2, "loss": None, "grad_norm": None},
    {"step": 3, "loss": 1.5, "n": 3},
  ]
  assert metrics.read(tmp_path) == lines(tmp_path)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float32_survives_its_digits(value):
  """The short digits name the same float32, so runs compare bit for bit."""
  plain = metrics._plain(np.float32(value))
  assert np.float32(plain).tobytes() == np.float32(value).tobytes()


def test_resume_drops_what_came_later(tmp_path):
  """A run continued from step 2 ends with the file of an unbroken one."""

  def record(log, steps):
    for step in steps:
      log.scalars(step, {"loss": 1 / step})
      if step % 2 == 0:
        log.scalars(step, {"val_loss": 2 / step})

  whole, broken = tmp_path / "whole", tmp_path / "broken"
  with metrics.Log(whole, tensorboard=False) as log:
    record(log, range(1, 7))
  with metrics.Log(broken, tensorboard=False) as log:
    record(log, range(1, 4))
  with open(broken / "metrics.jsonl", "a") as file:
    file.write('{"step": 4, "lo')  # torn by a power cut
  assert [r["step"] for r in metrics.read(broken)] == [1, 2, 2, 3]
  with metrics.Log(broken, tensorboard=False, step=2) as log:
    assert log.last("val_loss") == 2
    record(log, range(3, 7))
    assert (log.last("loss"), log.last("lr")) == (6, None)
  name = "metrics.jsonl"
  assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_a_kill_costs_no_finished_line(tmp_path):
  """Lines reach the operating system before `scalars` returns."""
  code = (
    "import os, sys; from jaxlm.metrics import Log\n"
    "log = Log(sys.argv[1]); log.scalars(1, {'loss': 1.5}); os._exit(9)\n"
  )
  subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
  assert lines(tmp_path) == [{"step": 1, "loss": 1.5}]
  assert tensorboard(tmp_path).Scalars("loss")[0].value == 1.5


def fill(log) -> None:
  for step in range(2, 10):
    log.scalars(step, {"loss": 1.0})


def test_full_disk(tmp_path):
  """One sentence, and what was recorded stays readable."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  log = metrics.Log(tmp_path, tensorboard=False)
  log.scalars(1, {"loss": 1.0})
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
  try:
    with pytest.raises(UserError, match="File too large"):
      fill(log)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert metrics.read(tmp_path)[0] == {"step": 1, "loss": 1.0}
  log.close()


def test_refuses_a_workdir_that_cannot_be(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="metrics could not be written"):
    metrics.Log(tmp_path / "file" / "run")


def test_silent_processes_write_nothing(tmp_path):
  """On a pod one process records; the others make the same calls."""
  with metrics.Log(tmp_path / "run", write=False) as log:
    log.scalars(1, {"loss": 1.0})
    log.text(1, "sample", "x")
  assert not (tmp_path / "run").exists()


# --- TensorBoard -------------------------------------------------------------


def tensorboard(workdir):
  """TensorBoard's own reader, all events loaded."""
  from tensorboard.backend.event_processing import event_accumulator

  everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
  reader = event_accumulator.EventAccumulator(
    str(workdir / "tb"), size_guidance=everything
  )
  return reader.Reload()


def test_tensorboard_reads_it_back(tmp_path):
  """Scalars (NaN too), histogram, text, images and config, by its reader."""
  values = np.random.default_rng(0).normal(size=1000)
  values[:2] = np.nan, np.inf
  ramp = np.linspace(0, 1, 12).reshape(3, 4)
  with metrics.Log(tmp_path, config={"steps": 7}) as log:
    log.scalars(1, {"loss": 2.5, "lr": 1e-3})
    log.scalars(2, {"loss": jnp.float32("nan")})
    log.histogram(2, "weights", jnp.asarray(values, jnp.bfloat16))
    log.histogram(2, "nothing", np.full((3,), np.nan))
    log.text(2, "sample", "To be, or *not*")
    log.image(2, "map", ramp)
    log.image(2, "color", (np.zeros((3, 4, 3)) + 255).astype(np.uint8))
  reader = tensorboard(tmp_path)
  points = reader.Scalars("loss")
  assert [p.step for p in points] == [1, 2]
  assert points[0].value == 2.5
  assert math.isnan(points[1].value)
  histogram = reader.Histograms("weights")[0]
  assert histogram.step == 2
  assert histogram.histogram_value.num == 998
  assert reader.Tags()["histograms"] == ["weights"]
  assert {(i.width, i.height) for i in reader.Images("map")} == {(4, 3)}
  assert reader.Images("color")[0].encoded_image_string.startswith(b"\x89PNG")
  text = reader.Tensors("sample/text_summary")[0].tensor_proto.string_val[0]
  assert text == b"To be, or *not*"
  config = reader.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
  assert b'"steps": 7' in config


def test_tensorboard_forgets_what_was_done_again(tmp_path):
  """After a resume from step 2 the reader shows each step once."""
  with metrics.Log(tmp_path) as log:
    for step in (1, 2, 3, 4):
      log.scalars(step, {"loss": float(step)})
  with metrics.Log(tmp_path, step=2) as log:
    for step in (3, 4, 5):
      log.scalars(step, {"loss": 10.0 * step})
  points = [(p.step, p.value) for p in tensorboard(tmp_path).Scalars("loss")]
  assert points == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


# --- wandb -------------------------------------------------------------------


class FakeWandb(types.ModuleType):
  """Notes what it is called with, as wandb's own interface is."""

  def __init__(self):
    super().__init__("wandb")
    self.inits, self.logged, self.finished = [], [], 0
    self.Histogram = self.Image = lambda array: ("seen", array.shape)
    self.Table = lambda columns, data: ("table", columns, data)

  def init(self, **options):
    self.inits.append(options)
    return self

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.finished += 1


def test_wandb(tmp_path, monkeypatch):
  """All kinds arrive, and a continued run has the id it had."""
  wandb = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  for step in (0, 5):
    with metrics.Log(tmp_path, False, wandb=True, config={"a": 1}, step=step):
      pass
  first, second = wandb.inits
  assert first["id"] == second["id"]
  assert first["resume"] == "allow"
  assert first["config"] == {"a": 1}
  with metrics.Log(tmp_path, False, wandb=True) as log:
    log.scalars(1, {"loss": 2.0})
    log.histogram(1, "h", np.ones((3,)))
    log.image(1, "i", np.ones((2, 3)))
    log.text(1, "t", "x")
  assert wandb.logged == [
    (1, {"loss": 2.0}),
    (1, {"h": ("seen", (3,))}),
    (1, {"i": ("seen", (2, 3, 1))}),
    (1, {"t": ("table", ["step", "text"], [[1, "x"]])}),
  ]
  assert wandb.finished == 3


def test_wandb_is_named_where_it_is_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r"jaxlm\[wandb\]"):
    metrics.Log(tmp_path, tensorboard=False, wandb=True)


# --- Means and the plot ------------------------------------------------------


@given(
  st.lists(
    st.tuples(st.integers(0, 99), st.floats(-10, 10)), min_size=1, max_size=9
  )
)
def test_mean_equals_one_big_batch(batches):
  """However the tokens are cut into batches, their mean is the same."""
  mean = metrics.Mean()
  for weight, value in batches:
    mean.add(jnp.int32(weight), loss=value)
  all_tokens = [value for weight, value in batches for _ in range(weight)]
  got = mean.result()["loss"]
  if all_tokens:
    assert got == pytest.approx(np.mean(all_tokens), abs=1e-12)
  else:
    assert math.isnan(got)


def test_smoothing_keeps_a_straight_line():
  """A centred mean has no lag: a line stays where it is, but for its end."""
  line = np.arange(500.0)
  got = metrics._smooth(line)
  assert got.shape == line.shape
  np.testing.assert_allclose(got[:489], line[:489])
  assert (metrics._smooth(np.ones(1)) == 1).all()


def test_plot(tmp_path):
  """A PNG of a sensible size, also from the shortest of runs."""
  with pytest.raises(UserError, match="train first"):
    metrics.plot_loss(tmp_path)
  with metrics.Log(tmp_path, tensorboard=False) as log:
    log.scalars(1, {"loss": 2.0})
    path = metrics.plot_loss(tmp_path)
    for step in range(2, 50):
      log.scalars(step, {"loss": math.nan if step == 7 else 2 / step})
    log.scalars(49, {"val_loss": 0.3})
  assert metrics.plot_loss(tmp_path) == path == tmp_path / "loss.png"
  assert path.read_bytes().startswith(b"\x89PNG")
  assert 10_000 < path.stat().st_size < 200_000
