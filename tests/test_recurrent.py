"""Recurrent mixers: torch's numbers, and one state however it is reached."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.generate.decode import generate
from jaxlm.generate.prompts import pad_left
from jaxlm.layers.at import At
from jaxlm.layers.cache import empty
from jaxlm.layers.compute import Compute
from jaxlm.layers.mlp import relu
from jaxlm.layers.param import abstract, init, muon_dims, paths, shardings
from jaxlm.layers.recurrent import GRU, LSTM, RNN, Elman
from jaxlm.layers.rglru import RGLRU
from jaxlm.models.build import build
from jaxlm.models.decoder import forward, hidden
from jaxlm.models.families import recurrent
from jaxlm.objectives import next_token
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import preset
from jaxlm.values import from_json, to_json

GOLDEN = pathlib.Path(__file__).parent / "golden" / "recurrent.npz"

CELLS = {"tanh": Elman(), "relu": Elman(relu), "lstm": LSTM(), "gru": GRU()}
MIXERS = {
  "rnn": RNN(6, Elman()),
  "lstm": RNN(6, LSTM(), hidden=8),
  "gru": RNN(6, GRU(), bias=False),
  "rglru": RGLRU(6, width=8, blocks=2),
}


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
  """What the judge says of one layer, float32."""
  with np.load(GOLDEN) as file:
    return {
      key.removeprefix(f"{name}/"): file[key].astype(np.float32)
      for key in file
      if key.startswith(f"{name}/")
    }


def random(mixer, seed: int = 0):
  """Parameters, none of them zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32),
    abstract(mixer.params()),
  )


def inputs(batch: int, seq: int, dim: int = 6, seed: int = 1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(batch, seq, dim)), jnp.float32)


def close(found, want, tol: float = 1e-5) -> None:
  np.testing.assert_allclose(found, want, rtol=tol, atol=tol)


# --- Against torch and transformers -----------------------------------------


def from_torch(gates: int, a: dict[str, np.ndarray], prefix: str = "") -> dict:
  """Our tree from torch's: matrices are turned, gates stand apart."""

  def matrix(name: str):
    w = a[f"{prefix}{name}_l0"]
    return jnp.asarray(w.T.reshape(w.shape[1], gates, -1))

  def vector(name: str):
    return jnp.asarray(a[f"{prefix}{name}_l0"].reshape(gates, -1))

  return {
    "x": matrix("weight_ih"),
    "h": matrix("weight_hh"),
    "x_bias": vector("bias_ih"),
    "h_bias": vector("bias_hh"),
  }


@pytest.mark.parametrize("name", CELLS)
def test_cells_equal_torch(name: str):
  """Values, last states, and the gradient of every weight and input."""
  a, cell = golden(name), CELLS[name]
  mixer = RNN(5, cell)
  p, x = from_torch(cell.gates, a), jnp.asarray(a["x"])
  at = At(positions=jnp.broadcast_to(jnp.arange(13), (2, 13)))

  def fn(p, x):
    y, _ = mixer(p, x)
    return jnp.sum(y * a["cotangent"]), y

  (_, y), grads = jax.value_and_grad(fn, (0, 1), has_aux=True)(p, x)
  close(y, a["out"], 2e-6)
  close(grads[1], a["grad/x"])
  want = from_torch(cell.gates, a, "grad/")
  jax.tree.map(close, grads[0], want)
  assert min(np.abs(w).max() for w in want.values()) > 0.1
  _, last = mixer(p, x, at, empty(mixer.cache(2, 13)))
  for key in cell.states:
    close(last[key], a[f"last/{key}"], 2e-6)


def from_griffin(a: dict[str, np.ndarray], prefix: str = "") -> dict:
  """Our tree from RecurrentGemma's block."""
  a = {k.removeprefix(prefix): v for k, v in a.items() if prefix in k}
  tree = {
    "x": a["linear_x.weight"].T,
    "x_bias": a["linear_x.bias"],
    "gate": a["linear_y.weight"].T,
    "gate_bias": a["linear_y.bias"],
    "o": a["linear_out.weight"].T,
    "o_bias": a["linear_out.bias"],
    "conv": a["conv_1d.weight"][:, 0].T,
    "conv_bias": a["conv_1d.bias"],
    "input_gate": a["rg_lru.input_gate_weight"],
    "input_gate_bias": a["rg_lru.input_gate_bias"].reshape(-1),
    "decay_gate": a["rg_lru.recurrent_gate_weight"],
    "decay_gate_bias": a["rg_lru.recurrent_gate_bias"].reshape(-1),
    "decay": a["rg_lru.recurrent_param"],
  }
  return jax.tree.map(jnp.asarray, tree)


