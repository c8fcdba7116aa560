"""Supervised fine-tuning: what is read, what is learned, in which order."""

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm import config as configs
from jaxlm import metrics, program, recipe
from jaxlm.data import EOT, Bytes
from jaxlm.data.chat import CHATML, ChatTemplate
from jaxlm.data.examples import example_batches, join, lay
from jaxlm.data.loader import Shuffle
from jaxlm.data.orders import Competence, Random, ShortToLong
from jaxlm.errors import UserError
from jaxlm.interop import beside
from jaxlm.layers.compute import Compute
from jaxlm.layers.param import init
from jaxlm.models.families import modern
from jaxlm.objectives import sft
from jaxlm.objectives.sft import Responses
from jaxlm.train import train

ROOT = Path(__file__).parent.parent
PAIRS = {"red": "rouge", "dog": "chien", "cat": "chat", "two": "deux"}
TALK = [
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Hello"},
  {"role": "user", "content": "Bye"},
  {"role": "assistant", "content": "Ciao"},
]


def write(path: Path, *records: dict) -> Path:
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def read(path, seq_len=64, tokenizer="bytes", val_fraction=0.0, **options):
  """The corpus that a config would give."""
  conversations = sft(seq_len, **options).data
  return conversations.read(path, tokenizer, 300, val_fraction)


def learned(corpus) -> list[str]:
  """What is learned of each training example."""
  e, texts = corpus.train, []
  for first, last in e.docs:
    ids, trained = e.ids[first : last + 1], e.trained[first : last + 1]
    texts.append(corpus.tokenizer.decode(ids[trained]))
  return texts


# --- Reading ----------------------------------------------------------------


def test_every_form_of_a_record_is_read(tmp_path):
  """Messages under two names, pairs under several."""
  path = write(
    tmp_path / "a.jsonl",
    {"messages": TALK},
    {
      "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Yes"},
      ]
    },
    {"prompt": "1+1=", "response": "2"},
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"question": "1+3=", "answer": "4", "system": "Be brief."},
    {"prompt": TALK[:1], "completion": "5"},
  )
  want = [f"Hello{EOT}Ciao{EOT}", *(f"{x}{EOT}" for x in ("Yes", *"2345"))]
  assert learned(read(path)) == want


def test_parquet_is_read(tmp_path):
  """As the hub stores conversations: lists of structs."""
  pa = pytest.importorskip("pyarrow")
  pytest.importorskip("pyarrow.parquet")
  table = pa.table({"messages": [TALK, TALK[2:]]})
  pa.parquet.write_table(table, tmp_path / "a.parquet")
  want = [f"Hello{EOT}Ciao{EOT}", f"Ciao{EOT}"]
  assert learned(read(tmp_path / "a.parquet")) == want


def test_what_teaches_nothing_is_counted_and_told(tmp_path):
  """Each reason with its number; the others are trained on."""
  path = write(
    tmp_path / "a.jsonl",
    {"prompt": "a", "response": "b"},
    {"prompt": "a", "response": " "},
    {"messages": TALK[:1]},
    {"prompt": "", "response": "b"},
    {"prompt": "a" * 17, "response": "b"},
    {"prompt": "a", "response": "b" * 17},
  )
  corpus = read(path, seq_len=16)
  assert learned(corpus) == [f"b{EOT}"]
  assert corpus.describe().endswith(
    "left out: 1 with an empty response, 1 with no response, 1 with an empty "
    "prompt, 1 with a prompt that fills seq_len=16, 1 with more than "
    "seq_len=16 tokens"
  )


@pytest.mark.parametrize(
  ("records", "options", "words"),
  [
    ([{"prompt": "a", "response": ""}], {}, "1 with an empty response"),
    ([{"prompt": "a" * 99, "response": "b"}], {}, "no example is left"),
    ([{"prompt": "a"}], {}, "line 1: there are no messages, and no response"),
    ([{"messages": [{"role": "me"}]}], {}, "line 1: .* is no message"),
    ([{"prompt": 3, "response": "a"}], {}, "line 1: the prompt 3"),
    ([{"prompt": "a", "response": "b"}], {"tokenizer": Bytes()}, "end-of-text"),
    (
      [{"prompt": "a", "response": "b"}],
      {"tokenizer": Bytes((EOT,)), "template": "chatml"},
      r"special tokens <\|im_start\|>, <\|im_end\|>",
    ),
    ([{"prompt": "a", "response": "b"}], {"template": "chat"}, "chatml"),
    ([{"prompt": "a", "response": "b"}], {"order": "ranom"}, "random"),
  ],
)
def test_bad_input_is_one_sentence(tmp_path, records, options, words):
  """Before anything is computed."""
  path = write(tmp_path / "a.jsonl", *records)
  with pytest.raises(UserError, match=words):
    read(path, **options)


@pytest.mark.parametrize(
  ("path", "words"),
  [
    (None, "needs conversations"),
    ("task:ad", "'add'"),
    ("task:add?levels", "levels=VALUE"),
  ],
)
def test_a_path_that_names_nothing(path, words):
  """A forgotten path is not the default corpus."""
  with pytest.raises(UserError, match=words):
    read(path)


