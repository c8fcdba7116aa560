"""`python -m jaxlm.evaluate`, as one types it, and what it is made of."""

import json
import shutil
import subprocess
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxlm
from jaxlm import tasks
from jaxlm.data.chat import BARE, PLAIN, ChatTemplate
from jaxlm.data.tokenizers import Bytes, Chars
from jaxlm.errors import UserError
from jaxlm.evaluate import __main__ as program
from jaxlm.evaluate import browser, harness, likelihood, respond, results
from jaxlm.evaluate.likelihood import Judge, Likelihood, windows
from jaxlm.generate import __main__ as generate
from jaxlm.layers.param import init
from jaxlm.models.families import modern

TEXT = "A list is a list, and an owl is an owl. " * 3


@pytest.fixture(scope="module")
def judge() -> Judge:
  """A model that says this and that, with a context of 48 bytes."""
  tokenizer = Bytes(["<|endoftext|>"])
  model = modern.decoder(tokenizer.vocab_size, 16, 1, 2, max_positions=48)
  params = init(model.params(), jax.random.key(0))
  params = jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), params
  )
  return Judge(model, params, tokenizer, size=4)


@pytest.fixture(scope="module")
def workdir(judge, tmp_path_factory):
  path = tmp_path_factory.mktemp("w") / "model"
  jaxlm.save(path, judge.model, judge.params, judge.tokenizer)
  return path


def told(capsys, *args: str) -> str:
  program.main(args)
  return capsys.readouterr().out


# --- Likelihoods --------------------------------------------------------------


@given(st.integers(2, 40), st.integers(1, 3), st.integers(3, 9))
def test_windows_judge_every_token_once(n, given, most):
  """In order, after as many tokens as the context holds, and no more."""
  ids = [*range(max(n, given + 1))]
  pairs = windows(ids, given, most)
  assert [i for _, after in pairs for i in after] == ids[given:]
  for before, after in pairs:
    assert [*before, *after] == ids[before[0] : after[-1] + 1]
    # All but the last token are read.
    assert len(before) + len(after) - 1 == min(most, after[-1])


def test_a_likelihood_is_a_sum_of_logarithms(judge):
  """One row at a time, without padding; also of texts beyond the context."""
  encode, model = judge.tokenizer.encode, judge.model
  forward = jax.jit(lambda tokens: model(judge.params, tokens))

  def direct(before, after):
    tokens = np.array([[*before, *after]], np.int32)
    logits = jax.nn.log_softmax(forward(tokens[:, :-1]))[0]
    logits = np.asarray(logits, np.float64)[len(before) - 1 :]
    greedy = bool((logits.argmax(axis=-1) == np.array(after)).all())
    picked = logits[np.arange(len(after)), np.array(after)]
    return Likelihood(picked.sum(), greedy, len(after))

  likely = int(np.argmax(forward(encode("an owl")[None])[0, -1]))
  pairs = [
    (encode("an owl"), [likely]),
    (encode("a"), encode("bcdefg")),
    ([judge.tokenizer.eot], encode("an owl")),
    (encode("an owl"), []),
    (encode("abcd"), encode("efg")),
  ]
  found = judge.following(pairs)
  assert [f.greedy for f in found] == [True, False, False, True, False]
  for one, pair in zip(found, pairs, strict=True):
    if len(pair[1]):
      want = direct(*pair)
      assert one.logprob == pytest.approx(want.logprob, abs=1e-4)
      assert (one.greedy, one.tokens) == (want.greedy, want.tokens)
  ids = [judge.tokenizer.eot, *encode(TEXT)]
  parts = [direct(*pair) for pair in windows(ids, 1, 48)]
  text = judge.text(TEXT)
  assert text.tokens == len(TEXT)
  assert text.logprob == pytest.approx(sum(p.logprob for p in parts), abs=1e-3)
  figures = likelihood.perplexity(text, TEXT)
  assert figures["loss"] == pytest.approx(-text.logprob / len(TEXT))
  bits = figures["loss"] / np.log(2)  # a byte is a token here
  assert figures["bits_per_byte"] == pytest.approx(bits)
  assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))