def test_rglru_equals_transformers():
  """The whole block: convolution, gates, scan, and all their gradients."""
  a = golden("rglru")
  mixer = RGLRU(6, width=12, blocks=3)
  p, x = from_griffin(a), jnp.asarray(a["x"])
  assert {k: v.shape for k, v in p.items()} == {
    k: v.shape for k, v in mixer.params().items()
  }

  def fn(p, x):
    y, _ = mixer(p, x)
    return jnp.sum(y * a["cotangent"]), y

  (_, y), grads = jax.value_and_grad(fn, (0, 1), has_aux=True)(p, x)
  assert np.abs(a["out"]).max() > 1.0
  close(y, a["out"])
  close(grads[1], a["grad/x"], 3e-5)
  for key, want in from_griffin(a, "grad/").items():
    np.testing.assert_allclose(
      grads[0][key], want, rtol=3e-5, atol=3e-5, err_msg=key
    )


# --- One state, however it is reached ---------------------------------------


@pytest.mark.parametrize("name", MIXERS)
@given(data=st.data())
@settings(max_examples=15)
def test_calls_may_be_cut_anywhere_and_padded_anywhere(name: str, data):
  """With a cache, chunks of any size and any padding leave the same outputs.

  Padding (negative positions) stands wherever it wants; what the tokens say
  is what they say in one plain call.
  """
  mixer, seq, room = MIXERS[name], 6, 10
  call = jax.jit(mixer)
  p, x = random(mixer), inputs(2, seq)
  plain, none = call(p, x)
  assert none == {}
  places = [
    sorted(data.draw(st.permutations(range(room)))[:seq]) for _ in range(2)
  ]
  wide, at = np.full((2, room, 6), 7.0, np.float32), np.full((2, room), -1)
  for row, where in enumerate(places):
    wide[row, where], at[row, where] = x[row], np.arange(seq)
  cut = data.draw(st.sampled_from([1, 6]))
  cache, out = empty(mixer.cache(2, 1)), []
  for part in (slice(0, cut), slice(cut, room)):
    here = At(positions=jnp.asarray(at[:, part], jnp.int32))
    y, cache = call(p, jnp.asarray(wide[:, part]), here, cache)
    out.append(y)
  found = jnp.concatenate(out, axis=1)
  close(jnp.stack([found[i, jnp.asarray(places[i])] for i in (0, 1)]), plain)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("known", ["segments", "positions", "both"])
def test_documents_of_a_packed_row_do_not_meet(name: str, known: str):
  """Each document in a row is as if alone, by segments or by positions."""
  mixer, sizes = MIXERS[name], (1, 2, 5, 3)
  p, x = random(mixer), inputs(2, sum(sizes))
  ends = np.cumsum(sizes)
  alone = [
    mixer(p, x[:, end - n : end])[0] for n, end in zip(sizes, ends, strict=True)
  ]

  def rows(parts):
    row = jnp.asarray(np.concatenate(parts), jnp.int32)
    return jnp.broadcast_to(row, (2, len(row)))

  marks = {
    "segments": rows([[i + 1] * n for i, n in enumerate(sizes)]),
    "positions": rows([np.arange(n) for n in sizes]),
  }
  at = At(**{k: v for k, v in marks.items() if known in (k, "both")})
  close(mixer(p, x, at)[0], jnp.concatenate(alone, axis=1))


