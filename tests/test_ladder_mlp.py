"""The hand-written network: each part is JAX's, and no program derives it."""

import ast
import gzip
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.ladder import components, images, mlp, mlp_jax, rung

DERIVERS = {"jax", "torch", "tensorflow", "autograd", "tensor", "gradcheck"}


def derivers(text: str) -> list[str]:
  """What a file imports or names that could derive a gradient for it."""
  found = set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      found |= {part for a in node.names for part in a.name.split(".")}
    elif isinstance(node, ast.ImportFrom):
      found |= {*(node.module or "").split("."), *(a.name for a in node.names)}
    elif isinstance(node, ast.Attribute):
      found.add(node.attr)
    elif isinstance(node, ast.Name):
      found.add(node.id)
  banned = DERIVERS | {"grad", "vjp", "jvp", "backward", "GradientTape"}
  banned |= {"__import__", "import_module", "einsum_grad", "mlp_jax"}
  return sorted(found & banned)


def test_the_scan_finds():
  """Every way in."""
  assert derivers("import jax.numpy as jnp") == ["jax"]
  assert derivers("from jaxlm.ladder import autograd as a") == ["autograd"]
  assert derivers("__import__('ja' + 'x')") == ["__import__"]
  assert derivers("loss.backward()") == ["backward"]


@pytest.mark.parametrize("module", [mlp, components, images])
def test_nothing_is_derived_by_a_program(module):
  """The file, its parts and its data are NumPy."""
  assert derivers(inspect.getsource(module)) == []


def pulled(f, args, dy):
  """JAX's value and gradients of `f` at `args`, float64."""
  with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
    y, pull = jax.vjp(f, *map(jnp.asarray, args))
    return y, pull(jnp.asarray(dy))


def test_linear_and_relu():
  """Three gradients and one mask."""
  rng = np.random.default_rng(0)
  x, w, b = rng.normal(size=(5, 3)), rng.normal(size=(3, 4)), rng.normal(size=4)
  dy = rng.normal(size=(5, 4))
  y, line = components.linear(x, w, b)
  z, bend = components.relu(y)
  judge, exact = pulled(lambda x, w, b: jax.nn.relu(x @ w + b), (x, w, b), dy)
  np.testing.assert_allclose(z, judge, rtol=1e-12)
  got = components.linear_back(components.relu_back(dy, bend), line)
  for mine, other in zip(got, exact, strict=True):
    np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-12)


def test_batch_norm():
  """Gradients flow through the mean and the variance."""
  rng = np.random.default_rng(1)
  x, scale, bias = rng.normal(size=(6, 3)), rng.normal(size=3), np.ones(3)
  dy = rng.normal(size=(6, 3))

  def judge(x, scale, bias):
    normal = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
    return normal * scale + bias

  y, saved = components.batch_norm(x, scale, bias)
  value, exact = pulled(judge, (x, scale, bias), dy)
  np.testing.assert_allclose(y, value, rtol=1e-10, atol=1e-12)
  got = components.batch_norm_back(dy, saved)
  for mine, other in zip(got, exact, strict=True):
    np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-11)


def test_embedding_adds():
  """A row that is read three times is paid three times."""
  rng = np.random.default_rng(2)
  table, ids = rng.normal(size=(5, 2)), np.array([[1, 1], [4, 1]])
  dy = rng.normal(size=(2, 2, 2))
  y, saved = components.embedding(table, ids)
  value, (exact,) = pulled(lambda table: table[ids], (table,), dy)
  np.testing.assert_array_equal(y, value)
  np.testing.assert_allclose(components.embedding_back(dy, saved), exact)


def test_cross_entropy():
  """And at scores that would overflow."""
  rng = np.random.default_rng(3)
  z, y = 50 * rng.normal(size=(6, 4)), rng.integers(0, 4, 6)

  def judge(z):
    return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(6), y])

  loss, saved = components.cross_entropy(z, y)
  value, (exact,) = pulled(judge, (z,), 1.0)
  np.testing.assert_allclose(loss, value, rtol=1e-12)
  got = components.cross_entropy_back(saved)
  np.testing.assert_allclose(got, exact, atol=1e-14)
  assert np.isfinite(components.cross_entropy(1000 * z, y)[0])


def test_dropout():
  """A part is zero, the mean stays, and the way back has the same holes."""
  x = np.ones((200, 500), np.float32)
  y, keep = components.dropout(np.random.default_rng(4), x, 0.3)
  assert abs(np.mean(y == 0) - 0.3) < 0.01
  assert abs(y.mean() - 1) < 0.01
  assert y.dtype == np.float32
  np.testing.assert_array_equal(components.dropout_back(x, keep), y)


@pytest.mark.parametrize("sizes", [(6, 5, 4), (6, 5, 7, 4), (6, 4)])
def test_the_whole_walk(sizes):
  """Of one, two and three layers, with every bias."""
  rng = np.random.default_rng(5)
  params = [p.astype(np.float64) for p in mlp.start(rng, *sizes)]
  params = [p + 0.1 * rng.normal(size=p.shape) for p in params]
  x, y = rng.normal(size=(9, 6)), rng.integers(0, 4, 9)
  loss, got = mlp.gradients(params, x, y)
  with jax.enable_x64(True):
    value, exact = jax.value_and_grad(mlp_jax.loss)(
      [jnp.asarray(p) for p in params], jnp.asarray(x), jnp.asarray(y)
    )
  np.testing.assert_allclose(loss, value, rtol=1e-10)
  for mine, other in zip(got, exact, strict=True):
    np.testing.assert_allclose(mine, other, rtol=1e-8, atol=1e-12)


