"""Spike skipping and QK clip, by closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.errors import UserError
from jaxlm.layers.param import Param, stack
from jaxlm.optim import Optimizer, make, qk_clip, skip_spikes

# --- Spikes -----------------------------------------------------------------


def walk(norms, factor=3.0, window=4):
  """Parameters and state after each gradient of the given norms."""
  tx = skip_spikes(optax.sgd(1.0, momentum=0.5), factor, window)
  params = jnp.zeros(1)
  state = tx.init(params)
  update = jax.jit(tx.update)
  history = []
  for norm in norms:
    g = jnp.full(1, norm, jnp.float32)
    updates, state = update(g, state, params, grad_norm=g[0])
    params = optax.apply_updates(params, updates)
    history.append(float(params[0]))
  return history, state


def test_without_spikes_nothing_changes():
  """The guarded optimizer walks where the bare one does."""
  got, state = walk([1, 2, 1, 2, 1, 2])
  v = w = 0.0
  for i, norm in enumerate([1, 2, 1, 2, 1, 2]):
    v = 0.5 * v + norm
    w -= v
    assert got[i] == pytest.approx(w)
  assert int(state.skipped) == 0


def test_spike_changes_neither_weights_nor_momentum():
  """The step after the spike is as if the spike had not been."""
  with_spike, state = walk([1, 1, 1, 1, 100, 1])
  without, _ = walk([1, 1, 1, 1, 1])
  assert with_spike[4] == with_spike[3]
  assert with_spike[5] == pytest.approx(without[4])
  assert int(state.skipped) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_skipped_from_the_first_step(bad):
  """No memory is needed to know that NaN is wrong, and none of it stays."""
  got, state = walk([bad, 1, 1])
  assert got[0] == 0
  assert got[1] == -1
  assert np.isfinite(got).all()
  assert int(state.skipped) == 1
  assert float(jnp.nanmax(state.recent)) == 1


def test_a_lasting_rise_is_accepted():
  """A new level ten times higher is refused for a while, not for ever."""
  got, state = walk([1] * 4 + [10] * 12)
  assert 1 <= int(state.skipped) <= 8
  assert got[-1] < got[-2]


def test_warmup_takes_anything_finite():
  """Before the window is full nobody knows what is usual."""
  got, state = walk([1, 1000, 1])
  assert got[1] < -1000
  assert int(state.skipped) == 0


def test_spike_guard_watches_the_loss_too():
  """`watch='value'` looks at the loss; a missing measurement is a defect."""
  tx = skip_spikes(optax.sgd(1.0), 2.0, 1, watch="value")
  params = jnp.zeros(1)
  state = tx.init(params)
  _, state = tx.update(params + 1, state, params, value=jnp.float32(1.0))
  updates, _ = tx.update(params + 1, state, params, value=jnp.float32(3.0))
  assert float(updates[0]) == 0
  with pytest.raises(ValueError, match="value"):
    tx.update(params, state, params, grad_norm=1.0)
  with pytest.raises(UserError, match="factor above 1"):
    skip_spikes(optax.sgd(1.0), 1.0)


# --- QK clip ----------------------------------------------------------------

DIM, HEADS, GROUPS, WIDTH, LAYERS = 6, 4, 2, 3, 2
ATTENTION = {
  "q": Param((DIM, HEADS, WIDTH), ("embed", "heads", "head_dim")),
  "k": Param((DIM, GROUPS, WIDTH), ("embed", "kv_heads", "head_dim")),
  "q_bias": Param((HEADS, WIDTH), ("heads", "head_dim"), 0),
  "k_bias": Param((GROUPS, WIDTH), ("kv_heads", "head_dim"), 0),
  "o": Param((HEADS, WIDTH, DIM), ("heads", "head_dim", "embed"), 2),
}
TREE = {"layers": {"0": {"mixer": stack(ATTENTION, LAYERS)}}}
X = jax.random.normal(jax.random.key(5), (20, DIM))


def max_logits(params):
  """Largest x W_q (x W_k)' of each layer and head, keys shared by groups."""
  p = params["layers"]["0"]["mixer"]
  q = jnp.einsum("td,ldnh->ltnh", X, p["q"]) + p["q_bias"][:, None]
  k = jnp.einsum("td,ldnh->ltnh", X, p["k"]) + p["k_bias"][:, None]
  k = jnp.repeat(k, HEADS // GROUPS, axis=2)
  return jnp.einsum("ltnh,lsnh->lnts", q, k).max((-2, -1))


def random_params(seed=0):
  leaves, treedef = jax.tree.flatten(
    TREE, is_leaf=lambda x: isinstance(x, Param)
  )
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return treedef.unflatten(
    [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
  )


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_clipped_heads_reach_tau_and_the_others_stay(alpha):
  """Logits scale by γ exactly: min(old, tau), with biases and shared keys."""
  params = random_params()
  old = max_logits(params)
  tau = float(jnp.median(old))
  assert (old > tau).any()
  assert (old < tau).any()
  tx = qk_clip(TREE, tau, alpha)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(tx.update)(
    zeros, tx.init(params), params, max_logits={"layers/0/mixer": old}
  )
  new = max_logits(optax.apply_updates(params, updates))
  np.testing.assert_allclose(new, jnp.minimum(old, tau), rtol=1e-5)
  assert not updates["layers"]["0"]["mixer"]["o"].any()


def test_without_shared_keys_each_side_takes_its_power():
  """One key head per query head: weights shrink by γᵅ and γ¹⁻ᵅ."""
  tree = {
    "q": Param((DIM, HEADS, WIDTH), ("embed", "heads", "head_dim")),
    "k": Param((DIM, HEADS, WIDTH), ("embed", "kv_heads", "head_dim")),
  }
  params = {n: jnp.ones(p.shape) for n, p in tree.items()}
  step = {n: jnp.full(p.shape, 0.5) for n, p in tree.items()}
  tx = qk_clip(tree, 100.0, alpha=0.25)
  peak = jnp.array([50.0, 100.0, 200.0, 1600.0])
  updates, _ = tx.update(step, tx.init(params), params, max_logits={"": peak})
  new = optax.apply_updates(params, updates)
  gamma = jnp.array([1.0, 1.0, 1 / 2, 1 / 16])
  np.testing.assert_allclose(new["q"][0, :, 0], 1.5 * gamma**0.25, rtol=1e-6)
  np.testing.assert_allclose(new["k"][0, :, 0], 1.5 * gamma**0.75, rtol=1e-6)


def test_optimizer_chains_the_clip():
  """`Optimizer(qk_clip=...)` clips what its own update has moved."""
  params = random_params()
  grads = random_params(1)
  o = Optimizer("muon", clip_norm=0)
  plain, clipped = (
    make(TREE, 0.1, o),
    make(TREE, 0.1, Optimizer("muon", clip_norm=0, qk_clip=1.0)),
  )
  a, _ = plain.update(grads, plain.init(params), params)
  peak = jnp.full((LAYERS, HEADS), 4.0)
  b, _ = clipped.update(
    grads, clipped.init(params), params, max_logits={"layers/0/mixer": peak}
  )
  a, b = (
    optax.apply_updates(params, x)["layers"]["0"]["mixer"] for x in (a, b)
  )
  np.testing.assert_allclose(b["q"], a["q"] / 2, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(b["k"], a["k"] / 2, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(b["o"], a["o"])
  with pytest.raises(ValueError, match="max_logits"):
    clipped.update(grads, clipped.init(params), params)


def test_normalised_queries_are_refused():
  """Scaling weights before a norm does nothing: say so instead."""
  tree = {"mixer": {**ATTENTION, "q_norm": Param((WIDTH,), ("head_dim",), 0)}}
  with pytest.raises(UserError, match="normalises"):
    qk_clip(tree, 100.0)