def test_a_task_gives_both_splits():
  """No prompt of the one is in the other."""
  corpus = read("task:add?levels=1-2", examples=50, val_fraction=0.2)
  assert (len(corpus.train), len(corpus.val)) == (50, 10)
  decode = corpus.tokenizer.decode
  assert all("=" in decode(corpus.train.ids[a:b]) for a, b in corpus.train.docs)


def test_a_tokenizer_that_is_made_has_what_the_template_needs(tmp_path):
  """Special tokens of the template, and the template beside it."""
  path = write(tmp_path / "a.jsonl", {"messages": TALK})
  corpus = read(path, tokenizer="chars", template="chatml")
  assert {"<|im_start|>", "<|im_end|>"} <= set(corpus.tokenizer.specials)
  said = beside.said(corpus.tokenizer)
  assert said.template == ChatTemplate(CHATML, "", EOT)
  assert said.ends[0] == corpus.tokenizer.specials["<|im_end|>"]


# --- The loss ---------------------------------------------------------------


def tiny() -> tuple:
  model = modern.decoder(258, 16, 1, 2, max_positions=64)
  return model, init(model.params(), jax.random.key(0))


@functools.cache
def judge() -> Callable:
  """The loss, what it reports, and gradients; compiled once."""
  model, _ = tiny()

  def loss_fn(params, batch):
    return Responses()(model, params, batch, None, Compute())

  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def test_loss_is_the_sum_by_hand(tmp_path):
  """-log p of each token of the response and its end, and of no other."""
  path = write(tmp_path / "a.jsonl", {"prompt": "12+34=", "response": "46"})
  laid = lay(read(path).train, 64)
  model, params = tiny()
  (loss, found), _ = judge()(params, laid.take(np.arange(4)))
  ids = np.array([[*b"12+34=46", 256]], np.int32)
  logits = jax.jit(jaxlm.forward, static_argnums=0)(model, params, ids)
  log_p = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
  want = -sum(log_p[i, ids[0, i + 1]] for i in (5, 6, 7)) / 3
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert float(found["weight"]) == 3


def test_packed_is_as_separate(tmp_path):
  """Loss, gradient and the share that is exact, to 1e-5."""
  records = [{"prompt": k, "response": v} for k, v in PAIRS.items()]
  corpus = read(write(tmp_path / "a.jsonl", *records))
  _, params = tiny()
  results = []
  for packed in (True, False):
    laid = lay(corpus.train, 64, packed)
    (loss, seen), grads = judge()(params, laid.take(np.arange(4)))
    results.append((loss, seen["weight"], seen["exact"], grads))
    assert len(laid) == (1 if packed else 4)
  assert float(results[0][2][1]) == 4
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    *results,
  )


# --- Orders -----------------------------------------------------------------