def fake(n=64, seed=0):
  """Noise with labels that are a function of it."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, 16)).astype(np.float32)
  y = (x @ rng.normal(size=(16, 10))).argmax(1)
  return images.Images(x, y, x, y, "fake")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_hundred_steps_equal_jax(dtype):
  """One start, one order, two libraries: losses to 1e-5, or 1e-10."""
  data = fake()
  with jax.enable_x64(dtype == np.float64):
    mine, judge = (
      mlp_jax.curve(step, data, 100, 32, hidden=20, dtype=dtype)[0]
      for step in (mlp_jax.hand_step, mlp_jax.jax_step)
    )
  tolerance = 1e-5 if dtype == np.float32 else 1e-10
  np.testing.assert_allclose(mine, judge, atol=tolerance)
  assert mine[-1] < 0.6 * mine[0]


def test_it_learns_by_heart():
  """With its training set as test set; a seed is a run, bit for bit."""
  recipe = mlp.Recipe(hidden=50, epochs=60, batch=16, rate=0.05)
  _, errors = mlp.train(fake(), recipe, 0)
  assert errors[-1] == 0
  again = mlp.train(fake(), recipe, 0)[1]
  assert again == errors


def test_dropout_hides_and_is_learned_through():
  """The loss of a batch depends on the draw; the errors fall all the same."""
  data = fake()
  params = mlp.start(np.random.default_rng(0), 16, 50, 10)
  losses = {
    mlp.gradients(params, data.x, data.y, np.random.default_rng(s), 0.5)[0]
    for s in range(3)
  }
  assert len(losses) == 3
  recipe = mlp.Recipe(hidden=50, epochs=60, batch=16, rate=0.05, dropout=0.5)
  _, errors = mlp.train(data, recipe, 0)
  assert errors[-1] < 0.1


@pytest.mark.slow
def test_small_digits(tmp_path, capsys):
  """97.5 % or better of scikit-learn's digits, mean of three seeds."""
  pytest.importorskip("sklearn")
  mlp.main([f"--out={tmp_path}"])
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith("test error: ")
  assert float(last.split()[2]) <= 2.5
  assert (tmp_path / "mlp.png").stat().st_size > 10_000


def write(folder, names=images.NAMES[0], n=40, zipped=True):
  """An .npz and a folder of idx files with the same pictures."""
  rng = np.random.default_rng(6)
  parts = []
  for _ in range(2):
    parts.append(rng.integers(0, 256, (n, 4, 4), dtype=np.uint8))
    parts.append(rng.integers(0, 10, n).astype(np.uint8))
  np.savez(folder / "a.npz", **dict(zip(names, parts, strict=True)))
  for stem, part in zip(images.IDX, parts, strict=True):
    head = bytes([0, 0, 8, part.ndim]) + np.array(part.shape, ">i4").tobytes()
    data = head + part.tobytes()
    if zipped:
      (folder / f"{stem}-ubyte.gz").write_bytes(gzip.compress(data))
    else:
      (folder / f"{stem}-ubyte").write_bytes(data)


@pytest.mark.parametrize("names", images.NAMES)
@pytest.mark.parametrize("zipped", [True, False])
def test_npz_and_idx_are_one(tmp_path, names, zipped):
  """Both files, under both names, give the same pixels and labels."""
  write(tmp_path, names, zipped=zipped)
  a, b = images.load(tmp_path / "a.npz"), images.load(tmp_path)
  for name in ("x", "y", "x_test", "y_test"):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
  assert a.x.shape == (40, 16)
  assert abs(a.x.mean()) < 1e-5


def test_the_programs_end_as_told(tmp_path, capsys):
  """The last line is the mean error; JAX's program tells the difference."""
  write(tmp_path)
  flags = [f"--data={tmp_path}/a.npz", f"--out={tmp_path}"]
  mlp.main([*flags, "--seeds=1", "--epochs=1", "--dropout"])
  assert capsys.readouterr().out.splitlines()[-1].startswith("test error: ")
  mlp_jax.main([*flags, "--steps=3"])
  assert "largest difference: " in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--data={0}/none.npz"], "cannot be read as an .npz"),
    (["--data={0}/text.npz"], "cannot be read as an .npz"),
    (["--data={0}/empty.npz"], "it must hold x_train"),
    (["--data={0}/labels.npz"], "one integer for each image"),
    (["--data={0}"], "has no file train-images"),
    (["--data={0}/short"], "no whole idx file"),
    (["--seeds=0"], "at least 1"),
    (["--dropout=1"], "--dropout within"),
  ],
)
def test_wrong_input_is_one_sentence(flags, sentence, tmp_path, capsys):
  """Missing, broken, empty and unfitting data, and flags out of range."""
  (tmp_path / "text.npz").write_text("no zip")
  np.savez(tmp_path / "empty.npz", a=np.ones(2))
  np.savez(
    tmp_path / "labels.npz",
    **dict.fromkeys(images.NAMES[0], np.ones((4, 3, 3))),
  )
  (tmp_path / "short").mkdir()
  write(tmp_path / "short", zipped=False)
  path = tmp_path / "short" / f"{images.IDX[0]}-ubyte"
  path.write_bytes(path.read_bytes()[:100])
  flags = [flag.format(tmp_path) for flag in flags]
  with pytest.raises(SystemExit) as stop:
    rung.run(lambda: mlp.main(flags))
  assert stop.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ")
  assert sentence in said
  assert said.count("\n") == 1


def test_no_data_is_one_sentence(monkeypatch):
  """Without scikit-learn there are no small digits."""
  import sys

  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises(UserError, match="or install scikit-learn"):
    images.load(None)