@pytest.mark.parametrize("name", MIXERS)
def test_padding_on_the_left_without_a_cache(name: str):
  """A forward pass over padded rows says what a plain one says."""
  mixer = MIXERS[name]
  p, x = random(mixer), inputs(2, 5)
  wide = jnp.pad(x, ((0, 0), (4, 0), (0, 0)), constant_values=3.0)
  at = At(positions=jnp.broadcast_to(jnp.arange(-4, 5), (2, 9)))
  close(mixer(p, wide, at)[0][:, 4:], mixer(p, x)[0])


@pytest.mark.parametrize("name", MIXERS)
def test_a_row_at_rest_keeps_its_state(name: str):
  """A step at position -1 (a slot without work) changes no bit of it."""
  mixer = MIXERS[name]
  p, x = random(mixer), inputs(2, 5)
  at = At(positions=jnp.broadcast_to(jnp.arange(4), (2, 4)))
  _, cache = mixer(p, x[:, :4], at, empty(mixer.cache(2, 1)))
  at = At(positions=jnp.array([[4], [-1]]))
  _, after = mixer(p, x[:, 4:], at, cache)
  for old, new in zip(*map(jax.tree.leaves, (cache, after)), strict=True):
    np.testing.assert_array_equal(old[1], new[1])
    assert np.any(old[0] != new[0])


@pytest.mark.parametrize("name", MIXERS)
def test_nothing_is_seen_of_the_future(name: str):
  """The gradient of an output by later inputs is zero."""
  mixer = MIXERS[name]
  p, x = random(mixer), inputs(1, 7)
  grad = jax.grad(lambda x: jnp.sum(mixer(p, x)[0][:, 3]))(x)
  assert not np.any(grad[:, 4:])
  assert np.all(np.any(grad[:, :4], axis=-1))


def test_decay_starts_between_the_radii():
  """Λ at the start gives decays between 0.9 and 0.999 at an open gate."""
  p = init(RGLRU(4096).params(), jax.random.key(0))
  radius = np.exp(-jax.nn.softplus(p["decay"]))
  assert radius.min() >= 0.899
  assert radius.max() <= 0.9991
  close(np.mean(radius**2), (0.9**2 + 0.999**2) / 2, 3e-3)


def test_what_the_optimizer_sees():
  """A cell's gates are one matrix, blocks are many, a convolution is none."""
  dims = {k: v for k, v in paths(muon_dims(RNN(6).params())).items() if v}
  assert dims.keys() == {"x", "h"}
  tree = RGLRU(6, width=8, blocks=2).params()
  assert tree["input_gate"].n_stacked == 1
  assert tree["input_gate"].fan_in == 4
  assert not tree["conv"].is_matrix


# --- In a decoder -----------------------------------------------------------

VOCAB, WINDOW = 31, 48
SIZES = {"vocab": VOCAB, "dim": 16, "max_positions": WINDOW}
DECODERS = {
  "rnn": recurrent.decoder(mixer="rnn", layers=2, **SIZES),
  "lstm": recurrent.decoder(mixer="lstm", layers=2, **SIZES),
  "gru": recurrent.decoder(mixer="gru", layers=2, hidden=24, **SIZES),
  "rglru": recurrent.decoder(mixer="rglru", layers=2, heads=2, **SIZES),
  "hybrid": recurrent.decoder(
    mixer="hybrid", layers=5, heads=2, window=5, **SIZES
  ),
}


def tokens(batch: int, seq: int, seed: int = 0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, VOCAB, (batch, seq)), jnp.int32)


def test_a_hybrid_is_two_recurrences_and_a_window():
  """Griffin's pattern, the last one cut where the depth ends."""
  kinds = [type(b.mixer).__name__ for b in DECODERS["hybrid"].blocks]
  assert kinds == ["RGLRU", "RGLRU", "Attention", "RGLRU", "RGLRU"]


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_equals_the_full_pass(name: str):
  """Hidden states step by step, to 1e-5."""
  model = DECODERS[name]
  params, row = random(model), tokens(2, 12)
  full, _ = hidden(model, params, row)
  cache, out = empty(model.cache(2, 12)), []

  @jax.jit
  def step(token, position, cache):
    at = At(positions=position)
    return hidden(model, params, token, at, cache)

  for i in range(12):
    where = jnp.full((2, 1), i, jnp.int32)
    x, cache = step(row[:, i : i + 1], where, cache)
    out.append(x)
  close(jnp.concatenate(out, axis=1), full)


