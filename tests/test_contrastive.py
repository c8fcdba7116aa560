"""Contrastive search against its equation on whole forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MODELS, random_params, random_tokens

from jaxlm.errors import UserError
from jaxlm.generate.contrastive import Contrastive, contrastive
from jaxlm.generate.decode import generate
from jaxlm.models.decoder import forward, hidden


def by_equation(model, params, prompt, n: int, how: Contrastive) -> list:
  """One text; every candidate is read with all that stands before it."""
  text = list(prompt)
  for _ in range(n):
    row = jnp.asarray([text], jnp.int32)
    probs = np.asarray(jax.nn.softmax(forward(model, params, row)[0, -1]))
    values = {}
    for v in np.argsort(-probs, kind="stable")[: how.k]:
      row = jnp.asarray([[*text, v]], jnp.int32)
      h = np.asarray(hidden(model, params, row)[0][0], np.float64)
      h = h / np.linalg.norm(h, axis=1, keepdims=True)
      alike = (h[:-1] @ h[-1]).max()
      values[int(v)] = (1 - how.alpha) * probs[v] - how.alpha * alike
    text.append(max(values, key=values.get))
  return text[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "local"])
def test_it_is_its_equation(name: str):
  """Two prompts of unequal lengths, one of them padded."""
  model, how = MODELS[name], Contrastive(3, 0.5)
  params, tokens = random_params(model), np.array(random_tokens(2, 6))
  found = contrastive(model, params, tokens, 5, how, lengths=[6, 4])
  for row, length, got in zip(tokens, (6, 4), found, strict=True):
    want = by_equation(model, params, row[6 - length :], 5, how)
    assert got.tolist() == want


def test_without_a_penalty_it_is_greedy():
  """And what ends a text ends it."""
  model = MODELS["llama"]
  params, tokens = random_params(model), random_tokens(2, 5)
  greedy = np.asarray(generate(model, params, tokens, 8))[:, 5:]
  found = contrastive(model, params, tokens, 8, Contrastive(4, 0.0))
  np.testing.assert_array_equal(found, greedy)
  end = int(greedy[0, 2])
  found = contrastive(model, params, tokens, 8, Contrastive(4, 0.0), eot=end)
  want = np.asarray(generate(model, params, tokens, 8, eot=end))[:, 5:]
  np.testing.assert_array_equal(found, want)


def test_shares_are_shares():
  """One sentence for a weight that is none."""
  with pytest.raises(UserError, match="alpha a share"):
    Contrastive(4, 1.5)
