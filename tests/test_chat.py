"""Chat templates: the text transformers writes, and no injected tokens."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.data import ByteBPE, Bytes
from jaxlm.data.chat import (
  CHATML,
  LLAMA2,
  LLAMA3,
  TEMPLATES,
  ChatTemplate,
  encode,
  turn_ends,
)
from jaxlm.errors import UserError

SPECIALS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "#")
TOKENIZER = Bytes(SPECIALS)
TALK = [
  {"role": "system", "content": "Be kind."},
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Hello."},
  {"role": "user", "content": "Who?"},
]
# Wraps contents in halves of names, looks for a name, cuts and joins contents.
NASTY = """\
{% for m in messages %}{{ '<|' ~ m.content ~ '|>' }}{{ '<' ~ m.content }}
{{- m.content ~ 'im_end|>' }}{{ m.content | replace('</think>', '') }}
{{- m.content.split('x') | join }}{{ m.content | trim ~ m.content }}
{% endfor %}"""

pieces = st.lists(
  st.sampled_from(
    [*SPECIALS, "<|", "|>", "im_end", "im_end|>", "<|im_", "end|>", "</think>"]
    + ["<", ">", "|", "s", "[", "]", "x", " ", "\n", "INST", "\U000f0000"]
  )
  | st.text(max_size=3)
).map("".join)


def specials_in(ids: np.ndarray) -> list[int]:
  return [int(i) for i in ids if i >= 256]


# --- What is written --------------------------------------------------------


def test_chatml():
  """The format as OpenAI described it, turn by turn."""
  assert ChatTemplate(CHATML).render(TALK) == (
    "<|im_start|>system\nBe kind.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nWho?<|im_end|>\n"
    "<|im_start|>assistant\n"
  )


def test_llama2():
  """The format of Meta's repository: the system's words in the first turn."""
  assert ChatTemplate(LLAMA2, "<s>", "</s>").render(TALK) == (
    "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello. </s>"
    "<s>[INST] Who? [/INST]"
  )


def test_llama3():
  """Headers on both sides of the role; contents are stripped."""
  text = ChatTemplate(LLAMA3, "<|begin_of_text|>").render(
    [{"role": "user", "content": " Hi\n"}], add_generation_prompt=False
  )
  assert text == (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
  )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_goes_on_where_it_stopped(name):
  """What was said stays a prefix of what is said next."""
  template = ChatTemplate(TEMPLATES[name], "<s>", "</s>")
  before = template.render(TALK[:2])
  answered = template.render(TALK[:3], add_generation_prompt=False)
  assert answered.startswith(before.rstrip())


def test_environment():
  """What published templates use: tojson, loop controls, dates, refusals."""
  template = ChatTemplate(
    "{% for m in messages %}\n{% if loop.index > 1 %}{% break %}{% endif %}\n"
    "{{ m | tojson }}{% endfor %}{{ tools[0] | tojson(indent=1) }}"
    "{{ strftime_now('%Y') | length }}"
  )
  text = template.render(TALK, tools=[{"é": "<"}])
  assert text == json.dumps(TALK[0]) + '{\n "é": "<"\n}4'


# --- What is encoded --------------------------------------------------------


def test_tokens_of_harmless_text_are_those_of_the_text():
  """As if the rendered text were encoded with all its special tokens."""
  template = ChatTemplate(CHATML)
  want = TOKENIZER.encode(template.render(TALK), allow_special=True)
  np.testing.assert_array_equal(encode(template, TOKENIZER, TALK), want)


@pytest.mark.parametrize("source", [*TEMPLATES.values(), NASTY])
@given(texts=st.lists(pieces, min_size=1, max_size=4))
@example(texts=["im_end"])
@example(texts=["<|im_", "end|>"])
@example(texts=["<|im_</think>end|>"])
@example(texts=["<|im_xend|>"])
@example(texts=["<|im_end|>", "#", "\U000f0000\U000f0001"])
@settings(max_examples=60, deadline=None)
def test_no_content_becomes_a_special_token(source, texts):
  """Special ids are those of the same talk with harmless words; text stays."""
  template = ChatTemplate(source, "<s>", "</s>")
  roles = ["user", "assistant"] * 2
  talk = [
    {"role": role, "content": text}
    for role, text in zip(roles, texts, strict=False)
  ]
  harmless = [message | {"content": "7"} for message in talk]
  ids = encode(template, TOKENIZER, talk)
  want = encode(template, TOKENIZER, harmless)
  assert specials_in(ids) == specials_in(want)
  assert TOKENIZER.decode(ids) == template.render(talk)


def test_other_strings_are_guarded_too():
  """Arguments of calls and documents come from outside as well."""
  template = ChatTemplate("{{ messages | tojson }}{{ files | tojson }}")
  talk = [{"role": "tool", "content": [{"type": "text", "text": "<s>"}]}]
  ids = encode(template, TOKENIZER, talk, files={"</s>": ["[INST]", 1, None]})
  assert specials_in(ids) == []
  text = template.render(talk, files={"</s>": ["[INST]", 1, None]})
  assert TOKENIZER.decode(ids) == text


def test_templates_still_find_what_they_look_for():
  """Thoughts are cut out although "<" could begin a special token."""
  template = ChatTemplate(
    "{% for m in messages %}<s>{{ m.content.split('</think>')[-1] }}"
    "{% endfor %}"
  )
  talk = [{"role": "assistant", "content": "<think>1<s></think>2</s>"}]
  ids = encode(template, TOKENIZER, talk)
  assert TOKENIZER.decode(ids) == "<s>2</s>"
  assert specials_in(ids) == [TOKENIZER.specials["<s>"]]


def test_with_merges():
  """Text parts are encoded whole, so merges cross from template to content."""
  texts = ["user\nhello", "<|im_end|> hello user\n"] * 20
  tokenizer = ByteBPE.train(texts, 300, SPECIALS[:2])
  template = ChatTemplate(CHATML)
  talk = [{"role": "user", "content": "hello"}]
  want = tokenizer.encode(template.render(talk), allow_special=True)
  np.testing.assert_array_equal(encode(template, tokenizer, talk), want)
  talk[0]["content"] = "<|im_end|>"
  assert list(encode(template, tokenizer, talk)).count(1) == 1


def test_turn_ends():
  """The tokens that are known to end a turn, of those there are."""
  assert turn_ends(TOKENIZER) == [257]
  assert turn_ends(Bytes()) == []


# --- Bad input --------------------------------------------------------------


@pytest.mark.parametrize(
  ("messages", "source", "message"),
  [
    ([], CHATML, "conversation is empty"),
    ([{"role": "im_end", "content": ""}], CHATML, "role 'im_end'"),
    ([{"content": "x"}], CHATML, "role None"),
    ([{"role": "user"}], CHATML, "message 0 has no content"),
    (TALK, "{% for %}", "faulty in line 1"),
    (TALK, "{{ raise_exception('no system') }}", "refuses .* no system"),
    (TALK, "{{ messages.append(1) }}", "refuses this conversation"),
    (TALK, "{{ messages.__class__.__mro__ }}", "refuses this conversation"),
  ],
)
def test_bad_input(messages, source, message):
  """One sentence each; a template can neither change nor reach anything."""
  template = ChatTemplate(source)
  with pytest.raises(UserError, match=message):
    template.render(messages)
  with pytest.raises(UserError, match=message):
    encode(template, TOKENIZER, messages)
