"""A character RNN: text from a state that is carried along.

Mikolov et al., 2010; Graves, 2013 (arXiv:1308.0850); Karpathy's essay of 2015.
A text is cut into rows that are read side by side. Gradients reach back over
one window (truncated backpropagation through time, Williams and Peng, 1990),
but the state goes on into the next one, so what is remembered may be older than
any gradient.

LSTM against RNN is asked twice: with equal width, and with equal numbers of
parameters, each at its best of several learning rates. At one rate for all,
either may win.

What it could not do: every step waits for the one before, and all of the past
must fit into one vector. Attention has neither limit.
"""

import functools
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.ladder import adam, recurrent, rung
from jaxlm.ladder.bpe import read

Array = jax.Array
ROWS, WINDOW = 16, 32


@dataclass(frozen=True)
class Model:
  """A cell of some width between a table of characters and a head."""

  kind: str
  vocab: int
  hidden: int

  def fresh(self, key: Array) -> dict:
    """Arrays to begin with; the embedding is as wide as the cell."""
    keys, n = jax.random.split(key, 3), self.hidden
    scale = jnp.float32(n**-0.5)
    table, head = (
      jax.random.normal(k, shape, jnp.float32)
      for k, shape in ((keys[0], (self.vocab, n)), (keys[1], (n, self.vocab)))
    )
    p = recurrent.params(self.kind, n, n, keys[2])
    if self.kind == "lstm":  # gates that forget slowly, to begin with
      p = p | {"h_bias": p["h_bias"].at[n : 2 * n].add(1.0)}
    return {"table": table * scale, "cell": p, "head": head * scale}

  def size(self) -> int:
    """Number of parameters."""
    g, n = recurrent.GATES[self.kind], self.hidden
    return 2 * self.vocab * n + g * n * (2 * n + 2)

  def start(self, rows: int) -> tuple:
    """The state before a text."""
    return recurrent.start(self.kind, rows, self.hidden)

  def loss(self, p: dict, state: tuple, tokens: Array) -> tuple[Array, tuple]:
    """Mean nats per character of [rows, window + 1], and the last state."""
    h, state = recurrent.run(
      self.kind, p["cell"], state, p["table"][tokens[:, :-1]]
    )
    y = jax.nn.log_softmax(h @ p["head"])
    nll = -jnp.take_along_axis(y, tokens[:, 1:, None], -1)
    return jnp.mean(nll), state


def windows(data: np.ndarray, rows: int = ROWS) -> np.ndarray:
  """[windows, rows, WINDOW + 1]: row r goes on from window to window."""
  long = (len(data) - 1) // rows
  count = long // WINDOW
  if count < 1:
    raise UserError(
      f"{len(data)} characters are too few for {rows} rows of {WINDOW}; "
      "give a longer text"
    )
  start = np.arange(rows)[:, None] * long + np.arange(WINDOW + 1)[None]
  return np.stack([data[start + i * WINDOW] for i in range(count)])


@functools.partial(jax.jit, static_argnums=0)
def train(model: Model, p: dict, text: Array, lr: Array) -> tuple:
  """One pass over windows `[n, rows, WINDOW + 1]`.

  Adam with a rate that falls to zero; gradients clipped to norm one. The state
  that is carried is data to the next window: no gradient passes.

  Returns:
    Arrays, losses [n], and the norms of the gradients before clipping [n].
  """

  def step(carry: tuple, given: tuple) -> tuple:
    (p, means, state), (t, tokens) = carry, given
    grad_fn = jax.value_and_grad(model.loss, has_aux=True)
    (value, state), g = grad_fn(p, state, tokens)
    g, norm = recurrent.clip(g, 1.0)
    rate = lr * (1.0 - t / (len(text) + 1.0))
    p, means = adam.step(p, g, means, t, rate)
    return (p, means, state), (value, norm)

  times = jnp.arange(1.0, len(text) + 1.0)
  carry = (p, adam.start(p), model.start(text.shape[1]))
  (p, *_), (losses, norms) = jax.lax.scan(step, carry, (times, text))
  return p, losses, norms


@functools.partial(jax.jit, static_argnums=0)
def judge(model: Model, p: dict, text: Array) -> Array:
  """Mean nats per character, the state carried through."""

  def step(state: tuple, tokens: Array) -> tuple:
    value, state = model.loss(p, state, tokens)
    return state, value

  return jnp.mean(jax.lax.scan(step, model.start(text.shape[1]), text)[1])


