"""Beam search against transformers, and diverse groups against a plain loop."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.generate.beam import Beam, beam_search, best
from jaxlm.generate.decode import generate
from jaxlm.models import hub
from jaxlm.models.decoder import forward

FOLDER = Path(__file__).parent / "golden"
GOLDEN = dict(np.load(FOLDER / "beam.npz"))
NEW = 9

# As in golden/make_beam.py.
CASES = [
  Beam(k, p, e)
  for k in (1, 2, 3, 5)
  for p in (1.0, 0.0, -0.7, 2.0)
  for e in (False, True, "never")
]
ENDS = [(), (7,), (7, 20, 31), tuple(range(0, 61, 5))]


@functools.cache
def model_and_params():
  """The tiny GPT-2 of the golden file, its logits three times as large."""
  with np.load(FOLDER / "families_gpt2.npz") as file:
    config = json.loads(str(file["config"]))
    weights = {
      k.removeprefix("weight/"): v.astype(np.float32)
      for k, v in file.items()
      if k.startswith("weight/")
    }
  found = hub.find(config)
  model = found.read(config)
  params = jax.tree.map(jnp.asarray, found.names.load(model, weights))
  params["norm"] = jax.tree.map(lambda x: 3 * x, params["norm"])
  return model, params


# Every number of beams, penalty and rule of stopping, every set of ends.
PAIRS = [(0, 1), (12, 0), (16, 3), (19, 2), (26, 3), (28, 1), (33, 3), (47, 2)]


@pytest.mark.parametrize(("case", "ends"), PAIRS)
def test_beams_equal_transformers(case: int, ends: int):
  """All texts of four prompts, in order, with their scores."""
  model, params = model_and_params()
  beam = CASES[case]
  found = beam_search(
    model, params, GOLDEN["prompts"], NEW, beam, eot=ENDS[ends] or None
  )
  want = GOLDEN[f"{case} {ends} tokens"].reshape(4, beam.beams, NEW)
  for end in ENDS[ends]:  # behind its end, a text is what it is filled with
    after = np.cumsum(want == end, axis=-1) - (want == end) > 0
    want = np.where(after, 60, want)
  got = found.tokens
  for end in ENDS[ends]:
    after = np.cumsum(got == end, axis=-1) - (got == end) > 0
    got = np.where(after, 60, got)
  np.testing.assert_array_equal(got, want)
  if beam.beams > 1:
    scores = GOLDEN[f"{case} {ends} scores"].reshape(4, -1)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


def test_one_beam_is_greedy():
  """The likeliest token every time, to the end of a text."""
  model, params = model_and_params()
  found = beam_search(model, params, GOLDEN["prompts"], NEW, Beam(1), eot=7)
  greedy = generate(model, params, GOLDEN["prompts"], NEW, eot=7)
  np.testing.assert_array_equal(found.tokens[:, 0], greedy[:, 5:])


def test_unequal_prompts_do_not_disturb_each_other():
  """A padded row finds what it finds alone."""
  model, params = model_and_params()
  tokens = np.asarray(GOLDEN["prompts"][:2])
  both = beam_search(model, params, tokens, 5, Beam(3), lengths=[5, 3])
  alone = beam_search(model, params, tokens[1:, 2:], 5, Beam(3))
  np.testing.assert_array_equal(both.tokens[1:], alone.tokens)
  np.testing.assert_allclose(both.scores[1:], alone.scores, rtol=1e-5)


def diverse(model, params, prompt, beam: Beam, n: int):
  """Diverse beam search of one prompt by the paper's equation, whole passes."""
  k = beam.beams // beam.groups
  groups = [[((), 0.0)] for _ in range(beam.groups)]
  for _ in range(n):
    taken = np.zeros(model.vocab)
    for g, texts in enumerate(groups):
      rows = np.array([[*prompt, *text] for text, _ in texts], np.int32)
      y = forward(model, params, jnp.asarray(rows))[:, -1]
      y = np.asarray(jax.nn.log_softmax(y)) - beam.diversity * taken
      total = y + np.array([score for _, score in texts])[:, None]
      order = np.argsort(-total, axis=None, kind="stable")[:k]
      rows, tokens = np.unravel_index(order, total.shape)
      groups[g] = [
        ((*texts[r][0], int(t)), total[r, t])
        for r, t in zip(rows, tokens, strict=True)
      ]
      for t in tokens:
        taken[t] += 1
  found = [pair for texts in groups for pair in texts]
  return sorted(found, key=lambda pair: -pair[1])


def test_diverse_groups_follow_their_equation():
  """Three groups of two beams, five tokens, without ends."""
  model, params = model_and_params()
  beam = Beam(6, length_penalty=0.0, groups=3, diversity=0.7)
  prompts = GOLDEN["prompts"][:1]
  found = beam_search(model, params, prompts, 5, beam)
  want = diverse(model, params, prompts[0], beam, 5)
  np.testing.assert_allclose(
    found.scores[0], [score for _, score in want], rtol=1e-4
  )
  assert {tuple(t) for t in found.tokens[0].tolist()} == {t for t, _ in want}
  plain = beam_search(model, params, prompts, 5, Beam(6, 0.0))
  assert variety(plain.tokens[0]) < variety(found.tokens[0])


def variety(tokens: np.ndarray) -> int:
  """Different tokens in the same place, summed over places."""
  return sum(len(set(column)) for column in tokens.T.tolist())


def test_best_ranks_candidates_and_tokens_together():
  """By hand: 2 candidates, 3 tokens."""
  scores = jnp.array([[[0.1, 0.5, 0.2], [0.9, 0.0, 0.4]]])
  top, which, token = best(scores, 3)
  np.testing.assert_allclose(top, [[0.9, 0.5, 0.4]])
  assert (which.tolist(), token.tolist()) == ([[1, 0, 1]], [[0, 1, 2]])


def test_values_that_make_no_sense():
  """Beams that do not divide, an unknown rule, nothing to find."""
  model, params = model_and_params()
  with pytest.raises(UserError, match="do not divide"):
    Beam(5, groups=2)
  with pytest.raises(UserError, match="early_stopping"):
    Beam(2, early_stopping="soon")
  with pytest.raises(UserError, match="max_new_tokens"):
    beam_search(model, params, GOLDEN["prompts"], 0)
