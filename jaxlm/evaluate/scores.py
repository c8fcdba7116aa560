"""How right one response is, or several to one prompt: text in, number out.

All are in [0, 1] and compare a response with the gold one.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from math import comb, nan

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A minus that follows a digit or a bracket is an operation.
_NUMBER = re.compile(r"(?:(?<![\d)])-)?\d+(?:,\d{3})*(?!\d)(?:\.\d+)?")


def exact(response: str, gold: str) -> float:
  r"""1 if they are the same, blanks around them apart.

  >>> exact("46\n", "46"), exact("46.", "46")
  (1.0, 0.0)
  """
  return float(response.strip() == gold.strip())


def normalised(text: str) -> list[str]:
  """Words as SQuAD compares them: small, without punctuation and articles.

  >>> normalised("The owl, a bird.")
  ['owl', 'bird']
  """
  text = text.lower().translate(_PUNCTUATION)
  return _ARTICLES.sub(" ", text).split()


def same_words(response: str, gold: str) -> float:
  """1 if they have the same words in the same order: SQuAD's exact match.

  >>> same_words("The owl.", "owl")
  1.0
  """
  return float(normalised(response) == normalised(gold))


def token_f1(response: str, gold: str) -> float:
  """Harmonic mean of precision and recall of words (SQuAD, arXiv:1606.05250).

  Where one of the two has no words, 1 if neither has.

  >>> token_f1("a red owl", "the red fox")
  0.5
  """
  said, meant = normalised(response), normalised(gold)
  if not said or not meant:
    return float(said == meant)
  shared = (Counter(said) & Counter(meant)).total()
  return 2 * shared / (len(said) + len(meant))


def number(text: str) -> Decimal | None:
  """The last number in a text; None if there is none.

  >>> number("7-5=2, or 1,234.50 in all")
  Decimal('1234.50')
  """
  found = _NUMBER.findall(text)
  return Decimal(found[-1].replace(",", "")) if found else None


def numeric(response: str, gold: str) -> float:
  """1 if the last numbers are equal; nan where the gold response has none.

  >>> numeric("It is 46.0.", "#46"), numeric("no idea", "46")
  (1.0, 0.0)
  """
  meant = number(gold)
  return nan if meant is None else float(number(response) == meant)


# --- Several samples of one prompt ------------------------------------------


def pass_at_k(n: int, right: int, k: int) -> float:
  """The chance that one of k samples is right, from n of them.

    1 - C(n - right, k) / C(n, k)

  Unbiased, unlike 1 - (1 - right / n)^k (Codex, arXiv:2107.03374).

  >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
  (0.25, 0.5, 1.0)
  """
  return 1 - comb(n - right, k) / comb(n, k)


def maj_at_k(answers: Sequence[str], right: Sequence[bool], k: int) -> float:
  """How often the most frequent of k answers is right.

  The mean over as many groups of k neighbours as there are, which is unbiased
  where samples are drawn independently. Of answers that are equally frequent
  one is drawn. Self-consistency, arXiv:2203.11171.

  >>> maj_at_k(["4", "5", "4"], [True, False, True], 3)
  1.0
  >>> maj_at_k(["4", "5", "4", "6"], [True, False, True, False], 2)
  0.5

  Args:
    answers: the final answer of each sample; equal ones are one vote.
    right: whether each is right.
    k: how many vote.
  """
  votes = []
  for i in range(0, len(answers) - k + 1, k):
    group = Counter(answers[i : i + k])
    known = dict(zip(answers[i : i + k], right[i : i + k], strict=True))
    most = max(group.values())
    tied = [known[answer] for answer, n in group.items() if n == most]
    votes.append(sum(tied) / len(tied))
  return sum(votes) / len(votes)


def final(response: str) -> str:
  """The answer at the end of a response: what follows its last '#'.

  >>> final("2+4=6,1+3=4,#46"), final(" 46 ")
  ('46', '46')
  """
  return response.rpartition("#")[2].strip()
