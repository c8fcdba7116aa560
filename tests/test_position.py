"""Positions against transformers: every scaling, partial rotation, ALiBi.

`golden/positions.npz` was made by golden/make_positions.py; see there for the
settings behind each name, which stand here again as values.
"""

import dataclasses
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxlm.errors import UserError
from jaxlm.layers.at import At
from jaxlm.layers.attention import Attention
from jaxlm.layers.cache import empty
from jaxlm.layers.param import init
from jaxlm.layers.position import (
  NTK,
  Alibi,
  Dynamic,
  Learned,
  Linear,
  Llama3,
  LongRope,
  Rope,
  Yarn,
  softmax_factor,
)
from jaxlm.values import from_json, to_json

FOLDER = pathlib.Path(__file__).parent
with np.load(FOLDER / "golden/positions.npz") as file:
  GOLDEN = dict(file)

X = jnp.asarray(GOLDEN["x"], jnp.float32)
ORIGINAL = 32
SHORT = tuple(1.0 + 0.05 * i for i in range(10))
LONG = tuple(1.0 + 1.5 * i for i in range(10))
LONGROPE = LongRope(SHORT, LONG, ORIGINAL, 8.0)
DYNAMIC = Dynamic(2.5, ORIGINAL)
DEEPSEEK = Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
CASES = {
  "default": Rope(),
  "linear": Rope(scaling=Linear(3.0)),
  "dynamic/20": Rope(scaling=DYNAMIC),
  "dynamic/32": Rope(scaling=DYNAMIC),
  "dynamic/33": Rope(scaling=DYNAMIC),
  "dynamic/100": Rope(scaling=DYNAMIC),
  "llama3": Rope(5e5, Llama3()),
  "yarn": Rope(scaling=Yarn(4.0, 64)),
  "yarn_whole": Rope(scaling=Yarn(4.0, 64, truncate=False)),
  "yarn_betas": Rope(scaling=Yarn(4.0, 64, 8.0, 0.5, attention_factor=0.9)),
  "yarn_short": Rope(scaling=Yarn(4.0, 6)),
  "yarn_gpt_oss": Rope(150000.0, Yarn(32.0, 4096, truncate=False)),
  "yarn_deepseek": Rope(scaling=DEEPSEEK),
  "yarn_mscale": Rope(scaling=Yarn(40.0, 4096, mscale=0.8, mscale_all_dim=0.3)),
  "longrope/32": Rope(scaling=LONGROPE),
  "longrope/33": Rope(scaling=LONGROPE),
  "longrope_told": Rope(
    scaling=LongRope(SHORT, LONG, ORIGINAL, attention_factor=1.25)
  ),
}
SCALINGS = [
  Linear(2.0),
  NTK(2.0),
  DYNAMIC,
  Llama3(2.0, original=64),
  Yarn(2.0, 64),
  LONGROPE,
]


def named(scaling) -> str:
  return type(scaling).__name__


def test_every_golden_case_is_tested():
  """A case that is made and never read proves nothing."""
  made = {key.removesuffix("/turned") for key in GOLDEN if "/turned" in key}
  assert made == set(CASES)