def test_what_cannot_be_judged(judge):
  """Nothing before, too much after, no token to begin with, no text."""
  with pytest.raises(UserError, match="follow nothing"):
    judge.following([([], [1])])
  with pytest.raises(UserError, match=r"49 tokens .* the context of 48"):
    judge.following([([1], [1] * 49)])
  with pytest.raises(UserError, match="no probability"):
    Judge(judge.model, judge.params, Chars("ab")).text("ab")
  with pytest.raises(UserError, match="is empty"):
    likelihood.perplexity(Likelihood(0.0, True, 0), "")


# --- The program --------------------------------------------------------------


def test_a_task_is_evaluated(workdir, tmp_path, capsys):
  """Responses are those of jaxlm.generate; the file has every figure."""
  out, page = tmp_path / "a.json", tmp_path / "a.html"
  flags = [f"--workdir={workdir}", "--max_new_tokens=5"]
  said = told(
    capsys, *flags, "--task=add,copy", "--n=6", f"--out={out}", f"--html={page}"
  )
  assert "add,copy, 6 examples" in said
  about, records = results.read_results(out)
  assert about["metrics"]["score"]["value"] == pytest.approx(
    100 * np.mean([r.scores[0] for r in records])
  )
  assert [*about["slices"]] == ["skill", "level", "length"]
  examples = tasks.examples(tasks.make("add,copy"), "test", 6)
  assert [r.example for r in records] == examples
  asked = tmp_path / "p.jsonl"
  asked.write_text(
    "".join(json.dumps({"prompt": e.prompt}) + "\n" for e in examples)
  )
  generate.main(
    [
      *flags,
      "--temperature=0",
      f"--prompts={asked}",
      f"--out={tmp_path}/r.jsonl",
    ]
  )
  lines = (tmp_path / "r.jsonl").read_text().splitlines()
  texts = [json.loads(line)["text"] for line in lines]
  assert [r.texts for r in records] == [(text,) for text in texts]
  # The same from files: texts that are there, and results.
  capsys.readouterr()
  again = told(
    capsys,
    f"--responses={tmp_path}/r.jsonl",
    "--task=add,copy",
    "--n=6",
    f"--before={out}",
  )
  assert "0 come right, 0 gone wrong" in again
  assert "50.0 %" in again


def test_a_template_writes_the_prompts(judge):
  """The model's own, unless another or none is asked for; bare is none."""

  def chosen(name, own):
    found = types.SimpleNamespace(template=own)
    return program.template(types.SimpleNamespace(template=name), found)

  own = ChatTemplate(PLAIN)
  assert chosen(None, own) == chosen("plain", None) == own
  assert chosen("none", own) is chosen("bare", own) is None
  assert chosen(None, ChatTemplate(BARE)) is chosen(None, None) is None
  with pytest.raises(UserError, match="neither chatml"):
    chosen("owl", own)
  (example,) = tasks.examples(tasks.make("copy", levels=1), "test", 1)
  turn = [{"role": "user", "content": example.prompt}]
  assert respond._said(example, own) == turn
  assert respond._said(example, None) == example.prompt


def test_responses_may_hold_any_line_end(monkeypatch, judge):
  """Unicode has more of them than a file of JSON lines."""
  said = "a\u2028b\x85c"

  class Batches:
    def __init__(self, *_):
      pass

    def lines(self, requests):
      row = {"text": said, "finish_reason": "stop"}
      lines = [json.dumps(r.told() | row, ensure_ascii=False) for r in requests]
      yield len(requests), "".join(line + "\n" for line in lines)

  monkeypatch.setattr(respond, "Batches", Batches)
  figures = types.SimpleNamespace(new_tokens=0)
  writer = types.SimpleNamespace(figures=figures)
  task = tasks.make("add")
  found = respond.respond(writer, task, tasks.examples(task, "test", 2))
  assert [r.texts for r in found] == [(said,), (said,)]


