"""word2vec: a word is the company it keeps.

Mikolov et al., 2013 (arXiv:1301.3781, arXiv:1310.4546). Every word has a
vector, and every word beside it another. Skip-gram guesses the neighbours of a
word, CBOW a word from the mean of its neighbours; both tell true pairs from
pairs with words drawn at random (negative sampling):

    log s(u_c . v_w) + sum_k E log s(-u_n . v_w),   s(x) = 1 / (1 + exp(-x))

Levy and Goldberg (2014): where that is largest,

    u_c . v_w = PMI(w, c) - log k,   PMI = log p(w, c) / (p(w) p(c)),

so the vectors are a factorisation of a table of counts. Directions then mean
something: king - man + woman is near queen.

What it could not do: one vector for a word, whatever stands beside it. "Bank"
is one place between money and water. A word's meaning in its sentence needs
what looks at the sentence: attention.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ladder import adam, rung

Array = jax.Array
WINDOW, NEGATIVE, DIM = 2, 5, 32

# --- A language whose words differ by known features -------------------------

NOUNS = {  # (kind, gender, number)
  (kind, gender, number): f"{kind}{'_f' * gender}{'s' * number}"
  for kind in ("king", "actor", "waiter", "lion", "host", "heir", "uncle")
  for gender in (0, 1)
  for number in (0, 1)
}
PLACES = {
  "king": ("throne", "crown"),
  "actor": ("stage", "play"),
  "waiter": ("table", "soup"),
  "lion": ("savanna", "prey"),
  "host": ("party", "guest"),
  "heir": ("fortune", "lawyer"),
  "uncle": ("nephew", "visit"),
}


def sentence(rng: np.random.Generator) -> list[str]:
  """Each feature shows in a word of its own: number, gender, kind."""
  noun = list(NOUNS)[rng.integers(len(NOUNS))]
  kind, gender, number = noun
  verb = (("is", "has", "was"), ("are", "have", "were"))[number]
  own = (("his", "himself"), ("her", "herself"))[gender]
  around = [
    verb[rng.integers(3)],
    own[rng.integers(2)],
    PLACES[kind][rng.integers(2)],
  ]
  rng.shuffle(around)
  return [around[0], NOUNS[noun], around[1], around[2]]


def corpus(sentences: int, seed: int) -> tuple[np.ndarray, list[str]]:
  """Word numbers [sentences, 4], and the words."""
  rng = np.random.default_rng(seed)
  texts = [sentence(rng) for _ in range(sentences)]
  words = sorted({w for text in texts for w in text})
  index = {w: i for i, w in enumerate(words)}
  return np.array([[index[w] for w in text] for text in texts]), words


def pairs(texts: np.ndarray) -> np.ndarray:
  """(word, neighbour) [n, 2] within `WINDOW` places of each other."""
  size = texts.shape[1]
  near = [
    (i, j)
    for i, j in itertools.product(range(size), repeat=2)
    if 0 < abs(i - j) <= WINDOW
  ]
  return np.concatenate([texts[:, list(p)] for p in near])


# --- Training ---------------------------------------------------------------


def skip_gram(v: dict, word: Array, context: Array, noise: Array) -> Array:
  """-log likelihood of true and random pairs: [n], [n], [n, k] -> a mean."""
  w = v["words"][word]
  true = jnp.sum(w * v["contexts"][context], axis=-1)
  false = jnp.einsum("nd,nkd->nk", w, v["contexts"][noise])
  return -jnp.mean(
    jax.nn.log_sigmoid(true) + jnp.sum(jax.nn.log_sigmoid(-false), axis=-1)
  )


def cbow(v: dict, word: Array, context: Array, noise: Array) -> Array:
  """The same, where the mean of several contexts [n, c] asks for the word."""
  w = jnp.mean(v["words"][context], axis=1)
  true = jnp.sum(w * v["contexts"][word], axis=-1)
  false = jnp.einsum("nd,nkd->nk", w, v["contexts"][noise])
  return -jnp.mean(
    jax.nn.log_sigmoid(true) + jnp.sum(jax.nn.log_sigmoid(-false), axis=-1)
  )


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def train(
  loss, word: Array, context: Array, noise: Array, vocab: int, steps: int
) -> tuple[dict, Array]:
  """Vectors, and losses [steps]; by Adam, 1,024 examples at a time.

  Args:
    loss: `skip_gram` or `cbow`.
    word: [n].
    context: [n] or [n, c].
    noise: words as often as they occur, to draw from, [m].
    vocab: how many words there are.
    steps: of training.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  v = {
    name: 0.1 * jax.random.normal(key, (vocab, DIM), jnp.float32)
    for name, key in zip(("words", "contexts"), keys[:2], strict=True)
  }

  def step(state: tuple, t: Array) -> tuple:
    v, means = state
    key = jax.random.fold_in(keys[2], t.astype(jnp.int32))
    pick, drawn = jax.random.split(key)
    i = jax.random.randint(pick, (1024,), 0, len(word))
    k = jax.random.randint(drawn, (1024, NEGATIVE), 0, len(noise))
    value, g = jax.value_and_grad(loss)(v, word[i], context[i], noise[k])
    lr = 0.02 * (1.0 - t / (steps + 1.0))
    return adam.step(v, g, means, t, lr), value

  steps_from_1 = jnp.arange(1.0, steps + 1.0)
  (v, _), losses = jax.lax.scan(step, (v, adam.start(v)), steps_from_1)
  return v, losses