# --- Against transformers ---------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers(name: str):
  """Of a row of the golden length; 1e-6 is the judge's own rounding."""
  want = GOLDEN[f"{name}/frequencies"]
  places = jnp.asarray(GOLDEN[f"{name}/positions"])
  got = jax.jit(CASES[name].frequencies, static_argnums=0)(
    2 * len(want), places
  )
  np.testing.assert_allclose(got.reshape(-1), want, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_magnitude_equals_transformers(name: str):
  """What it multiplies cosines and sines by."""
  scaling = CASES[name].scaling
  got = 1.0 if scaling is None else scaling.magnitude
  np.testing.assert_allclose(got, GOLDEN[f"{name}/magnitude"], rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_turned_queries_equal_transformers(name: str):
  """The whole way: lengths found in the positions, magnitudes applied.

  Angles of up to 300 in float32 on either side: 2e-5 of each is rounding.
  """
  places = jnp.asarray(GOLDEN[f"{name}/positions"])
  want = GOLDEN[f"{name}/turned"]
  got = jax.jit(CASES[name])(X[..., : want.shape[-1]], places)
  np.testing.assert_allclose(got, want, atol=1e-4)
  mixed = dataclasses.replace(CASES[name], interleaved=True)
  order = np.arange(want.shape[-1]).reshape(2, -1).T.reshape(-1)
  got = mixed(X[..., : want.shape[-1]][..., order], places)
  np.testing.assert_allclose(got, want[..., order], atol=1e-4)


def test_ntk_equals_a_stretched_dynamic_rule():
  """There is no static NTK in transformers; its dynamic one passes by it."""
  got = Rope(scaling=NTK(6.0)).frequencies(20)
  np.testing.assert_allclose(got, GOLDEN["ntk/frequencies"], rtol=1e-6)


@pytest.mark.parametrize("layout", ["halves", "neighbours"])
@pytest.mark.parametrize(
  ("name", "head", "fraction"),
  [("quarter", 40, 0.25), ("half", 20, 0.5)],
)
def test_partial_rotation_equals_transformers(name, head, fraction, layout):
  """GPT-NeoX turns a quarter of each head; GPT-J's pairs are neighbours."""
  rope = Rope(fraction=fraction, interleaved=layout == "neighbours")
  got = rope(X[..., :head], jnp.asarray(GOLDEN["partial/positions"]))
  want = GOLDEN[f"partial/{name}/{layout}"]
  np.testing.assert_allclose(got, want, atol=3e-5)
  passed = int(head * fraction)
  np.testing.assert_array_equal(got[..., passed:], X[..., passed:head])


@pytest.mark.parametrize("interleaved", [False, True])
def test_reverse_undoes_the_rotation(interleaved: bool):
  """Turning by an angle and by its negative is the identity."""
  forth = Rope(fraction=0.5, interleaved=interleaved)
  back = dataclasses.replace(forth, reverse=True)
  where = jnp.arange(X.shape[1])
  assert not np.allclose(forth(X, where), X, atol=0.1)
  np.testing.assert_allclose(back(forth(X, where), where), X, atol=1e-5)


def test_alibi_slopes_equal_bloom():
  """For 1 to 40 heads, powers of two or not."""
  for heads in range(1, 41):
    want = GOLDEN["slopes"][heads - 1, :heads]
    np.testing.assert_allclose(Alibi().slopes(heads), want, rtol=1e-6)


@pytest.mark.parametrize("name", ["yarn", "yarn_deepseek", "yarn_mscale"])
def test_softmax_factor_equals_deepseek(name: str):
  """The square of what `mscale_all_dim` asks for, and one without it."""
  got = softmax_factor(CASES[name].scaling)
  np.testing.assert_allclose(got, GOLDEN[f"softmax/{name}"], rtol=1e-12)
  assert softmax_factor(None) == softmax_factor(Linear(4.0)) == 1.0


# --- Laws -------------------------------------------------------------------


@given(
  st.floats(1.0, 64.0), st.integers(2, 40), st.floats(1e2, 1e6), st.booleans()
)
def test_scaled_frequencies_lie_between(
  factor: float, pairs: int, theta: float, truncate: bool
):
  """No rule makes a wave shorter, or longer than `factor` times."""
  plain = np.asarray(Rope(theta).frequencies(2 * pairs))
  for scaling in (
    Linear(factor),
    NTK(factor),
    Llama3(factor),
    Yarn(factor, 512, truncate=truncate),
  ):
    freq = np.asarray(Rope(theta, scaling).frequencies(2 * pairs))
    assert (freq <= plain * (1 + 1e-6)).all(), scaling
    assert (freq >= plain / factor * (1 - 1e-6)).all(), scaling
    assert (np.diff(freq) < 0).all(), scaling


@given(st.floats(1.0, 64.0), st.integers(2, 40))
def test_ntk_keeps_the_fastest_and_divides_the_slowest(
  factor: float, pairs: int
):
  """As its docstring says."""
  plain = np.asarray(Rope().frequencies(2 * pairs))
  freq = np.asarray(Rope(scaling=NTK(factor)).frequencies(2 * pairs))
  assert freq[0] == plain[0]
  np.testing.assert_allclose(freq[-1], plain[-1] / factor, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 32, 33, 200])
@pytest.mark.parametrize("scaling", [DYNAMIC, LONGROPE], ids=named)
def test_fixed_is_the_rule_of_that_length(scaling, length: int):
  """Whatever the row at hand: a first token is turned as a last one."""
  row = jnp.arange(length)
  moving = Rope(scaling=scaling).frequencies(20, row)[0]
  settled = Rope(scaling=scaling.fixed(length))
  for other in (None, row, row[:1]):
    got = settled.frequencies(20, other).reshape(-1)
    np.testing.assert_allclose(got, moving, rtol=1e-6)
  assert scaling.fixed(length).magnitude == scaling.magnitude


@pytest.mark.parametrize("scaling", [DYNAMIC, LONGROPE], ids=named)
def test_rows_do_not_disturb_each_other(scaling):
  """A short row beside a long one is read as alone (transformers: not so)."""
  rope = Rope(scaling=scaling)
  x = jnp.stack([X[0, :, :, :20]] * 2)
  places = jnp.stack([jnp.arange(9), 100 + jnp.arange(9)])
  both = rope(x, places)
  for row in range(2):
    alone = rope(x[row : row + 1], places[row])
    np.testing.assert_allclose(both[row], alone[0], atol=1e-6)
  plain = Rope()(x[1:], places[1])
  assert not np.allclose(both[1:], plain, atol=1e-2)


@pytest.mark.parametrize("scaling", SCALINGS, ids=named)
def test_values_are_values(scaling):
  """Equal, hashable, written down and read back; dtypes stay."""
  rope = Rope(1e5, scaling, fraction=0.5, interleaved=True)
  assert from_json(to_json(rope)) == rope
  assert hash(dataclasses.replace(rope)) == hash(rope)
  x = X[..., :40].astype(jnp.bfloat16)
  assert rope(x, jnp.arange(9)).dtype == jnp.bfloat16


@pytest.mark.parametrize("scaling", SCALINGS, ids=named)
def test_one_program_serves_short_and_long_rows(scaling):
  """Which rule holds is decided by data: nothing is compiled again."""
  rope, traces = Rope(scaling=scaling), []

  @jax.jit
  def turn(x, places):
    traces.append(1)
    return rope(x, places)

  for start in (0, 500):
    places = jnp.arange(start, start + 9)
    want = rope(X[..., :20], places)
    np.testing.assert_allclose(turn(X[..., :20], places), want, atol=2e-4)
  assert len(traces) == 1


@pytest.mark.parametrize("scaling", SCALINGS, ids=named)
def test_rows_and_sequences_may_be_sharded(scaling):
  """The longest position is found across the devices of a row."""
  x = jax.random.normal(jax.random.key(0), (4, 6, 2, 20))
  places = 25 * jnp.arange(4)[:, None] + jnp.arange(6)[None]
  rope = Rope(scaling=scaling)
  want = rope(x, places)
  with jax.set_mesh(jax.make_mesh((4, 2), ("data", "seq"))):
    x, places = (jax.device_put(y, P("data", "seq")) for y in (x, places))
    got = jax.jit(rope)(x, places)
    assert got.sharding.spec[:2] == ("data", "seq")
  np.testing.assert_allclose(got, want, atol=3e-5)


# --- With a cache -----------------------------------------------------------


def attended(position: Rope, x, chunks: list[int] | None = None):
  """An attention layer's output on `x`, whole or by chunks into a cache."""
  layer = Attention(8, 2, head_dim=20, position=position)
  p = init(layer.params(), jax.random.key(0))
  if chunks is None:
    return layer(p, x)[0]
  cache, out = empty(layer.cache(1, x.shape[1])), []
  step = jax.jit(lambda x, at, cache: layer(p, x, at, cache))
  places = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
  for start, end in itertools.pairwise([0, *chunks]):
    y, cache = step(x[:, start:end], At(places[:, start:end]), cache)
    out.append(y)
  return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize(
  "scaling", [LongRope(SHORT, LONG, 8, 4.0), Dynamic(4.0, 8)], ids=named
)
def test_cached_keys_keep_the_rule_of_their_time(scaling):
  """So decoding equals the whole row to `original`, and beyond it if `fixed`.

  That a moving rule differs beyond it is a property of the rule, told in
  docs/positions.md; here it also shows that the comparison can fail.
  """
  x = jax.random.normal(jax.random.key(1), (1, 12, 8))
  moving, settled = Rope(scaling=scaling), Rope(scaling=scaling.fixed(12))
  chunks = [6, 7, 8, 9, 10, 11, 12]
  whole = attended(settled, x)
  np.testing.assert_allclose(attended(settled, x, chunks), whole, atol=1e-5)
  np.testing.assert_allclose(attended(moving, x), whole, atol=1e-5)
  got = attended(moving, x, chunks)
  short = attended(moving, x[:, :8])
  np.testing.assert_allclose(got[:, :8], short, atol=1e-5)
  assert float(jnp.abs(got - whole)[:, 8:].max()) > 1e-3


# --- Bad input --------------------------------------------------------------


def test_longrope_needs_a_divisor_for_every_pair():
  """Phi-3's are as many as its rotated pairs, not its features."""
  rope = Rope(scaling=LongRope(SHORT, LONG[:9], ORIGINAL))
  with pytest.raises(UserError, match=r"10 short and 9 long .* 10 pairs"):
    rope(X[..., :20], jnp.arange(9))


@pytest.mark.parametrize("fraction", [0.0, 0.45, 0.05, 1.5])
def test_features_turn_in_pairs(fraction: float):
  """An odd share, none and more than all are told, with what would do."""
  with pytest.raises(UserError, match="even, from 2 to 20"):
    Rope(fraction=fraction)(X[..., :20], jnp.arange(9))


def test_a_position_beyond_the_learned_ones_is_an_error():
  """Outside jit, where it is known; padding is negative and allowed."""
  table = Learned(6)
  p = init(table.params(4), jax.random.key(0))
  table(p, jnp.array([[-1, 0, 5]]), 4)
  with pytest.raises(UserError, match=r"position 6 is beyond the 6 .* \(0 to"):
    table(p, jnp.array([[-1, 0, 6]]), 4)


# --- The page ---------------------------------------------------------------


def test_examples_of_the_page(capsys):
  """Each block of docs/positions.md runs; what it prints is what it says."""
  page = FOLDER.parent / "docs" / "positions.md"
  blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
  assert len(blocks) == 5
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(page), "exec"), names)
    said = re.findall(r"^print\(.*\)  # (.*)$", block, re.M)
    assert capsys.readouterr().out.splitlines() == said