def test_samples_are_counted(workdir, tmp_path, capsys):
  """Several of a prompt, from a file of one's own questions."""
  path = tmp_path / "own.jsonl"
  rows = [{"prompt": p, "response": p} for p in ("ab", "cd")]
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  said = told(
    capsys,
    f"--model={workdir}",
    f"--task={path}",
    "--num_samples=3",
    "--batch=4",
    "--max_new_tokens=3",
    "--times=10",
    "--metrics=exact,pass@3,maj@3",
    f"--out={tmp_path}/a.json",
  )
  assert [line.split()[0] for line in said.splitlines()[2:6]] == [
    "metric",
    "exact",
    "pass@3",
    "maj@3",
  ]
  _, records = results.read_results(tmp_path / "a.json")
  assert [len(r.texts) for r in records] == [3, 3]
  assert len(set(records[0].texts)) > 1


def test_before_and_after(tmp_path, capsys):
  """Two files: one sentence of what has changed, and the change in JSON."""
  task = tasks.make("add")
  examples = tasks.examples(task, "test", 40)
  for name, right in (("old", 0), ("new", 30)):
    texts = [
      [e.response if i < right else e.rejected] for i, e in enumerate(examples)
    ]
    found = results.scored(task, examples, texts)
    results.write(tmp_path / f"{name}.json", results.to_json({}, found))
  flags = [f"--results={tmp_path}/new.json", f"--before={tmp_path}/old.json"]
  said = told(
    capsys, *flags, f"--out={tmp_path}/a.json", f"--html={tmp_path}/a.html"
  )
  assert "30 come right, 0 gone wrong" in said
  about = json.loads((tmp_path / "a.json").read_text())
  change = about["changes"]["score"]
  assert change["difference"]["value"] == 75
  assert change["wins"] == 1.0
  assert about["come_right"] == 30
  level = about["slices"]["level"]["1"]["change"]
  _, old = results.read_results(tmp_path / "old.json")
  _, new = results.read_results(tmp_path / "new.json")
  gains = [
    b.scores[0] - a.scores[0]
    for a, b in zip(old, new, strict=True)
    if a.example.level == 1
  ]
  assert level["difference"]["value"] == pytest.approx(100 * np.mean(gains))


def test_a_text_is_judged(judge, workdir, tmp_path, capsys):
  """Perplexity and bits per byte, printed and as JSON."""
  (tmp_path / "a.txt").write_text(TEXT)
  said = told(
    capsys,
    f"--workdir={workdir}",
    f"--text={tmp_path}/a.txt",
    "--batch=4",
    f"--out={tmp_path}/a.json",
  )
  found = json.loads((tmp_path / "a.json").read_text())
  want = -judge.text(TEXT).logprob / len(TEXT)
  assert found["loss"] == pytest.approx(want, abs=1e-5)
  assert f"loss {want:.4f} nats per token" in said


def test_prompts_beyond_the_context_are_told(workdir, tmp_path, capsys):
  """They count as wrong, and are counted."""
  path = tmp_path / "own.jsonl"
  rows = [{"prompt": p, "response": "a"} for p in ("b", "c" * 60)]
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  program.main([f"--workdir={workdir}", f"--task={path}", "--max_new_tokens=3"])
  assert "warning: 1 of 2 prompts could not be" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ([], "not none"),
    (["--model=a", "--results=b"], "not model and results"),
    (["--model=a"], "name what is asked"),
    (["--model=a", "--task=add", "--text=b"], "different questions"),
    (["--results=a", "--text=b"], "--text needs a model"),
    (["--model=a", "--task=add", "--n=0"], "--n=0: use 1 or more"),
    (["--model=a", "--task=ad"], "did you mean 'add'"),
    (["--model=a", "--task=add", "--chat"], "--chat is of jaxlm.generate"),
    (["--model=a", "--task=add", "--nn=3"], "--nn=3; --help shows"),
    (["--results=/no/a.json"], "cannot read /no/a.json: No such file"),
    (["--responses=/no/a.jsonl", "--task=add"], "cannot read /no/a.jsonl"),
    (["--model=/no/model", "--task=add"], "/no/model"),
    (["--workdir={}", "--text=/no/a.txt"], "cannot read /no/a.txt"),
  ],
)
def test_wrong_flags(args, message, workdir):
  """Each is one sentence."""
  with pytest.raises(UserError, match=message):
    program.main([arg.format(workdir) for arg in args])


