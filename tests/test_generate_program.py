"""`python -m jaxlm.generate`, as one types it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxlm
from jaxlm.data.tokenizers import Bytes, Chars
from jaxlm.errors import UserError
from jaxlm.generate import __main__ as program
from jaxlm.generate.text import sample_text
from jaxlm.layers.param import init, shardings
from jaxlm.models.families import modern
from jaxlm.parallel.rules import preset


def a_model(path: Path, tokenizer) -> Path:
  """A saved model that says this and that."""
  model = modern.decoder(
    vocab=tokenizer.vocab_size, dim=16, layers=1, heads=2, max_positions=24
  )
  params = init(model.params(), jax.random.key(0))
  params = jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), params
  )
  jaxlm.save(path, model, params, tokenizer)
  return path


@pytest.fixture(scope="module")
def chars(tmp_path_factory) -> Path:
  return a_model(tmp_path_factory.mktemp("w") / "chars", Chars("abcdef \n"))


@pytest.fixture(scope="module")
def utf8(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("w") / "bytes"
  return a_model(path, Bytes(["<|endoftext|>"]))


def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "jaxlm.generate", *args],
    input=stdin,
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""},
    check=False,
  )


def said(capsys, *args: str) -> str:
  """What the program prints to stdout, run in this process."""
  program.main(args)
  return capsys.readouterr().out


def test_the_prompt_then_what_follows(chars: Path):
  """The text on stdout and nothing else, figures on stderr, status 0."""
  done = run(f"--workdir={chars}", "--prompt=abc", "--max_new_tokens=60")
  assert done.returncode == 0
  assert done.stdout.startswith("abc")
  assert len(done.stdout) == 3 + 60 + 1  # a character is a token; a newline
  first, *others = done.stderr.splitlines()
  assert first == "texts    1, 60 new tokens"
  names = [line.split()[0] for line in others]
  assert names == ["prefill", "decode", "first", "compile", "memory"]


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--workdir=none", "--prompt=a"], "there is no directory none"),
    (["--prompt=a"], "name one of the two: --workdir=DIR"),
    (["--workdir=CHARS", "--chat", "--prompt=a"], "choose one of --template="),
    (["--model=none", "--prompt=a"], "there is no directory none"),
    (["--workdir=CHARS", "--prompt=xyz"], "character 'x'"),
  ],
)
def test_errors_are_one_line(chars: Path, args: list[str], words: str):
  """No traceback, status 2, nothing on stdout."""
  done = run(*(a.replace("CHARS", str(chars)) for a in args))
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr.startswith("error: ")
  assert words in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--top_p=2", "no probability"),
    ("--temperature=-1", "not a positive number"),
    ("--num_samples=0", "use 1 or more"),
    ("--max_new_tokens=-4", "negative"),
    ("--checkpoint=7", "no checkpoint at step 7"),
    ("--checkpoint=best", "none is the best"),
    ("--dtype=int4", "unknown"),
    ("--temprature=1", "unrecognized arguments: --temprature=1"),
    ("--seed=x", "invalid int value"),
  ],
)
def test_wrong_flags_are_explained(chars: Path, flag: str, words: str):
  """Each in a sentence."""
  with pytest.raises(UserError, match=words):
    program.main([f"--workdir={chars}", "--prompt=a", flag])


def test_samples_are_the_same_with_and_without_streaming(chars: Path, capsys):
  """One by one or side by side; another seed gives another text."""
  args = [f"--workdir={chars}", "--prompt=ab", "--num_samples=3"]
  args += ["--max_new_tokens=40", "--temperature=1"]
  text = said(capsys, *args)
  assert len(set(text.split("\n---\n"))) == 3
  assert said(capsys, *args, "--no-stream") == text
  assert said(capsys, *args, "--seed=1") != text


def test_greedy_is_temperature_zero(chars: Path, capsys):
  """Two ways to say it."""
  args = [f"--workdir={chars}", "--prompt=ab", "--max_new_tokens=12"]
  greedy = said(capsys, *args, "--greedy")
  assert greedy == said(capsys, *args, "--temperature=0", "--seed=9")


def test_what_is_piped_in_is_the_prompt(chars: Path, monkeypatch, capsys):
  """Without its last newline, which `echo` adds."""
  monkeypatch.setattr("sys.stdin", io.StringIO("fed\n"))
  text = said(capsys, f"--workdir={chars}", "--max_new_tokens=0")
  assert text == "fed\n"


def test_no_prompt_begins_a_text(chars: Path, utf8: Path, capsys):
  """After the end of another, or a newline; neither is shown."""
  for path in (chars, utf8):
    args = [f"--workdir={path}", "--prompt=", "--max_new_tokens=9"]
    assert len(said(capsys, *args, "--greedy")) > 1


def test_no_half_characters(utf8: Path, capsys):
  """Any bytes come out as whole characters, the same in pieces or at once."""
  args = [f"--workdir={utf8}", "--prompt=é", "--max_new_tokens=200"]
  text = said(capsys, *args, "--temperature=2")
  assert text.startswith("é")
  assert text == said(capsys, *args, "--temperature=2", "--no-stream")


@pytest.mark.parametrize("devices", [1, 8])
def test_a_sample_in_the_middle_of_training(chars: Path, capsys, devices: int):
  """From parameters that are spread over a mesh, the text is the same."""
  model, params = jaxlm.load(chars)
  tokenizer = jaxlm.load_tokenizer(chars)
  mesh = jax.make_mesh((devices,), ("fsdp",))
  rules = preset("fsdp")
  places = shardings(model.params(), mesh, rules)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, places)
    text = sample_text(model, params, tokenizer, "abc", tokens=30, seed=2)
  program.main(
    [f"--workdir={chars}", "--prompt=abc", "--max_new_tokens=30", "--seed=2"]
  )
  assert capsys.readouterr().out == text + "\n"


def test_each_line_typed_is_a_prompt(chars: Path, monkeypatch, capsys):
  """A line that cannot be expressed is explained, and the next one read."""

  class Terminal(io.StringIO):
    def isatty(self) -> bool:
      return True

  monkeypatch.setattr("sys.stdin", Terminal("abc\nxyz\nfed\n"))
  program.main([f"--workdir={chars}", "--max_new_tokens=5"])
  shown = capsys.readouterr()
  assert "> abc" in shown.out
  assert "> fed" in shown.out
  assert "error: character 'x'" in shown.err
  assert "texts    2, 10 new tokens" in shown.err
