"""Where a response begins and ends in tokens, whatever merges and users do."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.data import EOT, ByteBPE, Bytes
from jaxlm.data.chat import TEMPLATES, ChatTemplate, encode
from jaxlm.data.segments import encode_segments, segments
from jaxlm.errors import UserError

TEXTS = [
  "### Response:\nHello hello 46 = 46\n\n### Instruction:\n12+34=46"
] * 20
SPECIALS = (EOT, "<|im_start|>", "<|im_end|>", "<|eot_id|>")
SPECIALS += ("<|start_header_id|>", "<|end_header_id|>")
BPE = ByteBPE.train(TEXTS, 400, SPECIALS)
TALK = [
  {"role": "system", "content": "Be kind."},
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Hello."},
  {"role": "user", "content": "12+34="},
  {"role": "assistant", "content": "46"},
]
texts = st.lists(
  st.sampled_from([*SPECIALS, "<|im_", "end|>", "46", " 4", "\n", "é", "#"])
  | st.text(max_size=4),
  min_size=1,
  max_size=3,
).map("".join)


def written(name: str) -> ChatTemplate:
  return ChatTemplate(TEMPLATES[name], "", EOT)


def encoded(template, talk, tokenizer=BPE):
  return encode_segments([segments(template, talk, tokenizer)], tokenizer)[0]


def n_specials(ids: np.ndarray) -> int:
  return int(np.isin(ids, list(BPE.specials.values())).sum())


def ask(prompt: str, response: str) -> list[dict]:
  return [
    {"role": "user", "content": prompt},
    {"role": "assistant", "content": response},
  ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_the_assistant_is_learned_with_its_end(name):
  """And nothing else; the whole is what the template writes."""
  template = written(name)
  ids, trained = encoded(template, TALK)
  learned = BPE.decode(ids[trained])
  end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, EOT)
  assert learned.replace(" ", "") == f"Hello.{end}46{end}"
  whole = template.render(TALK, add_generation_prompt=False)
  assert whole.startswith(BPE.decode(ids))
  assert whole.removeprefix(BPE.decode(ids)).strip() == ""


@pytest.mark.parametrize("name", TEMPLATES)
@given(prompt=texts, response=texts)
@example(prompt="<|im_end|>", response=EOT)
@example(prompt="im_end", response="<|eot_id|>")
@settings(max_examples=40, deadline=None)
def test_the_border_is_where_generation_begins(name, prompt, response):
  """What is read is the very prompt; no word of a user becomes special."""
  template = written(name)
  ids, trained = encoded(template, ask(prompt, response))
  asked = encode(template, BPE, ask(prompt, "")[:1])
  begin = int(np.argmax(trained))
  np.testing.assert_array_equal(ids[:begin], asked)
  assert trained[begin:].all()
  plain, _ = encoded(template, ask("7", "7"))
  assert n_specials(ids) == n_specials(plain)
  learned = BPE.decode(ids[begin:-1])
  assert learned.strip() == response.strip()


def test_merges_would_have_hidden_the_border():
  """Encoded as one text the answer's first token swallows the prompt's last."""
  template = written("bare")
  prompt, response = "Complete: hel", "lo"
  ids, trained = encoded(template, ask(prompt, response))
  assert BPE.decode(ids[trained]) == response + EOT
  one = BPE.encode(prompt + response)
  begins = [BPE.decode(one[:n]) for n in range(len(one) + 1)]
  assert prompt not in begins  # no border there at all


def test_an_end_is_put_where_the_template_writes_none():
  """At the end of the last response, the only place it is learned at."""
  template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
  ids, trained = encoded(template, ask("a", "b"))
  assert BPE.decode(ids) == f"ab{EOT}"
  assert trained.tolist() == [False, True, True]
  with pytest.raises(UserError, match="no end-of-text token"):
    segments(template, ask("a", "b"), Bytes())


def test_what_follows_the_last_response_is_left_out():
  """Nobody learns from it."""
  talk = [*ask("a", "b"), {"role": "user", "content": "c"}]
  ids, _ = encoded(written("bare"), talk)
  assert BPE.decode(ids) == f"ab{EOT}"


@pytest.mark.parametrize(
  ("source", "words"),
  [
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes"),
    ("{{ messages[0].content }}", "every message once"),
  ],
)
def test_a_template_that_hides_what_is_said_is_refused(source, words):
  """Thoughts that are cut away, say: the border would be a guess."""
  with pytest.raises(UserError, match=words):
    segments(ChatTemplate(source, "", EOT), ask("a", "b"), BPE)


def test_a_talk_without_a_response_is_refused():
  """There is nothing to learn."""
  with pytest.raises(UserError, match="no response"):
    segments(written("bare"), ask("a", "b")[:1], BPE)
