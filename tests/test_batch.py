"""Files of prompts: what is read, how it is batched, what is written."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data.chat import CHATML, ChatTemplate, encode
from jaxlm.data.tokenizers import Bytes
from jaxlm.errors import UserError
from jaxlm.generate import batch, decode
from jaxlm.generate.__main__ import main
from jaxlm.generate.batch import Batches, Request
from jaxlm.generate.beam import Beam
from jaxlm.generate.methods import Beams, Draw
from jaxlm.generate.samplers import Greedy, Sample
from jaxlm.generate.text import Writer
from jaxlm.layers.param import init
from jaxlm.models.families import modern

TOKENIZER = Bytes(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
MODEL = modern.decoder(TOKENIZER.vocab_size, 16, 1, 2, max_positions=48)
PARAMS = jax.tree.map(
  lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape),
  init(MODEL.params(), jax.random.key(0)),
)
N = 10


def writer(method=Draw(Sample(0.8)), seed: int = 0, **options) -> Writer:
  key = jax.random.key(seed)
  return Writer(MODEL, PARAMS, TOKENIZER, method, N, key, **options)


def texts(batches: Batches, requests: list[Request]) -> list[dict]:
  """What is told of requests."""
  lines = "".join(text for _, text in batches.lines(requests))
  return [json.loads(line) for line in lines.splitlines()]


def prompts(*lengths: int) -> list[Request]:
  """Requests of such lengths, no two alike, with seeds of their own."""
  made = [chr(97 + i % 26) * n for i, n in enumerate(lengths)]
  return [Request(i, text, seed=i) for i, text in enumerate(made)]


def alone(request: Request, sample: int = 0, **options) -> str:
  """What the writer makes of a request by itself, as with --prompt."""
  pieces = writer(seed=request.seed, **options).pieces(request.prompt, sample)
  return "".join(pieces).removeprefix(request.prompt)


LENGTHS = (5, 30, 1, 12, 5, 40, 3, 12, 36, 20, 7)


@pytest.mark.parametrize(
  "size",
  [
    pytest.param(1, marks=pytest.mark.slow),
    3,
    pytest.param(8, marks=pytest.mark.slow),
  ],
)
def test_a_text_depends_on_its_prompt_and_seed_alone(size: int):
  """Not on its batch: the lines are those of each prompt alone, in order.

  Some outgrow the 48 positions, so that their windows slide.
  """
  requests = prompts(*LENGTHS)
  found = texts(Batches(writer(), size=size), requests)
  assert [line["id"] for line in found] == list(range(len(LENGTHS)))
  assert [line["text"] for line in found] == [alone(r) for r in requests]
  assert [line["prompt_tokens"] for line in found] == list(LENGTHS)
  assert {line["new_tokens"] for line in found} == {N}


def test_rows_that_slide_stand_among_their_like():
  """With different lengths and numbers of tokens, nothing slides too early."""
  requests = [
    Request(0, "a" * 30, seed=1, n=3),
    Request(1, "b" * 28, seed=2, n=30),
    Request(2, "c" * 5, seed=3, n=40),
    Request(3, "d" * 30, seed=4, n=30),
  ]
  found = texts(Batches(writer(), size=4), requests)
  for line, request in zip(found, requests, strict=True):
    told = writer(seed=request.seed)
    told.n = request.n
    want = "".join(told.pieces(request.prompt)).removeprefix(request.prompt)
    assert line["text"] == want
    assert line["new_tokens"] == request.n


def test_several_samples_and_seeds():
  """Sample i of a prompt is what --num_samples shows as its i-th text."""
  requests = prompts(4, 9)
  found = texts(Batches(writer(), samples=3, size=4), requests)
  assert [(x["id"], x["sample"]) for x in found] == [
    (i, j) for i in range(2) for j in range(3)
  ]
  want = [alone(r, j) for r in requests for j in range(3)]
  assert [x["text"] for x in found] == want
  assert len(set(want)) == 6
  # Without a seed of its own a request has the run's.
  (line,) = texts(Batches(writer(), seed=7), [Request(0, "abc")])
  assert line["text"] == alone(Request(0, "abc", seed=7))
  assert line["seed"] == 7


def test_stop_strings_end_rows():
  """Each row at its own place, and nothing behind it is told or counted."""
  requests = prompts(4, 9, 2)
  full = [alone(r) for r in requests]
  stop = full[0][3:5]
  found = texts(Batches(writer(stops=(stop,))), requests)
  for line, whole in zip(found, full, strict=True):
    assert line["text"] == whole.partition(stop)[0]
    reason = "stop" if stop in whole else "length"
    assert line["finish_reason"] == reason
  assert found[0]["new_tokens"] < N


def test_an_end_token_is_counted_and_not_shown():
  """finish_reason 'stop', though others of the batch go on."""
  request = Request(0, "abc", seed=0)
  ids = TOKENIZER.encode("abc")[None]
  keys = jax.random.fold_in(jax.random.key(0), 0)[None]
  made = np.asarray(jaxlm.generate(MODEL, PARAMS, ids, N, Sample(0.8), keys))[
    0, 3:
  ]
  at = next(i for i in range(2, N) if made[i] not in made[:i])
  told = writer(ends=(int(made[at]),))
  line, other = texts(Batches(told), [request, Request(1, "z", seed=5)])
  assert line["text"] == TOKENIZER.decode(made[:at])
  assert (line["finish_reason"], line["new_tokens"]) == ("stop", at + 1)
  assert other["id"] == 1


def test_log_probabilities():
  """Those of `scored`, for each token that counts."""
  requests = prompts(4, 9)
  found = texts(Batches(writer(), top=2), requests)
  plain = texts(Batches(writer()), requests)
  for line, want, request in zip(found, plain, requests, strict=True):
    assert line["text"] == want["text"]
    new = decode.scored(
      MODEL,
      PARAMS,
      TOKENIZER.encode(request.prompt)[None],
      N,
      Sample(0.8),
      jax.random.fold_in(jax.random.key(request.seed), 0)[None],
      top=2,
    )
    told = line["logprobs"]
    assert [x["id"] for x in told] == new.tokens[0].tolist()
    own = [x["logprob"] for x in told]
    np.testing.assert_allclose(own, new.logprobs[0], atol=2e-5)
    top = [[y["logprob"] for y in x["top"]] for x in told]
    np.testing.assert_allclose(top, new.top_logprobs[0], atol=2e-5)


def test_a_bad_prompt_is_a_line_and_the_others_go_on():
  """Empty, too long, without a template, not to be written."""
  talk = [{"role": "user", "content": "hi"}]
  requests = [
    Request(0, ""),
    Request(1, "x" * 60),
    Request(2, talk),
    Request(3, "fine", seed=0),
  ]
  found = texts(Batches(writer()), requests)
  assert "is empty" in found[0]["error"]
  assert "60 tokens, 12 more than the context of 48" in found[1]["error"]
  assert "--template" in found[2]["error"]
  assert found[2]["messages"] == talk
  assert found[3]["text"] == alone(requests[3])
  wrong = [Request(0, [{"role": "nobody", "content": "a"}]), Request(1, [3])]
  found = texts(Batches(writer(), ChatTemplate(CHATML)), wrong)
  assert "role 'nobody'" in found[0]["error"]
  assert "objects" in found[1]["error"]


def test_messages_are_written_by_the_template():
  """Like a turn of a chat."""
  talk, template = [{"role": "user", "content": "hi"}], ChatTemplate(CHATML)
  (line,) = texts(Batches(writer(), template), [Request(0, talk)])
  ids = encode(template, TOKENIZER, talk)
  assert line["text"] == "".join(writer().following(ids))
  assert line["prompt_tokens"] == len(ids)


def test_long_prompts_are_cut_or_slid():
  """--truncate leaves room for what is new; --slide reads half a context."""
  long = Request(0, "".join(chr(97 + i % 26) for i in range(60)), seed=3)
  (cut,) = texts(Batches(writer(long="truncate")), [long])
  kept = 48 + 1 - N
  assert cut["prompt_tokens"] == kept
  assert cut["text"] == alone(Request(0, long.prompt[-kept:], seed=3))
  (slid,) = texts(Batches(writer(long="slide")), [long])
  assert slid["text"] == alone(Request(0, long.prompt[-24:], seed=3))
  assert slid["prompt_tokens"] == 60


def test_searches_stand_together_only_with_equal_limits():
  """How long a text may be decides which beam wins."""
  method = Beams(Beam(3))
  requests = [Request(i, "ab", n=n) for i, n in enumerate((4, 8, 4))]
  found = texts(Batches(writer(method)), requests)
  assert [x["new_tokens"] for x in found] == [4, 8, 4]
  told = Batches(writer(method))
  plan = told.plan([told.ready(r) for r in requests])
  assert plan == [[0, 2], [1]]


def test_lengths_do_not_compile():
  """A second file with other lengths and numbers of prompts: nothing new.

  Batches are padded up to few sizes, and the last one is filled up.
  """
  batches = Batches(writer(Draw(Greedy())), size=4)
  texts(batches, [Request(i, "q" * (1 + i)) for i in range(30)])
  compiled = []

  def listen(event: str, seconds: float, **more) -> None:
    if event.endswith("backend_compile_duration"):
      compiled.append(more)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    lengths = [29, 3, 17, 17, 4, 25, 11, 22, 13, 1, 8]
    assert len(texts(batches, prompts(*lengths))) == len(lengths)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled == []


# --- Files ------------------------------------------------------------------


def write(path: Path, *lines) -> Path:
  told = [x if isinstance(x, str) else json.dumps(x) for x in lines]
  path.write_text("".join(line + "\n" for line in told), encoding="utf-8")
  return path


def test_files_are_read(tmp_path: Path):
  """JSON lines by their ending; else each line is a prompt."""
  plain = write(tmp_path / "a.txt", "one", "", '{"prompt": "x"}')
  assert [(r.id, r.prompt) for r in batch.read(plain)] == [
    (0, "one"),
    (1, ""),
    (2, '{"prompt": "x"}'),
  ]
  talk = [{"role": "user", "content": "hi"}]
  rich = write(
    tmp_path / "a.jsonl",
    {"prompt": "x\ny", "id": "first", "seed": 3, "max_new_tokens": 5},
    "",
    {"messages": talk},
  )
  assert batch.read(rich) == [
    Request("first", "x\ny", 3, 5),
    Request(2, talk),
  ]


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("{", "line 2 is not JSON"),
    ("[1]", "write an object"),
    ('{"promt": "a"}', "did you mean prompt"),
    ('{"id": 1}', 'give one of the two, "prompt" or "messages"'),
    ('{"prompt": "a", "messages": []}', "give one of the two"),
    ('{"prompt": 3}', "3 is not a str"),
    ('{"messages": "a"}', "'a' is not a list"),
    ('{"prompt": "a", "seed": "x"}', "seed='x'"),
    ('{"prompt": "a", "max_new_tokens": -1}', "max_new_tokens=-1"),
    ('{"prompt": "a", "max_new_tokens": true}', "max_new_tokens=True"),
  ],
)
def test_lines_that_are_no_requests(tmp_path: Path, line: str, words: str):
  """The file is wrong, and says so before anything is made."""
  path = write(tmp_path / "a.jsonl", {"prompt": "ok"}, line)
  with pytest.raises(UserError) as error:
    batch.read(path)
  assert words in str(error.value)
  assert "line 2" in str(error.value)


def test_files_that_are_none(tmp_path: Path):
  """Missing, empty, or no text."""
  with pytest.raises(UserError, match="cannot read the prompts"):
    batch.read(tmp_path / "none.txt")
  with pytest.raises(UserError, match="no prompts in"):
    batch.read(write(tmp_path / "empty.txt"))
  (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
  with pytest.raises(UserError, match="not UTF-8"):
    batch.read(tmp_path / "bad.txt")


def test_an_interrupted_run_is_taken_up(tmp_path: Path):
  """Wherever the file was cut, the resumed one is the whole one."""
  requests = [*prompts(5, 30, 1), Request(3, "é", seed=3), Request(4, "")]
  batches = Batches(writer(), samples=2, size=4)
  whole = tmp_path / "whole.jsonl"
  batch.run(batches, requests, whole)
  data = whole.read_bytes()
  assert data.count(b"\n") == 2 * 4 + 1
  lines = data.splitlines(keepends=True)
  cuts = [0, 3, len(lines[0]), len(data) - 1, len(data)]
  cuts += [sum(map(len, lines[:3])) + 5]
  for cut in cuts:
    part = tmp_path / f"{cut}.jsonl"
    part.write_bytes(data[:cut])
    batch.run(batches, requests, part, resume=True)
    assert part.read_bytes() == data


def test_a_run_writes_as_it_goes(tmp_path: Path, monkeypatch):
  """What was done before Ctrl-C is there, whole lines in order."""
  monkeypatch.setattr(batch, "WINDOW", 1)
  batches, out = Batches(writer(), size=2), tmp_path / "o.jsonl"
  requests = prompts(*LENGTHS)
  count, method = 0, batches.writer.method

  def interrupted(self, asked):
    nonlocal count
    count += 1
    if count == 3:
      raise KeyboardInterrupt
    return call(self, asked)

  call = type(method).__call__
  monkeypatch.setattr(type(method), "__call__", interrupted)
  with pytest.raises(KeyboardInterrupt):
    batch.run(batches, requests, out)
  ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
  assert ids == [0, 1, 2, 3]
  batch.run(batches, requests, out, resume=True)
  ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
  assert ids == list(range(len(LENGTHS)))


def test_other_files_are_not_touched(tmp_path: Path):
  """One that exists, or that holds other texts, stays as it is."""
  batches, requests = Batches(writer()), prompts(3)
  out = write(tmp_path / "o.jsonl", {"id": 0, "prompt": "other", "text": ""})
  before = out.read_bytes()
  with pytest.raises(UserError, match="--resume"):
    batch.run(batches, requests, out)
  with pytest.raises(UserError, match="other texts"):
    batch.run(batches, requests, out, resume=True)
  write(tmp_path / "p.jsonl", "not JSON")
  with pytest.raises(UserError, match="other texts"):
    batch.run(batches, requests, tmp_path / "p.jsonl", resume=True)
  assert out.read_bytes() == before
  with pytest.raises(UserError, match="cannot write"):
    batch.run(batches, requests, tmp_path / "none" / "o.jsonl")


def test_a_bar_where_somebody_looks(capsys, monkeypatch):
  """A line on a terminal's stderr, nothing elsewhere."""
  bar = batch.Bar(4)
  bar.show(2, 100)
  bar.close()
  assert capsys.readouterr().err == ""
  monkeypatch.setattr("sys.stderr.isatty", lambda: True)
  bar = batch.Bar(4)
  bar.show(2, 100)
  bar.close()
  shown = capsys.readouterr().err
  assert "[############............] 2/4 | " in shown
  assert "tokens/s" in shown


