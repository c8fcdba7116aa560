"""Byte pair encoding: the tokens a text suggests by itself.

Gage, "A new algorithm for data compression", 1994, brought to language models
by Sennrich, Haddow and Birch (arXiv:1508.07909) and to bytes by GPT-2 (2019).
Begin with the 256 bytes. Again and again, join the pair of neighbours that
occurs most often into one new token:

    (a, b) = argmax count(a, b);   a b  ->  ab

To read a new text, do the same joins in the same order.

Words come first: GPT-2 cuts a text into words with their space before them,
and no token reaches over a cut. The pattern for that speaks of letters and
numbers of all scripts, which Python's `re` cannot name, so `split` replaces
each character by its kind and matches the kinds.

What it could not do: it counts, and knows nothing of meaning. The same word
has other tokens after a space, in capitals or with a typing error; digits fall
apart by chance; and the model sees numbers, never letters. What a token means
is for the embedding to learn.
"""

import itertools
import re
import time
import unicodedata
from collections import Counter, defaultdict

import numpy as np

from jaxlm.errors import UserError
from jaxlm.ladder import rung

Pair = tuple[int, int]

# GPT-2 gives every byte a character that can be seen; byte-level tokenizers
# number the bytes in the order of those characters.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [*SEEN, *(b for b in range(256) if b not in SEEN)]
RANK = {byte: rank for rank, byte in enumerate(BYTES)}

# --- Words ------------------------------------------------------------------

# 's 't 're 've 'm 'll 'd; a space and letters, numbers or signs; white space,
# of which the last one goes to the word behind it.
PATTERN = re.compile(
  r"'(?:[stmd]|re|ve|ll)| ?[Lstrevmld]+| ?N+| ?[P']+|[ w]+(?![^ w])|[ w]+"
)
WHITE = "\t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
  map(chr, range(0x2000, 0x200B))
)


class Kinds(dict):
  """Each character's kind, looked up when it is first seen."""

  def __missing__(self, code: int) -> str:
    """L for letters, N numbers, w white space, P all else; some themselves."""
    char = chr(code)
    if char in " 'strevmld":
      kind = char
    elif char in WHITE:
      kind = "w"
    else:
      kind = {"L": "L", "N": "N"}.get(unicodedata.category(char)[0], "P")
    self[code] = kind
    return kind


KINDS = Kinds()


def split(text: str) -> list[str]:
  """The words of a text; joined they are the text."""
  kinds = text.translate(KINDS)
  return [text[m.start() : m.end()] for m in PATTERN.finditer(kinds)]


# --- Training ---------------------------------------------------------------


def train(text: str, vocab: int, least: int = 2) -> list[Pair]:
  """The joins that `text` suggests, in order.

  A pair's count is kept up to date word by word, so a join costs only the
  words that contain it. Of pairs that occur equally often, the one of lowest
  numbers comes first.

  Args:
    text: what to count.
    vocab: number of tokens, the 256 bytes among them.
    least: pairs that occur less often are not joined.

  Returns:
    Pairs of token numbers; the i-th makes token 256 + i.
  """
  if vocab < 256:
    raise UserError(f"vocab={vocab}; there are 256 bytes already, give more")
  counted = Counter(split(text)).items()
  words = [[RANK[b] for b in word.encode()] for word, _ in counted]
  times = [n for _, n in counted]
  counts, places = Counter(), defaultdict(set)
  for i, word in enumerate(words):
    for pair in itertools.pairwise(word):
      counts[pair] += times[i]
      places[pair].add(i)
  merges = []
  while len(merges) < vocab - 256 and counts:
    best = max(counts, key=lambda p: (counts[p], (-p[0], -p[1])))
    if counts[best] < least:
      break
    new = 256 + len(merges)
    merges.append(best)
    for i in places.pop(best):
      for pair in zip(words[i], words[i][1:], strict=False):
        counts[pair] -= times[i]
      words[i] = join(words[i], best, new)
      for pair in zip(words[i], words[i][1:], strict=False):
        counts[pair] += times[i]
        places[pair].add(i)
    del counts[best]
  return merges


def join(word: list[int], pair: Pair, new: int) -> list[int]:
  """`word` with every `pair` in it, from the left, replaced by `new`."""
  out, i = [], 0
  while i < len(word):
    found = i + 1 < len(word) and (word[i], word[i + 1]) == pair
    out.append(new if found else word[i])
    i += 2 if found else 1
  return out


# --- Use --------------------------------------------------------------------


def encode(text: str, merges: list[Pair]) -> list[int]:
  """Token numbers of `text`: in each word, the earliest join first."""
  order = {pair: i for i, pair in enumerate(merges)}
  known, out = {}, []
  for word in split(text):
    if word not in known:
      ids = [RANK[b] for b in word.encode()]
      while len(ids) > 1:
        pairs = itertools.pairwise(ids)
        first = min(order.get(pair, len(merges)) for pair in pairs)
        if first == len(merges):
          break
        ids = join(ids, merges[first], 256 + first)
      known[word] = ids
    out += known[word]
  return out


def spelling(merges: list[Pair]) -> list[bytes]:
  """The bytes of every token, [256 + joins]."""
  tokens = [bytes([b]) for b in BYTES]
  for a, b in merges:
    tokens.append(tokens[a] + tokens[b])
  return tokens


def decode(ids: list[int], merges: list[Pair]) -> str:
  """The text of token numbers; broken characters become U+FFFD."""
  tokens = spelling(merges)
  return b"".join(tokens[i] for i in ids).decode(errors="replace")


def main(argv: list[str] | None = None) -> None:
  """Trains on a text, shows the tokens, and how short texts become."""
  flags = rung.parser(__doc__)
  flags.add_argument("--text", help="a file; default: Python's documentation")
  flags.add_argument("--vocab", type=int, default=500)
  args = flags.parse_args(argv)
  text = read(args.text)
  begin = time.perf_counter()
  merges = train(text, args.vocab)
  took, tokens = time.perf_counter() - begin, spelling(merges)
  print(f"{len(tokens)} tokens from {len(text.encode()):,} bytes: {took:.2f} s")
  names = [repr(t.decode(errors="replace")) for t in tokens[256:]]
  print(f"first: {' '.join(names[:12])}\nlast: {' '.join(names[-8:])}")
  ids = encode(text, merges)
  print(f"lossless: {decode(ids, merges) == text}")
  print(f"bytes per token: {len(text.encode()) / len(ids):.2f}")
  draw(args.out, text[:200_000], merges)


def read(path: str | None) -> str:
  """The file's text, or 700 kB of documentation that comes with Python."""
  if path is None:
    from pydoc_data.topics import topics

    return "\n".join(topics.values())
  try:
    with open(path, encoding="utf-8") as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"cannot read {path}: {error}; give UTF-8 text") from None


def draw(out, text: str, merges: list[Pair]) -> None:
  """How many bytes a token has, by how many joins were done."""
  page, (left, right) = rung.figure(2)
  steps = np.unique(np.linspace(0, len(merges), 9).astype(int))
  size = len(text.encode())
  rate = [size / len(encode(text, merges[:n])) for n in steps]
  left.plot(256 + steps, rate, "o-")
  left.set(xlabel="tokens in the vocabulary", ylabel="bytes per token")
  left.set_title("Each join helps less")
  counts = Counter(encode(text, merges))
  often = np.array(sorted(counts.values(), reverse=True))
  right.loglog(1 + np.arange(len(often)), often)
  right.set(xlabel="rank of the token", ylabel="occurrences", title="Zipf")
  rung.save(page, out, "bpe")


if __name__ == "__main__":
  rung.run(main)
