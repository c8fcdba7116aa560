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
from jaxlm.generate.beam import Beam, beam_search
from jaxlm.generate.contrastive import Contrastive, contrastive
from jaxlm.generate.samplers import make_sampler
from jaxlm.generate.search import best_of
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
    ("--method=beem", "did you mean beam"),
    ("--sampler=top_q(1)", "did you mean top_p"),
    ("--stop=", "a stop string is empty"),
    ("--stats=none/x.json", "cannot write none/x.json"),
    ("--draft=none", "--draft belongs to --method=speculative"),
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


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ("--greedy --sampler=top_k(1)", "--greedy and --sampler contradict"),
    ("--greedy --temperature=1", "--greedy and --temperature contradict"),
    ("--greedy --method=sample", "--greedy and --method contradict"),
    ("--sampler=top_k(2) --top_k=2", "--sampler and --top_k contradict"),
    ("--method=beam --top_p=0.5", "beam draws nothing"),
    ("--method=contrastive --sampler=top_k(2)", "draws nothing"),
    ("--truncate --slide", "--truncate and --slide contradict"),
    ("--method=beam --slide", "nothing can --slide"),
    ("--method=beam(2) --num_samples=3", "finds 2 texts"),
    ("--method=contrastive --num_samples=2", "finds 1 texts"),
    ("--method=sample --draft=none", "--draft belongs to --method=spec"),
    ("--prompts=x.txt", "--prompt and --prompts contradict"),
    ("--out=x", "--out belongs to --prompts"),
    ("--resume", "--resume belongs to --out"),
    ("--batch=2", "--batch belongs to --prompts"),
    ("--logprobs=2", "--logprobs belongs to --prompts"),
    ("--system=x", "--system belongs to --chat"),
    ("--chat --num_samples=2", "--chat and --num_samples"),
  ],
)
def test_contradictions_are_explained(chars: Path, flags: str, words: str):
  """One error each, before anything is made."""
  with pytest.raises(UserError) as error:
    program.main([f"--workdir={chars}", "--prompt=a", *flags.split()])
  assert words in str(error.value)


def test_a_prompt_longer_than_the_context(chars: Path, capsys):
  """It says by how much; two flags say what to do instead."""
  args = [f"--workdir={chars}", "--prompt=" + "abcdef" * 5, "--greedy"]
  args += ["--max_new_tokens=4"]
  with pytest.raises(UserError, match="30 tokens, 6 more than the context of"):
    program.main(args)
  for flag in ("--truncate", "--slide"):
    assert len(said(capsys, *args, flag)) == 30 + 4 + 1
  with pytest.raises(UserError, match="30 tokens of prompt and 4 new ones are"):
    program.main([*args[:2], args[3], "--method=beam"])
  cut = said(capsys, *args[:2], args[3], "--method=beam", "--truncate")
  assert len(cut) == 30 + 4 + 1


def test_a_ring_goes_on_past_the_context(chars: Path, capsys):
  """A prompt longer than the context is read through a ring, and int8 too."""
  long = "ab" * 40
  base = [f"--workdir={chars}", f"--prompt={long}", "--max_new_tokens=5"]
  with pytest.raises(UserError, match="--cache='ring"):
    program.main(base)
  for kind in ("ring(16, sinks=2)", "ring(16) int8"):
    text = said(capsys, *base, f"--cache={kind}", "--greedy")
    assert text.startswith(long)
  with pytest.raises(UserError, match="--cache works with"):
    program.main([*base, "--cache=ring(16)", "--method=beam"])
  with pytest.raises(UserError, match="a cache is full or a ring"):
    program.main([*base, "--cache=int8 full"])


def test_stop_strings(chars: Path, capsys):
  """The text up to the first of them, which is not shown."""
  args = [f"--workdir={chars}", "--prompt=ab", "--max_new_tokens=40"]
  args += ["--temperature=1"]
  whole = said(capsys, *args)[:-1]
  new, at = whole[2:], 7
  stop = new[at : at + 2]
  cut = "ab" + new[: new.find(stop)] + "\n"
  written = stop.replace("\n", "\\n")
  assert said(capsys, *args, "--stop=never", f"--stop={written}") == cut
  assert said(capsys, *args, f"--stop={written}", "--no-stream") == cut
  assert program._unescaped(r"a\nb\tc\\n\d") == "a\nb\tc\\n\\d"


@pytest.mark.slow
def test_methods_are_those_of_python(chars: Path, capsys):
  """The program shows what the functions return."""
  model, params = jaxlm.load(chars)
  tokenizer = jaxlm.load_tokenizer(chars)
  ids = tokenizer.encode("abc")[None]
  args = [f"--workdir={chars}", "--prompt=abc", "--max_new_tokens=8"]

  def shown(method: str) -> str:
    return said(capsys, *args, f"--method={method}")[3:-1]

  found = beam_search(model, params, ids, 8, Beam(3, groups=3, diversity=0.2))
  want = tokenizer.decode(found.tokens[0, 0])
  assert shown("diverse_beam(3,diversity=0.2)") == want
  two = said(capsys, *args, "--method=beam(3)", "--num_samples=2")
  found = beam_search(model, params, ids, 8, Beam(3)).tokens[0, :2]
  assert two == "".join(
    f"{'---' if i else ''}{chr(10) * i}abc{tokenizer.decode(row)}\n"
    for i, row in enumerate(found)
  )
  found = contrastive(model, params, ids, 8, Contrastive(3, 0.5))
  assert shown("contrastive(3,alpha=0.5)") == tokenizer.decode(found[0])
  key = jax.random.fold_in(jax.random.key(0), 0)
  (best,) = best_of(
    model, params, ids[0], 8, 4, sampler=make_sampler(0.8), key=key
  )
  assert shown("best_of(4)") == tokenizer.decode(best[1])


def test_speculation_changes_nothing_but_the_cost(chars: Path, capsys):
  """Greedy, with a lookup and with a draft: the plain greedy text."""
  args = [f"--workdir={chars}", "--prompt=abc", "--max_new_tokens=12"]
  greedy = said(capsys, *args, "--greedy")
  fast = [*args, "--temperature=0", "--method=speculative(gamma=2)"]
  assert said(capsys, *fast) == greedy
  program.main([*fast, f"--draft={chars}"])
  shown = capsys.readouterr()
  assert shown.out == greedy
  assert "accepted" in shown.err  # the draft is the model: all of them are
  with pytest.raises(UserError, match="leave them out with --draft"):
    program.main([*args, "--method=speculative(n=2)", f"--draft={chars}"])
