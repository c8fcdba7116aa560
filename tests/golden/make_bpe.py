"""Writes bpe_tiktoken.json: what tiktoken makes of some texts.

    python tests/golden/make_bpe.py        # needs tiktoken

The joins are those that `jaxlm.ladder.bpe` learns from the start of Python's
documentation; tiktoken gets them as its ranks.
"""

import json
from pathlib import Path

import tiktoken

from jaxlm.ladder import bpe

PATTERN = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
  r"|\s+(?!\S)|\s+"
)
CORPUS = "the cat's hat, that's the hat of the cat; they'll chat at that. " * 9
TEXTS = [
  "the cat that they'll chat at",
  "  two spaces, three   here\n\n\tand tabs ",
  "Größe, naïve café, Ελλάδα, 日本語, 한국어 and 🙂👍🏽",
  "x1y2 ½ Ⅷ ٣ 1,000.00 a_b-c 'S's 'LL'll",
  "\u00a0no\u3000break\u2009thin\r\nend\x1c",
  "",
]


def main() -> None:
  """Makes the file beside this one."""
  merges = bpe.train(CORPUS, 290)
  ranks = {token: i for i, token in enumerate(bpe.spelling(merges))}
  judge = tiktoken.Encoding(
    "joins", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
  )
  data = {
    "corpus": CORPUS,
    "merges": merges,
    "texts": TEXTS,
    "ids": [judge.encode(text) for text in TEXTS],
  }
  path = Path(__file__).with_name("bpe_tiktoken.json")
  path.write_text(json.dumps(data), encoding="utf-8")


if __name__ == "__main__":
  main()