# --- What came of it --------------------------------------------------------


def analogies(vectors: np.ndarray, words: list[str]) -> tuple[int, int]:
  """A - b + c = d for nouns that differ in one feature: right, of how many.

  The nearest word by angle, the three given ones left out, as in the paper.
  """
  unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  index, right, total = {w: i for i, w in enumerate(words)}, 0, 0
  for (k1, g1, n1), (k2, g2, n2) in itertools.permutations(NOUNS, 2):
    for change in ((1, 0), (0, 1)):
      if k1 == k2 or (g1, n1) != (g2, n2):
        continue
      a, c = (k1, g1 ^ change[0], n1 ^ change[1]), (k2, g2, n2)
      d = (k2, g2 ^ change[0], n2 ^ change[1])
      ids = [index[NOUNS[x]] for x in (a, (k1, g1, n1), c, d)]
      score = unit @ (unit[ids[0]] - unit[ids[1]] + unit[ids[2]])
      score[ids[:3]] = -np.inf
      right += int(np.argmax(score) == ids[3])
      total += 1
  return right, total


def shifted_pmi(seen: np.ndarray, noise: np.ndarray, vocab: int) -> np.ndarray:
  """PMI(w, c) - log k of pairs that occur, else NaN; [vocab, vocab].

  p(c) is that of the noise, which is what the vectors are trained against.
  """
  count = np.zeros((vocab, vocab))
  np.add.at(count, tuple(seen.T), 1)
  of_word = count.sum(1, keepdims=True) / count.sum()
  of_noise = np.bincount(noise, minlength=vocab)[None] / len(noise)
  with np.errstate(divide="ignore"):
    pmi = np.log(count / count.sum() / (of_word * of_noise))
  return np.where(count > 0, pmi - np.log(NEGATIVE), np.nan)


def main(argv: list[str] | None = None) -> None:
  """Trains both ways, asks analogies, compares with counts."""
  flags = rung.parser(__doc__)
  flags.add_argument("--steps", type=int, default=1500)
  args = flags.parse_args(argv)
  texts, words = corpus(20_000, args.seed)
  seen, noise = pairs(texts), texts.ravel()
  v, _ = train(skip_gram, seen[:, 0], seen[:, 1], noise, len(words), args.steps)
  # Places 1 and 2 see three others each.
  around = np.concatenate([texts[:, [0, 2, 3]], texts[:, [0, 1, 3]]])
  middle = np.concatenate([texts[:, 1], texts[:, 2]])
  bag, _ = train(cbow, middle, around, noise, len(words), args.steps)
  for name, table in (
    ("skip-gram", v["words"]),
    ("CBOW", bag["contexts"]),
  ):
    right, total = analogies(np.asarray(table), words)
    print(f"{name}: {right} of {total} analogies ({right / total:.1%})")
  pmi = shifted_pmi(seen, noise, len(words))
  product = np.asarray(v["words"] @ v["contexts"].T)
  there = ~np.isnan(pmi)
  r = np.corrcoef(pmi[there], product[there])[0, 1]
  gap = np.abs(pmi - product)[there].mean()
  print(
    f"products against PMI - log {NEGATIVE}: r = {r:.3f}, mean gap {gap:.2f}"
  )
  draw(args.out, np.asarray(v["words"]), words, (pmi[there], product[there]))


def draw(out, vectors: np.ndarray, words: list[str], counts: tuple) -> None:
  """Nouns in the plane that shows most of them, and products against PMI."""
  page, (left, right) = rung.figure(2, size=(5.2, 4.2))
  index = {w: i for i, w in enumerate(words)}
  x = np.stack([vectors[index[w]] for w in NOUNS.values()])
  sides = [
    np.mean([s * x[i] for i, n in enumerate(NOUNS) for s in [2 * n[f] - 1]], 0)
    for f in (1, 2)
  ]
  plane = x @ np.stack(sides).T
  for i, (kind, gender, number) in enumerate(NOUNS):
    left.plot(*plane[i], "o", color=rung.COLORS[2 * number + gender])
    if kind == "king":
      left.annotate(NOUNS[kind, gender, number], plane[i], fontsize=8)
  left.set(xlabel="gender", ylabel="number", title="Two directions")
  right.plot(*counts, ".", alpha=0.5)
  ends = [counts[0].min(), counts[0].max()]
  right.plot(ends, ends, "--", color=rung.COLORS[5])
  right.set(xlabel="PMI - log k", ylabel="product of vectors")
  right.set_title("Vectors are counts")
  rung.save(page, out, "word2vec")


if __name__ == "__main__":
  rung.run(main)