@given(
  st.lists(st.integers(2, 40), min_size=1, max_size=30),
  st.booleans(),
  st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_example_lies_in_one_row(lengths, packed, graded):
  """With its tokens, its mask and nothing of another, however it is laid."""
  made = [
    (np.arange(n, dtype=np.int32) + 100 * i, np.arange(n) > 0)
    for i, n in enumerate(lengths)
  ]
  laid = lay(join(made), 40, packed, graded)
  batch = laid.take(np.arange(len(laid) + 1))
  found = []
  for row in range(len(laid) + 1):
    for segment in range(1, batch["segments"][row].max() + 1):
      here = batch["segments"][row] == segment
      inputs, targets = batch["inputs"][row][here], batch["targets"][row][here]
      np.testing.assert_array_equal(targets, inputs + 1)
      assert batch["mask"][row][here].all()
      found.append((inputs[0] // 100, len(inputs) + 1))
  assert sorted(found) == list(enumerate(lengths))
  assert batch["mask"].sum() == sum(lengths) - len(lengths)


def batches_of(order, lengths, steps=20, rows=None, size=4, graded=False):
  made = [(np.full(n, n, np.int32), np.ones(n, bool)) for n in lengths]
  laid = lay(join(made), 64, packed=False, graded=graded)
  rows = np.arange(size) if rows is None else rows
  return example_batches(laid, order, size, 0, steps, rows)


def lengths_in(batches, step) -> list[int]:
  return batches[step]["inputs"][:, 0].tolist()


def test_short_to_long_and_competence():
  """An epoch ascends; competence shows the easiest c(t) and in time all."""
  lengths = [*range(2, 42)]
  batches = batches_of(ShortToLong(), lengths)
  epoch = [n for step in range(10) for n in lengths_in(batches, step)]
  assert epoch == lengths
  order = Competence(start=0.1, until=0.5)
  batches = batches_of(order, lengths)
  for step in range(10):
    seen = round(order.at(step / 20) * 40)
    assert max(lengths_in(batches, step)) <= lengths[seen - 1]
  assert order.at(0) == pytest.approx(0.1)
  assert order.at(0.125) == pytest.approx((0.25 * 0.99 + 0.01) ** 0.5)
  late = [n for step in range(10, 20) for n in lengths_in(batches, step)]
  assert sorted(late) == lengths


def test_random_is_an_epoch():
  """Each once, and not in the order that was given."""
  lengths = [*range(2, 42)]
  batches = batches_of(Random(), lengths)
  epoch = [n for step in range(10) for n in lengths_in(batches, step)]
  assert sorted(epoch) == lengths
  assert epoch != lengths


@pytest.mark.parametrize("order", [Random(), ShortToLong(), Competence()])
def test_rows_of_a_batch_are_the_same_on_every_host(order):
  """Two processes make the halves of what one makes, at any step."""
  lengths = [*range(2, 42)]
  one = batches_of(order, lengths)
  halves = [
    batches_of(order, lengths, rows=np.arange(2) + 2 * i) for i in (0, 1)
  ]
  for step in (0, 7, 13, 100):
    parts = [n for half in halves for n in lengths_in(half, step)]
    assert parts == lengths_in(one, step)


def test_equals_take_turns():
  """Examples of one length come in another order in the next epoch."""
  grades, shuffle = np.full(20, 5), Shuffle(0)
  first, second = (
    ShortToLong().pick(grades, np.arange(20) + 20 * e, None, 0.0, shuffle)
    for e in (0, 1)
  )
  assert sorted(first) == sorted(second) == list(range(20))
  assert first.tolist() != second.tolist()


# --- The program ------------------------------------------------------------

KEYS = (
  "steps=60",
  "batch_size=8",
  "seq_len=16",
  "log_every=10",
  "eval_every=30",
  "checkpoint_every=30",
  "model.dim=32",
  "model.layers=1",
  "model.heads=2",
  "optimizer.warmup=2",
  "optimizer.lr=0.03",
  "sample.prompt=dog",
  "sample.tokens=8",
  "sample.temperature=0",
  "log.tensorboard=false",
  "objective.packed=false",
  "data.tokenizer=chars",
)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("words") / "words.jsonl"
  records = [{"prompt": k, "response": v} for k, v in PAIRS.items()]
  return write(path, *records * 2)


def run(words: Path, workdir: Path, *changed: str, keys=KEYS):
  flags = [f"--config={ROOT / 'configs' / 'sft.py'}", f"--workdir={workdir}"]
  flags += [f"--config.{k}" for k in (*keys, f"data.path={words}", *changed)]
  asked = program.load(flags, program.parser("A test."))
  return train(asked.config, asked.workdir)


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return run(words, workdir), workdir


def test_it_learns_to_answer_and_to_stop(whole):
  """Exact in evaluation is exact when generated; the sample ends itself."""
  _, workdir = whole
  seen = [r for r in metrics.read(workdir) if "val_exact" in r]
  assert [r["step"] for r in seen] == [30, 60]
  assert seen[-1]["val_exact"] == 1.0
  samples = (workdir / "samples.txt").read_text()
  assert samples == "--- step 60\ndogchien\n\n"
  model, params = jaxlm.load(workdir)
  tokenizer = jaxlm.load_tokenizer(workdir)
  for prompt, response in PAIRS.items():
    ids = tokenizer.encode(prompt)[None]
    out = jaxlm.generate(model, params, ids, 8, eot=tokenizer.eot)
    said = tokenizer.decode(out[0, ids.shape[1] :])
    assert said.startswith(response + EOT)


def test_an_interrupted_run_continues_to_the_same_bits(
  whole, words, tmp_path, monkeypatch
):
  """Conversations resume like everything else: there is no state."""
  import jaxlm.train as program_under_test

  real, seen = program_under_test._next_event, []

  def interrupting(config, step):
    if step == 40 and not seen:
      seen.append(step)
      os.kill(os.getpid(), signal.SIGTERM)
    return real(config, step)

  monkeypatch.setattr(program_under_test, "_next_event", interrupting)
  with pytest.raises(SystemExit):
    run(words, tmp_path / "run")
  state = run(words, tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, state, whole[0])


def test_a_curriculum_goes_on_from_a_run_of_ours(whole, words, tmp_path):
  """From a checkpoint, packed, with its tokenizer: it begins where that was."""
  of_its_own = ("model", "data.tokenizer", "objective", "steps")
  keys = tuple(k for k in KEYS if not k.startswith(of_its_own))
  changed = ("steps=3", "log_every=1", "objective.order=competence")
  changed += (f"start={whole[1]}", "sample.tokens=0")
  run(words, tmp_path / "run", *changed, keys=keys)
  losses = [r["loss"] for r in metrics.read(tmp_path / "run") if "loss" in r]
  assert losses[0] < 0.1


def test_an_unknown_objective_or_option_is_told():
  """With the nearest there is."""
  with pytest.raises(UserError, match="no objective 'stf'; did you mean"):
    recipe.objective(configs.freeze({"objective.name": "stf"}))
  with pytest.raises(UserError, match=r"objective\.template"):
    recipe.objective(
      configs.freeze({"objective.name": "sft", "objective.templat": "bare"})
    )
  with pytest.raises(UserError, match=r"competence .* 1\.5"):
    recipe.objective(
      configs.freeze(
        {
          "objective.name": "sft",
          "objective.order": "competence",
          "objective.competence": 1.5,
        }
      )
    )
