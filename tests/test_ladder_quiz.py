"""The quiz grades right answers as right, and wrong ones as wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.ladder import quiz

SOLUTION = Path(__file__).parent.parent / "colab/solutions/quiz_sort.c"
compiler = pytest.mark.skipif(
  not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)
BUBBLE = """
int less(double a, double b);
void sort(double *x, long n) {
  for (long i = 0; i < n; i++)
    for (long j = n - 1; j > i; j--)
      if (less(x[j], x[j - 1])) {
        double t = x[j]; x[j] = x[j - 1]; x[j - 1] = t;
      }
}
"""


def derivatives(question: str) -> tuple[str, str]:
  """By hand, for each of the five shapes; they differ in their numbers."""
  kind = question[:3]
  if kind == "exp":
    a, b, c = re.match(r"exp\((\d) .* (\d) \* x\*\*(\d)", question).groups()
    e = f"exp({a}*x*y)"
    return f"{a}*y*{e} + {b}*{c}*x**({c}-1)", f"{a}*x*{e}"
  if kind == "log":
    a, b = re.match(r"log\(1 \+ (\d) .* (\d) \* y", question).groups()
    u = f"(1 + {a}*x**2 + {b}*y**2)"
    return f"log{u} + 2*{a}*x**2/{u}", f"2*{b}*x*y/{u}"
  if kind == "sin":
    a, b, c = re.findall(r"\((\d) .*\*\*(\d)\) .* (\d) \*", question)[0]
    u, v = f"({a}*x + y**{b})", f"(1 + {c}*x**2)"
    return (
      f"{a}*cos{u}/{v} - 2*{c}*x*sin{u}/{v}**2",
      f"{b}*y**({b}-1)*cos{u}/{v}",
    )
  if kind == "sqr":
    a, b = re.match(r"sqrt\((\d) .* cos\((\d)", question).groups()
    u = f"sqrt({a} + x**2*y**2)"
    return (
      f"x*y**2*cos({b}*y)/{u}",
      f"x**2*y*cos({b}*y)/{u} - {b}*{u}*sin({b}*y)",
    )
  a, b, c = re.match(r"\(x\*\*(\d) .* (\d) \* y.* (\d) \* x", question).groups()
  u = f"(x**{a}*y - {b}*y**2)"
  return f"2*{u}*{a}*x**({a}-1)*y + {c}", f"2*{u}*(x**{a} - 2*{b}*y)"


@pytest.mark.parametrize("seed", range(40))
def test_derivatives(seed):
  """All kinds of questions; the answer of the other variable is wrong."""
  question = quiz.function(seed)
  dx, dy = derivatives(question)
  assert quiz.derivative_right(question, dx, "x", seed)
  assert quiz.derivative_right(question, dy, "y", seed)
  assert not quiz.derivative_right(question, dy, "x", seed)
  assert not quiz.derivative_right(question, f"{dx} + 1e-6", "x", seed)


@pytest.mark.parametrize("text", ["__import__('os')", "x.real", "2 *", "z"])
def test_an_answer_is_a_formula(text):
  """Nothing else is evaluated."""
  with pytest.raises(UserError, match=r"formula|use numbers"):
    quiz.formula(text)


@compiler
def test_sorts(tmp_path):
  """Heapsort passes; bubble sort, an empty one and a crash do not."""
  good, seen = quiz.sort_right(SOLUTION, tmp_path)
  assert good, seen
  wrong = tmp_path / "sort.c"
  for text, said in (
    (BUBBLE, "comparisons"),
    (quiz.SORT_C, "unsorted"),
    ("void sort(double *x, long n) { *(int *)0 = 1; }", "crashes"),
    (
      "void sort(double *x, long n) { for (long i=0;i<n;i++) x[i]=0; }",
      "chang",
    ),
    ("void sort(", "does not compile"),
  ):
    wrong.write_text(text)
    good, seen = quiz.sort_right(wrong, tmp_path)
    assert not good
    assert said in seen


@compiler
def test_the_program(tmp_path, capsys):
  """Asks, keeps what is written, and grades it."""
  out = f"--out={tmp_path}"
  quiz.main([out, "--seed=3"])
  folder = tmp_path / "quiz-3"
  a, b = quiz.matrices(3)
  said = {"A @ B.T": (a @ b.T).tolist(), "df/dx": "x", "df/dy": ""}
  (folder / "answers.json").write_text(json.dumps(said))
  shutil.copy(SOLUTION, folder / "sort.c")
  quiz.main([out, "--seed=3"])
  quiz.main([out, "--seed=3", "--grade"])
  assert "2 of 4" in capsys.readouterr().out
  (folder / "answers.json").write_text("{")
  with pytest.raises(UserError, match="cannot read your answers"):
    quiz.main([out, "--seed=3", "--grade"])