# --- The page of failures -----------------------------------------------------


def a_page() -> str:
  task = tasks.make("add,copy")
  examples = tasks.examples(task, "test", 8)
  texts = [
    [e.response if i % 2 else "</script><b>&\ud83d"]
    for i, e in enumerate(examples)
  ]
  found = results.scored(task, examples, texts)
  old = results.scored(task, examples, [[e.response] for e in examples])
  return browser.page("a <title>", "metric", found, old)


def test_the_page_holds_the_responses_as_data():
  """No text of a model becomes markup, and half a character can be written."""
  page = a_page()
  data = page.split('id="data">')[1].split("</script>")[0]
  rows = json.loads(data)["rows"]
  assert rows[0]["texts"] == ["</script><b>&\ud83d"]
  assert page.encode()
  assert page.count("<script") == page.count("</script>") == 2
  assert "<b>" not in page
  assert "http" not in page  # it needs nothing else


DOM = """
const made = {};
class Node {
  constructor() { this.children = []; this.dataset = {}; this.text = ""; }
  append(...all) { this.children.push(...all); }
  replaceChildren(...all) { this.children = all; }
  get textContent() {
    const of = (c) => typeof c === "string" ? c : c.textContent;
    return this.text + this.children.map(of).join("");
  }
  set textContent(x) { this.text = String(x); this.children = []; }
  get value() { return this.own ?? this.children[0]?.value ?? ""; }
  set value(x) { this.own = x; }
  get selectedIndex() {
    return this.children.findIndex((c) => c.value === this.value);
  }
}
globalThis.Option = class { constructor(t, v) { this.value = v; } };
globalThis.document = {
  getElementById: (id) => made[id] ??= new Node(),
  createElement: () => new Node(),
};
const html = require("fs").readFileSync(0, "utf8");
const parts = html.split(/<script[^>]*>/);
document.getElementById("data").textContent = parts[1].split("</script>")[0];
const run = new Function(parts[2].split("</script>")[0]);
run();
const rows = () => made.body.children.map((tr) => tr.children[0].textContent);
const found = { wrong: rows() };
made.outcome.value = "all"; made.outcome.onchange();
found.all = rows();
made.skill.value = "add"; made.skill.onchange();
found.add = rows();
made.skill.value = "every skill"; made.search.value = "COPY";
made.search.oninput();
found.search = rows();
made.search.value = "";
const heads = Object.fromEntries(
  made.head.children.map((th) => [th.textContent, th]));
heads["#"].onclick();
found.down = rows();
made.outcome.value = "gone wrong"; made.outcome.onchange();
found.gone = rows();
found.count = made.count.textContent;
console.log(JSON.stringify(found));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_filters_and_sorts():
  """Run with a few lines of DOM: outcome, skill, search, order."""
  done = subprocess.run(
    ["node", "-e", DOM], input=a_page(), capture_output=True, text=True
  )
  assert done.stderr == ""
  found = json.loads(done.stdout)
  examples = tasks.examples(tasks.make("add,copy"), "test", 8)
  assert found["all"] == [str(i + 1) for i in range(8)]
  assert found["wrong"] == ["1", "3", "5", "7"]
  of = {
    skill: [str(i + 1) for i, e in enumerate(examples) if e.skill == skill]
    for skill in ("add", "copy")
  }
  assert found["add"] == of["add"]
  assert found["search"] == of["copy"]
  assert found["down"] == found["all"][::-1]
  assert found["gone"] == found["wrong"][::-1]
  assert found["count"] == "4 of 8"


# --- The harness --------------------------------------------------------------


def questions(*args):
  return [types.SimpleNamespace(args=a) for a in args]


@pytest.fixture
def answers(judge, workdir, monkeypatch):
  """The adapter on a stand-in for the harness's abstract class."""

  class LM:
    def __init__(self):
      self.kept = []
      self.cache_hook = types.SimpleNamespace(
        add_partial=lambda *x: self.kept.append(x)
      )

  stand_in = types.SimpleNamespace()
  stand_in.api = types.SimpleNamespace(model=types.SimpleNamespace(LM=LM))
  monkeypatch.setattr(harness, "_imported", lambda: stand_in)
  flags, found, usual = program.loaded("workdir", str(workdir), ["--greedy"])
  return harness.adapter(judge, program.make_writer(flags, found, usual, ()), 4)