def test_as_a_program(tmp_path: Path, capsys):
  """A file in, a file out, figures as JSON."""
  run, out = tmp_path / "run", tmp_path / "o.jsonl"
  jaxlm.save(run, MODEL, PARAMS, TOKENIZER)
  requests = write(tmp_path / "in.jsonl", {"prompt": "abc"}, {"prompt": "d"})
  flags = [f"--workdir={run}", f"--prompts={requests}", "--temperature=0.8"]
  flags += [f"--max_new_tokens={N}"]
  stats = tmp_path / "stats.json"
  main([*flags, f"--out={out}", f"--stats={stats}", "--batch=2"])
  assert capsys.readouterr().out == ""
  found = [json.loads(line) for line in out.read_text().splitlines()]
  want = [alone(Request(0, text, seed=0)) for text in ("abc", "d")]
  assert [line["text"] for line in found] == want
  said = json.loads(stats.read_text())
  assert (said["texts"], said["new_tokens"]) == (2, 2 * N)
  assert said["prefill_tokens"] == 4
  assert said["decode_tokens"] == 2 * N - 2
  # keys and values of 2 rows and 16 positions, 16 numbers each, float32; and
  # the position of each, int32
  assert said["cache_bytes"] == 2 * 16 * (2 * 16 * 4 + 4)
  assert said["time_to_first_token"] > 0
  assert said["peak_host_bytes"] > 1e7
  main(flags)  # to stdout
  assert capsys.readouterr().out == out.read_text()
