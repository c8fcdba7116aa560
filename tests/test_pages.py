"""Pages of a shared pool: who owns them, and that sharing changes nothing."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB, random_params

from jaxlm.errors import UserError
from jaxlm.generate.decode import generate
from jaxlm.generate.pages import Pages, generate_paged, make_pool
from jaxlm.generate.prompts import pad_left
from jaxlm.generate.samplers import Sample
from jaxlm.layers.paged import Paged
from jaxlm.models.families import gpt2, llama, recurrent

SIZES = {"vocab": VOCAB, "dim": 16, "layers": 2, "heads": 2}
MODEL = llama.decoder(**SIZES, kv_heads=1, mlp_dim=24, max_positions=128)


def text(n: int, seed: int = 0) -> list[int]:
  return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


# --- Who owns what ----------------------------------------------------------


def test_rows_share_what_they_begin_with():
  """Full blocks only, and never the whole of a prompt."""
  pages = Pages.of(Paged(4, 12))
  prompt = text(10)
  pages, first, known = pages.allocate(prompt, 13)
  assert (len(first), known, pages.used) == (4, 0, 4)
  pages = pages.learn(prompt, first)
  pages, second, known = pages.allocate(prompt[:9] + text(4, 1), 13)
  assert second[:2] == first[:2]
  assert not set(second[2:]) & set(first)
  assert (known, pages.used) == (8, 6)
  _, third, known = pages.allocate(prompt[:8], 8)  # its last token is read
  assert third[:1] == first[:1]
  assert third[1] != first[1]
  assert known == 4
  other = [prompt[0] ^ 1, *prompt[1:]]
  assert pages.allocate(other, 10)[2] == 0  # equal blocks, another beginning


def test_blocks_are_known_after_they_are_freed():
  """Until the pool has no others: those left first are taken first."""
  pages = Pages.of(Paged(2, 4))
  prompt = text(5)
  pages, row, _ = pages.allocate(prompt, 6)
  pages = pages.learn(prompt, row).free(row)
  assert pages.used == 0
  again, same, known = pages.allocate(prompt, 6)
  assert (same[:2], known) == (row[:2], 4)
  with pytest.raises(UserError, match="use a larger pool"):
    again.allocate(text(4, 1), 4)
  pages, _, known = pages.allocate(text(8, 1), 8)  # takes them all
  assert (known, pages.known) == (0, {})
  with pytest.raises(UserError, match="free a row once"):
    pages.free(row).free(row).free(row)


ROWS = st.lists(
  st.tuples(st.booleans(), st.integers(0, 2), st.integers(1, 9)), max_size=25
)


@given(ROWS)
def test_books_are_kept(steps):
  """However rows come and go: uses are counted, idle ones are the rest.

  A block that two rows own holds the same tokens for both.
  """
  pages, rows = Pages.of(Paged(2, 10)), []
  for come, seed, length in steps:
    if come:
      prompt = text(length, seed)
      try:
        pages, row, known = pages.allocate(prompt, length + 1)
      except UserError:
        continue
      assert known < length
      pages = pages.learn(prompt, row)
      rows.append((prompt, row))
    elif rows:
      pages = pages.free(rows.pop(0)[1])
    counts, holds = [0] * 10, {}
    for prompt, row in rows:
      for i, b in enumerate(row):
        counts[b] += 1
        told = tuple(prompt[: 2 * (i + 1)]) if counts[b] > 1 else None
        assert told is None or holds[b] == told
        holds[b] = tuple(prompt[: 2 * (i + 1)])
    assert pages.uses == tuple(counts)
    assert sorted(pages.idle) == [b for b in range(10) if not counts[b]]
    assert len(set(pages.known.values())) == len(pages.known)


# --- Generation -------------------------------------------------------------


@pytest.mark.parametrize("kind", [Paged(16, 16), Paged(5, 60)])
def test_eight_rows_read_their_prefix_once(kind, monkeypatch):
  """64 tokens in common: what each says is what it says alone.

  40 blocks of 16 would be needed apart; 4 + 8 are, and the prefix is read by
  the first row only, in this call and in the next.
  """
  params, prefix = random_params(MODEL), text(64)
  rows = [prefix + text(3 + i % 3, i + 1) for i in range(8)]
  tokens, lengths = pad_left(rows)
  sampler, key = Sample(0.9), jax.random.key(1)
  want = generate(MODEL, params, tokens, 9, sampler, key, lengths=lengths)[
    :, -9:
  ]
  pool = make_pool(MODEL, 80, kind)
  peak, plan = [], Pages.free

  def free(pages, row):
    peak.append(pages.used)
    return plan(pages, row)

  monkeypatch.setattr(Pages, "free", free)
  for _ in range(2):
    found = generate_paged(MODEL, params, rows, 9, sampler, key, pool=pool)
    np.testing.assert_array_equal(found, want)
    assert pool.pages.used == 0
  shared = 64 // kind.block
  longest = [-(-(len(row) + 8) // kind.block) for row in rows]
  # Two rows may go on alike for another token, and share one block more.
  assert max(peak) <= shared + sum(n - shared for n in longest)
  assert max(peak) < sum(longest) / 2
  assert pool.pages.allocate(rows[3], 75)[2] >= 64 // kind.block * kind.block


def test_rows_end_and_positions_may_be_learned():
  """Another model, one row as the beginning of the other, an end of text."""
  model = gpt2.decoder(**SIZES, max_positions=64)
  params, rows = random_params(model), [text(9), text(9) + text(3, 1)]
  pool = make_pool(model, 32, Paged(4, 20))
  found = generate_paged(model, params, rows, 7, pool=pool, eot=3)
  tokens, lengths = pad_left(rows)
  want = generate(model, params, tokens, 7, lengths=lengths, eot=3)
  np.testing.assert_array_equal(found, want[:, -7:])
  assert generate_paged(model, params, rows, 0, pool=pool).shape == (2, 0)


def test_what_a_pool_cannot_do():
  """One sentence each; the pool is as it was."""
  params, pool = random_params(MODEL), make_pool(MODEL, 32, Paged(4, 10))
  rows = [text(20), text(21, 1)]
  with pytest.raises(UserError, match="idle; use a larger pool"):
    generate_paged(MODEL, params, rows, 3, pool=pool)
  assert pool.pages.used == 0
  assert generate_paged(MODEL, params, rows[:1], 3, pool=pool).shape == (1, 3)
  with pytest.raises(UserError, match=r"33 positions.*rows of 32"):
    generate_paged(MODEL, params, [text(30)], 4, pool=pool)
  with pytest.raises(UserError, match="needs a size"):
    make_pool(MODEL, 32, Paged(4))
  hybrid = recurrent.decoder(VOCAB, 16, 3, 2, window=4, max_positions=32)
  with pytest.raises(UserError, match="states as well"):
    make_pool(hybrid, 32, Paged(4, 10))