def test_the_harness_is_answered(answers, judge, workdir, capsys):
  """Likelihoods are the judge's, texts those of the program."""
  encode = judge.tokenizer.encode
  asked = questions(("an owl", " is"), ("", "an owl"), ("an ", "owl"))
  found = answers.loglikelihood(asked)
  want = judge.following(
    [
      (encode("an owl"), encode(" is")),
      ([judge.tokenizer.eot], encode("an owl")),
      (encode("an"), encode(" owl")),
    ]
  )
  for one, other in zip(found, want, strict=True):
    assert one == (pytest.approx(other.logprob, abs=1e-4), other.greedy)
  (rolling,) = answers.loglikelihood_rolling(questions((TEXT,)))
  assert rolling == pytest.approx(judge.text(TEXT).logprob, abs=1e-3)
  assert answers.kept[0] == ("loglikelihood", ("an owl", " is"), found[0])
  short = {"until": [], "max_gen_toks": 4}
  long = {"until": "\n", "max_gen_toks": 7, "do_sample": False}
  asked = [("an owl", short), ("a", long), ("a fox", short), ("b" * 90, short)]
  texts = answers.generate_until(questions(*asked))
  for (prompt, options), text in list(zip(asked, texts, strict=True))[:3]:
    n = options["max_gen_toks"]
    generate.main(
      [
        f"--workdir={workdir}",
        "--greedy",
        "--no-stream",
        f"--prompt={prompt}",
        f"--max_new_tokens={n}",
        "--stop=\\n",
      ]
    )
    assert capsys.readouterr().out == f"{prompt}{text}\n"


def test_the_harness_says_what_it_needs(monkeypatch, workdir):
  """Without the library, the extra is named."""
  import sys

  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(UserError, match=r"jaxlm\[lm-eval\]"):
    program.main([f"--workdir={workdir}", "--harness=arc_easy"])


LOCAL = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/data.jsonl
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_a_local_task_of_the_harness(judge, workdir, tmp_path, capsys):
  """A small JSONL as multiple choice and as generation, by the harness."""
  pytest.importorskip("lm_eval")
  rows = [
    {"question": "an owl", "choices": [" is", " zq", "x"], "gold": i % 3}
    for i in range(5)
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "data.jsonl").write_text(text)
  for name, kind in (("choice", CHOICE), ("write", GENERATE)):
    head = LOCAL.format(name=f"local_{name}", folder=tmp_path)
    (tmp_path / f"{name}.yaml").write_text(head + kind)
  flags = [f"--workdir={workdir}", f"--include_path={tmp_path}"]
  out = tmp_path / "a.json"
  told(capsys, *flags, "--harness=local_choice,local_write", f"--out={out}")
  found = json.loads(out.read_text())["results"]
  encode = judge.tokenizer.encode
  pairs = [(encode("an owl"), encode(c)) for c in rows[0]["choices"]]
  best = int(np.argmax([one.logprob for one in judge.following(pairs)]))
  right = np.mean([row["gold"] == best for row in rows])
  assert found["local_choice"]["acc,none"] == pytest.approx(right)
  assert found["local_write"]["exact_match,none"] == 0
  with pytest.raises(UserError, match="no task 'local_no'"):
    program.main([*flags, "--harness=local_no"])
