"""Conversations with a model: history, ends, and what the terminal shows."""

import jax
import pytest

import jaxlm
from jaxlm.data import Bytes
from jaxlm.data.chat import CHATML, ChatTemplate, encode
from jaxlm.errors import UserError
from jaxlm.generate.__main__ import main
from jaxlm.generate.chat import Chat
from jaxlm.generate.methods import Draw
from jaxlm.generate.samplers import Greedy, make_sampler
from jaxlm.generate.text import Writer
from jaxlm.layers.param import init
from jaxlm.models.families import modern

TOKENIZER = Bytes(("<|im_start|>", "<|im_end|>"))
MODEL = modern.decoder(TOKENIZER.vocab_size, 16, 1, 2, max_positions=256)
PARAMS = init(MODEL.params(), jax.random.key(0))


KEY = jax.random.key(0)


def writer(sampler=Greedy(), ends=()) -> Writer:
  return Writer(MODEL, PARAMS, TOKENIZER, Draw(sampler), 6, KEY, ends=ends)


def test_history_is_read_and_kept():
  """The second answer is what follows both turns, written by the template."""
  template = ChatTemplate(CHATML)
  chat = Chat(writer(), template)
  first = "".join(chat.reply("Hi"))
  second = "".join(chat.reply("And?"))
  roles = [message["role"] for message in chat.messages]
  assert roles == ["user", "assistant"] * 2
  assert chat.messages[1]["content"] == first.strip()
  ids = encode(template, TOKENIZER, chat.messages[:3])
  assert second == "".join(writer().following(ids, 2))


def test_any_of_the_ends_ends_a_turn():
  """Whichever comes first; it is not shown."""
  ids = encode(
    ChatTemplate(CHATML), TOKENIZER, [{"role": "user", "content": ""}]
  )
  sampler, keys = make_sampler(1.0), jax.random.fold_in(KEY, 0)[None]
  made = jaxlm.generate(MODEL, PARAMS, ids[None], 6, sampler, keys)
  tokens = made[0, len(ids) :].tolist()
  at = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
  ended = "".join(writer(sampler, ends=(257, tokens[at])).following(ids))
  assert ended == TOKENIZER.decode(tokens[:at])


def test_a_turn_that_cannot_begin_is_forgotten():
  """A refused one leaves the conversation as it was."""
  chat = Chat(writer(), ChatTemplate("{{ raise_exception('no') }}"))
  with pytest.raises(UserError, match="no"):
    "".join(chat.reply("Hi"))
  assert chat.messages == []


def test_in_the_terminal(tmp_path, capsys, monkeypatch):
  """One turn with --prompt; a run of ours needs a template by name."""
  path = tmp_path / "run"
  jaxlm.save(path, MODEL, PARAMS, TOKENIZER)
  flags = [f"--workdir={path}", "--chat", "--max_new_tokens=6"]
  flags += ["--system=Be brief.", "--prompt=Hi"]
  with pytest.raises(UserError, match="choose one of --template=chatml"):
    main(flags)
  main([*flags, "--template=chatml"])
  talk = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
  ]
  ids = encode(ChatTemplate(CHATML), TOKENIZER, talk)
  want = "".join(writer().following(ids, 1))
  assert capsys.readouterr().out == want + "\n"