@functools.partial(jax.jit, static_argnums=(0, 2))
def say(model: Model, p: dict, n: int, key: Array) -> Array:
  """`n` characters, each drawn from what the state suggests."""

  def step(carry: tuple, key: Array) -> tuple:
    state, token = carry
    state = recurrent.cell(model.kind, p["cell"], state, p["table"][token])
    token = jax.random.categorical(key, state[0] @ p["head"])
    return (state, token), token[0]

  first = model.start(1), jnp.zeros(1, jnp.int32)
  return jax.lax.scan(step, first, jax.random.split(key, n))[1]


def sweep(model: Model, text, held_out, rates: tuple, seeds: int) -> dict:
  """Held-out loss by rate: [seeds] of each."""
  found = {}
  for lr in rates:
    found[lr] = []
    for seed in range(seeds):
      p, _, _ = train(model, model.fresh(jax.random.key(seed)), text, lr)
      found[lr].append(float(judge(model, p, held_out)))
  return found


def main(argv: list[str] | None = None) -> None:
  """Sweeps three models, and lets the best one talk."""
  flags = rung.parser(__doc__)
  flags.add_argument("--text", help="a file; default: Python's documentation")
  flags.add_argument("--windows", type=int, default=400)
  flags.add_argument("--hidden", type=int, default=64)
  flags.add_argument("--seeds", type=int, default=1)
  args = flags.parse_args(argv)
  text, begin = read(args.text), time.perf_counter()
  chars = sorted(set(text))
  index = {c: i for i, c in enumerate(chars)}
  data = np.array([index[c] for c in text], np.int32)
  cut = len(data) * 9 // 10
  held_out = windows(data[cut:])[:100]
  train_text = windows(data[:cut])
  train_text = np.tile(train_text, (-(-args.windows // len(train_text)), 1, 1))[
    : args.windows
  ]
  lstm = Model("lstm", len(chars), args.hidden)
  equal = max(
    (Model("rnn", len(chars), n) for n in range(args.hidden, 4 * args.hidden)),
    key=lambda m: -abs(m.size() - lstm.size()),
  )
  models = {
    "LSTM": lstm,
    "RNN, equal width": Model("rnn", len(chars), args.hidden),
    "RNN, equal parameters": equal,
  }
  found, rates = {}, (3e-3, 1e-2, 3e-2)
  for name, model in models.items():
    found[name] = sweep(model, train_text, held_out, rates, args.seeds)
    shown = ", ".join(
      f"{lr:g}: {np.mean(v):.3f}" for lr, v in found[name].items()
    )
    print(f"{name}, {model.size():,} parameters; nats by rate: {shown}")
  best = {
    name: min(np.mean(v) for v in f.values()) for name, f in found.items()
  }
  for name in ("RNN, equal width", "RNN, equal parameters"):
    print(f"LSTM is better than {name} by {best[name] - best['LSTM']:.3f} nats")
  lr = min(rates, key=lambda lr: np.mean(found["LSTM"][lr]))
  p, losses, norms = train(
    lstm, lstm.fresh(jax.random.key(args.seed)), train_text, lr
  )
  ids = say(lstm, p, 120, jax.random.key(args.seed))
  print(f"it says: {''.join(chars[i] for i in np.asarray(ids))!r}")
  cuts = float(np.mean(np.asarray(norms) > 1.0))
  print(
    f"clipped: {cuts:.0%} of the steps; {time.perf_counter() - begin:.0f} s"
  )
  draw(args.out, np.asarray(losses), np.asarray(norms), found)


def draw(out, losses: np.ndarray, norms: np.ndarray, found: dict) -> None:
  """Loss and gradient norm by window, and loss by rate."""
  page, (left, middle, right) = rung.figure(3)
  left.plot(losses)
  left.set(xlabel="window", ylabel="nats a character", title="LSTM")
  middle.semilogy(norms)
  middle.axhline(1.0, ls="--", color=rung.COLORS[5])
  middle.set(xlabel="window", title="Gradient norm; clipped at 1")
  for name, by_rate in found.items():
    means = [np.mean(v) for v in by_rate.values()]
    right.semilogx(list(by_rate), means, "o-", label=name)
  right.set(xlabel="learning rate", ylabel="held-out nats", title="By rate")
  right.legend(frameon=False, fontsize=8)
  rung.save(page, out, "charrnn")


if __name__ == "__main__":
  rung.run(main)