@pytest.mark.parametrize("name", DECODERS)
def test_unequal_prompts_do_not_disturb_each_other(name: str):
  """`generate` on a padded batch says what each prompt alone says."""
  model = DECODERS[name]
  params = random(model)
  rows = [np.asarray(tokens(1, n, seed=n)[0]) for n in (1, 9, 4)]
  padded, lengths = pad_left(rows, pad=7)
  found = generate(model, params, padded, 12, lengths=lengths)
  full = jax.jit(functools.partial(forward, model))
  for row, prompt in zip(found, rows, strict=True):
    text = list(prompt)
    for _ in range(12):
      line = np.zeros((1, 24), np.int32)
      line[0, : len(text)] = text
      text.append(int(jnp.argmax(full(params, line)[0, len(text) - 1])))
    np.testing.assert_array_equal(row[-12:], text[-12:])


@pytest.mark.parametrize("name", ["lstm", "gru", "hybrid"])
def test_it_learns(name: str):
  """Gradient descent on one row that counts: the loss falls to a third."""
  model = DECODERS[name]
  params = init(model.params(), jax.random.key(0))
  line = jnp.arange(24, dtype=jnp.int32)[None] % 7
  batch = {"inputs": line[:, :-1], "targets": line[:, 1:]}

  @jax.jit
  def step(params):
    loss, grad = jax.value_and_grad(lambda p: next_token(model, p, batch)[0])(
      params
    )
    return loss, jax.tree.map(lambda p, g: p - 0.3 * g, params, grad)

  first, params = step(params)
  for _ in range(40):
    loss, params = step(params)
  assert loss < first / 3


@pytest.mark.parametrize(
  ("mixer", "rules"), [("lstm", "tp"), ("gru", "fsdp"), ("rglru", "fsdp_tp")]
)
def test_eight_devices_say_what_one_says(mixer: str, rules: str):
  """Loss and gradients, states and gates split over devices or gathered."""
  model = recurrent.decoder(mixer=mixer, layers=1, heads=2, **SIZES)
  params, row = random(model), tokens(8, 9)
  batch = {"inputs": row[:, :-1], "targets": row[:, 1:]}

  def loss(params, batch, compute):
    return next_token(model, params, batch, None, compute)[0]

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
  want = grad(params, batch, Compute())
  table = preset(rules)
  mesh = make_mesh(table)
  with jax.set_mesh(mesh):
    put = jax.device_put(params, shardings(model.params(), mesh, table))
    spec = table.activation_spec(("batch", None), row.shape, mesh)
    here = jax.sharding.NamedSharding(mesh, spec)
    rows = jax.tree.map(lambda x: jax.device_put(x, here), batch)
    found = grad(put, rows, Compute(rules=table))
  jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b)), found, want)


def test_an_unknown_mixer_names_the_known():
  """One sentence."""
  with pytest.raises(UserError, match=r"'ltsm'.*gru, hybrid, lstm, rglru, rnn"):
    recurrent.decoder(mixer="ltsm")


@pytest.mark.parametrize("mixer", ["lstm", "hybrid"])
def test_a_config_builds_one(mixer: str):
  """`config.model.mixer` is a key like any other; wrong sizes are told."""
  model = {"family": "recurrent", "dim": 24, "layers": 3, "heads": 4}
  config = ml_collections.ConfigDict({"seq_len": 8, "model": model})
  config.model.mixer = mixer
  assert build(config, 65).blocks[0].mixer.dim == 24
  config.model.heads = 5
  if mixer == "hybrid":
    with pytest.raises(UserError, match=r"heads=5 does not divide the 24"):
      build(config, 65)


def test_a_value_can_be_written_down():
  """Recurrent decoders survive JSON, as checkpoints need."""
  for model in DECODERS.values():
    assert from_json(to_json(model)) == model


def test_the_page_runs():
  """Every example of docs/recurrent.md, in order."""
  page = pathlib.Path(__file__).parents[1] / "docs" / "recurrent.md"
  blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
  names: dict = {}
  exec("\n".join(blocks), names)
  assert names["tokens"].shape == (1, 11)
