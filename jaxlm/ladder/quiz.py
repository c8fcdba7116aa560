r"""Prerequisites: three questions that grade themselves.

    python -m jaxlm.ladder.quiz --seed=7           # writes the questions
    python -m jaxlm.ladder.quiz --seed=7 --grade   # grades what you wrote

A product A @ B.T of two 3 x 3 matrices by hand, two partial derivatives, and a
sort in C that needs O(N log N) comparisons. Every seed has other numbers. Who
can do these can read everything here: a network is products, training it is
partial derivatives, and what makes it fast is known to anyone who has counted
operations. (C. A. R. Hoare's quicksort is from 1961, the chain rule is from
Leibniz's papers of 1676.)

What it could not do: tell whether you enjoy it. The next rung is the
perceptron.
"""

import ast
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxlm.errors import UserError
from jaxlm.ladder import rung

SIZES = (0, 1, 2, 100, 1000, 10_000, 100_000)
ORDERS = ("sorted", "reversed", "equal", "random")
SORT_C = """\
// Sort x[0..n-1], smallest first. Compare only by less(a, b), which counts.
// It must need O(n log n) comparisons for any order of the numbers.
int less(double a, double b);

void sort(double *x, long n) {
}
"""
HARNESS = Path(__file__).with_name("quiz.c")

# --- Questions --------------------------------------------------------------


def matrices(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """A and B, 3 x 3, of small whole numbers."""
  rng = np.random.default_rng(seed)
  return rng.integers(-4, 6, (3, 3)), rng.integers(-4, 6, (3, 3))


def function(seed: int) -> str:
  """An expression in x and y."""
  rng = np.random.default_rng(seed + 1)
  a, b, c = rng.integers(2, 6, 3)
  shapes = (
    f"exp({a} * x * y) + {b} * x**{c}",
    f"log(1 + {a} * x**2 + {b} * y**2) * x",
    f"sin({a} * x + y**{b}) / (1 + {c} * x**2)",
    f"(x**{a} * y - {b} * y**2)**2 + {c} * x",
    f"sqrt({a} + x**2 * y**2) * cos({b} * y)",
  )
  return shapes[rng.integers(len(shapes))]


# --- Answers ----------------------------------------------------------------

NODES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Load)
NODES += (ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub)
NAMES = {n: getattr(np, n) for n in ("sin", "cos", "tan", "exp", "log", "sqrt")}


def formula(text: str) -> Callable[[complex, complex], complex]:
  """A function of x and y, and nothing but that.

  Raises:
    UserError: for anything but numbers, x, y, + - * / ** and `NAMES`.
  """
  try:
    tree = ast.parse(text, mode="eval")
  except (SyntaxError, TypeError):
    raise UserError(f"{text!r} is no formula; write like 2 * x * y") from None
  for node in ast.walk(tree):
    name = node.id if isinstance(node, ast.Name) else "x"
    if not isinstance(node, NODES) or name not in {*NAMES, "x", "y"}:
      raise UserError(
        f"{text!r}: use numbers, x, y, + - * / ** and {', '.join(NAMES)}"
      )
  code = compile(tree, "answer", "eval")
  return lambda x, y: eval(code, {"__builtins__": {}}, NAMES | {"x": x, "y": y})


def derivative_right(question: str, answer: str, by: str, seed: int) -> bool:
  """Compares with the complex step Im f(x + ih) / h at 20 places."""
  f, g, h = formula(question), formula(answer), 1e-30
  for x, y in np.random.default_rng(seed).uniform(0.2, 1.5, (20, 2)):
    point = (x + 1j * h, y) if by == "x" else (x, y + 1j * h)
    true, said = np.imag(f(*point)) / h, g(x, y)
    if not abs(said - true) <= 1e-9 * (1 + abs(true)):
      return False
  return True


def sort_right(source: Path, folder: Path) -> tuple[bool, str]:
  """Compiles `source`, sorts by it, and counts comparisons.

  Returns:
    Whether all are sorted by at most 3 n log2 n + 10 comparisons; and what was
    seen.

  Raises:
    UserError: if there is no C compiler.
  """
  compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
  if compiler is None:
    raise UserError("there is no C compiler (cc, gcc, clang); install one")
  program = folder / "sort"
  command = [compiler, "-O2", "-o", program, HARNESS, source]
  built = subprocess.run(command, capture_output=True, text=True)
  if built.returncode:
    return False, f"it does not compile:\n{built.stderr.strip()}"
  for n in SIZES:
    for order in ORDERS:
      try:
        found = subprocess.run(
          [program, str(n), order], capture_output=True, text=True, timeout=20
        )
      except subprocess.TimeoutExpired:
        return False, f"{n} {order} numbers take more than 20 s"
      if found.returncode:
        return False, f"it crashes on {n} {order} numbers"
      done, count, seconds = found.stdout.split()
      if done != "sorted":
        return False, f"{n} {order} numbers come out {done}"
      if int(count) > 3 * n * math.log2(max(n, 2)) + 10:
        return False, f"{n} {order} numbers take {int(count):,} comparisons"
  return True, f"{n:,} numbers: {int(count):,} comparisons, {seconds} s"


# --- The program ------------------------------------------------------------


def write(folder: Path, seed: int) -> None:
  """Writes the questions and the places for answers; keeps what is there."""
  folder.mkdir(parents=True, exist_ok=True)
  answers, sort = folder / "answers.json", folder / "sort.c"
  if not answers.exists():
    empty = {"A @ B.T": [[0] * 3] * 3, "df/dx": "", "df/dy": ""}
    answers.write_text(json.dumps(empty, indent=1))
  if not sort.exists():
    sort.write_text(SORT_C)
  a, b = matrices(seed)
  print(f"1. A = {a.tolist()}, B = {b.tolist()}. What is A @ B.T?")
  print(f"2. f(x, y) = {function(seed)}. What are df/dx and df/dy?")
  print("3. Write a sort in C that needs O(n log n) comparisons.")
  print(f"Write 1 and 2 into {answers}, 3 into {sort}; then add --grade.")


def grade(folder: Path, seed: int) -> int:
  """Prints what is right, and returns how many of four."""
  try:
    said = json.loads((folder / "answers.json").read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read your answers: {error}") from None
  a, b = matrices(seed)
  right = {"A @ B.T": np.array_equal(said.get("A @ B.T"), a @ b.T)}
  for by in "xy":
    answer = said.get(f"df/d{by}") or "0"
    right[f"df/d{by}"] = derivative_right(function(seed), answer, by, seed)
  right["sort"], seen = sort_right(folder / "sort.c", folder)
  for name, ok in right.items():
    print(f"{name:8} {'right' if ok else 'not yet'}")
  print(f"sort: {seen}\n{sum(right.values())} of 4")
  return sum(right.values())


def main(argv: list[str] | None = None) -> None:
  """Asks, or grades."""
  flags = rung.parser(__doc__)
  flags.add_argument("--grade", action="store_true")
  args = flags.parse_args(argv)
  (grade if args.grade else write)(args.out / f"quiz-{args.seed}", args.seed)


if __name__ == "__main__":
  rung.run(main)
