"""BabyGPT: the whole model and its training on one page.

Vaswani et al., "Attention is all you need", 2017 (arXiv:1706.03762); Radford
et al., GPT, 2018. Two ideas in turn, each added to what was there before:
attention moves information between places, a small network works at each.

    x = tokens + positions
    x = x + attention(norm(x))      and again, for every layer
    x = x + mlp(norm(x))
    p(next) = softmax(head(norm(x)))

The parameters are declared as everywhere in jaxlm (`layers.param`), by the
names of `jaxlm.models.decoder.Decoder`: the same arrays in that model give the
same logits, and a test holds it.

What it could not do: no cache, so each new token reads the whole text again;
one device, one precision, no dropout, a text of characters; a crash loses it.
That is the main job: `python -m jaxlm.train --config=configs/tiny.py`.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.ladder import rung
from jaxlm.layers.param import ONES, FanIn, Normal, Param, count, init, stack

Array = jax.Array

# --- The model --------------------------------------------------------------


def declare(vocab: int, dim: int, layers: int, heads: int, length: int) -> dict:
  """Every array: its shape, what each dimension means, how it starts."""
  scale = {"scale": Param((dim,), ("embed",), 0, ONES)}
  inwards = Param(
    (dim, heads, dim // heads), ("embed", "heads", "head_dim"), 1, FanIn()
  )
  outwards = Param(
    (heads, dim // heads, dim), ("heads", "head_dim", "embed"), 2, FanIn()
  )
  block = {
    "mixer_norm": scale,
    "mixer": {"q": inwards, "k": inwards, "v": inwards, "o": outwards},
    "ffn_norm": scale,
    "ffn": {
      "up": Param((dim, 4 * dim), ("embed", "mlp"), 1, FanIn()),
      "down": Param((4 * dim, dim), ("mlp", "embed"), 1, FanIn()),
    },
  }
  table = Param((vocab, dim), ("vocab", "embed"), 1, Normal(0.02))
  places = Param((length, dim), ("positions", "embed"), 1, Normal(0.02))
  return {
    "embed": {"tokens": table, "positions": {"table": places}},
    "layers": {"0": {"0": stack(block, layers)}},
    "norm": scale,
    "head": Param((dim, vocab), ("embed", "vocab"), 1, FanIn()),
  }


def norm(p: dict, x: Array) -> Array:
  """Every row of size one, times a learned scale."""
  size = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(size + 1e-6) * p["scale"][None, None]


def attention(p: dict, x: Array) -> Array:
  """Each place asks (q) all places up to its own (k) for what they know (v)."""
  q, k, v = (jnp.einsum("btd,dnh->bnth", x, p[name]) for name in "qkv")
  scores = jnp.einsum("bnth,bnsh->bnts", q, k) * q.shape[-1] ** -0.5
  past = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
  weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)
  y = jnp.einsum("bnts,bnsh->bnth", weights, v)
  return jnp.einsum("bnth,nhd->btd", y, p["o"])


def mlp(p: dict, x: Array) -> Array:
  """Four times as wide, the square of what is positive, and back."""
  return jnp.square(jax.nn.relu(x @ p["up"])) @ p["down"]


def logits(params: dict, tokens: Array) -> Array:
  """Scores of the next token, [batch, seq, vocab], of tokens [batch, seq]."""
  table = params["embed"]["positions"]["table"]
  x = params["embed"]["tokens"][tokens] + table[None, : tokens.shape[1]]

  def block(x: Array, p: dict) -> tuple[Array, None]:
    x = x + attention(p["mixer"], norm(p["mixer_norm"], x))
    return x + mlp(p["ffn"], norm(p["ffn_norm"], x)), None

  x, _ = jax.lax.scan(block, x, params["layers"]["0"]["0"])
  return norm(params["norm"], x) @ params["head"]


# --- Training ---------------------------------------------------------------


def loss(params: dict, tokens: Array) -> Array:
  """Mean of -log p(token | those before it), tokens [batch, seq + 1]."""
  y = jax.nn.log_softmax(logits(params, tokens[:, :-1]))
  picked = jnp.take_along_axis(y, tokens[:, 1:, None], axis=-1)
  return -jnp.mean(picked)


@jax.jit
def step(state: tuple, tokens: Array, lr: Array) -> tuple[tuple, Array]:
  """One step of Adam: state is (params, mean, mean square, steps)."""
  params, m, v, t = state
  value, g = jax.value_and_grad(loss)(params, tokens)
  t = t + 1.0
  m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
  v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, v, g)

  def move(p: Array, m: Array, v: Array) -> Array:
    size = jnp.sqrt(v / (1 - 0.99**t)) + 1e-8
    return p - lr * (m / (1 - 0.9**t)) / size

  return (jax.tree.map(move, params, m, v), m, v, t), value


@jax.jit
def say(params: dict, tokens: Array, key: Array) -> Array:
  """Draws one more token for every place; the caller keeps the last."""
  return jax.random.categorical(key, logits(params, tokens))


def main(argv: list[str] | None = None) -> None:
  """Trains on characters of Python's documentation, and talks."""
  flags = rung.parser(__doc__)
  flags.add_argument("--steps", type=int, default=300)
  args = flags.parse_args(argv)
  from pydoc_data.topics import topics

  text, length, rng = "\n".join(topics.values()), 64, np.random.default_rng(0)
  if args.steps < 1:
    raise UserError(f"--steps={args.steps}; give 1 or more")
  chars = sorted(set(text))
  data = np.array([chars.index(c) for c in text], np.int32)
  tree = declare(len(chars), 96, 3, 4, length)
  params = init(tree, jax.random.key(args.seed))
  zeros = jax.tree.map(jnp.zeros_like, params)
  state, losses, begin = (params, zeros, zeros, 0.0), [], time.perf_counter()
  for i in range(args.steps):
    starts = rng.integers(0, len(data) - length - 1, (16, 1))
    lr = 5e-3 * min((i + 1) / 20, 1 - i / args.steps)
    state, value = step(state, data[starts + np.arange(length + 1)], lr)
    losses.append(value)
  losses = np.array(losses)
  print(f"{count(tree):,} parameters, {time.perf_counter() - begin:.0f} s")
  print(f"loss {losses[0]:.3f} (ln {len(chars)} = {np.log(len(chars)):.3f})")
  print(f"loss {losses[-20:].mean():.3f} nats a character at the end")
  print(f"it says: {talk(state[0], chars, args.seed)!r}")
  print("next: python -m jaxlm.train --config=configs/tiny.py")
  draw(args.out, losses, len(chars))


def talk(params: dict, chars: list[str], seed: int) -> str:
  """A hundred characters, each drawn from what the text before it suggests."""
  ids, key = [chars.index("\n")] * 64, jax.random.key(seed)
  for i in range(100):
    window = jnp.array([ids[-64:]], jnp.int32)
    drawn = say(params, window, jax.random.fold_in(key, i))
    ids.append(int(drawn[0, -1]))
  return "".join(chars[i] for i in ids[64:])


def draw(out, losses: np.ndarray, vocab: int) -> None:
  """The loss."""
  page, (ax,) = rung.figure(1)
  ax.plot(losses)
  ax.axhline(np.log(vocab), ls="--", color=rung.COLORS[5])
  ax.set(xlabel="step", ylabel="nats a character", title="BabyGPT")
  rung.save(page, out, "babygpt")


if __name__ == "__main__":
  rung.run(main)
