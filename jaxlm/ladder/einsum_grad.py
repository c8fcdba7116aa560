"""The gradient of an einsum is an einsum: this derives its string.

Einstein's summation convention, 1916. In y = einsum("ab,bc->ac", A, B) every
entry of A meets dy times the rest, so dA = einsum("ac,bc->ab", dy, B): swap
the operand's letters with the result's. Two cases need one more operand:

  "ab->a"  a letter summed alone:  "a,b->ab" with ones(b), which spreads dy
  "aa->a"  a letter met twice:     "a,ab->ab" with eye(a), which is a diagonal

What it could not do: anything with a bend in it. Sums of products are linear
in each operand, and a network needs exp and max as well: see `autograd`.
"""

import string
from collections.abc import Sequence

import numpy as np

from jaxlm.errors import UserError
from jaxlm.ladder import rung


def parse(spec: str) -> tuple[list[str], str]:
  """'ab,bc->ac' as (['ab', 'bc'], 'ac')."""
  inner, arrow, out = spec.replace(" ", "").partition("->")
  letters = inner.replace(",", "")
  if not arrow or set(letters + out) - set(string.ascii_letters):
    raise UserError(
      f"einsum {spec!r} is not letters, commas and '->'; write every axis as a "
      "letter, as in 'ab,bc->ac'"
    )
  if len(set(out)) < len(out) or set(out) - set(letters):
    raise UserError(
      f"the result of einsum {spec!r} must name letters of its operands, each "
      "once"
    )
  return inner.split(","), out


def backward(spec: str, i: int) -> tuple[str, str]:
  """The string that gives the gradient of operand `i`.

  Returns:
    A string whose operands are dy, then the other operands in their order,
    then one for each part of the second value: 'b' stands for ones of the size
    of b, 'ab' for a unit matrix of that of a.

  >>> backward("ab,bc->ac", 0)
  ('ac,bc->ab', '')
  >>> backward("ab->a", 0)
  ('a,b->ab', 'b')
  >>> backward("aa->a", 0)
  ('a,ab->ab', 'ab')
  """
  inner, out = parse(spec)
  others = inner[:i] + inner[i + 1 :]
  free = (c for c in string.ascii_letters if c not in spec)
  target, extras = "", []
  for c in inner[i]:
    if c in target:  # met before: a new letter, tied to the old one
      extras.append(c + next(free))
      c = extras[-1][1]
    elif c not in out + "".join(others):
      extras.append(c)
    target += c
  operands = ",".join([out, *others, *extras])
  return f"{operands}->{target}", ",".join(extras)


def gradient(
  spec: str, operands: Sequence[np.ndarray], i: int, dy: np.ndarray
) -> np.ndarray:
  """The gradient of operand `i` of einsum(spec, *operands), given that of y."""
  back, extras = backward(spec, i)
  sizes = dict(zip(parse(spec)[0][i], operands[i].shape, strict=True))
  more = [
    np.ones(sizes[e]) if len(e) == 1 else np.eye(sizes[e[0]])
    for e in filter(None, extras.split(","))
  ]
  others = [*operands[:i], *operands[i + 1 :]]
  return np.einsum(back, dy, *others, *more)


def main(argv: list[str] | None = None) -> None:
  """Prints the backward strings of a few einsums, or of --spec."""
  flags = rung.parser(__doc__)
  flags.add_argument("--spec", help="such as 'bqd,bkd->bqk'")
  given = flags.parse_args(argv).spec
  known = ("ab,bc->ac", "bqd,bkd->bqk", "abc->", "aa->a", "a,a->", "ab->ba")
  for spec in [given] if given else known:
    for i, letters in enumerate(parse(spec)[0]):
      back, extras = backward(spec, i)
      more = f"   with {extras}" if extras else ""
      print(f"{spec:14s} gradient of {letters}: {back}{more}")


if __name__ == "__main__":
  rung.run(main)
